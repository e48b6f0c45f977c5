"""Row-wise Adagrad against its rule in float64, and what it shares with the other optimizers of tables."""

import copy

import pytest
import torch
from torch import nn

from fastmtl import optim
from fastmtl.errors import ConfigError
from fastmtl.trainers import MTLTrainer

from .runs import NEVER, Gradients, assert_same_bits, make_tables, schedule, train_densely, train_sparsely
from .test_exact import SHAPES
from .test_trainer import is_sparse, make_model, trained

SETTINGS = [
    {"lr": 0.1},
    {"lr": 0.05, "lr_decay": 1e-3, "initial_accumulator_value": 0.1},
    {"lr": 0.05, "weight_decay": 1e-3, "eps": 1e-3},
]


def by_the_rule(seed, settings, steps):
    """Tables and states in float64, every row in every step."""
    tables = [table.detach().double() for table in make_tables(seed, SHAPES)]
    sums = [torch.full((len(table),), settings.get("initial_accumulator_value", 0.0)).double() for table in tables]
    gradients = Gradients(seed, SHAPES)
    for step in range(steps):
        rate = settings["lr"] * schedule(step) / (1 + step * settings.get("lr_decay", 0.0))
        for number, (table, total) in enumerate(zip(tables, sums, strict=True)):
            rows, values = gradients.at(step, number)
            grad = table * settings.get("weight_decay", 0.0)
            grad[rows] += values.double()
            total += grad.square().mean(dim=1)
            table -= rate * grad / (total.sqrt() + settings.get("eps", 1e-10))[:, None]
    return tables, sums


def run(seed, settings, steps, train=train_sparsely):
    tables = make_tables(seed, SHAPES)
    optimizer = optim.RowwiseAdagrad(tables, tables=tables, **settings)
    train(optimizer, tables, Gradients(seed, SHAPES), range(steps))
    optimizer.flush()
    return tables, optimizer


@pytest.mark.parametrize("settings", SETTINGS)
def test_the_rule_is_followed(settings, seed):
    tables, optimizer = run(seed, settings, 300)
    right, sums = by_the_rule(seed, settings, 300)
    for table, wanted, total in zip(tables, right, sums, strict=True):
        torch.testing.assert_close(table.detach().double(), wanted, rtol=1e-5, atol=2e-5 * float(wanted.abs().max()))
        found = optimizer.state[table]["sum"]
        assert found.shape == (len(table),)
        torch.testing.assert_close(found.double(), total, rtol=5e-5, atol=1e-12)
        assert not table[NEVER, ::2].any()


@pytest.mark.parametrize("settings", SETTINGS)
def test_waiting_threads_and_dense_gradients_change_no_bit(settings, seed, threads):
    tables, _ = run(seed, settings, 100)
    threads(3)
    assert_same_bits(tables, run(seed, settings, 100)[0])
    assert_same_bits(tables, run(seed, settings, 100, train_densely)[0])


def test_other_parameters_are_adagrads(seed):
    torch.manual_seed(seed)
    (table,), weight = make_tables(seed, [(50, 8)]), nn.Parameter(torch.randn(8, 3))
    dense = nn.Parameter(weight.detach().clone())
    ours, theirs = optim.RowwiseAdagrad([table, weight], tables=[table]), torch.optim.Adagrad([dense])
    for step in range(20):
        weight.grad = torch.randn(8, 3)
        dense.grad = weight.grad.clone()
        train_sparsely(ours, [table], Gradients(seed, [(50, 8)]), range(step, step + 1))
        theirs.param_groups[0]["lr"] = ours.param_groups[0]["lr"]
        theirs.step()
    torch.testing.assert_close(weight, dense, rtol=1e-6, atol=1e-7)


def test_checkpoints(seed):
    settings = SETTINGS[2]
    whole, _ = run(seed, settings, 100)
    tables, first = run(seed, settings, 60)
    state = copy.deepcopy(first.state_dict())
    again = optim.RowwiseAdagrad(tables, tables=tables, **settings)
    again.load_state_dict(state)
    train_sparsely(again, tables, Gradients(seed, SHAPES), range(60, 100))
    again.flush()
    assert_same_bits(tables, whole)
    plain = optim.Adagrad(tables, tables=tables)
    with pytest.raises(ConfigError, match=r"must be \[70\], one number a row, not \[70, 16\]"):
        again.load_state_dict(plain.state_dict())


def test_the_trainer_takes_it(seed, tmp_path):
    trainer, losses = trained(seed, tmp_path, None, optim.RowwiseAdagrad, {"lr": 0.05}, epochs=4)
    assert is_sparse(trainer)
    assert type(trainer.optimizer) is optim.RowwiseAdagrad
    assert sum(losses[-1]) < sum(losses[0])
    for table in trainer.optimizer.tables:
        assert trainer.optimizer.state[table]["sum"].shape == (len(table),)
    for more, message in (
        ({"embedding_update": "dense"}, "no tables to train by rows"),
        ({"adaptive_params": {"method": "gradnorm"}}, "no tables to train by rows"),
        ({"optimizer_params": {"lr": 0.1, "maximize": True}}, "maximize=True"),
    ):
        with pytest.raises(ConfigError, match=message):
            MTLTrainer(make_model(seed), optimizer_fn=optim.RowwiseAdagrad, model_path=str(tmp_path), **more)


def test_no_tables_are_refused():
    with pytest.raises(ConfigError, match=r"torch\.optim\.Adagrad"):
        optim.RowwiseAdagrad([nn.Parameter(torch.ones(3))])
