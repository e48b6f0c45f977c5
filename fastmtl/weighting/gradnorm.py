"""GradNorm."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .base import Strategy

#: A step may take a weight below zero, where its norm would no longer be linear in it.
LEAST_WEIGHT = 1e-6


@torch.no_grad()
def weight_gradients(w: Tensor, norms: Tensor, rates: Tensor, alpha: float) -> Tensor:
    """GradNorm's gradient of the loss weights.

    Args:
        w: weights ``[T]``.
        norms: ``[T]``, of the gradient of each unweighted loss.
        rates: ``[T]``, each loss divided by its first value.
        alpha: how strongly a task that lags is pushed.

    Returns:
        ``[T]``.
    """
    weighted = w * norms  # G_i: the norm is linear in a positive weight
    target = weighted.mean() * (rates / rates.mean()) ** alpha
    # the target is held constant; d|w n - target| / dw
    return torch.sign(weighted - target) * norms


class GradNorm(Strategy):
    """Learned loss weights that pull the gradient norms of the tasks towards each other.

    With G_i the norm of the gradient of ``w_i L_i`` with respect to the last shared weight and r_i the task's relative
    inverse training rate, the weights minimise ``sum_i |G_i - mean(G) r_i^alpha|``; after each step they are scaled to
    sum to T. They are updated by the model's optimizer.

    Args:
        alpha: how strongly a task that lags is pushed.

    Source: Chen et al., GradNorm, ICML'18, algorithm 1.
    """

    def __init__(self, alpha: float = 0.16) -> None:
        self.alpha = alpha
        self.initial: Tensor | None = None

    def attach(self, model: Any, task_types: list[str]) -> None:
        super().attach(model, task_types)
        self.shared = model.last_shared_weight()
        self.w = model.loss_weights(1.0)

    def backward(self, losses: Tensor, penalty: Tensor | float) -> None:
        now = losses.detach()
        # a task without labels in a batch has loss 0: its first value is that of the first batch with labels
        self.initial = now.clone() if self.initial is None else torch.where(self.initial > 0, self.initial, now)
        known = now > 0
        norms = torch.stack(
            [torch.autograd.grad(loss, self.shared, retain_graph=True)[0].norm() for loss in losses.unbind()]
        )
        ((self.w.detach() * losses).sum() + penalty).backward()
        gradient = torch.zeros_like(self.w)
        rates = now[known] / self.initial[known]
        gradient[known] = weight_gradients(self.w.detach()[known], norms[known], rates, self.alpha)
        self.w.grad = gradient

    @torch.no_grad()
    def after_step(self) -> None:
        self.w.clamp_(min=LEAST_WEIGHT)
        self.w.mul_(len(self.w) / self.w.sum())

    def weights(self) -> nn.Parameter:
        return self.w
