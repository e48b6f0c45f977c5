"""Random lookups with all that embedding_bag can do: maxima, weights of ids, ragged bags, tables of 16 bits."""

from __future__ import annotations

import random
from dataclasses import dataclass

import torch
from torch import Tensor

from fastmtl.spec import Bag, EmbeddingSpec, Ragged


@dataclass
class Case:
    spec: EmbeddingSpec
    weights: list[Tensor]
    ids: Tensor
    columns: tuple[int, ...]
    dense: Tensor | None
    scales: Tensor | None
    ragged: Ragged | None
    grad: Tensor


def random_case(seed, dtype=torch.float32, batch=None):
    """1 to 7 bags of every pooling, in columns or ragged, shared tables, padding, unknown ids, equal numbers."""
    rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    batch = rng.choice((0, 1, 2, 9, 64, 150)) if batch is None else batch
    dims = rng.sample((1, 3, 4, 16, 33), rng.randint(1, 2)) if rng.random() < 0.9 else [1025]
    heights = [0] * len(dims)
    with_max = rng.random() < 0.6
    bags, columns, parts, lists, offsets = [], [0], [], [], []
    for f in range(max(len(dims), rng.randint(1, 7))):
        table, vocab = f % len(dims), rng.choice((1, 2, 7, 40, 900))
        same = [bag for bag in bags if bag.table == table]
        offset = heights[table]
        if same and rng.random() < 0.3:
            offset, vocab = same[-1].offset, same[-1].vocab
        heights[table] = max(heights[table], offset + vocab)
        is_ragged = rng.random() < 0.4
        pooling = rng.choice(("sum", "mean", *["max"] * with_max, *["concat"] * (not is_ragged)))
        padding = rng.choice(((), (0,), (-1, 0)))
        oov = rng.choice(("zero", rng.randrange(vocab)))
        bags.append(Bag(f"f{f}", table, offset, vocab, dims[table], pooling, padding, oov, is_ragged))
        lengths = torch.randint(0, rng.choice((1, 2, 9)), (batch,), generator=generator) if is_ragged else None
        size = (int(lengths.sum()),) if is_ragged else (batch, rng.choice((0, 1, 1, 4)))
        part = torch.randint(0, vocab, size, generator=generator)
        part[torch.rand(size, generator=generator) < 0.2] = rng.choice((-1, 0, vocab, 2**31 - 1))
        if is_ragged:
            ends = lengths.cumsum(0) + sum(map(len, lists))
            offsets.append(torch.cat([torch.tensor([sum(map(len, lists))]), ends]))
            lists.append(part)
        else:
            parts.append(part)
        columns.append(columns[-1] + (0 if is_ragged else size[1]))
    narrow = torch.int32 if rng.random() < 0.5 else torch.int64
    ids = torch.cat([torch.zeros(batch, 0, dtype=torch.int64), *parts], dim=1).to(narrow)
    if rng.random() < 0.3:
        ids = ids.t().contiguous().t()
    scaled = not with_max and rng.random() < 0.7
    scales = torch.randn(ids.shape, generator=generator) if scaled else None
    ragged = None
    if lists:
        listed = torch.cat([*lists, torch.zeros(3, dtype=torch.int64)]).to(rng.choice((torch.int32, torch.int64)))
        list_scales = torch.randn(len(listed), generator=generator) if scaled and rng.random() < 0.7 else None
        at = torch.stack(offsets).to(rng.choice((torch.int32, torch.int64)))
        ragged = Ragged(listed, at, list_scales)
    spec = EmbeddingSpec(tuple(bags), rng.choice((0, 3)))
    dense = torch.randn(batch, spec.n_dense, generator=generator) if spec.n_dense else None
    # few different numbers, so that maxima are shared
    shapes = [(height, dim) for height, dim in zip(heights, dims, strict=True)]
    weights = [(torch.randn(shape, generator=generator) * 2).round().div(2).to(dtype) for shape in shapes]
    grad = torch.randn(batch, spec.width(tuple(columns)), generator=generator)
    return Case(spec, weights, ids, tuple(columns), dense, scales, ragged, grad)
