"""What torch-rechub trips over while training: each works here, or fails at construction with a message that helps."""

import math

import numpy as np
import pytest
import torch
from devices import call, fetch
from torch.nn import functional as F

from behaviour.helpers import KINDS, Memory, data, features, loader, model, pair, trainer
from fastmtl.errors import FastMTLError


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rows", [65, 1])
def test_last_batch_of_one_row(kind, rows, backend, tmp_path):
    """BatchNorm has no variance over one row, so torch-rechub stops; here nothing becomes NaN and all rows predict."""
    n_task = 3 if kind == "ESMM" else 2
    x, y = data(256, n_task=n_task)
    part = {name: column[:rows] for name, column in x.items()}, y[:rows]
    trained = model(kind)
    runner = trainer(trained, tmp_path, ("classification",) * n_task, n_epoch=2)
    log = np.array(runner.fit(loader(*part), loader(x, y)))
    assert np.isfinite(log).all()
    assert all(torch.isfinite(value).all() for value in trained.state_dict().values())
    assert len(runner.predict(trained, loader(*part))) == rows


@pytest.mark.parametrize("kind", KINDS)
def test_one_row_is_normalised_by_the_running_statistics(kind, backend):
    """And leaves them alone: its output in training is its output in evaluation."""
    x, _ = data(80)
    many, one = ({k: torch.from_numpy(v[rows]) for k, v in x.items()} for rows in (slice(0, 79), slice(79, 80)))
    made = model(kind)
    call(made.train(), many)
    before = {name: value.clone() for name, value in made.state_dict().items()}
    in_training = call(made, one)
    assert all(torch.equal(made.state_dict()[name], value) for name, value in before.items())
    torch.testing.assert_close(in_training, call(made.eval(), one), rtol=1e-6, atol=1e-7)


SCHEDULERS = {
    "StepLR": (torch.optim.lr_scheduler.StepLR, {"step_size": 2, "gamma": 0.1}, [1, 1, 0.1, 0.1]),
    "LambdaLR": (torch.optim.lr_scheduler.LambdaLR, {"lr_lambda": lambda epoch: 0.5**epoch}, [1, 0.5, 0.25, 0.125]),
    "CosineAnnealingLR": (
        torch.optim.lr_scheduler.CosineAnnealingLR,
        {"T_max": 4},
        [(1 + math.cos(math.pi * epoch / 4)) / 2 for epoch in range(4)],
    ),
    "ExponentialLR": (torch.optim.lr_scheduler.ExponentialLR, {"gamma": 0.5}, [1, 0.5, 0.25, 0.125]),
}


@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.parametrize("adaptive", [None, "metabalance"])
def test_schedulers_without_step_size(name, adaptive, tmp_path):
    scheduler, params, factors = SCHEDULERS[name]
    memory = Memory()
    runner = trainer(
        model(),
        tmp_path,
        n_epoch=4,
        scheduler_fn=scheduler,
        scheduler_params=params,
        model_logger=memory,
        adaptive_params=adaptive and {"method": adaptive},
    )
    runner.fit(loader(*data(128)), loader(*data(128)))
    np.testing.assert_allclose(memory.column("learning_rate"), [1e-2 * factor for factor in factors], rtol=1e-6)


@pytest.mark.parametrize(("name", "function"), [("gelu", F.gelu), ("tanh", torch.tanh), ("silu", F.silu)])
def test_more_activations(name, function, backend):
    """Eval: the bottom's output is the activation of the normalised linear layer."""
    made = model(features=features(history=False), bottom_params={"dims": [8], "activation": name})
    x, y = data(64)
    batch, _ = next(iter(loader(x, y)))
    state = fetch(made.state_dict())
    with torch.no_grad():
        row = call(made.embedding, batch, made.features, squeeze_dim=True)
        hidden = row @ state["bottom_mlp.mlp.0.weight"].T + state["bottom_mlp.mlp.0.bias"]
        hidden = function(hidden / math.sqrt(1 + 1e-5))
        tower = hidden @ state["towers.1.mlp.0.weight"].T + state["towers.1.mlp.0.bias"]
        logit = (
            torch.relu(tower / math.sqrt(1 + 1e-5)) @ state["towers.1.mlp.4.weight"].T + state["towers.1.mlp.4.bias"]
        )
        torch.testing.assert_close(call(made.eval(), batch)[:, 1], torch.sigmoid(logit[:, 0]), rtol=1e-5, atol=1e-6)


