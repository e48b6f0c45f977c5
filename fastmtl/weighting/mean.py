"""The mean of the losses; for ESMM the sum of CTR's and CTCVR's."""

from __future__ import annotations

import torch
from torch import Tensor

from .base import Strategy


class Mean(Strategy):
    """Every task counts alike. torch-rechub's default."""

    def total(self, losses: Tensor) -> Tensor:
        return self.trained(losses).sum() * self.factor

    def factors(self) -> Tensor:
        return self.spread(torch.full((len(self.tasks),), self.factor))
