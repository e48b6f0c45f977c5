"""embedding_bag in plain PyTorch, bag by bag: maxima, a weight for each id, bags of any length."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import BadDataError, BadIdError
from ..spec import Bag, EmbeddingSpec, Ragged
from .eager import make_plan, plan_of, resolve, rows_of


def padded(ragged: Ragged, r: int, bag: Bag) -> tuple[Tensor, Tensor, Tensor | None]:
    """The r-th ragged bag as columns: rows of its weight ``[B, L]``, which of them count, and their scales."""
    offsets, n = ragged.offsets[r].long(), len(ragged.ids)
    lengths = offsets[1:] - offsets[:-1]
    if len(offsets) and not (int(offsets[0]) >= 0 and bool((lengths >= 0).all()) and int(offsets[-1]) <= n):
        raise BadDataError(
            f"feature {bag.name!r}: the offsets of its ragged ids must ascend from 0 to at most {n}, the number of ids"
        )
    columns = torch.arange(int(lengths.max()) if len(lengths) else 0, device=offsets.device)
    there = columns < lengths.unsqueeze(1)
    at = torch.where(there, offsets[:-1].unsqueeze(1) + columns, 0)
    ids = ragged.ids.long()[at] if n else torch.zeros_like(at)
    rows, keep, refused = resolve(ids, *_plan_of_one(bag, ids.shape[1], ids.device))
    refused = refused & there
    if refused.any():
        row, column = (int(i) for i in refused.nonzero()[0])
        raise BadIdError.at(bag.name, int(ids[row, column]), row, bag.vocab)
    keep = there if keep is None else keep & there
    scales = None if ragged.scales is None else ragged.scales[at]
    return torch.where(keep, rows, 0), keep, scales


def _plan_of_one(bag: Bag, length: int, device: torch.device) -> tuple[Any, ...]:
    """What :func:`_resolve` needs for ``length`` columns of one bag."""
    alone = EmbeddingSpec((replace(bag, table=0, is_ragged=False, pooling="sum"),))
    return make_plan(alone, (0, length), device)[:5]


def embedding_bag_general(
    weights: list[Tensor],
    ids: Tensor,
    columns: tuple[int, ...],
    dense: Tensor | None,
    spec: EmbeddingSpec,
    scales: Tensor | None,
    ragged: Ragged | None,
) -> Tensor:
    """The op bag by bag, with maxima, scales and ragged bags."""
    rows, keep = rows_of(ids, columns, spec, plan_of(spec, columns, ids.device))
    pieces, r = [], 0
    for f, bag in enumerate(spec.bags):
        part = slice(columns[f], columns[f + 1])
        own, counts = rows[:, part], torch.ones_like(rows[:, part], dtype=torch.bool) if keep is None else keep[:, part]
        factors = None if scales is None else scales[:, part]
        if bag.is_ragged:
            assert ragged is not None
            own, counts, factors = padded(ragged, r, bag)
            r += 1
        emb = F.embedding(own, weights[bag.table])  # [B, L, D]
        if factors is not None:
            emb = emb * factors.unsqueeze(-1)
        if bag.pooling == "max":
            emb = torch.where(counts.unsqueeze(-1), emb, -torch.inf)
            largest = emb.max(dim=1).values if emb.shape[1] else emb.sum(dim=1)
            pieces.append(torch.where(counts.any(dim=1, keepdim=True), largest, 0))
            continue
        emb = torch.where(counts.unsqueeze(-1), emb, 0)
        if bag.pooling == "concat":
            pieces.append(emb.flatten(1))
            continue
        emb = emb.sum(dim=1)
        pieces.append(emb / counts.sum(dim=1, keepdim=True).clamp(min=1) if bag.pooling == "mean" else emb)
    return torch.cat(pieces if dense is None else [*pieces, dense], dim=1)
