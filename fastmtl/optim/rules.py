"""torch's optimizers as rules of csrc/core/optimizer.h: their states, and the numbers of one step."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch

#: The rules, in the order of ``Rule`` in csrc/core/optimizer.h.
RULES = ("sgd", "momentum", "nesterov", "adam", "adamw", "adagrad")
#: Behind them, of tables only.
ROWWISE_ADAGRAD = len(RULES)
#: The fields of ``Step`` there.
FIELDS = ("l2", "shrink", "keep", "fresh", "fresh_square", "ahead", "root", "eps", "neg_lr")


class Rule(NamedTuple):
    """How one of torch's optimizers moves a table.

    Args:
        number: the rule's place in :data:`RULES`, or :data:`ROWWISE_ADAGRAD`.
        states: names of its states in ``optimizer.state``, of the table's shape (row-wise: ``[V]``), in the kernel's
            order.
        remembers: whether a row without a gradient moves even without weight decay.
    """

    number: int
    states: tuple[str, ...]
    remembers: bool


_ADAM = ("exp_avg", "exp_avg_sq")


def rule_of(optimizer: torch.optim.Optimizer, group: Mapping[str, Any]) -> Rule:
    """The rule of a parameter group."""
    if isinstance(optimizer, torch.optim.Adam):
        return Rule(RULES.index("adamw" if group["decoupled_weight_decay"] else "adam"), _ADAM, True)
    if isinstance(optimizer, torch.optim.Adagrad):
        return Rule(RULES.index("adagrad"), ("sum",), False)
    if not group["momentum"]:
        return Rule(RULES.index("sgd"), (), False)
    return Rule(RULES.index("nesterov" if group["nesterov"] else "momentum"), ("momentum_buffer",), True)


def why_not(optimizer_fn: Callable[..., Any], settings: Mapping[str, Any]) -> str | None:
    """Why tables can't be trained sparsely with these settings of one of torch's optimizers; None: they can."""
    for name in ("amsgrad", "maximize", "differentiable", "capturable"):
        if settings.get(name):
            return f"{name}=True"
    if isinstance(settings.get("lr"), torch.Tensor):
        return "a learning rate in a tensor"
    if settings.get("betas", (0.9,))[0] <= 0.5:
        return "betas[0] of at most 0.5, where torch's interpolation changes its form"
    return None


def step_numbers(rule: Rule, group: Mapping[str, Any], number: float, is_first: bool) -> list[float]:
    """The :data:`FIELDS` of step ``number`` (from 1), computed in double precision as torch does.

    Args:
        rule: of the group.
        group: the hyperparameters.
        number: the step's.
        is_first: whether no momentum has been gathered yet: torch's buffer starts as the first gradient.
    """
    step = dict.fromkeys(FIELDS, 0.0) | {"shrink": 1.0, "root": 1.0}
    lr, decay = float(group["lr"]), float(group["weight_decay"])
    name = "adagrad" if rule.number == ROWWISE_ADAGRAD else RULES[rule.number]
    step["neg_lr"], step["l2"] = -lr, decay
    if name in ("adam", "adamw"):
        beta1, beta2 = group["betas"]
        step |= {"keep": beta2, "fresh": 1 - beta1, "fresh_square": 1 - beta2, "eps": group["eps"]}
        step["root"] = (1 - beta2**number) ** 0.5
        step["neg_lr"] = -(lr / (1 - beta1**number))
        if name == "adamw":
            step |= {"l2": 0.0, "shrink": 1 - lr * decay}
    elif name == "adagrad":
        step["eps"] = group["eps"]
        step["neg_lr"] = -(lr / (1 + (number - 1) * group["lr_decay"]))
    elif name != "sgd":
        momentum = group["momentum"]
        step |= {"ahead": momentum, "keep": momentum, "fresh": 1 - group["dampening"]}
        if is_first:
            step |= {"keep": 0.0, "fresh": 1.0}
    return [step[field] for field in FIELDS]


def has_closed_form(rule: int, numbers: Sequence[float]) -> bool:
    """Whether a rule's steps with these :data:`FIELDS` can be summed up for a row without a gradient.

    Those of Adam without decay and AdamW are, unless the steps' shares of a gradient fade too slowly to count them: by
    ``beta1 / sqrt(beta2)`` a step, which for torch's defaults is 0.9.
    """
    step = dict(zip(FIELDS, numbers, strict=True))
    if rule not in (RULES.index("adam"), RULES.index("adamw")) or step["l2"] or step["shrink"] <= 0:
        return False
    fade = (1 - step["fresh"]) / step["keep"] ** 0.5 / step["shrink"]
    return fade <= 0.98 and step["eps"] >= 1e-20
