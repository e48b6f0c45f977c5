"""The layers of torch-rechub's API: plain modules for models of one's own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ConfigError
from .activation import activation_layer
from .embedding import EmbeddingLayer
from .features import DenseFeature, SequenceFeature, SparseFeature

__all__ = [
    "MLP",
    "AveragePooling",
    "ConcatPooling",
    "EmbeddingLayer",
    "InputMask",
    "PredictionLayer",
    "SumPooling",
]

TASK_TYPES = ("classification", "regression")


def check_task_type(task_type: str) -> str:
    """``"classification"`` (also spelt ``"binary"``) or ``"regression"``; anything else raises ConfigError."""
    task_type = {"binary": "classification"}.get(task_type, task_type)
    if task_type not in TASK_TYPES:
        raise ConfigError(
            f"task type {task_type!r} is not known; the task types are {', '.join(TASK_TYPES)} (or binary)"
        )
    return task_type


class MLP(nn.Module):
    """Linear -> BatchNorm -> activation -> dropout for each of ``dims``, then, with ``output_layer``, Linear(., 1).

    Args:
        input_dim: width of the input.
        output_layer: end with a Linear(., 1).
        dims: hidden widths.
        dropout: probability of zeroing an activation.
        activation: a name of :data:`fastmtl.spec.ACTIVATIONS` or the module class.

    Shape:
        ``[B, input_dim]`` to ``[B, 1]``, or ``[B, dims[-1]]`` without an output layer.
    """

    def __init__(
        self,
        input_dim: int,
        output_layer: bool = True,
        dims: Sequence[int] | None = None,
        dropout: float = 0,
        activation: str | type[nn.Module] = "relu",
    ) -> None:
        super().__init__()
        if not 0 <= dropout < 1:
            raise ConfigError(f"MLP: dropout must be at least 0 and below 1, got {dropout!r}")
        layers: list[nn.Module] = []
        for width in dims or ():
            if int(width) != width or width < 1:
                raise ConfigError(f"MLP: dims must be whole numbers of at least 1, got {list(dims or ())}")
            layers += [
                nn.Linear(input_dim, width),
                nn.BatchNorm1d(width),
                activation_layer(activation),
                nn.Dropout(dropout),
            ]
            input_dim = width
        if output_layer:
            layers.append(nn.Linear(input_dim, 1))
        self.mlp = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        return self.mlp(x)


class PredictionLayer(nn.Module):
    """Logits to predictions: sigmoid for classification, identity for regression."""

    def __init__(self, task_type: str = "classification") -> None:
        super().__init__()
        self.task_type = check_task_type(task_type)

    def forward(self, x: Tensor) -> Tensor:
        return torch.sigmoid(x) if self.task_type == "classification" else x


class InputMask(nn.Module):
    """1 where an id counts, 0 where it is padding (the feature's ``padding_idx``, and -1 always).

    Shape:
        Columns ``[B]`` or ``[B, L]`` of F features to ``[B, F]`` or ``[B, F, L]``.
    """

    def forward(self, x: Mapping[str, Tensor], features: Sequence | SparseFeature | SequenceFeature) -> Tensor:
        masks = []
        chosen: Sequence[Any] = features if isinstance(features, (list, tuple)) else [features]
        for feature in chosen:
            if isinstance(feature, DenseFeature):
                raise ConfigError(f"InputMask: {feature} has no ids; give sparse or sequence features")
            ids = x[feature.name].long()
            keep = ids != -1
            if feature.padding_idx is not None:
                keep &= ids != feature.padding_idx
            masks.append(keep.unsqueeze(1).float())
        return torch.cat(masks, dim=1)


class SumPooling(nn.Module):
    """``[B, L, D]`` to ``[B, D]``; ``mask [B, 1, L]`` leaves padding out."""

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        return x.sum(dim=1) if mask is None else torch.bmm(mask, x).squeeze(1)


class AveragePooling(nn.Module):
    """``[B, L, D]`` to ``[B, D]``; ``mask [B, 1, L]`` leaves padding out of sum and count."""

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        if mask is None:
            return x.mean(dim=1)
        return torch.bmm(mask, x).squeeze(1) / (mask.sum(dim=-1) + 1e-16)


class ConcatPooling(nn.Module):
    """Keeps ``[B, L, D]`` as it is."""

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        return x
