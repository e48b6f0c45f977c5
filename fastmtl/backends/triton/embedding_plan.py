"""What depends only on a lookup's description, as integer tensors on the device: made once, found again by identity."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from ...spec import Bag, EmbeddingSpec
from .launch import alignment

#: Columns of ``TablePlan.slots``, in the order in which ``load_slot`` of embedding_bag_forward.py reads them.
SLOT_FIELDS = ("first", "length", "vocab", "offset", "mean", "n_pads", "pad0", "pad1", "oov", "out")
_OOV: dict[str | int, int] = {"raise": -2, "zero": -1}


@dataclass(frozen=True)
class TinyTable:
    """A table small enough to be summed in registers, and the lookups that read it.

    Args:
        offset, vocab: its rows in the weight.
        first: its first row among all tiny rows of the weight.
        lookups: ``(id column of the weight's tiny ones, output column, bag)``.
    """

    offset: int
    vocab: int
    first: int
    lookups: tuple[tuple[int, int, int], ...]


class TablePlan:
    """One weight tensor's share of a lookup.

    Attributes:
        slots: ``[n_slots, 10]`` int64, one row for each D columns of the output (a bag, or one id of a concatenated
            bag): :data:`SLOT_FIELDS`.
        bags: ``[n_bags, 12]`` int64, the same for whole bags, and where the backward puts the bag's rows: 1 + the
            table's first row among all tiny ones where it is tiny, else 0; the first column among those of its kind.
        sorted_columns: ``[n_sorted, 2]`` int32: output column and bag of each id column whose rows are sorted.
        sorted_bags: ``[width]`` int32: the bag of each of these output columns.
        width: the lookup's, of all weights.
        tiny: the tables that are not sorted.
        align: a power of two that divides every output column a slot begins at.
    """

    def __init__(
        self, spec: EmbeddingSpec, columns: tuple[int, ...], table: int, tiny_vocab: int, device: torch.device
    ):
        self.device = device
        widths = spec.bag_widths(columns)
        starts = [sum(widths[:f]) for f in range(len(widths))]
        mine = [f for f, bag in enumerate(spec.bags) if bag.table == table]
        vocabs: dict[int, int] = {}
        for f in mine:
            bag = spec.bags[f]
            vocabs[bag.offset] = max(vocabs.get(bag.offset, 0), bag.vocab)
        slots, bags = [], []
        sorted_columns: list[tuple[int, int]] = []
        lookups: dict[int, list[tuple[int, int, int]]] = {}
        first_rows: dict[int, int] = {}
        n_tiny = n_tiny_rows = 0
        for at, f in enumerate(mine):
            bag, first, length = spec.bags[f], columns[f], columns[f + 1] - columns[f]
            concat = bag.pooling == "concat"
            outs = [starts[f] + i * bag.dim * concat for i in range(length)]
            if concat:
                slots += [_fields(bag, first + i, 1, out) for i, out in enumerate(outs)]
            else:
                slots.append(_fields(bag, first, length, starts[f]))
            tiny = vocabs[bag.offset] <= tiny_vocab
            if tiny and bag.offset not in first_rows:
                first_rows[bag.offset] = n_tiny_rows
                n_tiny_rows += vocabs[bag.offset]
            bags.append((
                *_fields(bag, first, length, starts[f]), 1 + first_rows[bag.offset] if tiny else 0,
                n_tiny if tiny else len(sorted_columns),
            ))  # fmt: skip
            if tiny:
                lookups.setdefault(bag.offset, []).extend((n_tiny + i, out, at) for i, out in enumerate(outs))
                n_tiny += length
            else:
                sorted_columns += [(out, at) for out in outs]
        self.n_bags, self.n_slots, self.n_sorted, self.n_tiny_columns = (
            len(bags),
            len(slots),
            len(sorted_columns),
            n_tiny,
        )
        self.slots = torch.tensor(slots, dtype=torch.int64, device=device).reshape(-1, len(SLOT_FIELDS))
        self.bags = torch.tensor(bags, dtype=torch.int64, device=device).reshape(-1, len(SLOT_FIELDS) + 2)
        self.sorted_columns = torch.tensor(sorted_columns, dtype=torch.int32, device=device).reshape(-1, 2)
        self.width = max(sum(widths), 1)
        bag_of = torch.zeros(self.width, dtype=torch.int32)
        for out, at in sorted_columns:
            bag_of[out] = at
        self.sorted_bags = bag_of.to(device)
        self.has_mean = any(spec.bags[f].pooling == "mean" for f in mine)
        self.align = alignment(*(row[-1] for row in slots))
        self.tiny = tuple(
            TinyTable(offset, vocabs[offset], first_rows[offset], tuple(found)) for offset, found in lookups.items()
        )
        self.n_tiny_rows = n_tiny_rows

    @cached_property
    def tiny_rows(self) -> Tensor:
        """``[n_tiny_rows]`` int64: the weight's row of each tiny row."""
        rows = [t.offset + v for t in self.tiny for v in range(t.vocab)]
        return torch.tensor(rows, dtype=torch.int64, device=self.device)

    def tiny_group(self, most: int) -> tuple[Tensor, Tensor] | None:
        """The tiny tables in slices of at most ``most`` rows: the slices ``[n, 4]`` (rows, the first of them among all
        tiny rows, first and last + 1 lookup) and the lookups ``[m, 3]``, int32; None: there are none."""
        if self.tiny and most not in self._groups:
            slices: list[tuple[int, ...]] = []
            lookups: list[tuple[int, ...]] = []
            for tiny in self.tiny:
                end = len(lookups) + len(tiny.lookups)
                for begin in range(0, tiny.vocab, most):
                    slices.append((min(most, tiny.vocab - begin), tiny.first + begin, len(lookups), end))
                lookups += tiny.lookups
            made = [torch.tensor(rows, dtype=torch.int32, device=self.device) for rows in (slices, lookups)]
            self._groups[most] = made[0], made[1]
        return self._groups.get(most)

    @cached_property
    def _groups(self) -> dict[int, tuple[Tensor, Tensor]]:
        return {}


def _fields(bag: Bag, first: int, length: int, out: int) -> tuple[int, ...]:
    pads = (*bag.padding, 0, 0)[:2]
    code = _OOV.get(bag.oov, bag.oov)
    return (first, length, bag.vocab, bag.offset, bag.pooling == "mean", len(bag.padding), *pads, int(code), out)


_plans: dict[tuple, tuple[EmbeddingSpec, tuple[TablePlan, ...]]] = {}


def plans(
    spec: EmbeddingSpec, columns: tuple[int, ...], tiny_vocab: int, device: torch.device
) -> tuple[TablePlan, ...]:
    """The plan of each weight tensor; tables of at most ``tiny_vocab`` rows are summed without a sort."""
    key = (id(spec), columns, tiny_vocab, device)
    kept = _plans.get(key)
    if kept is None or kept[0] is not spec:
        if len(_plans) >= 256:  # sequence lengths may differ from batch to batch
            _plans.clear()
        made = tuple(TablePlan(spec, columns, table, tiny_vocab, device) for table in range(spec.n_tables))
        kept = _plans[key] = (spec, made)
    return kept[1]


def kept() -> list[Any]:
    """The plans made so far that would be found again."""
    return list(_plans.values())
