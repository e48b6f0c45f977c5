"""From frames and arrays to loaders, under torch-rechub's names."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from itertools import chain
from typing import Any

import numpy as np
import torch
from torch.utils.data import Subset

from ..basic.features import get_auto_embedding_dim
from ..basic.loss_func import get_loss_func
from ..basic.metric import get_metric_func
from ..data.datasets import PredictDataset, TorchDataset
from ..data.loader import ColumnLoader
from ..errors import BadDataError, ConfigError

__all__ = [
    "DataGenerator",
    "PredictDataset",
    "TorchDataset",
    "df_to_dict",
    "get_auto_embedding_dim",
    "get_loss_func",
    "get_metric_func",
    "pad_sequences",
]

_log = logging.getLogger(__name__)


class DataGenerator:
    """Loaders for training, validation and test rows.

    Args:
        x: name -> column ([N], or [N, L]), or a DataFrame.
        y: labels [N, T] or [N], or a frame, dict or list of T columns, whose names become the tasks' names.
    """

    def __init__(self, x: Any, y: Any) -> None:
        self.dataset = TorchDataset(x, y)
        self.length = len(self.dataset)

    def generate_dataloader(
        self,
        x_val: Any = None,
        y_val: Any = None,
        x_test: Any = None,
        y_test: Any = None,
        split_ratio: Sequence[float] | None = None,
        batch_size: int = 16,
        num_workers: int = 0,
    ) -> tuple[ColumnLoader, ColumnLoader | None, ColumnLoader | None]:
        """Make the three loaders; only the first shuffles.

        The vocabularies in their schemas cover all the rows given here, so that a model built from column names has a
        row for each id that it will meet.

        Args:
            x_val: validation features, as ``x``.
            y_val: validation labels, as ``y``.
            x_test: test features, as ``x``.
            y_test: test labels, as ``y``; without them the test loader yields features only.
            split_ratio: (train, validation) shares of the rows of ``x``, the test rows being the rest; instead of the
                four arguments above.
            batch_size: rows in a batch.
            num_workers: accepted for torch's sake, see ``ColumnLoader``.

        Returns:
            (train, validation, test) loaders; None for a set that was not given.

        Raises:
            BadDataError: for columns that do not fit one another, or a training share without a row.
            ConfigError: for shares that are no shares, or given beside ``x_val`` or ``x_test``.
        """
        if split_ratio is not None:
            if any(part is not None for part in (x_val, y_val, x_test, y_test)):
                raise ConfigError(
                    "split_ratio and x_val, y_val, x_test, y_test exclude each other; give one or the other."
                )
            train, val, test = self._split(split_ratio)
            return (
                ColumnLoader(train, batch_size, shuffle=True, num_workers=num_workers),
                ColumnLoader(val, batch_size, num_workers=num_workers),
                ColumnLoader(test, batch_size, num_workers=num_workers),
            )
        others = [_dataset(x_val, y_val, "val"), _dataset(x_test, y_test, "test")]
        schema = self.dataset.schema
        for other in others:
            schema = schema if other is None else schema.merge(other.schema)
        val_loader, test_loader = (
            None
            if other is None
            else ColumnLoader(other, batch_size, num_workers=num_workers, schema=other.schema.merge(schema))
            for other in others
        )
        train_loader = ColumnLoader(self.dataset, batch_size, shuffle=True, num_workers=num_workers, schema=schema)
        return train_loader, val_loader, test_loader

    def _split(self, ratio: Sequence[float]) -> list[Subset]:
        """Random parts of the rows, the same as torch's random_split gives, with their row numbers kept as arrays."""
        if len(ratio) not in (2, 3) or min(ratio) < 0 or sum(ratio) > 1 + 1e-9:
            raise ConfigError(f"split_ratio is {ratio!r}; give (train, validation) shares such as (0.7, 0.1).")
        n_train, n_val = int(self.length * ratio[0]), int(self.length * ratio[1])
        sizes = [n_train, n_val, self.length - n_train - n_val]
        _log.info("rows: %d train, %d validation, %d test", *sizes)
        # Tensors of row numbers instead of torch's lists: an object for each row is dear where there are many.
        rows = torch.randperm(self.length).split(sizes)
        return [Subset(self.dataset, part) for part in rows]


def _dataset(x: Any, y: Any, name: str) -> PredictDataset | None:
    if x is None:
        if y is not None:
            raise BadDataError(f"y_{name} is given without x_{name}; give the features of these rows too.")
        return None
    return PredictDataset(x) if y is None else TorchDataset(x, y)


def df_to_dict(data: Any) -> dict[Any, np.ndarray]:
    """The columns of a frame as arrays, in 64-bit types.

    Args:
        data: pandas DataFrame of N rows.

    Returns:
        dict name -> array [N] (or [N, L] for a column of equally long lists).
    """
    wide = {"i": np.int64, "f": np.float64, "b": np.bool_}
    columns = {}
    for name in data.columns:
        column = data[name]
        kind = getattr(column.dtype, "kind", "O")
        simple = isinstance(column.dtype, np.dtype) and kind in wide
        columns[name] = column.to_numpy(wide[kind], copy=True) if simple else np.array(column.tolist())
    return columns


def pad_sequences(
    sequences: Sequence[Sequence[float]],
    maxlen: int | None = None,
    dtype: str = "int32",
    padding: str = "pre",
    truncating: str = "pre",
    value: float = 0.0,
) -> np.ndarray:
    """Bring lists to one length.

    Args:
        sequences: N lists or arrays of numbers.
        maxlen: L; the longest list's length when None.
        dtype: dtype of the result.
        padding: where the filling goes, "pre" or "post".
        truncating: where longer lists are cut, "pre" or "post".
        value: the filling.

    Returns:
        Array [N, L].

    Raises:
        BadDataError: for a number that ``dtype`` cannot hold.
        ConfigError: for another ``padding`` or ``truncating``.
    """
    for option, given in (("padding", padding), ("truncating", truncating)):
        if given not in ("pre", "post"):
            raise ConfigError(f"{option} is {given!r}; it is 'pre' or 'post'.")
    lengths = np.fromiter((len(sequence) for sequence in sequences), np.int64)
    longest = int(lengths.max(initial=0))
    maxlen = longest if maxlen is None else maxlen
    out = np.full((len(lengths), maxlen), value, dtype=dtype)
    flat = np.array(list(chain.from_iterable(sequences)))
    if flat.size == 0 or maxlen == 0:
        return out
    _check_range(flat, lengths, out.dtype)
    kept = np.minimum(lengths, maxlen)[:, None]
    if longest > maxlen:
        place = np.arange(len(flat)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
        first = np.repeat(lengths - kept[:, 0], lengths) if truncating == "pre" else 0
        flat = flat[(place >= first) & (place < first + maxlen)]
    column = np.arange(maxlen)
    out[column >= maxlen - kept if padding == "pre" else column < kept] = flat
    return out


def _check_range(flat: np.ndarray, lengths: np.ndarray, dtype: np.dtype) -> None:
    """Refuse numbers that would wrap around in the integer dtype asked for."""
    if dtype.kind not in "iu":
        return
    limits = np.iinfo(dtype)
    bad = ~((flat >= limits.min) & (flat <= limits.max))
    if bad.any():
        at = int(bad.argmax())
        row = int(np.searchsorted(np.cumsum(lengths), at, side="right"))
        raise BadDataError(
            f"sequence {row} holds {flat[at]}, which {dtype} cannot hold; give a wider dtype such as 'int64'."
        )
