"""Uncertainty weighting."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .base import Strategy


class UncertaintyWeighting(Strategy):
    """Each task's loss is divided by a learned variance: ``sum_i c_i L_i exp(-s_i) + s_i``, s = log variance.

    c is 2 for a cross-entropy and 1 for a squared error (twice the paper's objective). s may become negative, which is
    where torch-rechub's stops learning.

    Source: Kendall et al., Multi-Task Learning Using Uncertainty to Weigh Losses, CVPR'18, equations 7 to 10.
    """

    def attach(self, model: Any, task_types: list[str]) -> None:
        super().attach(model, task_types)
        self.log_variances = model.loss_weights(0.0)
        scale = torch.tensor([2.0 if kind == "classification" else 1.0 for kind in task_types])
        self.scale = scale

    def total(self, losses: Tensor) -> Tensor:
        s = self.log_variances
        terms = self.on(losses.device, "scale", self.scale) * losses * torch.exp(-s) + s
        return self.trained(terms).sum()

    @torch.no_grad()
    def factors(self) -> Tensor | None:
        if not self.log_variances.is_cpu:
            return None  # a CUDA graph would hold the first ones
        return self.spread(self.trained(self.scale * torch.exp(-self.log_variances)))

    @torch.no_grad()
    def give_own_gradients(self, losses: Tensor) -> None:
        weighted = self.scale * torch.exp(-self.log_variances) * losses
        self.log_variances.grad = self.spread(self.trained(1 - weighted))

    def weights(self) -> nn.Parameter:
        return self.log_variances
