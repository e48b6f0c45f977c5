"""Small tables folded into the layers that read them, on the CPU: which ones, and how a batch is then looked up.

What a layer makes of each row of a small table is computed once, and a row of a batch adds one of these sums instead of
multiplying its embedding; see csrc/core/small_tables.h (prediction) and csrc/core/expert_gate_small.h (training).
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from ..spec import Bag, EmbeddingSpec, ExpertGateSpec
from . import eager, native

#: A table is folded where it has at most so many rows for each of its columns, and all together have so many rows at
#: most.
_MOST_TIMES, _MOST_ROWS = 16, 1024
#: What it saves and costs, in cycles for sixteen columns of the layer and a row of the batch, forward and backward
#: (docs/performance.md, "Small tables"): a column of an embedding in the products, in fp32 and on processors that
#: multiply bf16; adding a row of sums; and in training the passes over z and dz beside the products.
_COLUMN, _COLUMN_BF16 = 3.0, {"avx512_bf16": 1.5, "amx": 0.2}
_PICK, _PASSES = 4.0, 30.0


def small_tables(
    spec: EmbeddingSpec, bf16: bool, among: Sequence[int] | None = None, training: bool = False
) -> list[int]:
    """The bags of one id a row whose tables are folded, the smallest first chosen.

    Args:
        spec: the lookup.
        bf16: whether the layer computes in bf16.
        among: the bags to choose from; None: all.
        training: whether there is a backward.

    Returns:
        Their numbers, ascending; none where folding costs more than it saves.
    """
    column = _COLUMN_BF16.get(torch.ops.fastmtl.gemm_isa(), _COLUMN) if bf16 else _COLUMN
    chosen, rows = [], 0
    for f in sorted(range(len(spec.bags)) if among is None else among, key=lambda f: spec.bags[f].vocab):
        bag = spec.bags[f]
        rows += bag.vocab
        fits = bag.vocab <= _MOST_TIMES * bag.dim and rows <= _MOST_ROWS and bag.dim * column > _PICK
        if fits and bag.pooling == "sum":
            chosen.append(f)
    saved = sum(spec.bags[f].dim * column - _PICK for f in chosen)
    return sorted(chosen) if saved > (_PASSES if training else 0) else []


def table_of(bag: Bag, tables: Sequence[Tensor]) -> Tensor:
    """The table that a bag reads."""
    return tables[bag.table].detach()[bag.offset : bag.offset + bag.vocab]


def split(plan: Tensor, folded: list[int]) -> tuple[Tensor, Tensor | None]:
    """The bags that are looked up, side by side without the others' columns, and the folded ones."""
    if not folded:
        return plan, None
    kept, small = plan.clone(), plan[folded].clone()
    is_before = small[:, native.BAG_OUT] < plan[:, native.BAG_OUT, None]
    kept[:, native.BAG_OUT] -= (is_before * small[:, native.BAG_DIM]).sum(1)
    small[:, native.BAG_OUT] = 0
    is_kept = torch.ones(len(plan), dtype=torch.bool)
    is_kept[folded] = False
    return kept[is_kept], small


