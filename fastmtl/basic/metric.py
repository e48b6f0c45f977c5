"""Scores of predictions: scikit-learn's numbers."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable

import numpy as np
from sklearn import metrics

from .layers import check_task_type

#: ``metric(labels, predictions, task=None)``
Metric = Callable[..., float]


def _known(labels: np.ndarray, predictions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Rows whose label is not missing (NaN)."""
    labels, predictions = np.asarray(labels, dtype=np.float64), np.asarray(predictions, dtype=np.float64)
    keep = ~np.isnan(labels)
    return (labels, predictions) if keep.all() else (labels[keep], predictions[keep])


def auc(labels: np.ndarray, predictions: np.ndarray, task: str | None = None) -> float:
    """Area under the ROC curve over the rows with a label.

    Args:
        labels: ``[N]``, 0, 1 or NaN.
        predictions: ``[N]``.
        task: the task's name, for the warning.

    Returns:
        NaN, with a warning that says why, where it is undefined: one class only, or predictions that are NaN.
    """
    labels, predictions = _known(labels, predictions)
    if not len(labels) or (labels == labels[0]).all():
        found = f"only the class {labels[0]:g}" if len(labels) else "no labels"
        warn_undefined(task, f"{found} among {len(labels)} rows")
        return math.nan
    if np.isnan(predictions).any():
        warn_undefined(task, "some predictions are NaN")
        return math.nan
    negative, positive = (np.sort(predictions[labels == kind]) for kind in (0, 1))
    if len(negative) + len(positive) < len(labels):  # other labels: scikit-learn says what it thinks of them
        return float(metrics.roc_auc_score(labels, predictions))
    # twice the pairs in order, a tie counting half: whole numbers
    pairs = sum(int(np.searchsorted(negative, positive, side).sum()) for side in ("left", "right"))
    return pairs / (2 * len(positive) * len(negative))


def warn_undefined(task: str | None, reason: str) -> None:
    """Say why a task's AUC is NaN."""
    undefined = "AUC is undefined" if task is None else f"task {task!r}: AUC is undefined"
    warnings.warn(f"{undefined}: {reason}; the score is NaN", stacklevel=3)


def log_loss(labels: np.ndarray, predictions: np.ndarray) -> float:
    """Mean binary cross-entropy in nats over the rows with a label; NaN without any."""
    labels, predictions = _known(labels, predictions)
    if not len(labels):
        return math.nan
    p = np.clip(predictions, 1e-15, 1 - 1e-15)
    return float(-np.mean(labels * np.log(p) + (1 - labels) * np.log1p(-p)))


def mean_squared_error(labels: np.ndarray, predictions: np.ndarray, task: str | None = None) -> float:
    """Mean squared error over the rows with a label; NaN without any."""
    labels, predictions = _known(labels, predictions)
    return float(np.mean((labels - predictions) ** 2)) if len(labels) else math.nan


def get_metric_func(task_type: str = "classification") -> Metric:
    """The score of a task type: :func:`auc` (larger is better) or :func:`mean_squared_error` (smaller is)."""
    return auc if check_task_type(task_type) == "classification" else mean_squared_error


def metric_mode(task_type: str) -> str:
    """``"max"`` where a larger score is better, ``"min"`` where a smaller one is."""
    return "max" if check_task_type(task_type) == "classification" else "min"
