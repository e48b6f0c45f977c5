"""Fixed loss weights."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..errors import ConfigError
from .base import Strategy


class Static(Strategy):
    """The mean of the losses, each times a fixed weight; weights of 1 are the plain mean.

    Args:
        weights: one a task.
    """

    def __init__(self, weights: Sequence[float]) -> None:
        self.fixed = torch.tensor([float(weight) for weight in weights])

    def attach(self, model: Any, task_types: list[str]) -> None:
        super().attach(model, task_types)
        if len(self.fixed) != len(task_types) and len(self.fixed) != len(self.tasks):
            raise ConfigError(
                f"task_weights has {len(self.fixed)} entries for {len(task_types)} tasks; give one a task"
            )

    def total(self, losses: Tensor) -> Tensor:
        weights = self.on(losses.device, "weights", self._trained_weights())
        return (self.trained(losses) * weights).sum() * self.factor

    def factors(self) -> Tensor:
        return self.spread(self._trained_weights() * self.factor)

    def _trained_weights(self) -> Tensor:
        return self.trained(self.fixed) if len(self.fixed) == len(self.task_types) else self.fixed
