"""The sums of missed steps against the steps one by one in float64, whatever the numbers, and what must be refused."""

import random

import numpy as np
import pytest
import torch

from fastmtl import optim
from fastmtl.optim import waiting
from fastmtl.optim.rules import FIELDS, RULES, has_closed_form
from fastmtl.optim.waiting import WAIT_FIELDS

from .runs import Gradients, assert_close, make_tables, peak_of, train_sparsely


def steps_of(rng, rule, n):
    """Numbers of ``n`` steps with a learning rate that rises, falls, jumps and is zero now and then."""
    beta1, beta2 = rng.choice(((0.9, 0.999), (0.8, 0.99), (0.95, 0.9999), (0.9, 0.95)))
    lr, eps, decay = 10 ** rng.uniform(-4, -1), rng.choice((1e-8, 1e-10, 1e-4, 1.0)), rng.choice((1e-2, 0.5))
    found = []
    for number in range(1, n + 1):
        rate = lr * min(1, number / 100) * rng.choice((1, 1, 1, 0.3)) * (number % 97 != 0)
        step = dict.fromkeys(FIELDS, 0.0)
        step |= {"keep": beta2, "fresh": 1 - beta1, "fresh_square": 1 - beta2, "eps": eps}
        step |= {"root": (1 - beta2**number) ** 0.5, "neg_lr": -rate / (1 - beta1**number)}
        step["shrink"] = 1 - rate * decay if rule == "adamw" else 1.0
        found.append([step[field] for field in FIELDS])
    return found


def close(rule, p, m, v, last, numbers, rows=None):
    """The table's rows at the last of the steps 1 .. n, in place."""
    waits = torch.zeros(len(numbers) + 1, WAIT_FIELDS, dtype=torch.float64)
    torch.ops.fastmtl.table_wait_from(waits)
    front = 0
    for n, step in enumerate(numbers, 1):
        front = torch.ops.fastmtl.table_wait(waits, n, front, step)
    torch.ops.fastmtl.table_close(p, [m, v], last, RULES.index(rule), waits, len(waits), 0, rows)


def one_by_one(p, m, v, last, numbers):
    """The same in float64, with the steps' numbers as float32 has them: (the weights, m, v, all the ways moved)."""
    p, m, v = (x.double().numpy() for x in (p, m, v))
    steps, moved, last = np.float32(numbers).astype(np.float64), np.zeros_like(p), last.numpy()
    for number, fields in enumerate(steps, 1):
        s, due = dict(zip(FIELDS, fields, strict=True)), last < number
        m[due] *= 1 - s["fresh"]
        v[due] *= s["keep"]
        by = s["neg_lr"] * m[due] / (np.sqrt(v[due]) / s["root"] + s["eps"])
        p[due] = p[due] * s["shrink"] + by
        moved[due] = moved[due] * s["shrink"] + np.abs(by)
    return tuple(map(torch.from_numpy, (p, m, v, moved)))


@pytest.mark.parametrize("rule", ["adam", "adamw"])
def test_any_wait_is_summed_up(rule, seed):
    """v from far below eps squared to far above, from the first steps on, over waits of 0 to 2,000 steps."""
    rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    for _ in range(6):
        rows, dim, n = rng.choice((1, 40)), rng.choice((1, 5, 16, 33)), rng.choice((1, 3, 40, 300, 2000))
        numbers = steps_of(rng, rule, n)
        assert has_closed_form(RULES.index(rule), numbers[0])
        p = torch.randn(rows, dim, generator=generator) * (torch.rand(rows, 1, generator=generator) < 0.5)
        size = 10 ** (-10 * torch.rand(rows, 1, generator=generator))
        m = torch.randn(rows, dim, generator=generator) * size
        v = (torch.randn(rows, dim, generator=generator) * size * 10 ** rng.uniform(-2, 1)).square()
        m[::7], v[::11] = 0, 0
        last = (torch.rand(rows, generator=generator) ** rng.choice((0.1, 1, 5)) * (n + 1)).int()
        right, first, second, moved = one_by_one(p, m, v, last, numbers)
        before, before_m, before_v = p.clone(), m.clone(), v.clone()
        close(rule, p, m, v, last, numbers)
        assert (last == n).all()
        assert ((p - right).abs() <= 5e-7 * moved + 1.2e-7 * torch.maximum(right.abs(), before.abs())).all()
        # a factor below float32's least is zero
        for got, want, had in ((m, first, before_m), (v, second, before_v)):
            assert ((got.double() - want).abs() <= 1e-6 * want.abs() + 2e-38 * (1 + had.abs())).all()


