"""GradNorm."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .base import Strategy


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
        if self.initial is None:
            self.initial = losses.detach().clamp(min=1e-12)
        norms = torch.stack(
            [torch.autograd.grad(loss, self.shared, retain_graph=True)[0].norm() for loss in losses.unbind()]
        )
        ((self.w.detach() * losses).sum() + penalty).backward()
        self.w.grad = weight_gradients(self.w, norms, losses / self.initial, self.alpha)

    @torch.no_grad()
    def after_step(self) -> None:
        self.w.mul_(len(self.w) / self.w.sum())

    def weights(self) -> nn.Parameter:
        return self.w
