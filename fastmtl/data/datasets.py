"""Data sets held as columns: whole batches for our loader, single rows for a plain torch DataLoader."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from ..backends import native
from ..basic.batch import ColumnBatch, Layout
from ..errors import BadDataError
from .columns import as_columns, as_labels, to_tensor
from .schema import Schema


class PredictDataset(Dataset):
    """Feature columns without labels.

    Columns of one dtype are kept as one row-major tensor [N, F], so that a batch is one copy of rows for each dtype.

    Args:
        x: name -> column ([N], or [N, L] for sequences and vectors; arrays, tensors, lists, Series), or a DataFrame.

    Raises:
        BadDataError: for columns that are empty, differ in length, or hold no numbers.
    """

    def __init__(self, x: Any) -> None:
        super().__init__()
        columns = as_columns(x)
        self.schema = Schema.from_columns(columns)
        self.n_rows = len(next(iter(columns.values())))
        self._hold(columns)

    def _hold(self, columns: Mapping[str, np.ndarray]) -> None:
        self.layout, self.blocks, self.wide = Layout.from_columns(
            {name: to_tensor(column) for name, column in columns.items()}
        )
        # Views of the stacked memory, so that the user's own arrays can be freed.
        views = {name: wide.numpy() for name, wide in self.wide.items()}
        for names, block in zip(self.layout.blocks, self.blocks, strict=True):
            views.update(zip(names, block.numpy().T, strict=True))
        self.x: dict[str, np.ndarray] = {name: views[name] for name in self.layout.names}

    def take(self, rows: torch.Tensor | slice) -> Any:
        """The batch of these rows.

        Args:
            rows: row numbers [B] (int64), or a slice of neighbouring rows.

        Returns:
            ColumnBatch of B rows, its memory not shared with the data set.

        Raises:
            BadDataError: a row that the data set does not have.
        """
        return self._batch(_rows_of(self._held(), rows))

    def _held(self) -> list[torch.Tensor]:
        return [*self.blocks, *self.wide.values()]

    def _batch(self, parts: list[torch.Tensor]) -> ColumnBatch:
        n = len(self.blocks)
        return ColumnBatch(self.layout, parts[:n], dict(zip(self.wide, parts[n:], strict=True)))

    def __getitem__(self, index: int) -> Any:
        return {name: column[index] for name, column in self.x.items()}

    def __getitems__(self, indices: Sequence[int]) -> list[Any]:
        columns = [column[np.asarray(indices)] for column in self.x.values()]
        return [dict(zip(self.x, row, strict=True)) for row in zip(*columns, strict=True)]

    def __len__(self) -> int:
        return self.n_rows


class TorchDataset(PredictDataset):
    """Feature columns with a label column for each task.

    Args:
        x: as for ``PredictDataset``.
        y: labels [N, T] or [N], a frame, or a dict or list of T columns; NaN where a label is unknown.

    Raises:
        BadDataError: also when the labels differ in length from the features.
    """

    def __init__(self, x: Any, y: Any) -> None:
        super().__init__(x)
        self.y, names = as_labels(y, self.n_rows)
        self.schema = Schema(self.schema.columns, names)
        self._labels = to_tensor(self.y)

    def take(self, rows: torch.Tensor | slice) -> tuple[ColumnBatch, torch.Tensor]:
        """The batch of these rows, (ColumnBatch of B rows, labels [B, T])."""
        *parts, labels = _rows_of([*self._held(), self._labels], rows)
        return self._batch(parts), labels

    def __getitem__(self, index: int) -> Any:
        return super().__getitem__(index), self.y[index]

    def __getitems__(self, indices: Sequence[int]) -> list[Any]:
        return list(zip(super().__getitems__(indices), self.y[np.asarray(indices)], strict=True))


def _rows_of(tensors: list[torch.Tensor], rows: torch.Tensor | slice) -> list[torch.Tensor]:
    if isinstance(rows, slice):
        return [tensor[rows].clone() for tensor in tensors]
    plain = rows.dtype == torch.int64 and all(part.is_contiguous() for part in (rows, *tensors))
    try:
        if plain and native.unavailable() is None:
            return native.take_rows(tensors, rows)
        return [tensor.index_select(0, rows) for tensor in tensors]
    except (IndexError, RuntimeError):
        n = len(tensors[0])
        wrong = rows[(rows < 0) | (rows >= n)]
        if not len(wrong):
            raise
        raise BadDataError(
            f"row {int(wrong[0])} was asked for of a data set of {n} rows; the sampler's are 0 to {n - 1}"
        ) from None
