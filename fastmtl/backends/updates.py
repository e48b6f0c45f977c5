"""What the GPU backends are told about a step of a table's optimizer, and whether its tensors fit."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..errors import BackendError

#: The rules in the order of ``fastmtl.optim.rules.RULES``, and one that torch does not have: one number of state a row.
RULES = ("sgd", "momentum", "nesterov", "adam", "adamw", "adagrad", "rowwise_adagrad")
ROWWISE_ADAGRAD = RULES.index("rowwise_adagrad")
#: For each rule how many states it has: of the table's shape ``[V, D]``, but ``[V]`` where the rule is row-wise.
STATES = (0, 1, 1, 2, 2, 1, 1)
#: The numbers of one step, those of ``fastmtl.optim.rules.FIELDS``.
STEP_FIELDS = ("l2", "shrink", "keep", "fresh", "fresh_square", "ahead", "root", "eps", "neg_lr")
FIELDS = len(STEP_FIELDS)


class Update(NamedTuple):
    """An optimizer's step of one table, for kernels that take it where the gradient comes into being.

    Args:
        p: ``[V, D]`` float32.
        states: as many as the rule has.
        last: ``[V]`` int32, set to ``now`` for the rows that move.
        rule: place in :data:`RULES`.
        step: ``[9]`` float32, the step's numbers.
        now: ``[1]`` int32 on the device, the step's number; negative: nothing is to move after all.
        index: the weight's part of ``embedding_bag_index`` of the batch; None: the backward makes its own.
    """

    p: Tensor
    states: Sequence[Tensor]
    last: Tensor
    rule: int
    step: Tensor
    now: Tensor
    index: Any = None

    @property
    def whole_rows(self) -> bool:
        """Whether a row's columns move together."""
        return self.rule == ROWWISE_ADAGRAD

    def check(self) -> None:
        """Raise BackendError where the tensors do not fit."""
        check_update(self.p, self.states, self.last, self.rule, self.step[None])


def check_update(p: Tensor, states: Sequence[Tensor], last: Tensor, rule: int, steps: Tensor) -> None:
    """Whether a table, its states and its steps fit together.

    Args:
        p, states, last, rule: as in :class:`Update`.
        steps: ``[n, 9]`` float32.

    Raises:
        BackendError: they do not; the message says which.
    """
    if not 0 <= rule < len(RULES):
        raise BackendError(f"table update: there is no rule {rule}; the rules are 0 to {len(RULES) - 1}")
    if len(states) != STATES[rule]:
        raise BackendError(f"table update: rule {RULES[rule]!r} has {STATES[rule]} states, not {len(states)}")
    shape = p.shape[:1] if rule == ROWWISE_ADAGRAD else p.shape
    for what, tensor, want, dtype in (
        ("the table", p, p.shape, torch.float32),
        *(("a state", state, shape, torch.float32) for state in states),
        ("last", last, p.shape[:1], torch.int32),
        ("steps", steps, (len(steps), FIELDS), torch.float32),
    ):
        if p.ndim != 2 or tensor.shape != want or tensor.dtype is not dtype or not tensor.is_contiguous():
            found = f"{list(tensor.shape)} {tensor.dtype}"
            raise BackendError(f"table update: {what} must be {list(want)} {dtype}, contiguous, not {found}")


def check_gradients(p: Tensor, rows: Tensor, grads: Tensor) -> None:
    """Whether ``grads [n, D]`` are those of ``rows [n]`` of ``p``.

    Raises:
        BackendError: they are not.
    """
    if grads.shape != (len(rows), p.shape[1]) or grads.dtype is not torch.float32 or not grads.is_contiguous():
        raise BackendError(f"table update: gradients of {len(rows)} rows can't be {list(grads.shape)} {grads.dtype}")


def check_range(p: Tensor, begin: int, end: int) -> None:
    """Whether ``begin .. end - 1`` are rows of ``p``.

    Raises:
        BackendError: they are not.
    """
    if not 0 <= begin <= end <= len(p):
        raise BackendError(f"table update: rows {begin} to {end} are not in a table of {len(p)}")


_behind: dict[torch.device, Tensor] = {}


def behind_on(device: torch.device) -> Tensor:
    """``[1]`` int32 on the device: not 0 where a row lagged further than the kept steps reach."""
    if device not in _behind:
        _behind[device] = torch.zeros(1, dtype=torch.int32, device=device)
    return _behind[device]


def check_reached(device: torch.device) -> None:
    """Ask whether every row was caught up that should have been; waits for the device.

    Raises:
        BackendError: a row missed more steps than were kept, and was left as it was.
    """
    flag = behind_on(device)
    if int(flag) != 0:
        flag.zero_()
        raise BackendError("a table's row missed more steps than were kept: flush() before so many steps without one")
