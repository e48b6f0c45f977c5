"""Embedding tables on a GPU, trained where they are looked up: the optimizer's step is part of the backward."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .. import backend
from ..backends import branches
from ..backends.updates import FIELDS, Update, check_reached
from ..errors import ConfigError
from ..optim.dense import prepare_state
from ..optim.rules import Rule, rule_of, step_numbers, why_not
from ..spec import EmbeddingSpec

#: Steps that a row may miss before the sweep makes it current.
MOST_MISSED = 32
#: Steps whose numbers are kept on the device: more than a row may miss, and those sent ahead.
KEPT = 64
#: Steps whose numbers are sent at once, as they will be if no setting changes; divides :data:`KEPT`.
AHEAD = 16


class DeviceTables:
    """The numbers of one of torch's optimizers on dense gradients, at the cost of the rows that a batch looks up.

    A step is: :meth:`advance`; a forward, which first makes the rows current that it reads; its backward, which moves
    them; :meth:`sweep`. All but :meth:`advance` can be captured in a CUDA graph (:meth:`end` is called after a replay):
    which step it is, and its learning rate, are read on the device. Nothing waits for the device but :meth:`flush`.

    Set as ``model.embedding.updater``. Each table may be looked up once a step.

    Args:
        optimizer_fn: torch.optim's Adam, AdamW, SGD or Adagrad.
        tables: float32 parameters ``[V, D]`` on one device.
        **settings: the optimizer's.

    Raises:
        ConfigError: settings without a sparse form.
        BackendError: no backend here can update tables in its backward.

    Source: temporal blocking, see fastmtl.optim.
    """

    def __init__(self, optimizer_fn: Callable[..., Any], tables: Sequence[nn.Parameter], **settings: Any) -> None:
        self._attach(optimizer_fn(list(tables), **settings), tables, False, None)

    @classmethod
    def of(
        cls,
        optimizer: torch.optim.Optimizer,
        tables: Sequence[nn.Parameter],
        is_lazy: bool,
        rule: Rule | None = None,
    ) -> DeviceTables:
        """For tables of an optimizer that has other parameters too.

        Args:
            optimizer: holds the settings and, under torch's names, the states.
            tables: of one of its groups.
            is_lazy: rows without a gradient do not move at all, which trains another model.
            rule: the tables'; None: that of the optimizer's class.
        """
        made = cls.__new__(cls)
        made._attach(optimizer, tables, is_lazy, rule)
        return made

    def _attach(
        self, optimizer: torch.optim.Optimizer, tables: Sequence[nn.Parameter], is_lazy: bool, rule: Rule | None
    ) -> None:
        #: Holds the settings; learning-rate schedules may be built on it. It takes no step of the tables itself.
        self.optimizer = optimizer
        self.tables = list(tables)
        groups = {place: group for place, group in enumerate(optimizer.param_groups) if _holds(group, self.tables)}
        if len(groups) != 1:
            raise ConfigError("DeviceTables: the tables must be in one parameter group")
        ((self._place, group),) = groups.items()
        reason = why_not(type(optimizer), group)
        if reason:
            raise ConfigError(f"DeviceTables: tables can't be trained in the backward with {reason}")
        self._rule = rule or rule_of(optimizer, group)
        self._module: Any = backend.resolve("embedding_bag", *tables)
        if not hasattr(self._module, "embedding_bag_bwd_step"):
            raise ConfigError(
                f"DeviceTables: {self._module.__name__} takes no step in its backward; tables on a GPU can"
            )
        device = tables[0].device
        self._is_lazy, self._is_still = is_lazy, True
        self._last = {p: torch.zeros(len(p), dtype=torch.int32, device=device) for p in tables}
        self._ring = torch.zeros(KEPT, FIELDS, device=device)
        self._step = torch.zeros(FIELDS, device=device)
        self._clock = torch.zeros(1, dtype=torch.int32, device=device)
        self._now = torch.zeros(1, dtype=torch.int32, device=device)  # the clock, or -1 where no step is to be taken
        self._sent: dict[int, list[float]] = {}  # the numbers of this step and later ones, as the ring has them
        self._was_looked_up = False
        self._was_counted = True  # by the clock
        self._is_current = True
        self.now = 0

    @property
    def _group(self) -> dict[str, Any]:
        return self.optimizer.param_groups[self._place]

    @property
    def is_still(self) -> bool:
        """Whether rows without a gradient stay where they are, so that nobody has to catch up."""
        return self._is_still

    # ------------------------------------------------------------------------------------------------ a step

    def advance(self) -> None:
        """Begin the next step, with the learning rate that the optimizer's group has now."""
        were_made = [prepare_state(self.optimizer, p, self._rule) for p in self.tables]
        is_still = self._is_lazy or not (self._rule.remembers or self._group["weight_decay"])
        if is_still != self._is_still:
            if self._is_still:  # nobody has kept the time
                for last in self._last.values():
                    last.fill_(self.now)
            else:
                self.flush()
            self._is_still = is_still
        if not self._was_counted:  # a step that came to nothing
            self._clock.fill_(self.now)
        self.now += 1
        numbers = step_numbers(self._rule, self._group, float(self.now), any(were_made))
        if self._sent.get(self.now) != numbers:
            self._send(numbers)
        self._was_looked_up = self._is_current = self._was_counted = False

    def _send(self, numbers: list[float]) -> None:
        """Write the numbers of this step into the ring, and with them those of some that follow: a copy for each would
        cost the host as much as a replay."""
        first = (self.now - 1) % KEPT
        steps = [numbers]
        for ahead in range(1, AHEAD - first % AHEAD):
            steps.append(step_numbers(self._rule, self._group, float(self.now + ahead), False))
        self._sent = {self.now + ahead: row for ahead, row in enumerate(steps)}
        # torch keeps page-locked memory until the copy out of it was made
        sent = torch.tensor(steps, dtype=torch.float32, pin_memory=self._ring.is_cuda)
        self._ring[first : first + len(steps)].copy_(sent, non_blocking=True)

    def _count(self) -> None:
        """Let the device begin the step, before anything that depends on its number."""
        if not self._was_counted:
            self._module.advance(self._ring, self._step, self._clock, self._now)
            self._was_counted = True

    def again(self) -> None:
        """The step that was begun is to be taken after all: recording it has failed half-way."""
        self._was_looked_up = self._was_counted = False
        self._clock.fill_(self.now - 1)

    def end(self) -> None:
        """The step that was begun has been taken by a graph."""
        self._was_counted = True

    def index(
        self,
        ids: Tensor,
        columns: tuple[int, ...],
        spec: EmbeddingSpec,
        weights: Sequence[Tensor],
        out: list[Any] | None = None,
    ) -> list[Any]:
        """What a lookup's steps need to know of its ids; may be made while an earlier batch computes.

        Args:
            ids, columns, spec, weights: the lookup's, see :func:`fastmtl.ops.embedding_bag`.
            out: the index of another batch of the same shape, to be overwritten.
        """
        mine = [p in self._last for p in weights]
        return self._module.embedding_bag_index(ids, columns, spec, [p.shape for p in weights], mine, out)

    def before_lookup(
        self,
        weights: list[nn.Parameter],
        ids: Tensor,
        columns: tuple[int, ...],
        spec: EmbeddingSpec,
        index: list[Any] | None = None,
    ) -> list[Update | None] | None:
        """Make the rows current that a lookup is about to read; where no gradients are taken, all rows.

        Args:
            weights, ids, columns, spec: the lookup's, see :func:`fastmtl.ops.embedding_bag`.
            index: of these ids, see :meth:`index`; None: it is made here.

        Returns:
            The step that its backward is to take.

        Raises:
            ConfigError: the second lookup of a step.
        """
        if not torch.is_grad_enabled():
            self.flush()
            return None
        if self._was_looked_up:
            raise ConfigError(
                "this model looks its tables up more than once in a step, which can't be their step's backward; "
                "train it with embedding_update='dense'"
            )
        self._was_looked_up = True
        self._count()
        index = self.index(ids, columns, spec, weights) if index is None else index
        found: list[Update | None] = []
        for p, rows in zip(weights, index, strict=True):
            if rows is None:
                found.append(None)
                continue
            states, last = self._states(p), self._last[p]
            if not self._is_still:
                with torch.no_grad():
                    self._module.table_catch_up(
                        p, states, last, self._rule.number, self._ring, 1, rows, -1, self._clock
                    )
            found.append(Update(p, states, last, self._rule.number, self._step, self._now, rows))
        return found

    def clock_and_step(self) -> tuple[Tensor, Tensor]:
        """``[1]`` int32 on the device each: the number of the step under way, and that of the step which the backward
        takes. Writing -1 there between forward and backward makes it move nothing."""
        self._count()
        return self._clock, self._now

    @torch.no_grad()
    def take(self, p: nn.Parameter) -> None:
        """Take the step with a dense gradient, of all rows."""
        self._count()
        assert p.grad is not None
        rows = torch.arange(len(p), device=p.device)
        self._module.table_step(
            p, self._states(p), self._last[p], self._rule.number, self._ring, 1, rows, p.grad.float().contiguous(),
            self._is_still, 0, 0, self._clock,
        )  # fmt: skip

    def sweep(self) -> None:
        """Make a 32nd of each table current: the rest of a step."""
        self._count()
        if not self._is_still:
            for p in self.tables:
                share = -(-len(p) // MOST_MISSED)
                branches.beside(branches.TABLES, self._replay, p, share, 0, self._clock)

    # ------------------------------------------------------------------------------------------- between steps

    def flush(self) -> None:
        """Make every row current: parameters and states are what the dense optimizer's would be.

        Raises:
            BackendError: a step was left without its sweep for so long that a row can't be caught up.
        """
        if self._is_current:
            return
        if not self._is_still:
            for p in self.tables:
                self._replay(p, len(p), self.now, None)
        check_reached(self._clock.device)
        for p in self.tables:
            if "step" in self.optimizer.state[p]:
                self.optimizer.state[p]["step"] = torch.tensor(float(self.now), device=p.device)
        self._is_current = True

    def restart(self, now: int) -> None:
        """Every row is current at step ``now``."""
        self.now, self._was_counted = now, True
        self._sent.clear()
        self._clock.fill_(now)
        for last in self._last.values():
            last.fill_(now)
        self._is_current = True

    def states(self, p: nn.Parameter) -> dict[str, Tensor]:
        """The optimizer's states of a table, under torch's names; call :meth:`flush` first."""
        return dict(zip(self._rule.states, self._states(p), strict=True))

    def _states(self, p: Tensor) -> list[Tensor]:
        state = self.optimizer.state[p]
        return [state[name] for name in self._rule.states]

    @torch.no_grad()
    def _replay(self, p: nn.Parameter, end: int, upto: int, clock: Tensor | None) -> None:
        self._module.table_replay(
            p, self._states(p), self._last[p], self._rule.number, self._ring, 1, None, 0, end, upto, clock
        )


def _holds(group: dict[str, Any], tables: Sequence[Tensor]) -> bool:
    return any(p is table for p in group["params"] for table in tables)
