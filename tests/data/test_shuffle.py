"""An epoch's order is torch's permutation, however much of it is drawn at a time."""

import random

import pytest
import torch

from fastmtl.backends import native
from fastmtl.data import shuffle
from fastmtl.data.shuffle import Memory, Shuffle

pytestmark = pytest.mark.skipif(native.unavailable() is not None, reason=str(native.unavailable()))


def randperm(n, seed, dtype):
    return torch.randperm(n, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("most", [1, 50, 3000, 200_000])
def test_it_is_torch_s_permutation(most, dtype, seed, monkeypatch):
    rng = random.Random(seed)
    n, torch_seed, step = rng.randint(1, most), rng.randrange(2**63), rng.randint(1, most)
    monkeypatch.setattr(shuffle, "PIECE", rng.choice((1, 7, 10_000)))
    order = Shuffle(n, torch_seed, dtype)
    given = [order.rows(start, min(start + step, n)) for start in range(0, n, step)]
    first = given[0].clone()
    assert torch.equal(torch.cat(given), randperm(n, torch_seed, dtype))
    assert torch.equal(given[0], first), "rows that were given do not change"


def test_only_what_is_asked_for_is_drawn(monkeypatch):
    taken = []
    inner = native.shuffle_ahead
    monkeypatch.setattr(native, "shuffle_ahead", lambda *a: (taken.append((a[1], len(a[2]))), inner(*a))[1])
    monkeypatch.setattr(shuffle, "PIECE", 10)
    assert shuffle._draws_as_torch()
    taken.clear()
    order = Shuffle(100, 1, torch.int32)
    for start in range(0, 40, 4):
        order.rows(start, start + 4)
    order.rows(40, 100)
    assert taken == [(0, 4), (4, 4), (8, 8), (16, 10), (26, 10), (36, 10), (46, 54)], "few at first"


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_memory_is_used_again(dtype, seed, monkeypatch):
    """Orders that end, are given up, or are drawn at the same time as another; and other numbers of rows."""
    rng = random.Random(seed)
    monkeypatch.setattr(shuffle, "PIECE", rng.choice((1, 7, 10_000)))
    memory, n, places = Memory(), rng.randint(50, 3000), set()
    for _ in range(12):
        if rng.random() < 0.2:
            n, places = rng.randint(50, 3000), set()
        at_once = [(s, Shuffle(n, s, dtype, memory)) for s in range(rng.choice((1, 1, 2)))]
        step, given = rng.randint(1, n), []
        for start in range(0, n, step):
            end = min(start + step, n)
            if rng.random() < 0.1:
                break
            given.append([order.rows(start, end) for _, order in at_once])
        places |= {order._order.data_ptr() for _, order in at_once}
        for _, order in at_once:
            order.close()
            order.close()
        for (s, _), rows in zip(at_once, zip(*given, strict=True), strict=False):
            found = torch.cat(rows)
            assert torch.equal(found, randperm(n, s, dtype)[: len(found)])
    assert len(memory._kept) == 1
    assert memory._kept[0].order.data_ptr() in places


def test_memory_is_not_written_whole_for_each_order(monkeypatch):
    memory, mend = Memory(), shuffle._Work.mend
    for s in range(3):
        order = Shuffle(1000, s, torch.int32, memory)
        work, mended = order._work, []
        monkeypatch.setattr(shuffle._Work, "mend", lambda w, upto, m=mended: (m.append((w.whole, upto)), mend(w, upto)))
        for start in range(0, 1000, 100):
            order.rows(start, start + 100)
        order.close()
        monkeypatch.undo()
        assert mended == [(start, start + 100) for start in range(0, 1000, 100)]
        assert torch.equal(work.order, torch.arange(1000, dtype=torch.int32))
        assert memory._kept == [work]


@pytest.mark.parametrize("why", ["long", "no library", "another torch"])
def test_where_it_can_t_be_drawn_ahead_torch_draws_it(why, seed, monkeypatch):
    if why == "long":
        monkeypatch.setattr(shuffle, "_TOO_MANY", 90)
    elif why == "no library":
        monkeypatch.setattr(native, "unavailable", lambda: "none")
    else:
        monkeypatch.setattr(shuffle, "_draws_as_torch", lambda: False)
    monkeypatch.setattr(native, "shuffle_ahead", None)
    assert torch.equal(Shuffle(90, seed, torch.int64).rows(0, 90), randperm(90, seed, torch.int64))


def test_steps_that_there_are_not_are_refused():
    for begin, count in ((-1, 2), (3, 3), (6, 0)):
        with pytest.raises(RuntimeError, match=f"no {count} steps from {begin} on in an order of 5"):
            native.shuffle_ahead(torch.arange(5), begin, torch.zeros(count, dtype=torch.int64))
    with pytest.raises(RuntimeError, match="order"):
        native.shuffle_ahead(torch.rand(5), 0, torch.zeros(1, dtype=torch.int64))
