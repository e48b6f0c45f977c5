"""Batches made ahead: the loader's own, in its order, with its errors, and nothing left behind."""

import threading
import time

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, IterableDataset, WeightedRandomSampler

from fastmtl.data.ahead import ahead, draws_at_once
from fastmtl.data.loader import ColumnLoader, TorchDataset


class Source:
    """A generator that notes which thread asks for each of its items, and whether it was closed."""

    def __init__(self, n, error_at=None):
        self.n, self.error_at = n, error_at
        self.threads, self.is_closed = [], False

    def __iter__(self):
        try:
            for i in range(self.n):
                self.threads.append(threading.current_thread())
                if i == self.error_at:
                    raise ValueError(f"item {i}")
                yield i
        finally:
            self.is_closed = True


def threads_of_batches():
    return [thread for thread in threading.enumerate() if thread.name.startswith("fastmtl-batches")]


@pytest.mark.parametrize("n", [0, 1, 2, 7])
def test_order_is_kept_and_the_first_item_is_the_callers(n):
    source = Source(n)
    assert list(ahead(source, lambda i: i * i)) == [i * i for i in range(n)]
    assert source.is_closed
    assert not threads_of_batches()
    if n:
        assert source.threads[0] is threading.main_thread()
        assert all(thread is not threading.main_thread() for thread in source.threads[1:])


def test_one_item_is_made_while_the_one_before_is_used_and_no_more():
    source = Source(10)
    for i in ahead(source):
        end = time.monotonic() + 10
        while len(source.threads) < min(i + 2, 10):
            assert time.monotonic() < end, "the next item is not being made"
            time.sleep(0.001)
        time.sleep(0.002)
        assert len(source.threads) <= i + 2


@pytest.mark.parametrize("where", ["loader", "make"])
@pytest.mark.parametrize("at", [0, 1, 4])
def test_an_error_is_raised_where_its_item_is_asked_for(where, at):
    source = Source(6, at if where == "loader" else None)

    def make(i):
        if where == "make" and i == at:
            raise ValueError(f"item {i}")
        return i

    items = ahead(source, make)
    assert [next(items) for _ in range(at)] == list(range(at))
    with pytest.raises(ValueError, match=f"item {at}"):
        next(items)
    assert not threads_of_batches()
    assert source.is_closed


def test_batches_that_are_given_up_close_the_loader():
    source = Source(10**9)
    batches = ahead(source)
    assert [next(batches), next(batches)] == [0, 1]
    batches.close()
    assert source.is_closed
    assert not threads_of_batches()


def data(rng, n=60):
    x = {"a": rng.integers(0, 9, n), "b": rng.random(n, dtype=np.float32)}
    return TorchDataset(x, rng.random((n, 1), dtype=np.float32))


def test_random_numbers_are_drawn_as_without(rng, seed):
    """A step that draws too (dropout) sees the same numbers, and so do the epochs after it."""
    dataset, results = data(rng), []
    for wrap in (iter, ahead):
        torch.manual_seed(seed)
        loader = ColumnLoader(dataset, 7, shuffle=True)
        drawn = []
        for _ in range(3):
            for x, y in wrap(loader):
                drawn += [x["a"].clone(), y.clone(), torch.rand(2)]
        results.append((drawn, torch.get_rng_state()))
    for first, second in zip(results[0][0], results[1][0], strict=True):
        assert torch.equal(first, second)
    assert torch.equal(results[0][1], results[1][1])


class Stream(IterableDataset):
    def __iter__(self):
        return iter(())


def test_only_loaders_that_draw_at_once_are_asked_by_another_thread(rng):
    dataset = data(rng)
    assert draws_at_once(ColumnLoader(dataset, 7))
    assert draws_at_once(ColumnLoader(dataset, 7, shuffle=True))
    assert not draws_at_once(ColumnLoader(dataset, 7, sampler=WeightedRandomSampler([1.0] * 60, 60)))
    assert not draws_at_once(DataLoader(dataset, 7))
    assert not draws_at_once([1, 2])
    stream = Stream()
    assert not draws_at_once(DataLoader(stream, batch_size=None))
    stream.draws_at_once = True
    assert draws_at_once(DataLoader(stream, batch_size=None))
    assert not draws_at_once(DataLoader(stream, batch_size=None, num_workers=1))
