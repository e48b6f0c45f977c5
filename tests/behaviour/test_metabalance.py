"""MetaBalance follows its paper: auxiliary gradients take the target's size, tensor by tensor, as far as asked."""

import numpy as np
import pytest
import torch
from devices import fetch

from behaviour import by_hand
from behaviour.helpers import CLASSIFICATION, KINDS, data, loader, model, pair, trainer
from fastmtl.errors import FastMTLError
from fastmtl.utils import MetaBalance, shared_task_layers

LR = 0.1
#: What the paper shares between tasks, by the start of its name.
SHARED = {
    "SharedBottom": ("embedding.", "bottom_mlp."),
    "MMOE": ("embedding.", "experts."),
    "PLE": ("embedding.", "cgc_layers."),
}


def _run(trained, rows, path, **adaptive):
    """One epoch of MetaBalance under plain SGD."""
    runner = trainer(
        trained,
        path,
        optimizer_fn=torch.optim.SGD,
        optimizer_params={"lr": LR},
        adaptive_params={"method": "metabalance", **adaptive},
    )
    runner.train_one_epoch(loader(*rows))


@pytest.mark.parametrize(("relax_factor", "beta"), [(0.7, 0.9), (0.0, 0.9), (0.95, 0.5)])
@pytest.mark.parametrize(("kind", "n_step"), [("SharedBottom", 1), ("SharedBottom", 3), ("MMOE", 2), ("PLE", 1)])
def test_steps_are_those_computed_by_hand(kind, n_step, relax_factor, beta, backend, tmp_path):
    rows = data(64 * n_step)
    ours, theirs = pair(kind)
    shared = [p for name, p in theirs.named_parameters() if name.startswith(SHARED[kind])]
    by_hand.metabalance(theirs, shared, list(loader(*rows)), CLASSIFICATION, relax_factor, beta, LR)
    _run(ours, rows, tmp_path, relax_factor=relax_factor, beta=beta)
    state = fetch(ours.state_dict())
    for name, value in theirs.named_parameters():
        torch.testing.assert_close(
            state[name], value.detach(), rtol=1e-3, atol=2e-5, msg=lambda m, name=name: f"{name}: {m}"
        )


def test_relax_factor_and_beta_have_an_effect(tmp_path):
    rows = data(64 * 4)
    states = []
    for relax_factor, beta in ((0.7, 0.9), (0.1, 0.9), (0.7, 0.1)):
        trained = model()
        _run(trained, rows, tmp_path, relax_factor=relax_factor, beta=beta)
        states.append(trained.state_dict()["bottom_mlp.mlp.0.weight"])
    assert (states[0] - states[1]).abs().max() > 1e-4
    assert (states[0] - states[2]).abs().max() > 1e-5


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "ESMM"])
def test_every_model_with_shared_layers_trains(kind, backend, tmp_path):
    x, y = data(256)
    runner = trainer(model(kind), tmp_path, n_epoch=4, adaptive_params={"method": "metabalance"})
    log = np.array(runner.fit(loader(x, y), loader(x, y)))
    assert np.isfinite(log).all()
    assert log[-1, 0] < log[0, 0]


def test_regularisation_loss_is_part_of_the_step(tmp_path):
    states = []
    for strength in (0.0, 0.5):
        trained = model()
        runner = trainer(
            trained,
            tmp_path,
            optimizer_fn=torch.optim.SGD,
            optimizer_params={"lr": LR},
            adaptive_params={"method": "metabalance"},
            regularization_params={"dense_l2": strength},
        )
        runner.train_one_epoch(loader(*data(64)))
        states.append(trained.state_dict())
    # The towers are the tasks' own: no balancing, so the step differs by lr times the gradient of 0.5 * w^2.
    name = "towers.0.mlp.0.weight"
    start = model().state_dict()[name]
    torch.testing.assert_close(states[1][name], states[0][name] - LR * start, rtol=1e-4, atol=1e-6)
    assert not torch.equal(states[0]["bottom_mlp.mlp.0.weight"], states[1]["bottom_mlp.mlp.0.weight"])


@pytest.mark.parametrize("keywords", [{"relax_factor": -0.1}, {"relax_factor": 1.5}, {"beta": 1.0}, {"beta": -1}])
def test_factors_out_of_range_are_named(keywords):
    ((name, value),) = keywords.items()
    with pytest.raises((FastMTLError, ValueError), match=rf"{name}.*{value}"):
        MetaBalance(model().parameters(), **keywords)


def test_shared_task_layers_splits_all_parameters():
    their_mtl = pytest.importorskip("torch_rechub.utils.mtl", reason="torch-rechub is not here")
    for kind in KINDS:
        if kind == "ESMM":
            continue
        trained = model(kind)
        shared, task = shared_task_layers(trained)
        both = [id(p) for p in (*shared, *task)]
        assert len(set(both)) == len(both)
        assert set(both) == {id(p) for p in trained.parameters()}
        their_shared, their_task = their_mtl.shared_task_layers(model(kind, package="torch_rechub"))
        assert sum(p.numel() for p in shared) == sum(p.numel() for p in their_shared)
        assert sum(p.numel() for p in task) == sum(p.numel() for p in their_task)
