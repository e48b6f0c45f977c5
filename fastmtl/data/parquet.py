"""Parquet files as a stream of whole batches, for logs that do not fit in memory."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info

from ..errors import BadDataError, ConfigError, require
from .columns import to_tensor
from .schema import ColumnInfo, Schema
from .table import FIRST_ROW, check_names, open_parquet

Batch = dict[str, Tensor] | tuple[dict[str, Tensor], Tensor]

#: Rows decoded at a time: large enough for speed, small enough to hold for any number of columns.
_DECODE_ROWS = 65_536
#: What fills the end of a shorter list; models take it as "nothing".
_PADDING = -1


class ParquetIterableDataset(IterableDataset):
    """Batches of rows from Parquet files, in the files' order.

    Integers stay 64-bit integers, so that ids above 2^24 are exact; other numbers become float32. Lists of one length
    are [B, L]; lists of integers of different lengths are filled up with -1 to the longest of the batch. With n loader
    workers each reads an equal share of all rows, whatever the files and row groups, and every row is read once. Give
    it to ``torch.utils.data.DataLoader(dataset, batch_size=None, num_workers=n)``, or iterate over it.

    Args:
        file_paths: the files, all with the columns read.
        columns: feature columns to read; None reads all but the labels.
        batch_size: rows in a batch; the last one of each worker may be shorter.
        labels: label columns, one a task; a missing value (null) is NaN, "unknown".

    Yields:
        dict column -> tensor [B] or [B, L]; with ``labels``, (that dict, labels [B, T] float32).

    Raises:
        BadDataError: for a file that cannot be read, a missing column, texts, a missing or infinite feature value; the
            message names file, column and row.
        ConfigError: for no file, or a batch size below 1.
        MissingExtraError: without pyarrow.
    """

    #: It draws no random numbers, and may be read by another thread than the one that began to (see ahead.py).
    draws_at_once = True

    def __init__(
        self,
        file_paths: Sequence[str | os.PathLike[str]] | str | os.PathLike[str],
        /,
        columns: Sequence[str] | None = None,
        batch_size: int = 1024,
        *,
        labels: Sequence[str] | None = None,
    ) -> None:
        super().__init__()
        if isinstance(file_paths, (str, os.PathLike)):
            file_paths = [file_paths]
        self._paths = tuple(str(path) for path in file_paths)
        if not self._paths:
            raise ConfigError("no Parquet file is given; give at least one path.")
        if batch_size < 1:
            raise ConfigError(f"batch_size is {batch_size}; give a whole number of rows, at least 1.")
        self._batch_size = int(batch_size)
        self._labels = () if labels is None else tuple(labels)
        self._columns: tuple[str, ...] = ()
        # Rows of each row group of each file: what is shared out among workers.
        self._group_rows: list[list[int]] = []
        for place, path in enumerate(self._paths):
            file = open_parquet(path)
            names = file.schema_arrow.names
            if place == 0:
                chosen = [name for name in names if name not in self._labels] if columns is None else columns
                self._columns = tuple(check_names(path, names, list(chosen)))
            check_names(path, names, [*self._columns, *self._labels])
            for name in (*self._columns, *self._labels):
                _check_type(path, file.schema_arrow.field(name), name in self._labels)
            self._group_rows.append([file.metadata.row_group(g).num_rows for g in range(file.num_row_groups)])
        self.n_rows = sum(map(sum, self._group_rows))
        if self.n_rows == 0:
            raise BadDataError(
                f"{', '.join(self._paths)}: no row in {'it' if len(self._paths) == 1 else 'any of them'}."
            )

    @property
    def task_names(self) -> list[str]:
        """The label columns."""
        return list(self._labels)

    @property
    def schema(self) -> Schema:
        """Names, kinds and ranges of the columns; reads every row once, the first time."""
        if not hasattr(self, "_schema"):
            self._schema = Schema(tuple(self._scan()), self._labels)
        return self._schema

    def __iter__(self) -> Iterator[Batch]:
        worker = get_worker_info()
        part, parts = (0, 1) if worker is None else (worker.id, worker.num_workers)
        start, stop = part * self.n_rows // parts, (part + 1) * self.n_rows // parts
        for table in _rebatched(self._pieces(start, stop), self._batch_size):
            x = {name: to_tensor(_to_numpy(table[name])) for name in self._columns}
            if not self._labels:
                yield x
            else:
                labels = [_to_numpy(table[name]).astype(np.float32) for name in self._labels]
                yield x, torch.from_numpy(np.stack(labels, axis=1))

    def _pieces(self, start: int, stop: int) -> Iterator[Any]:
        """Checked record batches of rows start to stop - 1, counted over all files."""
        first = 0
        for path, group_rows in zip(self._paths, self._group_rows, strict=True):
            file, in_file = None, 0
            for group, n_rows in enumerate(group_rows):
                low, high = max(start - first, 0), min(stop - first, n_rows)
                if low < high:
                    file = open_parquet(path) if file is None else file
                    yield from self._pieces_of_group(file, path, group, low, high, in_file)
                first, in_file = first + n_rows, in_file + n_rows

    def _pieces_of_group(self, file: Any, path: str, group: int, low: int, high: int, in_file: int) -> Iterator[Any]:
        pa = require("pyarrow", "parquet", "Reading Parquet files")
        names = [*self._columns, *self._labels]
        done = 0
        batches = file.iter_batches(_DECODE_ROWS, row_groups=[group], columns=names)
        while True:
            try:
                piece = next(batches, None)
            except (pa.ArrowException, OSError) as error:
                row = in_file + done + FIRST_ROW
                raise BadDataError(
                    f"{path}: cannot be read from row {row} on ({error}); the file may be damaged."
                ) from error
            if piece is None or done >= high:
                return
            a, b = max(low - done, 0), min(high - done, piece.num_rows)
            if a < b:
                wanted = piece.slice(a, b - a).select(names)
                yield self._normalised(wanted, path, in_file + done + a + FIRST_ROW)
            done += piece.num_rows

    def _normalised(self, piece: Any, path: str, first_row: int) -> Any:
        """The piece with the types that a model reads, once its values are known to be usable."""
        pa = require("pyarrow", "parquet", "Reading Parquet files")
        arrays = []
        for name, array in zip(piece.schema.names, piece.columns, strict=True):
            is_label = name in self._labels
            array = _plain(pa, array, path, name, first_row, is_label)
            if not is_label:
                _check_values(pa, array, path, name, first_row)
            arrays.append(array)
        return pa.RecordBatch.from_arrays(arrays, piece.schema.names)

    def _scan(self) -> Iterator[ColumnInfo]:
        pa = require("pyarrow", "parquet", "Reading Parquet files")
        compute = require("pyarrow.compute", "parquet", "Reading Parquet files")
        ranges: dict[str, tuple[int, int]] = {}
        lengths: dict[str, int] = {}
        kinds: dict[str, str] = {}
        for piece in self._pieces(0, self.n_rows):
            for name in self._columns:
                values, is_list = piece.column(name), pa.types.is_large_list(piece.column(name).type)
                if is_list:
                    lengths[name] = max(
                        lengths.get(name, 1), compute.max(compute.list_value_length(values)).as_py() or 0
                    )
                    values = values.flatten()
                if pa.types.is_floating(values.type):
                    kinds[name] = "vector" if is_list else "float"
                    continue
                kinds[name] = "sequence" if is_list else "int"
                if len(values):
                    limits = compute.min_max(values).as_py()
                    low, high = ranges.get(name, (limits["min"], limits["max"]))
                    ranges[name] = (min(low, limits["min"]), max(high, limits["max"]))
        for name in self._columns:
            low, high = ranges.get(name, (0, 0)) if kinds[name] in ("int", "sequence") else (None, None)
            yield ColumnInfo(name, kinds[name], low, high, lengths.get(name))


def _rebatched(pieces: Iterator[Any], size: int) -> Iterator[Any]:
    """Tables of ``size`` rows cut from record batches of any size, without copying; the last one may be shorter."""
    pa = require("pyarrow", "parquet", "Reading Parquet files")
    held: list[Any] = []
    n_held = 0
    for piece in pieces:
        at = 0
        while at < piece.num_rows:
            take = min(size - n_held, piece.num_rows - at)
            held.append(piece.slice(at, take))
            at, n_held = at + take, n_held + take
            if n_held == size:
                yield pa.Table.from_batches(held)
                held, n_held = [], 0
    if held:
        yield pa.Table.from_batches(held)


def _check_type(path: str, field: Any, is_label: bool) -> None:
    """Refuse, before any row is read, a column that cannot become numbers."""
    types = require("pyarrow.types", "parquet", "Reading Parquet files")
    kind = field.type
    if types.is_dictionary(kind):
        kind = kind.value_type
    is_list = types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind)
    value = kind.value_type if is_list else kind
    numeric = types.is_integer(value) or types.is_floating(value) or types.is_boolean(value) or types.is_decimal(value)
    if not (numeric or types.is_null(value)) or (is_list and is_label):
        raise BadDataError(
            f"{path}: column '{field.name}' holds {field.type}, which is no number; leave it out with columns=[...], "
            "or encode it first."
        )


def _plain(pa: Any, array: Any, path: str, name: str, first_row: int, is_label: bool) -> Any:
    """An arrow array as int64, float32 or a large list of these; labels always as numbers with NaN for null."""
    types = pa.types
    if types.is_dictionary(array.type):
        array = array.dictionary_decode()
    is_list = types.is_list(array.type) or types.is_fixed_size_list(array.type) or types.is_large_list(array.type)
    value = array.type.value_type if is_list else array.type
    whole = types.is_integer(value) or types.is_boolean(value)
    target = pa.int64() if whole and not is_label else pa.float32()
    if types.is_decimal(value):
        array = array.cast(pa.float64())
    try:
        # Safe for integers (one above 2^63 is refused), rounding for floats (that is what float32 means).
        return array.cast(pa.large_list(target) if is_list else target, safe=target == pa.int64())
    except pa.ArrowInvalid as error:
        last = first_row + len(array) - 1
        raise BadDataError(
            f"{path}: column '{name}', rows {first_row} to {last}, holds a number that no 64-bit id can be ({error})."
        ) from error


def _check_values(pa: Any, array: Any, path: str, name: str, first_row: int) -> None:
    """Refuse a missing or infinite feature value, naming its row."""
    row = None
    if array.null_count:
        row = int(np.argmax(array.is_null().to_numpy(zero_copy_only=False)))
    elif pa.types.is_large_list(array.type):
        inner = array.flatten()
        at = _first_bad(pa, inner)
        if at is not None:
            ends = array.offsets.to_numpy()[1:] - array.offsets.to_numpy()[0]
            row = int(np.searchsorted(ends, at, side="right"))
    else:
        row = _first_bad(pa, array)
    if row is not None:
        raise BadDataError(
            f"{path}: column '{name}' has no usable value in row {first_row + row} (missing, NaN or infinite); "
            "fill it, or drop the row, before training."
        )


def _first_bad(pa: Any, array: Any) -> int | None:
    if array.null_count:
        return int(np.argmax(array.is_null().to_numpy(zero_copy_only=False)))
    if pa.types.is_floating(array.type):
        bad = ~np.isfinite(array.to_numpy(zero_copy_only=False))
        return int(bad.argmax()) if bad.any() else None
    return None


def _to_numpy(column: Any) -> np.ndarray:
    """A column of one batch: [B], or [B, L] with lists filled up to the longest."""
    array = column.combine_chunks()
    if not hasattr(array, "offsets"):
        return array.to_numpy(zero_copy_only=False)
    offsets, values = array.offsets.to_numpy(), array.flatten().to_numpy(zero_copy_only=False)
    lengths = np.diff(offsets)
    longest = max(int(lengths.max()), 1)
    if (lengths == longest).all():
        return values.reshape(len(lengths), longest)
    if values.dtype.kind == "f":
        raise BadDataError(
            f"a column of number lists has lengths from {lengths.min()} to {longest} in one batch; "
            "a dense vector has one length: write lists of one length, or ids as integers."
        )
    padded = np.full((len(lengths), longest), _PADDING, dtype=values.dtype)
    padded[np.arange(longest) < lengths[:, None]] = values
    return padded
