"""Random lookups: many bags of every kind, shared tables, padding, unknown ids."""

from __future__ import annotations

import random
from dataclasses import dataclass

import torch
from torch import Tensor

from fastmtl.spec import Bag, EmbeddingSpec


@dataclass
class Lookup:
    """One random call and the gradient of its output."""

    spec: EmbeddingSpec
    weights: list[Tensor]
    ids: Tensor
    columns: tuple[int, ...]
    dense: Tensor | None
    grad: Tensor


def random_lookup(seed: int, batch: int | None = None) -> Lookup:
    """A lookup by its seed: 0 to 12 bags over one to three widths, ids of 32 or 64 bits in any layout."""
    rng = random.Random(seed)
    generator = torch.Generator().manual_seed(seed)
    batch = rng.choice((0, 1, 2, 7, 63, 64, 65, 200, 500)) if batch is None else batch
    n_bags, dims = rng.randint(1, 12), rng.sample((1, 3, 4, 8, 9, 16, 32, 40), rng.randint(1, 3))
    height = [0] * len(dims)
    bags: list[Bag] = []
    columns, parts = [0], []
    used = [rng.randrange(len(dims)) for _ in range(n_bags)]
    order = sorted(set(used))  # a weight that no bag reads cannot be told to eager
    for f in range(n_bags):
        table = order.index(used[f])
        same = [bag for bag in bags if bag.table == table]
        vocab = rng.choice((1, 2, 3, 10, 100, 3000))
        if same and rng.random() < 0.25:  # a shared table
            offset, vocab = same[-1].offset, same[-1].vocab
        else:
            offset = height[used[f]]
            height[used[f]] += vocab
        length = rng.choice((1, 1, 1, 2, 5))
        padding = rng.choice(((), (), (-1,), (0,), (-1, 0)))
        oov = rng.choice(("raise", "raise", "zero", rng.randrange(vocab)))
        pooling = rng.choice(("sum", "mean", "concat"))
        bags.append(Bag(f"f{f}", table, offset, vocab, dims[used[f]], pooling, padding, oov))
        part = torch.randint(0, vocab, (batch, length), generator=generator)
        if padding and rng.random() < 0.8:
            part[torch.rand(part.shape, generator=generator) < 0.4] = rng.choice(padding)
        if oov != "raise":
            part[torch.rand(part.shape, generator=generator) < 0.2] = rng.choice((-7, vocab, 2**31 - 1))
        parts.append(part)
        columns.append(columns[-1] + length)
    ids = torch.cat(parts, dim=1)
    if rng.random() < 0.3:
        ids = ids.int()
    if rng.random() < 0.3:
        ids = ids.t().contiguous().t()
    n_dense = rng.choice((0, 1, 7))
    dense = torch.randn(batch, n_dense, generator=generator) if n_dense else None
    if dense is not None and rng.random() < 0.3:
        dense = dense.t().contiguous().t()
    spec = EmbeddingSpec(tuple(bags), n_dense)
    weights = [torch.randn(height[u], dims[u], generator=generator) for u in order]
    grad = torch.randn(batch, spec.width(tuple(columns)), generator=generator)
    return Lookup(spec, weights, ids, tuple(columns), dense, grad)
