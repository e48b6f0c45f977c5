"""Optimizers as the trainer makes them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from ..errors import ConfigError
from ..models.multi_task import MTLModel

#: torch's optimizers with a fused CPU and CUDA implementation: one pass over the parameters, the same rule.
FUSED = (torch.optim.Adam, torch.optim.AdamW, torch.optim.SGD, torch.optim.Adagrad)


def make_optimizer(
    optimizer_fn: Callable[..., torch.optim.Optimizer], params: Sequence[nn.Parameter], settings: Mapping[str, Any]
) -> torch.optim.Optimizer:
    """``optimizer_fn(params, **settings)``, fused where torch can and the user did not say otherwise."""
    settings = dict(settings)
    plain = all(p.dtype == torch.float32 and p.device.type in ("cpu", "cuda") for p in params)
    if optimizer_fn in FUSED and plain and not {"fused", "foreach", "differentiable"} & set(settings):
        settings["fused"] = True
    try:
        return optimizer_fn(params, **settings)
    except TypeError as error:
        name = getattr(optimizer_fn, "__name__", repr(optimizer_fn))
        raise ConfigError(f"optimizer_params: {name} does not take {dict(settings)}: {error}") from None


class TaskLearningRates:
    """Learning rates of single tasks: what is one task's own moves by ``lr_task / lr`` of the optimizer's step.

    The update rules of torch's optimizers are linear in the learning rate, so that this equals a parameter group for
    each task, for parameters that are stored batched.

    Args:
        model: a built model.
        rates: task name -> learning rate.
        base: the optimizer's learning rate.

    Raises:
        ConfigError: an unknown task; the message lists the tasks.
    """

    def __init__(self, model: MTLModel, rates: Mapping[str, float], base: float) -> None:
        self.factors: dict[nn.Parameter, torch.Tensor] = {}
        for name, rate in rates.items():
            if name not in model.task_names:
                raise ConfigError(f"task_specific_lr: no task {name!r}; the tasks are {', '.join(model.task_names)}")
            for p, rows in model.task_rows(model.task_names.index(name)).items():
                factor = self.factors.setdefault(p, torch.ones(len(p), *[1] * (p.ndim - 1), device=p.device))
                for part in rows:
                    factor[part] = rate / base

    @torch.no_grad()
    def step(self, optimizer: torch.optim.Optimizer) -> None:
        """Take the optimizer's step."""
        before = [p.clone() for p in self.factors]
        optimizer.step()
        for (p, factor), old in zip(self.factors.items(), before, strict=True):
            p.sub_(old).mul_(factor).add_(old)
