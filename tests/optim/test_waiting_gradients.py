"""Gradients that wait until their row is next wanted: nobody sees that they did, and none is lost."""

import copy

import pytest
import torch

from fastmtl import optim
from fastmtl.optim import waiting
from fastmtl.optim.rules import FIELDS

from .runs import REPLAYED, RULES, Gradients, assert_same_bits, make_tables

SHAPES = [(90, 16), (30, 5)]


def sparse_gradient(gradients, step, number, table):
    rows, values = gradients.at(step, number)
    return torch.sparse_coo_tensor(rows[None], values, table.shape, check_invariants=False)


@pytest.mark.usefixtures("correct_roots")
@pytest.mark.parametrize("name", REPLAYED)
@pytest.mark.parametrize("seen", ["never", "sometimes"])
def test_rows_need_not_be_read_between_gradients(name, seen, seed):
    """Without catch_up a row's next gradient comes while one still waits; zero_grad leaves what waits alone."""
    cls, settings = RULES[name]
    tables, dense = make_tables(seed, SHAPES), make_tables(seed, SHAPES)
    ours = getattr(optim, cls)(tables, tables=tables, **settings)
    theirs = getattr(torch.optim, cls)(dense, foreach=False, **settings)
    gradients = Gradients(seed, SHAPES)
    for step in range(120):
        for number, table in enumerate(tables):
            table.grad = sparse_gradient(gradients, step, number, table)
            if seen == "sometimes" and step % 3 == 0:
                ours.catch_up(table, torch.arange(0, len(table), 2))
        ours.param_groups[0]["lr"] = settings["lr"] * (1 + step % 5)
        ours.step()
        ours.zero_grad(set_to_none=bool(step % 2))
        if step % 50 == 49:
            ours.state_dict()
        for number, table in enumerate(dense):
            table.grad = sparse_gradient(gradients, step, number, table).to_dense()
        theirs.param_groups[0]["lr"] = ours.param_groups[0]["lr"]
        theirs.step()
    ours.flush()
    assert_same_bits(tables, dense)


@pytest.mark.usefixtures("correct_roots")
def test_a_row_is_moved_when_it_is_wanted(seed):
    (table,), (dense,) = make_tables(seed, SHAPES[:1]), make_tables(seed, SHAPES[:1])
    before = table.detach().clone()
    ours = optim.Adam([table], tables=[table], weight_decay=1e-3)
    theirs = torch.optim.Adam([dense], foreach=False, weight_decay=1e-3)
    table.grad = sparse_gradient(Gradients(seed, SHAPES[:1]), 5, 0, table)
    dense.grad = table.grad.to_dense()
    ours.step()
    theirs.step()
    rows = table.grad._indices()[0]
    swept = -(-len(table) // waiting.MOST_MISSED)
    waits, others = rows[rows >= swept], torch.arange(swept, len(table))
    assert torch.equal(table[others], before[others])
    ours.catch_up(table, waits)
    assert_same_bits([table[waits]], [dense[waits]])


def test_copies_hold_no_debts(seed):
    """A copy, made while gradients wait, goes on as the original does."""
    tables = make_tables(seed, SHAPES)
    ours = optim.Adam(tables, tables=tables, weight_decay=1e-3)
    gradients = Gradients(seed, SHAPES)

    def go_on(optimizer, params, steps):
        for step in steps:
            for number, table in enumerate(params):
                table.grad = sparse_gradient(gradients, step, number, table)
            optimizer.step()

    go_on(ours, tables, range(20))
    other, copied = copy.deepcopy((ours, tables))
    go_on(ours, tables, range(20, 40))
    go_on(other, copied, range(20, 40))
    ours.flush()
    other.flush()
    assert_same_bits(tables, copied)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"slot": torch.zeros(3, dtype=torch.int32)}, "slot must have an entry"),
        ({"slot": torch.tensor([-1, 5, -1, -1], dtype=torch.int32)}, "or its gradient was not"),
        ({"grads": []}, "or its gradient was not"),
        ({"grads": [torch.zeros(1, 3)]}, "must have the table's columns"),
        ({"grads": [torch.zeros(1, 2)] * 4}, "gradients of 4 of 3 steps"),
    ],
)
def test_gradients_that_are_not_there_are_refused(change, message):
    p = torch.ones(4, 2)
    call = {
        "p": p, "states": [p.clone(), p.clone()], "last": torch.ones(4, dtype=torch.int32), "rule": 3,
        "steps": torch.full((3, len(FIELDS)), 0.5), "first_step": 0, "rows": None, "grads": [torch.zeros(1, 2)],
        "slot": torch.tensor([-1, 0, -1, -1], dtype=torch.int32),
    }  # fmt: skip
    torch.ops.fastmtl.table_catch_up(**copy.deepcopy(call))
    with pytest.raises(RuntimeError, match=message):
        torch.ops.fastmtl.table_catch_up(**(copy.deepcopy(call) | change))


def test_deferred_calls_are_checked():
    p = torch.ones(4, 2)
    call = {
        "p": p, "states": [p.clone(), p.clone()], "last": torch.ones(4, dtype=torch.int32), "rule": 3,
        "steps": torch.full((3, len(FIELDS)), 0.5), "first_step": 0, "rows": torch.tensor([1]),
        "grads": [torch.zeros(1, 2)], "slot": torch.full((4,), -1, dtype=torch.int32), "begin": 0, "end": 4,
    }  # fmt: skip
    torch.ops.fastmtl.table_defer(**copy.deepcopy(call))
    for change, message in (
        ({"grads": []}, "no step to take"),
        ({"grads": [torch.zeros(2, 2)]}, "a row for each of rows"),
        ({"end": 5}, "not in the table"),
        ({"rows": torch.tensor([4])}, "ascending, unique and in the table"),
    ):
        with pytest.raises(RuntimeError, match=message):
            torch.ops.fastmtl.table_defer(**(copy.deepcopy(call) | change))
