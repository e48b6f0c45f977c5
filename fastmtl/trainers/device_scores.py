"""Predictions of a model over a loader that stay on the device, and the scores made of them there."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ..backends.deferred import Watch, watching
from ..basic.device_metric import Scores, task_scores
from ..data.resident import has_columns, resident
from ..errors import BadDataError
from .evaluation import labels_of, schema_of, split_batch, to_device, unwrap


@torch.no_grad()
def outputs_on(model: nn.Module, loader: Iterable, device: torch.device) -> tuple[Tensor, Tensor | None]:
    """Predictions ``[N, T]`` and labels ``[N, T]`` (None without) of a loader, on ``device``, in evaluation mode.

    The host waits for the device once, at the end, and then raises :class:`BadIdError` for the first refused id.
    """
    inner = unwrap(model)
    schema = schema_of(loader)
    if not inner.is_built and schema is not None:
        inner.build(schema)
    watch, outputs, labels = Watch(device), [], []
    was_training = model.training
    model.eval()
    try:
        with watching(watch):
            for x, y in _batches(loader, device):
                outputs.append(model(x).float())
                if y is not None:
                    labels.append(labels_of(y, inner).to(device, non_blocking=True))
    finally:
        model.train(was_training)
    watch.raise_bad_id(watch.wait())
    if not outputs:
        raise BadDataError("the loader has no rows")
    return torch.cat(outputs), torch.cat(labels) if labels else None


def _batches(loader: Iterable, device: torch.device) -> Iterator[tuple[Any, Any]]:
    if has_columns(loader):
        loader = resident(loader, device)
    for batch in loader:
        x, y = split_batch(batch)
        yield to_device(x, device), y


def scores_on(model: nn.Module, loader: Iterable, device: torch.device) -> list[Scores]:
    """The scores of each task, see :func:`fastmtl.basic.device_metric.task_scores`.

    Raises:
        BadDataError: a loader without rows or labels.
    """
    outputs, labels = outputs_on(model, loader, device)
    if labels is None:
        raise BadDataError("evaluate: the loader has no labels; give one that yields (x, y)")
    inner = unwrap(model)
    inner.take_task_names(getattr(loader, "task_names", ()))
    return task_scores(labels, outputs, inner.task_types, inner.task_names)


def main_scores(model: nn.Module, loader: Iterable, device: torch.device) -> list[float]:
    """What each task is judged by: its AUC, or its mean squared error."""
    kinds = unwrap(model).task_types
    found = scores_on(model, loader, device)
    return [
        scores.auc if kind == "classification" else scores.mean_squared_error
        for scores, kind in zip(found, kinds, strict=True)
    ]


def named_scores(model: nn.Module, loader: Iterable, device: torch.device) -> dict[str, dict[str, float]]:
    """See :func:`fastmtl.trainers.evaluation.evaluate_multi_task`."""
    inner = unwrap(model)
    found = scores_on(model, loader, device)
    return {
        name: {"auc": scores.auc, "logloss": scores.log_loss}
        if kind == "classification"
        else {"mse": scores.mean_squared_error}
        for name, kind, scores in zip(inner.task_names, inner.task_types, found, strict=True)
    }
