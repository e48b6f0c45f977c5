"""One native pass over all parameters with dense gradients, in the place of torch's step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..backends import native
from .rules import Rule, rule_of, step_numbers, why_not


class Batch(NamedTuple):
    """Parameters of one group that take the same step, and how the library wants them."""

    rule: Rule
    at: list[int]  # their places among the group's parameters with gradients
    params: list[nn.Parameter]
    states: list[Tensor]  # the first state of each, then the second of each
    counters: list[Tensor]  # their step numbers, where the rule counts
    is_first: bool  # whether the states were made for this step
    number: list[float]  # one entry: the step taken last

    def but(self, others: Sequence[Tensor]) -> tuple[Batch, Batch]:
        """Its parameters without ``others``, and those among these."""
        named, n = {id(p) for p in others}, len(self.params)

        def part(inside: bool) -> Batch:
            at = [i for i, p in enumerate(self.params) if (id(p) in named) is inside]
            states = [self.states[k * n + i] for k in range(len(self.rule.states)) for i in at]
            counters = [self.counters[i] for i in at] if self.counters else []
            params = [self.params[i] for i in at]
            return self._replace(at=[self.at[i] for i in at], params=params, states=states, counters=counters)

        return part(False), part(True)

    def take(self, grads: Sequence[Tensor], numbers: list[float], number: float) -> bool:
        """Take step ``number``; False, and nothing was done: a counter does not stand at the one before."""
        return torch.ops.fastmtl.dense_step.default(
            self.params, grads, self.states, self.counters, self.rule.number, numbers, number
        )


class _Kept(NamedTuple):
    """A group's batches, good as long as the same parameters have gradients and the same states."""

    rule: Rule
    params: list[nn.Parameter]
    entries: list[tuple[dict[str, Any], tuple[tuple[str, Tensor], ...]]]  # of ``optimizer.state``, and what they held
    batches: list[Batch]


