"""Uncertainty weighting follows Kendall et al.: no floor under the log-variances, and its checkpoints load anywhere."""

import numpy as np
import pytest
import torch
from devices import call, fetch

from behaviour import by_hand
from behaviour.helpers import CLASSIFICATION, Memory, data, loader, model, pair, same_state, trainer

LR = 0.05
UWL = {"method": "uwl"}


def _log_variances(trained):
    state = trained.state_dict()
    return np.array([state[f"loss weight.{task}"].item() for task in range(trained.n_task)])


@pytest.mark.parametrize("types", [CLASSIFICATION, ("classification", "regression")])
def test_steps_are_those_computed_by_hand(types, backend, tmp_path):
    rows = data(64 * 3)
    ours, theirs = pair(task_types=types)
    expected = by_hand.uwl(theirs, list(loader(*rows)), types, LR)
    runner = trainer(
        ours, tmp_path, types, optimizer_fn=torch.optim.SGD, optimizer_params={"lr": LR}, adaptive_params=UWL
    )
    runner.train_one_epoch(loader(*rows))
    np.testing.assert_allclose(_log_variances(ours), expected.numpy(), rtol=1e-4)
    state = fetch(ours.state_dict())
    for name, value in theirs.named_parameters():
        torch.testing.assert_close(
            state[name], value.detach(), rtol=1e-3, atol=1e-5, msg=lambda m, name=name: f"{name}: {m}"
        )


def test_log_variances_pass_zero_and_follow_the_losses(tmp_path):
    """At the optimum s = log(2 L): below zero for a loss under one half, where torch-rechub's stay at 0 for good."""
    x, y = data(512)
    y[:] = (x["age"] > 0)[:, None]  # learnable to nearly zero loss
    trained = model()
    runner = trainer(trained, tmp_path, optimizer_params={"lr": 5e-2}, adaptive_params=UWL)
    for _ in range(30):
        losses = runner.train_one_epoch(loader(x, y))
    assert max(losses) < 0.1
    assert (_log_variances(trained) < -0.5).all()


def test_a_checkpoint_loads_into_a_fresh_model(tmp_path):
    x, y = data(256)
    trained = model("MMOE")
    trainer(trained, tmp_path, n_epoch=2, adaptive_params=UWL).fit(loader(x, y), loader(x, y), mode="uwl", seed=3)
    file = torch.load(tmp_path / "model_uwl_3.pth", weights_only=True)
    assert {"loss weight.0", "loss weight.1"} <= set(file)
    fresh = model("MMOE", seed=1)
    fresh.load_state_dict(file, strict=True)
    assert same_state(fresh, trained)
    batch, _ = next(iter(loader(x, y)))
    with torch.no_grad():
        assert torch.equal(call(fresh.eval(), batch), call(trained.eval(), batch))


def test_training_goes_on_from_a_checkpoint(tmp_path):
    """The learned weights come back with the model, and the trainer takes them up."""
    x, y = data(256)
    trained = model()
    trainer(trained, tmp_path, adaptive_params=UWL).train_one_epoch(loader(x, y))
    fresh = model(seed=1)
    fresh.load_state_dict(trained.state_dict(), strict=True)
    trainer(fresh, tmp_path, adaptive_params=UWL)
    np.testing.assert_array_equal(_log_variances(fresh), _log_variances(trained))


@pytest.mark.parametrize("method", ["uwl", "gradnorm"])
def test_loss_weights_are_logged_by_task(method, tmp_path):
    x, y = data(256)
    memory = Memory()
    trained = model()
    runner = trainer(trained, tmp_path, n_epoch=1, adaptive_params={"method": method}, model_logger=memory)
    runner.fit(loader(x, y), loader(x, y))
    logged = [memory.epochs[0][f"loss_weight/task_{task}"] for task in range(2)]
    np.testing.assert_allclose(logged, _log_variances(trained), rtol=1e-6)
