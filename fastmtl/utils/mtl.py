"""Tools for multi-task training by hand."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..models.multi_task import MTLModel
from ..weighting import MetaBalance
from ..weighting.gradnorm import weight_gradients

__all__ = ["MetaBalance", "gradnorm", "shared_task_layers"]


def shared_task_layers(model: MTLModel) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """The parameters all tasks train, and the parameters of the tasks' own.

    Args:
        model: SharedBottom, MMOE, PLE or AITM.

    Returns:
        ``(shared, task)``: disjoint, together all parameters but learned loss weights.

    Raises:
        ConfigError: a model without such a split (ESMM).
    """
    return model.shared_parameters(), model.task_parameters()


def gradnorm(
    loss_list: Sequence[Tensor],
    loss_weight: Sequence[nn.Parameter],
    share_layer: Tensor | Sequence[Tensor],
    initial_task_loss: Sequence[float],
    alpha: float,
) -> None:
    """GradNorm in a training loop by hand: backward of the weighted losses, then the gradients of the weights.

    Fills ``.grad`` of the model's parameters and of the weights; the steps of their optimizers are the caller's, and so
    is scaling the weights to sum to T. In a trainer use ``adaptive_params={"method": "gradnorm"}``.

    Args:
        loss_list: the T losses, scalars with their graph.
        loss_weight: the T weights, one number each.
        share_layer: the last weight that all tasks share, or several.
        initial_task_loss: the T losses of the first step.
        alpha: how strongly a task that lags is pushed.

    Source: Chen et al., GradNorm, ICML'18, algorithm 1.
    """
    shared = [share_layer] if isinstance(share_layer, Tensor) else list(share_layer)
    weights = torch.cat([weight.reshape(1) for weight in loss_weight])
    losses = torch.stack([loss.reshape(()) for loss in loss_list])
    (weights.detach() * losses).sum().backward(retain_graph=True)
    gradients = [torch.autograd.grad(loss, shared, retain_graph=True) for loss in losses.unbind()]
    norms = torch.stack([torch.cat([part.flatten() for part in parts]).norm() for parts in gradients])
    rates = losses.detach() / torch.as_tensor(initial_task_loss, dtype=losses.dtype, device=losses.device)
    for weight, gradient in zip(loss_weight, weight_gradients(weights, norms, rates, alpha), strict=True):
        weight.grad = gradient.reshape(weight.shape)