class DenseStep:
    """Takes an optimizer's step for parameters in float32 on the CPU, in one call of the library a group.

    The numbers are bit for bit those of torch's single-tensor implementation, see docs/optimizers.md.

    Args:
        optimizer: one of torch's, of a rule that :func:`fastmtl.optim.rules.rule_of` knows.
    """

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = optimizer
        self._kept: dict[int, _Kept] = {}

    @torch.no_grad()
    def take(self) -> bool:
        """Take the step; False, and nothing was done: a parameter or a setting needs torch's own."""
        groups = self._groups()
        if groups is None:
            return False
        for slot, group, params, kept in groups:
            if kept is None:
                kept = self._kept[slot] = self._gather(group, params)
            grads: list[Any] = [p.grad for p in params]
            for batch in kept.batches:
                self._run(slot, group, batch, grads)
            torch.autograd.graph.increment_version(params)
        return True

    def steady(self) -> list[tuple[dict[str, Any], Batch]]:
        """What :meth:`take` would move for the gradients that are there, and by which group's settings, where that is
        no parameter's first step and stays the same from now on; empty: it is not so."""
        found = []
        for slot, group, params, kept in self._groups() or ():
            if kept is None:
                kept = self._kept[slot] = self._gather(group, params)
            found += [(group, batch) for batch in kept.batches]
        return [] if any(batch.is_first for _, batch in found) else found

    def _groups(self) -> list[tuple[int, dict[str, Any], list[nn.Parameter], _Kept | None]] | None:
        """Of each parameter group with gradients its number, itself, these parameters, and what is kept of it; None: a
        parameter or a setting needs torch's own step."""
        groups = []
        for slot, group in enumerate(self.optimizer.param_groups):
            params = [p for p in group["params"] if p.grad is not None]
            if not params:
                continue
            if group.get("fused") or group.get("foreach") or why_not(type(self.optimizer), group):
                return None
            for p in params:
                if p.grad.dtype is not torch.float32 or p.grad.is_sparse:
                    return None
            kept = self._kept.get(slot)
            if kept is None or not self._holds(kept, group, params):
                if not all(p.is_cpu and p.is_contiguous() for p in params):
                    return None
                kept = None
            groups.append((slot, group, params, kept))
        return groups

    def _holds(self, kept: _Kept, group: dict[str, Any], params: list[nn.Parameter]) -> bool:
        if len(params) != len(kept.params) or rule_of(self.optimizer, group).number != kept.rule.number:
            return False
        state = self.optimizer.state
        for p, before, (entry, held) in zip(params, kept.params, kept.entries, strict=True):
            if p is not before or state.get(p) is not entry:
                return False
            for name, tensor in held:
                if entry.get(name) is not tensor:
                    return False
        return True

    def _gather(self, group: dict[str, Any], params: list[nn.Parameter]) -> _Kept:
        rule = rule_of(self.optimizer, group)
        found: dict[tuple[float, bool], list[int]] = {}
        for i, p in enumerate(params):
            is_first = prepare_state(self.optimizer, p, rule)
            found.setdefault((float(self.optimizer.state[p].get("step", 0)), is_first), []).append(i)
        entries = []
        for p in params:
            entry = self.optimizer.state[p]
            names = (*rule.states, "step") if "step" in entry else rule.states
            entries.append((entry, tuple((name, entry[name]) for name in names)))
        batches = []
        for (number, is_first), at in found.items():
            held = [dict(entries[i][1]) for i in at]
            states = [one[name] for name in rule.states for one in held]
            counters = [one["step"] for one in held if "step" in one]
            batches.append(Batch(rule, at, [params[i] for i in at], states, counters, is_first, [number]))
        return _Kept(rule, params, entries, batches)

    def _run(self, slot: int, group: dict[str, Any], batch: Batch, grads: Sequence[Tensor]) -> None:
        number = batch.number[0] + 1
        mine = grads if len(batch.at) == len(grads) else [grads[i] for i in batch.at]
        done = batch.take(mine, step_numbers(batch.rule, group, number, batch.is_first), number)
        batch.number[0] = number
        if batch.is_first:
            self._kept.pop(slot, None)  # what follows is no first step
        elif not done:  # somebody else has changed the counters
            again = self._kept[slot] = self._gather(group, batch.params)
            for part in again.batches:
                self._run(slot, group, part, mine)


def prepare_state(optimizer: torch.optim.Optimizer, p: nn.Parameter, rule: Rule) -> bool:
    """Make the states that torch makes at a parameter's first step; returns whether there were none."""
    state = optimizer.state[p]
    missing = [name for name in rule.states if state.get(name) is None]
    if missing and isinstance(optimizer, torch.optim.Adam):
        state["step"] = torch.zeros((), dtype=torch.float32)
    for name in missing:
        state[name] = _zeros_like(p)
    for name in (*rule.states, "step"):
        # a checkpoint may hold them otherwise, and a GPU's has the number of steps there
        held = state.get(name)
        is_there = held is not None and (held.is_cpu or not p.is_cpu)
        if held is not None and not (is_there and held.dtype is torch.float32 and held.is_contiguous()):
            state[name] = held.to(held.device if is_there else p.device, torch.float32).contiguous()
    return bool(missing)


def _zeros_like(p: Tensor) -> Tensor:
    """Zeros, on huge pages where there are many: before memory is touched these cost nothing, later a copy."""
    made = torch.empty_like(p, memory_format=torch.contiguous_format)
    if made.is_cpu and native.unavailable() is None:
        torch.ops.fastmtl.in_huge_pages.default([made])
    return made.zero_()


def unhooked(step: Any) -> Callable[..., Any]:
    """A bound ``step`` of a class above, without the hooks that torch puts around every class's: they run around the
    step of the class below."""
    step = step.__func__
    while getattr(step, "hooked", False):
        step = step.__wrapped__
    return step
