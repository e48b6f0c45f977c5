"""Columns on a device: the batches of the loader that they came from, narrowed."""

import numpy as np
import pytest
import torch
from torch.utils.data import Subset, WeightedRandomSampler

from fastmtl.data.datasets import PredictDataset, TorchDataset
from fastmtl.data.loader import ColumnLoader
from fastmtl.data.resident import ResidentLoader, narrowed, resident
from fastmtl.errors import ConfigError

CPU = torch.device("cpu")
N = 53


def data(seed, labels=True):
    rng = np.random.default_rng(seed)
    x = {
        "price": rng.random(N),
        "user": rng.integers(0, 1000, N),
        "flag": rng.random(N) < 0.5,
        "history": rng.integers(-1, 50, (N, 4)),
        "shop": rng.integers(0, 9, N, dtype=np.int16),
        "hash": rng.integers(0, 2**40, N),
        "vector": rng.random((N, 3), dtype=np.float32),
    }
    return TorchDataset(x, rng.integers(0, 2, (N, 2))) if labels else PredictDataset(x)


LOADERS = {
    "in order": lambda d: ColumnLoader(d, 10),
    "shuffled": lambda d: ColumnLoader(d, 10, shuffle=True),
    "without the last": lambda d: ColumnLoader(d, 10, shuffle=True, drop_last=True),
    "workers": lambda d: ColumnLoader(d, 10, shuffle=True, num_workers=3),
    "a subset": lambda d: ColumnLoader(Subset(d, torch.arange(0, N, 2)), 10, shuffle=True),
    "a subset in order": lambda d: ColumnLoader(Subset(d, [5, 3, 40, 41]), 3),
    "a sampler": lambda d: ColumnLoader(d, 10, sampler=WeightedRandomSampler(torch.ones(N), 25)),
    "a generator": lambda d: ColumnLoader(d, 10, shuffle=True, generator=torch.Generator().manual_seed(3)),
}


@pytest.mark.parametrize("is_resident", [True, False], ids=["resident", "host"])
@pytest.mark.parametrize("kind", LOADERS)
def test_the_same_batches_in_the_same_order(kind, is_resident, seed):
    """And torch's random numbers stand where they would stand."""
    mine = ResidentLoader(LOADERS[kind](data(seed)), CPU, None if is_resident else 100)
    theirs = LOADERS[kind](data(seed))
    assert mine.is_resident == is_resident
    assert len(mine) == len(theirs)
    for _ in range(2):
        torch.manual_seed(seed)
        found = list(mine)
        drawn = torch.rand(1)
        torch.manual_seed(seed)
        right = list(theirs)
        assert torch.equal(drawn, torch.rand(1))
        assert len(found) == len(right)
        for (x, y), (xs, ys) in zip(found, right, strict=True):
            assert list(x) == list(xs)
            for name, column in xs.items():
                assert torch.equal(x[name].to(column.dtype), column) or name == "price", name
            torch.testing.assert_close(x["price"], xs["price"].float(), rtol=0, atol=0)
            assert x["user"].dtype is x["shop"].dtype is x["history"].dtype is x["flag"].dtype is torch.int32
            assert x["hash"].dtype is torch.int64, "more than 32 bits hold"
            assert x["vector"].dtype is y.dtype is torch.float32
            assert torch.equal(y, ys.float())


def test_epochs_that_are_given_up_or_run_at_once_disturb_none(seed):
    """The order's memory is kept from epoch to epoch."""
    loader, right = LOADERS["shuffled"](data(seed)), []
    held = ResidentLoader(loader, CPU)
    for epoch in range(5):
        torch.manual_seed(seed + epoch)
        right.append(torch.cat([y for _, y in LOADERS["shuffled"](data(seed))]))
    for epochs in ((0,), (1, 2), (3,), (4,)):
        running = []
        for epoch in epochs:
            torch.manual_seed(seed + epoch)
            batches = iter(held)
            running.append((epoch, batches, [next(batches)]))
        for epoch, batches, found in running:
            if epoch != 3:
                found += batches
            y = torch.cat([y for _, y in found])
            assert torch.equal(y, right[epoch][: len(y)].float())
            assert len(y) == (10 if epoch == 3 else N)


def test_what_fits_is_a_question_of_bytes(seed):
    one = ResidentLoader(LOADERS["shuffled"](data(seed)), CPU, 0)
    assert one.n_bytes == N * (4 * (3 + 4 + 1 + 3) + 8 + 2 * 4)
    assert not one.is_resident
    assert ResidentLoader(LOADERS["shuffled"](data(seed)), CPU, one.n_bytes).is_resident


def test_rows_without_labels(seed):
    batches = list(ResidentLoader(ColumnLoader(data(seed, labels=False), 20), CPU))
    assert [batch.n_rows for batch in batches] == [20, 20, 13]
    layout, parts = narrowed(data(seed).schema)
    assert batches[0].layout.blocks == layout.blocks == (("user", "flag", "shop"), ("hash",), ("price",))
    assert [part.names for part in parts if part.is_wide] == [("history",), ("vector",)]


def test_batches_are_cut_into_buffers_that_stay(seed):
    """Two sets of page-locked memory in turn: none is written before its copy was made."""
    one = ResidentLoader(LOADERS["in order"](data(seed)), CPU, 0)
    out = None
    for batch, (x, y) in zip(one.batches(), LOADERS["in order"](data(seed)), strict=True):
        if out is None or len(out[0]) != batch.n_rows:
            out = [torch.empty(shape, dtype=dtype) for shape, dtype in batch.shapes()]
        places = [t.data_ptr() for t in out]
        batch.write(out)
        assert [t.data_ptr() for t in out] == places
        assert torch.equal(out[0][:, 0], x["user"].int())
        assert torch.equal(out[-1], y.float())


def test_a_loader_is_made_resident_once(seed):
    loader = LOADERS["shuffled"](data(seed))
    one = resident(loader, CPU)
    assert resident(loader, CPU) is one
    assert resident(one, CPU) is one
    assert (one.schema, one.task_names, one.dataset) == (loader.schema, loader.task_names, loader.dataset)
    assert np.array_equal(one.labels, loader.labels)
    with pytest.raises(ConfigError, match="are on cpu, and are wanted on meta"):
        resident(one, torch.device("meta"))
    with pytest.raises(ConfigError, match="come from a ColumnLoader, not from list"):
        resident([], CPU)


def test_columns_go_to_the_host_where_the_device_is_full_after_all(seed, monkeypatch):
    """Other processes share a GPU, and may take what was free."""
    source = data(seed)
    place = ResidentLoader._place

    def full(self, columns, shape, dtype):
        if self.is_resident and dtype is torch.float32:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return place(self, columns, shape, dtype)

    monkeypatch.setattr(ResidentLoader, "_place", full)
    held = ResidentLoader(ColumnLoader(source, 10), CPU)
    assert not held.is_resident
    for (x, y), (right, labels) in zip(held, ColumnLoader(source, 10), strict=True):
        assert torch.equal(y, labels.float())
        assert torch.equal(x["user"].long(), right["user"])
