"""Whatever holds columns (dict, frame, arrays, tensors, lists), turned into named numpy arrays or a named error."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from ..errors import BadDataError

# torch can hold these but hardly compute with them; the next signed width keeps every value.
_WIDER = {"uint16": np.int32, "uint32": np.int64}


def is_frame(x: Any) -> bool:
    """Whether ``x`` is a pandas DataFrame (or looks like one), asked without importing pandas."""
    return hasattr(x, "columns") and hasattr(x, "iloc")


def as_column(name: str, values: Any) -> np.ndarray:
    """One column as a numeric numpy array.

    Args:
        name: what the column is called, for the error.
        values: array, tensor, pandas Series or list: [N], or [N, L] for sequences and vectors.

    Returns:
        Array [N] or [N, L] of a numeric or boolean dtype; shares memory with ``values`` where it can.

    Raises:
        BadDataError: for text, dates, missing values in integer columns, ragged lists and other shapes.
    """
    if isinstance(values, torch.Tensor):
        values = values.detach().cpu()
        array = values.float().numpy() if values.dtype == torch.bfloat16 else values.numpy()
    elif isinstance(values, np.ndarray):
        array = values
    else:
        try:
            array = np.asarray(values)
        except ValueError as error:
            raise _ragged(name) from error
    if array.dtype == object:
        array = _from_objects(name, array)
    kind = array.dtype.kind
    if kind in "US":
        raise _text(name, 0, array.flat[0] if array.size else "")
    if kind not in "iufb":
        raise BadDataError(f"column '{name}' holds {array.dtype} values; turn them into numbers (ids or floats) first.")
    if array.ndim not in (1, 2):
        raise BadDataError(f"column '{name}' has shape {array.shape}; a column is [rows] or [rows, length].")
    if array.dtype == np.uint64:
        if array.size and int(array.max()) > np.iinfo(np.int64).max:
            row = int(np.argmax(array.reshape(len(array), -1).max(axis=1)))
            raise BadDataError(f"column '{name}' holds {array.max()} in row {row}, more than a 64-bit id can be.")
        array = array.astype(np.int64)
    array = array.astype(_WIDER.get(array.dtype.name, array.dtype.newbyteorder("=")), copy=False)
    # torch has no negative strides.
    return array if min(array.strides) >= 0 else np.ascontiguousarray(array)


def to_tensor(array: np.ndarray) -> torch.Tensor:
    """The array as a tensor on the same memory, read-only or not: our loaders read it and never write."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*not writable.*", category=UserWarning)
        return torch.from_numpy(array)


def as_columns(x: Any) -> dict[str, np.ndarray]:
    """Every column of a dict or frame as a numeric numpy array, all of one length.

    Args:
        x: mapping name -> column, or a pandas DataFrame.

    Returns:
        dict name -> array [N] or [N, L], in the order given.

    Raises:
        BadDataError: when there is no column, no row, or the columns differ in length.
    """
    if is_frame(x):
        x = {str(name): x[name].to_numpy() for name in x.columns}
    if not isinstance(x, Mapping):
        raise BadDataError(
            f"the features are a {type(x).__name__}; give a dict of columns (name -> array) or a pandas DataFrame."
        )
    if not x:
        raise BadDataError("the features have no column; give at least one (name -> array).")
    columns = {str(name): as_column(str(name), values) for name, values in x.items()}
    first, n_rows = next((name, len(column)) for name, column in columns.items())
    for name, column in columns.items():
        if len(column) != n_rows:
            raise BadDataError(
                f"columns differ in length: '{first}' has {n_rows} rows and '{name}' has {len(column)}; "
                "every column needs one value per row."
            )
    if n_rows == 0:
        raise BadDataError(f"the data set is empty: its columns ({_some(columns)}) have no row.")
    return columns


def as_labels(y: Any, n_rows: int) -> tuple[np.ndarray, tuple[str, ...]]:
    """Labels as one array with a name for each task.

    Args:
        y: array [N, T] or [N], a frame, a Series, a dict or a list of T columns.
        n_rows: the N of the features.

    Returns:
        (array [N, T] in its own dtype, T names): names come from the columns, else task_0, task_1 and so on.

    Raises:
        BadDataError: for another number of rows, no task, or values that are no numbers.
    """
    names: tuple[str, ...] | None = None
    if is_frame(y):
        y = {str(name): y[name].to_numpy() for name in y.columns}
    if isinstance(y, Mapping):
        columns = {str(name): as_column(str(name), values) for name, values in y.items()}
        for name, column in columns.items():
            if len(column) != n_rows:
                raise BadDataError(_rows_differ(f"label '{name}'", len(column), n_rows))
        names = tuple(columns)
        array = np.stack([c.reshape(n_rows) for c in columns.values()], axis=1) if columns else np.empty((n_rows, 0))
    else:
        series_name = getattr(y, "name", None)
        array = as_column("labels", y)
        if array.ndim == 1:
            names = (series_name,) if isinstance(series_name, str) else None
            array = array[:, None]
        elif isinstance(y, (list, tuple)) and len(array) != n_rows and array.shape[1] == n_rows:
            array = np.ascontiguousarray(array.T)
        if len(array) != n_rows:
            raise BadDataError(_rows_differ("the labels", len(array), n_rows))
    if array.shape[1] == 0:
        raise BadDataError("the labels have no column; give one column per task.")
    return array, names or tuple(f"task_{i}" for i in range(array.shape[1]))


def _from_objects(name: str, array: np.ndarray) -> np.ndarray:
    """A numeric array out of Python objects, or the error that names the first row that is no number."""
    values = array.tolist()
    try:
        numbers = np.array([v.tolist() if isinstance(v, np.ndarray) else v for v in values])
    except ValueError as error:
        raise _ragged(name) from error
    if numbers.dtype.kind in "iufb":
        return numbers
    for row, value in enumerate(values):
        if isinstance(value, str):
            raise _text(name, row, value)
        if value is None or type(value).__name__ == "NAType":
            raise BadDataError(
                f"column '{name}' has no value in row {row}; fill missing values first (with an id of their own)."
            )
        if not isinstance(value, (int, float, np.number, np.bool_)):
            raise BadDataError(f"column '{name}' holds {value!r} in row {row}, which is no number.")
    raise BadDataError(f"column '{name}' mixes values that do not fit one numeric type; convert it first.")


def _text(name: str, row: int, value: object) -> BadDataError:
    return BadDataError(
        f"column '{name}' holds text ({str(value)!r} in row {row}) and a model reads numbers: leave the column out, "
        "or encode it first, for example with fastmtl.data.Encoder."
    )


def _ragged(name: str) -> BadDataError:
    return BadDataError(
        f"column '{name}' holds lists of different lengths; bring them to one length with "
        "fastmtl.utils.data.pad_sequences."
    )


def _rows_differ(what: str, got: int, n_rows: int) -> str:
    return f"{what} have {got} rows and the features {n_rows}; every row needs its label (NaN where it is unknown)."


def _some(names: Mapping[str, object], limit: int = 5) -> str:
    shown = ", ".join(f"'{name}'" for name in list(names)[:limit])
    return shown if len(names) <= limit else f"{shown} and {len(names) - limit} more"
