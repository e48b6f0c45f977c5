"""The dense parameters' part of a step on a GPU, by kernels of ours where these have the rule, else by torch's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import backend
from ..optim.rules import FIELDS, RULES, Rule, rule_of, step_numbers, why_not

#: torch's optimizers whose states do not count steps.
_UNCOUNTED = ("sgd", "momentum", "nesterov")


class _Part(NamedTuple):
    """The parameters of a group that have gradients, and their step's arguments."""

    params: list[Tensor]
    arguments: tuple[Any, ...]


@torch.no_grad()
def take(optimizer: torch.optim.Optimizer, rates: Sequence[Tensor], lost: Tensor | None) -> bool:
    """Take an optimizer's step with the gradients that are there.

    Args:
        optimizer: Adam, AdamW, SGD or Adagrad of torch.
        rates: of each group the learning rate, on the device.
        lost: where it is 1 nothing is to move; None: it does.

    Returns:
        Whether it was taken. False, and nothing was done: a setting, a tensor or a backend wants torch's own, and so
        does a parameter's first step, in which its states come into being.
    """
    parts = []
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        params = [p for p in group["params"] if p.grad is not None]
        if not params:
            continue
        part = _part(optimizer, group, params, rate, lost)
        if part is None:
            return False
        parts.append(part)
    for params, arguments in parts:
        backend.resolve("expert_gate", *params).dense_step(params, *arguments)
        torch.autograd.graph.increment_version(params)
    return True


def _part(
    optimizer: torch.optim.Optimizer, group: dict[str, Any], params: list[Tensor], rate: Tensor, lost: Tensor | None
) -> _Part | None:
    if group.get("fused") or group.get("foreach") or why_not(type(optimizer), group):
        return None
    given: list[Any] = [p.grad for p in params]
    grads = [grad if grad.is_sparse else grad.contiguous() for grad in given]
    if not all(_fits(tensor, rate) for tensor in (*params, *grads)):
        return None
    if not hasattr(backend.resolve("expert_gate", *params), "dense_step"):
        return None
    rule = rule_of(optimizer, group)
    held = [one for p in params if (one := _held(optimizer.state.get(p, {}), rule)) is not None]
    if len(held) < len(params) or not all(_fits(tensor, rate) for one in held for tensor in one):
        return None
    n = len(rule.states)
    states, counts = [one[:n] for one in held], [one[n] for one in held if len(one) > n]
    numbers = dict(zip(FIELDS, step_numbers(rule, group, 1.0, False), strict=True))
    betas = group.get("betas", (0.0, 0.0))
    settings: dict[str, float] = {name: group[name] for name in ("weight_decay", "lr_decay") if name in group}
    settings |= {"beta1": betas[0], "beta2": betas[1]}
    return _Part(params, (grads, states, counts, rule.number, numbers, settings, rate, lost))


def _held(state: dict[str, Any], rule: Rule) -> list[Tensor] | None:
    """A parameter's states and, where it counts, its number of steps; None: it has taken none."""
    names = rule.states if RULES[rule.number] in _UNCOUNTED else (*rule.states, "step")
    found = [state[name] for name in names if state.get(name) is not None]
    return found if len(found) == len(names) else None


def _fits(tensor: Tensor, rate: Tensor) -> bool:
    is_dense = tensor.layout is torch.strided and tensor.is_contiguous()
    return is_dense and tensor.dtype is torch.float32 and tensor.device == rate.device
