"""Checkpoints go both ways between torch's optimizers and ours, and dense gradients and other parameters work too."""

import copy
import pickle

import pytest
import torch
from torch import nn

from fastmtl import optim
from fastmtl.errors import ConfigError

from .runs import RULES, Gradients, assert_follows, assert_same_bits, make_tables, train_densely, train_sparsely
from .test_exact import SHAPES

pytestmark = pytest.mark.usefixtures("correct_roots")

HALF, WHOLE = 120, 240


def pickled(both):
    """There and back again."""
    return pickle.loads(pickle.dumps(both))


def reference_run(name, seed):
    cls, settings = RULES[name]
    tables = make_tables(seed, SHAPES)
    optimizer = getattr(torch.optim, cls)(tables, foreach=False, **settings)
    return tables, train_densely(optimizer, tables, Gradients(seed, SHAPES), range(WHOLE))


@pytest.mark.parametrize("name", RULES)
def test_torch_continues_ours(name, seed):
    cls, settings = RULES[name]
    tables = make_tables(seed, SHAPES)
    ours = getattr(optim, cls)(tables, tables=tables, **settings)
    train_sparsely(ours, tables, Gradients(seed, SHAPES), range(HALF))
    state = copy.deepcopy(ours.state_dict())
    continued = [nn.Parameter(table.detach().clone()) for table in tables]
    theirs = getattr(torch.optim, cls)(continued, foreach=False, **settings)
    theirs.load_state_dict(state)
    train_densely(theirs, continued, Gradients(seed, SHAPES), range(HALF, WHOLE))
    assert_follows(name, continued, *reference_run(name, seed))


@pytest.mark.parametrize("name", RULES)
def test_ours_continues_torch(name, seed):
    cls, settings = RULES[name]
    tables = make_tables(seed, SHAPES)
    theirs = getattr(torch.optim, cls)(tables, foreach=False, **settings)
    train_densely(theirs, tables, Gradients(seed, SHAPES), range(HALF))
    continued = [nn.Parameter(table.detach().clone()) for table in tables]
    ours = getattr(optim, cls)(continued, tables=continued, **settings)
    ours.load_state_dict(copy.deepcopy(theirs.state_dict()))
    train_sparsely(ours, continued, Gradients(seed, SHAPES), range(HALF, WHOLE))
    ours.flush()
    assert_follows(name, continued, *reference_run(name, seed))


@pytest.mark.parametrize("name", RULES)
def test_sparse_and_dense_gradients_may_alternate(name, seed):
    cls, settings = RULES[name]
    tables = make_tables(seed, SHAPES)
    ours = getattr(optim, cls)(tables, tables=tables, **settings)
    gradients = Gradients(seed, SHAPES)
    for start in range(0, WHOLE, 40):
        train_sparsely(ours, tables, gradients, range(start, start + 37))
        train_densely(ours, tables, gradients, range(start + 37, start + 40))
    ours.flush()
    assert_follows(name, tables, *reference_run(name, seed))


@pytest.mark.parametrize("name", RULES)
def test_other_parameters_take_torchs_own_step(name, seed):
    cls, settings = RULES[name]
    torch.manual_seed(seed)
    table, weight = make_tables(seed, [(50, 8)])[0], nn.Parameter(torch.randn(8, 3))
    dense_table, dense_weight = nn.Parameter(table.detach().clone()), nn.Parameter(weight.detach().clone())
    ours = getattr(optim, cls)([table, weight], tables=[table], **settings)
    theirs = getattr(torch.optim, cls)([dense_table, dense_weight], foreach=False, **settings)
    gradients = Gradients(seed, [(50, 8)])
    calls = []
    ours.register_step_post_hook(lambda *_: calls.append(1))
    for step in range(50):
        weight.grad = torch.randn(8, 3)
        dense_weight.grad = weight.grad.clone()
        train_sparsely(ours, [table], gradients, range(step, step + 1))
        (peak,) = train_densely(theirs, [dense_table], gradients, range(step, step + 1))
    ours.flush()
    assert_follows(name, [table], [dense_table], [peak])
    assert_same_bits([weight], [dense_weight])
    assert len(calls) == 50


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("copied", [copy.deepcopy, pickled], ids=lambda f: f.__name__)
def test_copies_go_on(name, copied, seed):
    cls, settings = RULES[name]
    tables = make_tables(seed, SHAPES)
    other = nn.Parameter(torch.ones(7))
    ours = getattr(optim, cls)([*tables, other], tables=tables, **settings)
    other.grad = torch.ones(7)
    train_sparsely(ours, tables, Gradients(seed, SHAPES), range(HALF))
    ours, (*tables, other) = copied((ours, [*tables, other]))
    assert ours.tables == tables
    before = other.detach().clone()
    other.grad = torch.ones(7)
    train_sparsely(ours, tables, Gradients(seed, SHAPES), range(HALF, WHOLE))
    ours.flush()
    assert (other < before).all()
    assert_follows(name, tables, *reference_run(name, seed))


def test_gradients_of_two_lookups_add_up(seed):
    tables, dense = make_tables(seed, [(50, 8)]), make_tables(seed, [(50, 8)])
    ours = optim.Adam(tables, tables=tables)
    theirs = torch.optim.Adam(dense, foreach=False)
    first, second = torch.tensor([3, 7, 9]), torch.tensor([1, 7])
    one, two = torch.randn(3, 8), torch.randn(2, 8)
    parts = [
        torch.sparse_coo_tensor(rows[None], values, (50, 8), check_invariants=True)
        for rows, values in ((first, one), (second, two))
    ]
    tables[0].grad = parts[0] + parts[1]
    dense[0].grad = tables[0].grad.to_dense()
    ours.step()
    theirs.step()
    ours.flush()
    assert_same_bits(tables, dense)


def test_a_scheduler_drives_the_rate(seed):
    tables, dense = make_tables(seed, SHAPES), make_tables(seed, SHAPES)
    gradients = Gradients(seed, SHAPES)
    for cls, params, train in ((optim.Adam, tables, train_sparsely), (torch.optim.Adam, dense, train_densely)):
        more = {"tables": params} if cls is optim.Adam else {"foreach": False}
        optimizer = cls(params, lr=1e-2, weight_decay=1e-3, **more)
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=20, gamma=0.5)
        for step in range(100):
            optimizer.defaults["lr"] = scheduler.get_last_lr()[0]
            train(optimizer, params, gradients, range(step, step + 1))
            optimizer.param_groups[0]["lr"] = optimizer.defaults["lr"]
            scheduler.step()
        if cls is optim.Adam:
            optimizer.flush()
    assert_same_bits(tables, dense)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"amsgrad": True}, "amsgrad=True"),
        ({"maximize": True}, "maximize=True"),
        ({"betas": (0.4, 0.9)}, "betas"),
        ({"embedding_update": "later"}, "use 'exact' or 'lazy'"),
    ],
)
def test_settings_without_a_sparse_form_are_refused(settings, message):
    tables = make_tables(0, [(10, 4)])
    with pytest.raises(ConfigError, match=message):
        optim.Adam(tables, tables=tables, **settings)


@pytest.mark.parametrize("rows", [[10], [-1], [3, 3], [4, 2]])
def test_rows_that_are_no_rows_are_refused(rows):
    tables = make_tables(0, [(10, 4)])
    ours = optim.SGD(tables, tables=tables, weight_decay=1e-3)
    train_sparsely(ours, tables, Gradients(0, [(10, 4)]), range(1))
    with pytest.raises(RuntimeError, match="ascending, unique and in the table"):
        ours.catch_up(tables[0], torch.tensor(rows))