class Folding:
    """The lookup of a model in training whose small tables are folded into its first layer.

    Args:
        spec: the lookup.
        columns: its id columns.
        folded: the bags that are folded, of one weight and with one id column each; ascending.
    """

    def __init__(self, spec: EmbeddingSpec, columns: tuple[int, ...], folded: list[int]) -> None:
        self._spec, self._columns = spec, columns
        bags = [spec.bags[f] for f in folded]
        starts = [0, *accumulate(spec.bag_widths(columns))]
        self._kept, self._small = split(native.bag_plan(spec, columns), folded)
        self._width = spec.width(columns) - sum(bag.dim for bag in bags)
        self._places = torch.tensor([(starts[f], bag.offset, bag.vocab) for f, bag in zip(folded, bags, strict=True)])
        self._weight = bags[0].table
        rows = torch.cat([torch.arange(bag.offset, bag.offset + bag.vocab) for bag in bags])
        #: The rows of the weight, ascending, and where each of the tables' rows counted through is among them.
        self._rows, self._among = rows.unique(return_inverse=True)
        is_ordered = torch.equal(self._among, torch.arange(len(self._rows)))
        #: The other way; None: they are the same, or several bags read a row.
        self._order = None if is_ordered or len(self._rows) < len(rows) else self._among.argsort()
        self._is_alone = all(bag in bags for bag in spec.bags if bag.table == self._weight)

    @classmethod
    def of(cls, spec: EmbeddingSpec, columns: tuple[int, ...], layer: ExpertGateSpec, bf16: bool) -> Folding | None:
        """What pays for a model whose first layer is ``layer``; None: nothing does."""
        if not spec.is_common or layer.n_inputs > 1 or not layer.dims:
            return None
        by_weight: dict[int, list[int]] = {}
        for f, bag in enumerate(spec.bags):
            if columns[f + 1] - columns[f] == 1:
                by_weight.setdefault(bag.table, []).append(f)
        found = [small_tables(spec, bf16, bags, training=True) for bags in by_weight.values()]
        folded = max(found, key=len, default=[])
        return cls(spec, columns, folded) if folded else None

    @property
    def width(self) -> int:
        """Columns of the looked-up rows."""
        return self._width

    @property
    def least_rows(self) -> int:
        """Rows of a batch that are worth folding the tables for: eight times those of a table in the mean."""
        return max(8 * len(self._among) // len(self._places), 64)

    def look_up(self, weights: list[Tensor], ids: Tensor, dense: Tensor | None) -> tuple[Tensor, native.Folded]:
        """The looked-up rows ``[B, width]`` without the folded tables' columns, and these tables."""
        shapes = [n for weight in weights for n in weight.shape]
        try:
            rows = torch.ops.fastmtl.embedding_bag_fwd.default(weights, ids, dense, self._kept, self._width)
            picks = torch.ops.fastmtl.embedding_bag_picks.default(ids, self._small, shapes)
        except RuntimeError:
            eager.raise_bad_id(ids, self._columns, self._spec)
            raise
        return rows, native.Folded(self._places, weights[self._weight], picks)

    def for_program(
        self, shapes: list[torch.Size], needs: list[bool]
    ) -> tuple[tuple[Tensor, int], tuple[Any, ...], list[bool]]:
        """The same for :class:`fastmtl.backends.native_training.TrainingProgram`: the lookup and its width, the folded
        tables and where their gradients go, and which weights have a gradient beside these."""
        is_all = self._takes_all(shapes)
        others = [need and not (is_all and w == self._weight) for w, need in enumerate(needs)]
        grads = (self._rows, self._among, is_all) if needs[self._weight] else (None, None, False)
        return (self._kept, self._width), (self._places, self._small, self._weight, *grads), others

    def _takes_all(self, shapes: list[torch.Size]) -> bool:
        """Whether no row of the weight has another gradient than the folded tables'."""
        return self._is_alone and len(self._rows) == shapes[self._weight][0]

    def table_gradients(
        self,
        grad: Tensor,
        of_small: Tensor,
        ids: Tensor,
        shapes: list[torch.Size],
        needs: list[bool],
        index: list[native.RowIndex | None] | None,
    ) -> list[tuple[Tensor, Tensor] | Tensor | None]:
        """What the native backend's ``embedding_bag_bwd`` (``index`` is None) or ``embedding_bag_bwd_sparse`` gives.

        Args:
            grad: of what :meth:`look_up` returned.
            of_small: ``[rows of the folded tables, D]``, their gradients.
        """
        if index is None:
            is_all = self._takes_all(shapes)
            others = [need and not (is_all and w == self._weight) for w, need in enumerate(needs)]
            found: list[Any] = [None] * len(others)
            if any(others):
                found = native.dense_gradients(grad, ids, self._kept, shapes, others)
            if needs[self._weight] and is_all:
                found[self._weight] = self._by_row(of_small)
            elif needs[self._weight]:
                found[self._weight][self._rows] += self._by_row(of_small)
            return found
        sparse = native.sparse_gradients(grad, ids, self._kept, shapes, index)
        pair = sparse[self._weight]
        if pair is not None and len(pair[0]):
            rows, values = pair
            at = torch.searchsorted(rows, self._rows).clamp_(max=len(rows) - 1)
            is_read = rows[at] == self._rows
            values[at[is_read]] += self._by_row(of_small)[is_read]
        return [*sparse]

    def _by_row(self, of_small: Tensor) -> Tensor:
        """The gradients of the weight's rows, which several bags may read."""
        if len(self._rows) == len(of_small):
            return of_small if self._order is None else of_small[self._order]
        return torch.zeros(len(self._rows), of_small.shape[1]).index_add_(0, self._among, of_small)