def test_listed_rows_alone_are_touched(seed):
    numbers = steps_of(random.Random(seed), "adamw", 20)
    generator = torch.Generator().manual_seed(seed)
    p, m = torch.randn(2, 3000, 8, generator=generator)
    v, last = m.square(), torch.zeros(3000, dtype=torch.int32)
    whole, listed = [[x.clone() for x in (p, m, v, last)] for _ in range(2)]
    rows = torch.arange(0, 3000, 3)
    close("adamw", *whole, numbers)
    close("adamw", *listed, numbers, rows)
    for was, one, all_ in zip((p, m, v, last), listed, whole, strict=True):
        assert torch.equal(one[rows], all_[rows])
        one[rows] = was[rows]
        assert torch.equal(one, was)


def test_the_sums_kept_are_bounded(seed, monkeypatch):
    """After so many steps every row is made current, and the counting begins anew."""
    shapes, runs = ((60, 4),), []
    for most in (40, 10_000):
        monkeypatch.setattr(waiting, "_FEWEST_SUMS", 20)
        monkeypatch.setattr(waiting, "_MOST_SUMS", most)
        tables = make_tables(seed, shapes)
        optimizer = optim.AdamW(tables, tables=tables, weight_decay=0.1)
        train_sparsely(optimizer, tables, Gradients(seed, shapes), range(150))
        rows_wait = optimizer._pending[tables[0]].waiting
        assert isinstance(rows_wait, waiting.Sums)
        assert len(rows_wait.waits) <= max(most, 160)
        optimizer.flush()
        runs.append(tables)
    assert_close(*runs, [peak_of(table) for table in runs[0]])


@pytest.mark.parametrize(
    ("settings", "kind"),
    [
        ({}, waiting.Sums),
        ({"eps": 0.0}, waiting.Replays),
        ({"betas": (0.999, 0.999)}, waiting.Replays),
        ({"weight_decay": 1e-3}, waiting.Replays),
    ],
)
def test_what_has_no_closed_form_is_replayed(settings, kind, seed):
    tables = make_tables(seed, [(10, 4)])
    optimizer = optim.Adam(tables, tables=tables, **settings)
    train_sparsely(optimizer, tables, Gradients(seed, [(10, 4)]), range(1))
    assert type(optimizer._pending[tables[0]].waiting) is kind


def test_settings_may_change_between_the_forms(seed):
    """Weight decay switched on and off: rows pay by the rule under which they waited."""
    shapes = [(50, 8)]
    (table,), (dense,) = make_tables(seed, shapes), make_tables(seed, shapes)
    ours, theirs = optim.Adam([table], tables=[table]), torch.optim.Adam([dense], foreach=False)
    gradients = Gradients(seed, shapes)
    for step in range(60):
        rows, values = gradients.at(step, 0)
        ours.catch_up(table, rows)
        table.grad = torch.sparse_coo_tensor(rows[None], values, table.shape, check_invariants=False)
        dense.grad = table.grad.to_dense()
        for optimizer in (ours, theirs):
            optimizer.param_groups[0]["weight_decay"] = 0.01 * (step // 10 % 2)
            optimizer.step()
    ours.flush()
    torch.testing.assert_close(table.detach(), dense.detach(), rtol=0, atol=2e-6 * float(dense.detach().abs().max()))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rule": 0}, "no closed form"),
        ({"waits": torch.zeros(3, 2, dtype=torch.float64)}, "waits must be"),
        ({"n": 4}, "there are no 4 of 3 waits"),
        ({"first_step": -1}, "out of range"),
        ({"rows": torch.tensor([4])}, "ascending, unique and in the table"),
        ({"first_step": 1}, "missed more steps"),
    ],
)
def test_malformed_calls_are_refused(change, message):
    p, last = torch.ones(4, 2), torch.zeros(4, dtype=torch.int32)
    waits = torch.ones(3, WAIT_FIELDS, dtype=torch.float64)
    call = {
        "p": p, "states": [p.clone(), p.clone()], "last": last, "rule": 3, "waits": waits, "n": 3, "first_step": 0,
        "rows": None,
    }  # fmt: skip
    with pytest.raises(RuntimeError, match=message):
        torch.ops.fastmtl.table_close(**(call | change))
    with pytest.raises(RuntimeError, match="there is no place for wait 3 of 3"):
        torch.ops.fastmtl.table_wait(waits, 3, 0, [0.5] * 9)
    with pytest.raises(RuntimeError, match="there is no wait 3 of 2"):
        torch.ops.fastmtl.table_wait(waits, 2, 3, [0.5] * 9)
