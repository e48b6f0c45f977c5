"""Predictions from many threads at once are bit for bit those of one thread."""

from __future__ import annotations

import random
from concurrent.futures import ThreadPoolExecutor

import torch

from fastmtl import models
from fastmtl.basic.batch import ColumnBatch
from fastmtl.basic.features import DenseFeature, SequenceFeature, SparseFeature

THREADS = 16
SIZES = (1, 1, 2, 3, 7, 16, 33, 100, 300, 700)
KINDS = ["classification", "classification", "regression"]


def _model(name: str) -> torch.nn.Module:
    features = [
        SparseFeature("user", 300, 8),
        SparseFeature("item", 90, 8),
        SparseFeature("day", 7, 8),
        DenseFeature("age"),
    ]
    bank, towers = {"dims": [32, 16]}, [{"dims": [8]}] * 3
    if name == "PLE":  # the other folds its smallest table into its first layer
        features.insert(2, SequenceFeature("history", 90, 8, pooling="mean", shared_with="item"))
        return models.PLE(features, KINDS, 2, 2, 1, bank, towers)
    return models.MMOE(features, KINDS, 4, bank, towers)


def _batches(seed: int) -> list[ColumnBatch]:
    rng = torch.Generator().manual_seed(seed)
    return [
        ColumnBatch.from_columns(
            {
                "user": torch.randint(0, 300, (n,), generator=rng),
                "item": torch.randint(0, 90, (n,), generator=rng),
                "day": torch.randint(0, 7, (n,), generator=rng),
                "history": torch.randint(-1, 90, (n, 5), generator=rng),
                "age": torch.randn(n, generator=rng),
            }
        )
        for n in SIZES * 3
    ]


def check(name: str, count: int, seed: int) -> None:
    """``THREADS`` threads make ``count`` predictions each."""
    torch.manual_seed(seed)
    model, batches = _model(name).eval(), _batches(seed)
    with torch.no_grad():
        expected = [model(batch) for batch in batches]

    def work(number: int) -> str | None:
        rng = random.Random(seed + number)
        with torch.no_grad():
            for i in range(count):
                which = rng.randrange(len(batches))
                if not torch.equal(model(batches[which]), expected[which]):
                    return f"thread {number}, prediction {i}: batch of {batches[which].n_rows} rows differs"
        return None

    with ThreadPoolExecutor(THREADS) as pool:
        found = [line for line in pool.map(work, range(THREADS)) if line]
    assert not found, f"{name}, seed {seed}: {found}"


def soak(count: int, seed: int) -> str:
    """``count`` predictions by each thread, of two models."""
    for name in ("MMOE", "PLE"):
        check(name, count, seed)
    return f"{THREADS} threads x {count:,} predictions of 1 to {max(SIZES)} rows, two models, bitwise equal"
