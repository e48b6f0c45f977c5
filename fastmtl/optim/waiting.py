"""What a table's rows owe to the steps they waited through, and how they pay: by replaying them, or by sums of them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor

from .rules import FIELDS, has_closed_form

#: Steps that a row may miss where they are replayed: the sweep reads and writes 1 / MOST_MISSED of a table a step.
MOST_MISSED = 32
#: Steps whose numbers are kept for replays; when they are used up the old ones are dropped.
_KEPT = 1024
#: Steps whose sums are kept at first, and at most: then every row is made current.
_FEWEST_SUMS, _MOST_SUMS = 256, 16384
#: Numbers of a ``Wait`` in csrc/core/optimizer_waiting.h.
WAIT_FIELDS = 14


class Waiting(ABC):
    """One table's rows: which step each is current at, and what the steps since then were.

    Args:
        table: ``[V, D]`` float32, contiguous.
        states, rule: as :class:`fastmtl.optim.rules.Rule` says.
        now: the step at which every row is current.
        last: ``[V]`` int32, which this object fills.
    """

    def __init__(self, table: Tensor, states: Sequence[Tensor], rule: int, now: int, last: Tensor) -> None:
        self.table, self.states, self.rule, self.now, self.last = table, list(states), rule, now, last
        self.is_current = True  # whether every row is, whatever `last` says

    def serves(self, states: Sequence[Tensor], rule: int, numbers: Sequence[float]) -> bool:
        """Whether a step with these numbers can follow those before."""
        same = rule == self.rule and all(one is other for one, other in zip(states, self.states, strict=True))
        return same and self._takes(numbers)

    @abstractmethod
    def _takes(self, numbers: Sequence[float]) -> bool: ...

    @abstractmethod
    def step(self, numbers: list[float], rows: Tensor, values: Tensor, is_still: bool) -> None:
        """Take the next step.

        Args:
            numbers: the step's, see :data:`fastmtl.optim.rules.FIELDS`.
            rows: ``[n]`` int64, ascending and unique.
            values: ``[n, D]``, their gradients.
            is_still: whether no other row moves, and these rows are taken as they are.
        """

    @abstractmethod
    def catch_up(self, rows: Tensor | None) -> None:
        """Make rows current, ``[n]`` int64, ascending and unique; None: all."""

    def flush(self) -> None:
        """Make every row current."""
        if not self.is_current:
            self.catch_up(None)
            self.is_current = True

    def _apply(
        self, steps: Tensor, first: int, rows: Tensor, values: Tensor, lazily: bool, begin: int, end: int
    ) -> None:
        torch.ops.fastmtl.table_step(
            self.table, self.states, self.last, self.rule, steps, first, rows, values, lazily, begin, end
        )


class Replays(Waiting):
    """Missed steps are taken one after the other, with torch's bits; a sweep through the table keeps them few."""

    def __init__(self, table: Tensor, states: Sequence[Tensor], rule: int, now: int, last: Tensor) -> None:
        super().__init__(table, states, rule, now, last)
        self.steps = torch.zeros(_KEPT, len(FIELDS))
        self.begin = now + 1  # the step in steps[0]
        self.next_row = 0  # of the sweep

    def _takes(self, numbers: Sequence[float]) -> bool:
        return not has_closed_form(self.rule, numbers)

    def step(self, numbers: list[float], rows: Tensor, values: Tensor, is_still: bool) -> None:
        if self.now + 1 - self.begin == _KEPT:
            # no row misses more than MOST_MISSED, and those need one step more than they missed
            kept = MOST_MISSED + 1
            self.steps[:kept] = self.steps[_KEPT - kept :].clone()
            self.begin = self.now + 1 - kept
        self.steps[self.now + 1 - self.begin] = torch.tensor(numbers)
        self.now += 1
        begin, end = (0, 0) if is_still else self._next_rows()
        if not is_still and self.is_current:
            self.last.fill_(self.now - 1)
        self._apply(*self._history, rows, values, is_still, begin, end)
        self.is_current = is_still

    @torch.no_grad()
    def catch_up(self, rows: Tensor | None) -> None:
        if not self.is_current:
            torch.ops.fastmtl.table_replay(
                self.table, self.states, self.last, self.rule,
                *self._history, rows, 0, 0 if rows is not None else len(self.table), self.now,
            )  # fmt: skip

    @property
    def _history(self) -> tuple[Tensor, int]:
        """``[n, fields]``, the newest steps, as many as a row may miss and one more; and the first one's number."""
        end = self.now + 1 - self.begin
        first = max(0, end - MOST_MISSED - 2)
        return self.steps[first:end], self.begin + first

    def _next_rows(self) -> tuple[int, int]:
        """The rows that the sweep takes in this step."""
        rows = len(self.table)
        begin = 0 if self.next_row >= rows else self.next_row
        self.next_row = min(rows, begin + -(-rows // MOST_MISSED))
        return begin, self.next_row


class Sums(Waiting):
    """Missed steps are summed up in closed form: rows wait as long as they like, and no other row is touched.

    For Adam without decay and AdamW, to some 1e-7 of what the missed steps moved. See csrc/core/optimizer_waiting.h.
    """

    def __init__(self, table: Tensor, states: Sequence[Tensor], rule: int, now: int, last: Tensor) -> None:
        super().__init__(table, states, rule, now, last)
        self.waits = torch.zeros(_FEWEST_SUMS, WAIT_FIELDS, dtype=torch.float64)
        self._restart()

    def _restart(self) -> None:
        self.begin, self.n, self.front = self.now, 1, 0
        torch.ops.fastmtl.table_wait_from(self.waits)

    def _takes(self, numbers: Sequence[float]) -> bool:
        return has_closed_form(self.rule, numbers)

    def step(self, numbers: list[float], rows: Tensor, values: Tensor, is_still: bool) -> None:
        if is_still:
            self.now += 1
            self._restart()
        else:
            if self.n == _MOST_SUMS:
                self.flush()
            if self.is_current:
                self.last.fill_(self.now)
                self._restart()
            self.catch_up(rows)
            if self.n == len(self.waits):
                self.waits = torch.cat([self.waits, torch.zeros_like(self.waits)])
            self.front = torch.ops.fastmtl.table_wait(self.waits, self.n, self.front, numbers)
            self.n += 1
            self.now += 1
        self._apply(torch.tensor([numbers]), self.now, rows, values, True, 0, 0)
        self.is_current = is_still

    @torch.no_grad()
    def catch_up(self, rows: Tensor | None) -> None:
        if not self.is_current:
            torch.ops.fastmtl.table_close(
                self.table, self.states, self.last, self.rule, self.waits, self.n, self.begin, rows
            )


def waiting(
    table: Tensor, states: Sequence[Tensor], rule: int, numbers: Sequence[float], now: int, last: Tensor
) -> Waiting:
    """How the rows of a table wait whose next step has these numbers; arguments as for :class:`Waiting`."""
    kind = Sums if has_closed_form(rule, numbers) else Replays
    return kind(table, states, rule, now, last)
