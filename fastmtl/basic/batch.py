"""A batch as columns: what the loaders yield as ``x`` and the models read without a Python loop over features."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor


class Layout:
    """Where each column of a data set lives; made once, shared by all its batches and compared by identity.

    Attributes:
        blocks: for each dtype, the names of its 1-D columns in order.
        wide: names of the columns with more than one dimension (sequences, dense vectors).
        names: all names in the user's order.
        where: name -> (block, column in the block) for the 1-D columns.
    """

    def __init__(self, blocks: tuple[tuple[str, ...], ...], wide: tuple[str, ...], names: tuple[str, ...]) -> None:
        self.blocks, self.wide, self.names = blocks, wide, names
        self.where = {name: (b, c) for b, block in enumerate(blocks) for c, name in enumerate(block)}

    @classmethod
    def from_columns(cls, columns: Mapping[str, Tensor]) -> tuple[Layout, list[Tensor], dict[str, Tensor]]:
        """Stack the 1-D columns of equal dtype row by row: ``[N]`` each to one ``[N, F]`` a dtype; dtypes are kept."""
        columns = {name: torch.as_tensor(column) for name, column in columns.items()}
        by_dtype: dict[torch.dtype, list[str]] = {}
        for name, column in columns.items():
            if column.ndim == 1:
                by_dtype.setdefault(column.dtype, []).append(name)
        blocks = [_stack([columns[name] for name in names]) for names in by_dtype.values()]
        wide = {name: column for name, column in columns.items() if column.ndim != 1}
        return cls(tuple(map(tuple, by_dtype.values())), tuple(wide), tuple(columns)), blocks, wide


def _stack(columns: list[Tensor], rows: int = 2048) -> Tensor:
    """Columns ``[N]`` side by side, some rows at a time: what is written then stays in the cache until it is full."""
    n = len(columns[0])
    out = torch.empty(n, len(columns), dtype=columns[0].dtype, device=columns[0].device)
    for start in range(0, n, rows):
        part = slice(start, start + rows)
        torch.stack([column[part] for column in columns], dim=1, out=out[part])
    return out


class ColumnBatch(Mapping[str, Tensor]):
    """B rows of a data set; reads like a dict of tensors (``x["age"]`` is ``[B]``, ``x["history"]`` is ``[B, L]``).

    Args:
        layout: where each column lives.
        blocks: one ``[B, F]`` tensor for each of ``layout.blocks``.
        wide: the columns with more than one dimension.
    """

    __slots__ = ("blocks", "layout", "wide")

    def __init__(self, layout: Layout, blocks: list[Tensor], wide: dict[str, Tensor]) -> None:
        self.layout, self.blocks, self.wide = layout, blocks, wide

    @classmethod
    def from_columns(cls, columns: Mapping[str, Tensor]) -> ColumnBatch:
        """A batch from single columns; see :meth:`Layout.from_columns`."""
        return cls(*Layout.from_columns(columns))

    def __getitem__(self, name: str) -> Tensor:
        place = self.layout.where.get(name)
        if place is None:
            return self.wide[name]
        return self.blocks[place[0]][:, place[1]]

    def __iter__(self) -> Iterator[str]:
        return iter(self.layout.names)

    def __len__(self) -> int:
        return len(self.layout.names)

    @property
    def n_rows(self) -> int:
        """B."""
        first = self.blocks[0] if self.blocks else next(iter(self.wide.values()))
        return len(first)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> ColumnBatch:
        """The batch on ``device``; itself where it is there already."""
        blocks = [block.to(device, non_blocking=non_blocking) for block in self.blocks]
        wide = {name: column.to(device, non_blocking=non_blocking) for name, column in self.wide.items()}
        return ColumnBatch(self.layout, blocks, wide)

    def pin_memory(self) -> ColumnBatch:
        """The batch in page-locked memory, for copies to a GPU that overlap with work."""
        return ColumnBatch(
            self.layout,
            [block.pin_memory() for block in self.blocks],
            {name: column.pin_memory() for name, column in self.wide.items()},
        )


class ReadyBatch(Mapping[str, Tensor]):
    """A batch laid out as one lookup of given features takes it, so that a step begins with the lookup itself.

    Args:
        names: of the features, in the lookup's order.
        ids: ``[B, S]``, or None where no feature has a table.
        columns: the bags' column offsets.
        dense: ``[B, n_dense]``, or None.
        index: what the tables' optimizer knows of the ids already (``TableOptimizer.index``), or None.
    """

    __slots__ = ("columns", "dense", "ids", "index", "names")

    def __init__(
        self,
        names: tuple[str, ...],
        ids: Tensor | None,
        columns: tuple[int, ...],
        dense: Tensor | None,
        index: list[Any] | None = None,
    ) -> None:
        self.names, self.ids, self.columns, self.dense, self.index = names, ids, columns, dense, index

    def __getitem__(self, name: str) -> Tensor:
        raise KeyError(f"{name!r}: the batch was laid out for a lookup and has no columns of its own any more")

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)
