"""GradNorm follows its paper: a target for each task, so that alpha matters, taken on the last shared layer."""

import numpy as np
import pytest
import torch
from devices import fetch

from behaviour import by_hand
from behaviour.helpers import KINDS, data, loader, model, pair, trainer

LR = 0.05
TYPES = ("classification", "regression")
LAST_SHARED = "bottom_mlp.mlp.4.weight"


def _rows(n, scale=1.0):
    """``n`` rows whose second label is a number of size ``scale``."""
    x, y = data(n)
    y[:, 1] = scale * (x["age"] + 0.3 * x["profile"][:, 0])
    return x, y


def _weights(trained):
    state = trained.state_dict()
    return np.array([state[f"loss weight.{task}"].item() for task in range(trained.n_task)])


def _run(trained, rows, path, alpha=1.5, **keywords):
    """One epoch of GradNorm under plain SGD; returns the loss weights afterwards."""
    runner = trainer(
        trained,
        path,
        TYPES,
        optimizer_fn=torch.optim.SGD,
        optimizer_params={"lr": LR},
        adaptive_params={"method": "gradnorm", "alpha": alpha},
        **keywords,
    )
    runner.train_one_epoch(loader(*rows))
    return _weights(trained)


@pytest.mark.parametrize("alpha", [0.0, 0.16, 1.5])
@pytest.mark.parametrize("n_step", [1, 3])
def test_steps_are_those_computed_by_hand(n_step, alpha, backend, tmp_path):
    rows = _rows(64 * n_step, scale=3.0)
    ours, theirs = pair(task_types=TYPES)
    history = by_hand.gradnorm(
        theirs, dict(theirs.named_parameters())[LAST_SHARED], list(loader(*rows)), TYPES, alpha, LR
    )
    weights = _run(ours, rows, tmp_path, alpha)
    np.testing.assert_allclose(weights, history[-1].numpy(), rtol=1e-4)
    state = fetch(ours.state_dict())
    for name, value in theirs.named_parameters():
        torch.testing.assert_close(
            state[name], value.detach(), rtol=1e-3, atol=1e-5, msg=lambda m, name=name: f"{name}: {m}"
        )


def test_alpha_has_an_effect(tmp_path):
    """torch-rechub's target is one number for all tasks, so that its alpha only scales it."""
    rows = _rows(64 * 30, scale=0.5)
    by_alpha = {alpha: _run(model(task_types=TYPES), rows, tmp_path, alpha) for alpha in (0.0, 3.0)}
    assert np.abs(by_alpha[0.0] - by_alpha[3.0]).max() > 0.05


def test_weights_move_towards_equal_gradients(tmp_path):
    """The task whose gradients are a hundred times larger loses weight, and the weights keep their sum."""
    weights = _run(model(task_types=TYPES), _rows(64 * 10, scale=10.0), tmp_path)
    assert weights[1] < 0.9 < 1.1 < weights[0]
    assert weights.sum() == pytest.approx(2.0, abs=1e-5)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "ESMM"])
def test_every_model_with_shared_layers_trains(kind, backend, tmp_path):
    x, y = data(256)
    trained = model(kind)
    runner = trainer(trained, tmp_path, n_epoch=4, adaptive_params={"method": "gradnorm"})
    log = np.array(runner.fit(loader(x, y), loader(x, y)))
    assert np.isfinite(log).all()
    assert log[-1, 0] < log[0, 0]
    assert _weights(trained).sum() == pytest.approx(2.0, abs=1e-4)
    assert not np.allclose(_weights(trained), 1.0)


def test_regularisation_loss_is_part_of_the_step(tmp_path):
    rows = _rows(64)
    plain, regularised = model(task_types=TYPES), model(task_types=TYPES)
    _run(plain, rows, tmp_path)
    _run(regularised, rows, tmp_path, regularization_params={"dense_l2": 0.5})
    name = "bottom_mlp.mlp.0.weight"
    start = model(task_types=TYPES).state_dict()[name]
    # d/dw of 0.5 * w^2 is w: one step of SGD takes lr * w more.
    torch.testing.assert_close(
        regularised.state_dict()[name], plain.state_dict()[name] - LR * start, rtol=1e-4, atol=1e-6
    )


def test_a_task_without_labels_in_the_first_batch_starts_when_it_has_some(tmp_path):
    """Two tasks with the same labels stay close, though the second has none in the first batch."""
    x, y = data(256)
    y = y.astype("float32")
    y[:, 1] = y[:, 0]
    y[:64, 1] = float("nan")
    batches = [
        ({name: torch.as_tensor(column[i : i + 64]) for name, column in x.items()}, y[i : i + 64])
        for i in range(0, 256, 64)
    ]
    runner = trainer(model(), tmp_path, adaptive_params={"method": "gradnorm", "alpha": 1.5})
    runner.train_one_epoch(batches)
    assert runner.strategy.initial[1] > 0.1
    assert (runner.loss_weight > 0).all()
    assert float(runner.loss_weight.detach().sum()) == pytest.approx(2, rel=1e-5)
