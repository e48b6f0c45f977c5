"""Random batches of ids for the sparse gradients: every pooling, shared tables, padding, unknown ids."""

from __future__ import annotations

import random
from typing import NamedTuple

import torch
from torch import Tensor

from fastmtl.spec import Bag, EmbeddingSpec


class Batch(NamedTuple):
    """What a backward is given."""

    spec: EmbeddingSpec
    shapes: list[torch.Size]
    ids: Tensor
    columns: tuple[int, ...]
    grad: Tensor


def random_batch(seed: int) -> Batch:
    """A batch by its seed: 1 to 8 bags over one to three widths."""
    rng = random.Random(seed)
    generator = torch.Generator().manual_seed(seed)
    batch = rng.choice((0, 1, 7, 64, 129, 300))
    dims = rng.sample((1, 3, 4, 8, 16, 17, 32), rng.randint(1, 3))
    heights = [0] * len(dims)
    bags: list[Bag] = []
    columns, parts = [0], []
    for f in range(max(len(dims), rng.randint(1, 8))):
        table = f % len(dims)
        vocab = rng.choice((1, 3, 50, 5000, 70_000))
        offset = heights[table]
        same = [bag for bag in bags if bag.table == table]
        if same and rng.random() < 0.3:
            offset, vocab = same[-1].offset, same[-1].vocab
        heights[table] = max(heights[table], offset + vocab)
        length = rng.choice((1, 1, 4))
        padding = rng.choice(((), (0,), (-1, 0)))
        oov = rng.choice(("zero", rng.randrange(vocab)))
        bags.append(
            Bag(f"f{f}", table, offset, vocab, dims[table], rng.choice(("sum", "mean", "concat")), padding, oov)
        )
        part = (torch.rand(batch, length, generator=generator) ** 3 * vocab).long()
        part[torch.rand(part.shape, generator=generator) < 0.1] = rng.choice((-1, vocab, 2**40))
        parts.append(part)
        columns.append(columns[-1] + length)
    spec = EmbeddingSpec(tuple(bags), rng.choice((0, 3)))
    grad = torch.randn(batch, spec.width(tuple(columns)), generator=generator)
    if rng.random() < 0.3:
        grad = grad.t().contiguous().t()
    shapes = [torch.Size((height + rng.choice((0, 5)), dim)) for height, dim in zip(heights, dims, strict=True)]
    return Batch(spec, shapes, torch.cat(parts, dim=1), tuple(columns), grad)
