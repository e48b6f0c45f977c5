"""Predictions and scores of a model over a loader, without a loop over rows."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .. import backend
from ..basic.batch import ReadyBatch
from ..basic.metric import auc, log_loss, mean_squared_error
from ..errors import BadDataError
from ..models.multi_task import MTLModel


def unwrap(model: nn.Module) -> MTLModel:
    """The fastmtl model inside wrappers (DataParallel, DistributedDataParallel, torch.compile)."""
    while True:
        inner = getattr(model, "module", None) or getattr(model, "_orig_mod", None)
        if not isinstance(inner, nn.Module):
            return model  # type: ignore[return-value]
        model = inner


def schema_of(loader: Any) -> Any:
    """What a loader (or the data set behind it) knows of its columns, or None."""
    return getattr(loader, "schema", None) or getattr(getattr(loader, "dataset", None), "schema", None)


def to_device(x: Mapping[str, Tensor], device: torch.device) -> Mapping[str, Tensor]:
    """A batch's columns on ``device``."""
    if isinstance(x, ReadyBatch):
        return x
    if hasattr(x, "to"):
        return x if device.type == "cpu" else x.to(device, non_blocking=True)
    return {name: column.to(device, non_blocking=True) for name, column in x.items()}


def split_batch(batch: Any) -> tuple[Mapping[str, Tensor], Tensor | None]:
    """``(x, y)`` of a batch, whether the loader has labels or not."""
    if isinstance(batch, (tuple, list)) and len(batch) == 2 and isinstance(batch[0], Mapping):
        return batch[0], batch[1]
    if isinstance(batch, Mapping):
        return batch, None
    raise BadDataError(
        f"a batch must be (x, y) or x, with x a mapping from column names to tensors; got {type(batch).__name__}"
    )


def labels_of(y: Any, model: MTLModel) -> Tensor:
    """Labels of a batch as ``[B, T]`` float32 for the model's outputs."""
    y = torch.as_tensor(y).float()
    y = model.adapt_labels(y.unsqueeze(1) if y.ndim == 1 else y)
    if y.shape[1] != model.n_task:
        raise BadDataError(f"the data has {y.shape[1]} label columns, the model {model.n_task} tasks")
    return y


@torch.no_grad()
def predictions(
    model: nn.Module, loader: Iterable, device: torch.device | None = None
) -> Iterator[tuple[Tensor, Tensor | None]]:
    """``(predictions [B, T], labels [B, T] or None)`` of each batch, on the CPU, in evaluation mode.

    The model's own mode is restored when the loader is exhausted.
    """
    inner = unwrap(model)
    schema = schema_of(loader)
    if not inner.is_built and schema is not None:
        inner.build(schema)
    if device is None:
        device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    try:
        for batch in loader:
            x, y = split_batch(batch)
            out = model(to_device(x, device))
            yield out.float().cpu(), None if y is None else labels_of(y, inner)
    finally:
        model.train(was_training)


def collect(
    model: nn.Module, loader: Iterable, device: torch.device | None = None
) -> tuple[np.ndarray, np.ndarray | None]:
    """All predictions ``[N, T]`` and labels ``[N, T]`` (None without) of a loader."""
    pairs = list(predictions(model, loader, device))
    if not pairs:
        raise BadDataError("the loader has no rows")
    outputs = torch.cat([out for out, _ in pairs]).numpy()
    if pairs[0][1] is None:
        return outputs, None
    return outputs, torch.cat([y for _, y in pairs if y is not None]).numpy()


def evaluate_multi_task(model: nn.Module, loader: Iterable) -> dict[str, dict[str, float]]:
    """Scores of each task.

    Args:
        model: a fastmtl model, wrapped or not.
        loader: yields ``(x, y)``.

    Returns:
        ``{task: {"auc": ..., "logloss": ...}}``, for a regression task ``{"mse": ...}``. An undefined AUC is NaN,
        with a warning that says why.
    """
    device = next(model.parameters()).device
    if backend.is_device(device):
        from .device_scores import named_scores

        return named_scores(model, loader, device)
    outputs, labels = collect(model, loader)
    if labels is None:
        raise BadDataError("evaluate_multi_task: the loader has no labels; give one that yields (x, y)")
    inner = unwrap(model)
    inner.take_task_names(getattr(loader, "task_names", ()))
    scores: dict[str, dict[str, float]] = {}
    for task, (name, kind) in enumerate(zip(inner.task_names, inner.task_types, strict=True)):
        y, p = labels[:, task], outputs[:, task]
        if kind == "classification":
            scores[name] = {"auc": auc(y, p, name), "logloss": log_loss(y, p)}
        else:
            scores[name] = {"mse": mean_squared_error(y, p)}
    return scores
