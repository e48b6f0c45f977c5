"""The best epoch's weights are kept, loaded back and saved, whichever direction the metric has, and NaN never wins."""

import contextlib
import math
import warnings

import pytest
import torch
from devices import call

from behaviour.helpers import Memory, data, loader, model, same_state, trainer

REGRESSION = ("regression", "classification")


def _opposed(task_types=("classification", "classification")):
    """Training rows, and validation rows whose first label says the opposite: each epoch scores worse than the last."""
    (x, y), (x_val, y_val) = data(512, seed=1), data(256, seed=2)
    if task_types[0] == "regression":
        y[:, 0], y_val[:, 0] = x["age"], -x_val["age"]
    else:
        y[:, 0], y_val[:, 0] = x["age"] > 0, x_val["age"] < 0
    return loader(x, y), loader(x_val, y_val)


@pytest.mark.parametrize("patience", [100, 3])
def test_best_weights_come_back_with_and_without_early_stop(patience, backend, tmp_path):
    train, val = _opposed()
    memory = Memory()
    trained = model()
    runner = trainer(trained, tmp_path, n_epoch=7, earlystop_patience=patience, model_logger=memory)
    log = runner.fit(train, val, mode="opposed", seed=4)
    scores = memory.column("val/task_0_score")
    assert len(scores) == len(log) == (7 if patience == 100 else scores.index(max(scores)) + 1 + patience)
    assert max(scores) > scores[-1] + 0.05
    assert runner.evaluate(trained, val)[0] == pytest.approx(max(scores), abs=1e-6)

    saved = model(seed=9)
    saved.load_state_dict(torch.load(tmp_path / "model_opposed_4.pth", weights_only=True), strict=True)
    assert same_state(saved, trained)
    assert memory.finished


def test_regression_keeps_the_least_mse_by_default(tmp_path):
    train, val = _opposed(REGRESSION)
    memory = Memory()
    trained = model(task_types=REGRESSION)
    runner = trainer(trained, tmp_path, REGRESSION, n_epoch=7, earlystop_patience=100, model_logger=memory)
    runner.fit(train, val)
    scores = memory.column("val/task_0_score")
    assert min(scores) < scores[-1] - 0.1
    assert runner.evaluate(trained, val)[0] == pytest.approx(min(scores), rel=1e-5)


def test_regression_score_is_the_mse(tmp_path):
    _, val = _opposed(REGRESSION)
    trained = model(task_types=REGRESSION)
    score = trainer(trained, tmp_path, REGRESSION).evaluate(trained, val)[0]
    x, _y = next(iter(loader(*data(256, seed=2), batch_size=256)))
    with torch.no_grad():
        expected = torch.mean((call(trained.eval(), x)[:, 0] + x["age"]) ** 2)
    assert score == pytest.approx(float(expected), rel=1e-5)


def test_early_stop_watches_the_task_it_is_given(tmp_path):
    train, val = _opposed()
    memory = Memory()
    trained = model()
    runner = trainer(trained, tmp_path, n_epoch=5, earlystop_taskid=1, model_logger=memory)
    runner.fit(train, val)
    scores = memory.column("val/task_1_score")
    assert memory.column("auc") == scores
    assert runner.evaluate(trained, val)[1] == pytest.approx(max(scores), abs=1e-6)


@contextlib.contextmanager
def _messages():
    """The texts of all warnings, none of which becomes an error."""
    texts = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield texts
    texts += [str(warning.message) for warning in caught]


@pytest.mark.parametrize("one_class", [0.0, 1.0])
def test_one_class_validation_gives_nan_and_says_why(one_class, tmp_path):
    x, y = data(256)
    y_val = y.copy()
    y_val[:, 0] = one_class
    trained = model()
    runner = trainer(trained, tmp_path, n_epoch=3)
    with _messages() as texts:
        log = runner.fit(loader(x, y), loader(x, y_val), mode="one_class")
    assert any("AUC" in text and "class" in text and f"{one_class:g}" in text for text in texts), texts
    assert all(math.isnan(epoch[2]) and 0 < epoch[3] < 1 for epoch in log)
    assert all(torch.isfinite(value).all() for value in trained.state_dict().values())
    assert (tmp_path / "model_one_class_0.pth").exists()


def test_the_warning_names_the_task(tmp_path):
    x, y = data(128)
    y[:, 1] = 1
    trained = model()
    with _messages() as texts:
        trainer(trained, tmp_path, task_names=["click", "buy"]).evaluate(trained, loader(x, y))
    assert len(texts) == 1
    assert "buy" in texts[0]


def test_one_class_of_another_task_leaves_the_best_epoch_alone(tmp_path):
    train, val = _opposed()
    y_val = val.labels.copy()
    y_val[:, 1] = 0
    val = loader(data(256, seed=2)[0], y_val)
    memory = Memory()
    trained = model()
    runner = trainer(trained, tmp_path, n_epoch=5, model_logger=memory)
    with _messages():
        runner.fit(train, val)
        score, undefined = runner.evaluate(trained, val)
    scores = memory.column("val/task_0_score")
    assert score == pytest.approx(max(scores), abs=1e-6)
    assert max(scores) > scores[-1] + 0.05
    assert math.isnan(undefined)