def test_an_unknown_activation_lists_the_known():
    with pytest.raises(FastMTLError, match=r"swosh.*relu.*gelu"):
        model(bottom_params={"dims": [8], "activation": "swosh"})


def test_a_missing_model_path_is_made_before_training(tmp_path):
    missing = tmp_path / "not" / "there"
    trainer(model(), missing)
    assert missing.is_dir()
    assert not list(missing.iterdir())


@pytest.mark.parametrize("place", ["file", "file/below"])
def test_a_model_path_that_cannot_be_written_is_found_before_training(place, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(FastMTLError, match=f"model_path.*{tmp_path / place}"):
        trainer(model(), tmp_path / place)


def test_missing_labels_are_left_out_of_the_loss(backend, tmp_path):
    """A NaN label says "unknown": the task's loss is the mean over the rows that have one."""
    x, y = data(64)
    y[::3, 0] = np.nan
    y[1::4, 1] = np.nan
    ours, theirs = pair()
    batch, labels = next(iter(loader(x, y)))
    expected = []
    y_pred = theirs.train()(dict(batch))
    for task in range(2):
        known = ~torch.isnan(labels[:, task])
        expected.append(F.binary_cross_entropy(y_pred[known, task], labels[known, task]))
    (sum(expected) / 2).backward()
    start = {name: value.clone() for name, value in fetch(ours.state_dict()).items()}
    runner = trainer(ours, tmp_path, optimizer_fn=torch.optim.SGD, optimizer_params={"lr": 1.0})
    losses = runner.train_one_epoch(loader(x, y))
    np.testing.assert_allclose(losses, [loss.item() for loss in expected], rtol=1e-5)
    for name, value in theirs.named_parameters():
        torch.testing.assert_close(
            fetch(ours.state_dict())[name],
            start[name] - value.grad,
            rtol=1e-3,
            atol=1e-5,
            msg=lambda m, name=name: f"{name}: {m}",
        )


@pytest.mark.parametrize("adaptive", [None, "uwl", "gradnorm", "metabalance"])
def test_a_task_without_any_label_in_a_batch(adaptive, tmp_path):
    x, y = data(256)
    y[:64, 1] = np.nan
    y[100:130, 0] = np.nan
    trained = model()
    runner = trainer(trained, tmp_path, n_epoch=3, adaptive_params=adaptive and {"method": adaptive})
    log = np.array(runner.fit(loader(x, y), loader(x, y)))
    assert np.isfinite(log).all()
    assert log[-1, 1] < log[0, 1]
    assert all(torch.isfinite(value).all() for value in trained.state_dict().values())


def test_scores_leave_missing_labels_out(tmp_path):
    x, y = data(200)
    known = np.arange(200) % 3 > 0
    y_missing = y.copy()
    y_missing[~known, 0] = np.nan
    trained = model()
    runner = trainer(trained, tmp_path)
    part = {name: column[known] for name, column in x.items()}, y[known]
    score, _ = runner.evaluate(trained, loader(x, y_missing))
    assert score == pytest.approx(runner.evaluate(trained, loader(*part))[0], abs=1e-9)


def test_an_unknown_adaptive_method_lists_the_known(tmp_path):
    with pytest.raises(FastMTLError) as caught:
        trainer(model(), tmp_path, adaptive_params={"method": "gradnrom"})
    assert all(name in str(caught.value) for name in ("gradnrom", "gradnorm", "metabalance", "uwl"))


@pytest.mark.parametrize("adaptive", ["metabalance", "gradnorm"])
def test_a_model_without_shared_layers_to_balance_is_named(adaptive, tmp_path):
    with pytest.raises(FastMTLError, match="ESMM"):
        trainer(model("ESMM"), tmp_path, ("classification",) * 3, adaptive_params={"method": adaptive})


def test_an_unknown_task_type_lists_the_known():
    with pytest.raises(FastMTLError, match=r"clasification.*classification.*regression"):
        model(task_types=("clasification", "regression"))
