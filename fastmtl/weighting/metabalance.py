"""MetaBalance."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ConfigError
from .base import Strategy


class MetaBalance(torch.optim.Optimizer):
    """Scales the gradients of the auxiliary tasks towards the magnitude of the target task's, the first.

    For each parameter: ``m_i <- beta m_i + (1 - beta) |g_i|``, then ``g_i <- r g_i m_0 / m_i + (1 - r) g_i``; the
    gradient is the sum over the tasks. It only fills ``.grad``; an optimizer then takes the step.

    Args:
        parameters: the shared parameters.
        relax_factor: r, how far the magnitudes are brought together; 0 <= r < 1 (1 is total balance).
        beta: decay of the moving averages; 0 <= beta < 1.

    Source: He et al., MetaBalance, WWW'22, algorithm 1.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], relax_factor: float = 0.7, beta: float = 0.9) -> None:
        if not 0.0 <= relax_factor < 1.0:
            raise ConfigError(f"MetaBalance: relax_factor must be at least 0 and below 1, got {relax_factor}")
        if not 0.0 <= beta < 1.0:
            raise ConfigError(f"MetaBalance: beta must be at least 0 and below 1, got {beta}")
        super().__init__(parameters, {"relax_factor": relax_factor, "beta": beta})
        self.blocks: dict[nn.Parameter, list[int]] = {}

    def attach(self, model: Any) -> None:
        """Balance the shared parameters of a fastmtl model, each of its outside tensors by itself."""
        group = dict(self.param_groups[0])
        self.param_groups[:] = [{**group, "params": [p for p in model.shared_parameters() if p.requires_grad]}]
        self.blocks = model.blocks()

    def step(self, losses: Sequence[Tensor], others: Sequence[nn.Parameter] = ()) -> None:  # type: ignore[override]
        """Fill ``.grad``.

        Args:
            losses: one a task, the target's first; their graph is kept until the last.
            others: parameters that get the plain sum of the tasks' gradients.
        """
        balanced = [(p, group) for group in self.param_groups for p in group["params"]]
        params = [p for p, _ in balanced] + list(others)
        sums: list[Tensor | None] = [None] * len(params)
        for task, loss in enumerate(losses):
            last = task == len(losses) - 1
            grads = torch.autograd.grad(loss, params, retain_graph=not last, allow_unused=True)
            with torch.no_grad():
                for k, grad in enumerate(grads):
                    if grad is None:
                        continue
                    if k < len(balanced):
                        grad = self._balance(*balanced[k], grad, task, len(losses))
                    before = sums[k]
                    sums[k] = grad if before is None else before + grad
        for p, total in zip(params, sums, strict=True):
            # a fused optimizer reads the gradient in the parameter's own layout
            p.grad = None if total is None else total.contiguous()

    def _balance(self, p: nn.Parameter, group: dict[str, Any], grad: Tensor, task: int, n_task: int) -> Tensor:
        rows = self.blocks.get(p, [len(p)] if p.ndim else [])
        state = self.state[p]
        if "norms" not in state:
            state["norms"] = grad.new_zeros(n_task, max(len(rows), 1))
        norms = state["norms"]
        parts = grad.split(rows) if rows else [grad]
        norms[task].mul_(group["beta"]).add_(torch.stack(torch._foreach_norm(parts)), alpha=1 - group["beta"])
        if task == 0:
            return grad
        relax = group["relax_factor"]
        scale = relax * norms[0] / norms[task].clamp(min=torch.finfo(grad.dtype).tiny) + (1 - relax)
        if len(scale) > 1:
            lengths = torch.tensor(rows, device=grad.device)
            scale = scale.repeat_interleave(lengths).view(-1, *[1] * (grad.ndim - 1))
        return grad * scale


class MetaBalanceStrategy(Strategy):
    """:class:`MetaBalance` on the shared parameters, plain sums on the tasks' own.

    Args:
        relax_factor, beta: see :class:`MetaBalance`.
        optimizer: a MetaBalance made by the user, whose settings are taken.
    """

    def __init__(self, relax_factor: float = 0.7, beta: float = 0.9, optimizer: MetaBalance | None = None) -> None:
        self.meta = optimizer
        self.settings = {"relax_factor": relax_factor, "beta": beta}
        if optimizer is None:
            MetaBalance([nn.Parameter(torch.zeros(1))], **self.settings)  # refuses bad settings before any data is read

    def attach(self, model: Any, task_types: list[str]) -> None:
        super().attach(model, task_types)
        shared = model.shared_parameters()
        if self.meta is None:
            self.meta = MetaBalance(shared, **self.settings)
        self.meta.attach(model)
        balanced = {id(p) for group in self.meta.param_groups for p in group["params"]}
        self.others = [p for p in model.parameters() if p.requires_grad and id(p) not in balanced]

    def backward(self, losses: Tensor, penalty: Tensor | float) -> None:
        assert self.meta is not None  # attach made it
        self.meta.step(losses.unbind(), self.others)
        if isinstance(penalty, Tensor):
            penalty.backward()
