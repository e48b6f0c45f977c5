"""Scores computed where the predictions are: scikit-learn's numbers."""

import math
import warnings

import numpy as np
import pytest
import torch
from sklearn import metrics

from fastmtl.basic import metric
from fastmtl.basic.device_metric import task_scores

CLICK = ["classification"]


def rows(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Labels and predictions of any number of rows, with ties, missing labels, all-equal scores, saturated ones."""
    n = int(rng.choice([2, 3, 10, 101, 5000]))
    labels = (rng.random(n) < rng.choice([0.02, 0.5])).astype(np.float64)
    labels[rng.permutation(n)[:2]] = (0, 1)
    predictions = rng.random(n) * 0.3 + 0.3 * labels
    kind = rng.integers(5)
    if kind == 0:
        predictions = predictions.round(1)
    elif kind == 1:
        predictions[:] = 0.25
    elif kind == 2:
        predictions = np.where(rng.random(n) < 0.5, 0.0, 1.0)
    missing = rng.random(n) < rng.choice([0, 0.3])
    missing[[int(np.argmax(labels)), int(np.argmin(labels))]] = False
    return np.where(missing, np.nan, labels), predictions


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_scores_are_scikit_learns(dtype, seed):
    rng = np.random.default_rng(seed)
    for case in range(60):
        labels, predictions = rows(rng)
        p = torch.from_numpy(predictions).to(dtype)
        y = torch.from_numpy(labels)
        (found,) = task_scores(y[:, None].to(dtype), p[:, None], CLICK, ["click"])
        known, exact = ~np.isnan(labels), p.double().numpy()
        right = metrics.roc_auc_score(labels[known], exact[known])
        assert found.auc == pytest.approx(right, abs=1e-12), case
        assert metric.auc(labels, exact) == pytest.approx(right, abs=1e-12), case
        clipped = np.clip(exact[known], 1e-15, 1 - 1e-15)
        assert found.log_loss == pytest.approx(metrics.log_loss(labels[known], clipped), rel=1e-12), case
        assert found.log_loss == pytest.approx(metric.log_loss(labels, exact), rel=1e-12)
        assert found.mean_squared_error == pytest.approx(np.mean((labels - exact)[known] ** 2), rel=1e-12), case


def test_tasks_are_scored_apart(seed):
    rng = np.random.default_rng(seed)
    y, p = rng.integers(0, 2, (50, 3)).astype(float), rng.random((50, 3))
    y[:2] = [[0, 0, 0], [1, 1, 1]]
    kinds = ["classification", "regression", "classification"]
    found = task_scores(torch.from_numpy(y), torch.from_numpy(p), kinds, list("abc"))
    assert [f.auc for f in found][::2] == pytest.approx([metrics.roc_auc_score(y[:, t], p[:, t]) for t in (0, 2)])
    assert math.isnan(found[1].auc)
    assert math.isnan(found[1].log_loss)
    assert found[1].mean_squared_error == pytest.approx(metrics.mean_squared_error(y[:, 1], p[:, 1]), rel=1e-12)


@pytest.mark.parametrize(
    ("labels", "predictions"),
    [
        ([0, 0, math.nan], [0.1, 0.2, 0.3]),
        ([1, 1, 1], [0.1, 0.2, 0.3]),
        ([math.nan] * 3, [0.1, 0.2, 0.3]),
        ([0, 1, 1], [0.1, math.nan, 0.3]),
        ([0, 0, math.nan], [0.1, 0.2, math.nan]),
    ],
)
def test_undefined_scores_say_why(labels, predictions):
    """The same words as the score on the CPU."""
    said = []
    for score in (
        lambda: task_scores(torch.tensor([labels]).T, torch.tensor([predictions]).T, CLICK, ["click"])[0].auc,
        lambda: metric.auc(np.array(labels), np.array(predictions), "click"),
    ):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            assert math.isnan(score())
        said.append([str(w.message) for w in caught])
    assert said[0] == said[1]
    assert len(said[0]) == 1


def test_a_missing_label_with_a_lost_prediction_does_not_count():
    labels, predictions = [0.0, 1.0, math.nan, 1.0], [0.2, 0.9, math.nan, 0.1]
    (found,) = task_scores(torch.tensor([labels]).T, torch.tensor([predictions]).T, CLICK, ["click"])
    assert found.auc == 0.5


def test_soft_labels_get_scikit_learns_answer():
    labels, predictions = torch.tensor([[0.0], [0.5], [1.0]]), torch.tensor([[0.2], [0.4], [0.9]])
    with pytest.raises(ValueError, match="continuous"):
        task_scores(labels, predictions, CLICK, ["click"])
