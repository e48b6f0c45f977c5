"""Losses: of a task, of all tasks at once, of the parameters."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .bank import ExpertGate
from .embedding import EmbeddingLayer
from .layers import check_task_type


def get_loss_func(task_type: str = "classification") -> nn.Module:
    """The loss of a task type: binary cross-entropy of probabilities, or mean squared error."""
    return nn.BCELoss() if check_task_type(task_type) == "classification" else nn.MSELoss()


def multi_task_loss(predictions: Tensor, labels: Tensor, task_types: list[str]) -> Tensor:
    """The mean loss of each task over the rows that have its label.

    Args:
        predictions: ``[B, T]`` probabilities (classification) or values (regression).
        labels: ``[B, T]``; NaN where a label is missing.
        task_types: T task types.

    Returns:
        ``[T]``: binary cross-entropy in nats, or squared error. A task without any label in the batch has loss 0.
    """
    known = ~torch.isnan(labels)
    labels = torch.where(known, labels, 0)
    if "regression" not in task_types:
        losses = F.binary_cross_entropy(predictions, labels, reduction="none")
    elif "classification" not in task_types:
        losses = F.mse_loss(predictions, labels, reduction="none")
    else:
        binary = [task for task, kind in enumerate(task_types) if kind == "classification"]
        losses = (predictions - labels).square()
        cross_entropy = F.binary_cross_entropy(predictions[:, binary], labels[:, binary], reduction="none")
        losses = losses.index_copy(1, torch.tensor(binary, device=losses.device), cross_entropy)
    return torch.where(known, losses, 0).sum(dim=0) / known.sum(dim=0).clamp(min=1)


class _CrossEntropy(torch.autograd.Function):
    """torch's binary cross-entropy of probabilities, and its gradient, without the check of their range: on a GPU a
    probability that is NaN would end the process's use of it. NaN gives NaN."""

    @staticmethod
    def forward(ctx: Any, p: Tensor, y: Tensor) -> Tensor:
        ctx.save_for_backward(p, y)
        return (y - 1) * torch.log1p(-p).clamp(min=-100) - y * torch.log(p).clamp(min=-100)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        p, y = ctx.saved_tensors
        return grad * (p - y) / ((1 - p) * p).clamp(min=1e-12), None


def device_losses(predictions: Tensor, labels: Tensor, is_classification: Tensor) -> Tensor:
    """:func:`multi_task_loss` that neither waits for the device nor stops it, and can be captured in a CUDA graph.

    Args:
        predictions, labels: as there.
        is_classification: ``[T]`` bool, on their device.

    Returns:
        ``[T]``; NaN where a task's predictions are.
    """
    known = ~torch.isnan(labels)
    labels = torch.where(known, labels, 0)
    cross_entropy = _CrossEntropy.apply(torch.where(is_classification, predictions, 0.5), labels)
    losses = torch.where(is_classification, cross_entropy, (predictions - labels).square())
    return torch.where(known, losses, 0).sum(dim=0) / known.sum(dim=0).clamp(min=1)


class RegularizationLoss(nn.Module):
    """L1 and L2 penalties of the tables and of the other weights; scales and shifts of normalisations are left out.

    Args:
        embedding_l1, embedding_l2: coefficients for embedding tables.
        dense_l1, dense_l2: coefficients for all other parameters.
    """

    def __init__(
        self, embedding_l1: float = 0.0, embedding_l2: float = 0.0, dense_l1: float = 0.0, dense_l2: float = 0.0
    ) -> None:
        super().__init__()
        self.embedding_l1, self.embedding_l2 = embedding_l1, embedding_l2
        self.dense_l1, self.dense_l2 = dense_l1, dense_l2

    @property
    def is_zero(self) -> bool:
        """Whether every coefficient is 0."""
        return not any((self.embedding_l1, self.embedding_l2, self.dense_l1, self.dense_l2))

    def forward(self, model: nn.Module) -> Tensor | float:
        """The penalty of the model's trained parameters (0.0 where every coefficient is 0)."""
        if self.is_zero:
            return 0.0
        norms: set[int] = set()
        tables: set[int] = set()
        for module in model.modules():
            if isinstance(module, ExpertGate):
                norms |= {id(p) for p in module.norm_parameters()}
            elif isinstance(module, (nn.modules.batchnorm._BatchNorm, nn.LayerNorm, nn.GroupNorm)):
                norms |= {id(p) for p in module.parameters()}
            elif isinstance(module, (EmbeddingLayer, nn.Embedding, nn.EmbeddingBag)):
                tables |= {id(p) for p in module.parameters()}
        loss: Tensor | float = 0.0
        for p in model.parameters():
            if not p.requires_grad or id(p) in norms:
                continue
            is_table = id(p) in tables
            l1, l2 = (self.embedding_l1, self.embedding_l2) if is_table else (self.dense_l1, self.dense_l2)
            if l1:
                loss = loss + l1 * p.abs().sum()
            if l2:
                loss = loss + l2 * p.square().sum()
        return loss
