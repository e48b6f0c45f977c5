"""Embedding tables on a GPU, trained where they are looked up: the optimizer's step is part of the backward."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .. import backend
from ..backends.updates import Update, check_reached
from ..errors import ConfigError
from ..optim.rules import Rule, rule_of, step_numbers, why_not
from ..spec import EmbeddingSpec

#: Steps that a row may miss before the sweep makes it current.
MOST_MISSED = 32
#: Steps whose numbers are kept on the device, more than a row may miss.
KEPT = 64


class _Table:
    """One table: its optimizer's states, and for each row the step up to which it is current."""

    def __init__(self, p: nn.Parameter, rule: Rule) -> None:
        self.p = p
        self.states = [torch.zeros_like(p, memory_format=torch.contiguous_format) for _ in rule.states]
        self.last = torch.zeros(len(p), dtype=torch.int32, device=p.device)
        self.share = -(-len(p) // MOST_MISSED)


class DeviceTables:
    """The numbers of one of torch's optimizers on dense gradients, at the cost of the rows that a batch looks up.

    A step is: :meth:`advance`; a forward, which first makes the rows current that it reads; its backward, which moves
    them; :meth:`sweep`. All but :meth:`advance` can be captured in a CUDA graph: which step it is, and its learning
    rate, are read on the device. Nothing waits for the device but :meth:`flush`.

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
        #: Holds the settings; learning-rate schedules may be built on it. It takes no step itself.
        self.optimizer: torch.optim.Optimizer = optimizer_fn(list(tables), **settings)
        reason = why_not(optimizer_fn, self.optimizer.param_groups[0])
        if reason is None and settings.get("initial_accumulator_value"):
            reason = "initial_accumulator_value"
        if reason:
            raise ConfigError(f"DeviceTables: tables can't be trained in the backward with {reason}")
        self._rule = rule_of(self.optimizer, self.optimizer.param_groups[0])
        self._module: Any = backend.resolve("embedding_bag", *tables)
        if not hasattr(self._module, "embedding_bag_bwd_step"):
            raise ConfigError(
                f"DeviceTables: {self._module.__name__} takes no step in its backward; tables on a GPU can"
            )
        self._tables = {p: _Table(p, self._rule) for p in tables}
        device = tables[0].device
        self._ring = torch.zeros(KEPT, 9, device=device)
        self._step = torch.zeros(9, device=device)
        self._clock = torch.zeros(1, dtype=torch.int32, device=device)
        self.now = 0

    def advance(self) -> None:
        """Begin the next step, with the learning rate that the optimizer's group has now."""
        self.now += 1
        numbers = step_numbers(self._rule, self.optimizer.param_groups[0], float(self.now), self.now == 1)
        self._module.advance(self._ring, self._step, self._clock, self.now, (self.now - 1) % KEPT, numbers)

    def before_lookup(
        self, weights: list[nn.Parameter], ids: Tensor, columns: tuple[int, ...], spec: EmbeddingSpec
    ) -> list[Update | None] | None:
        """Make the rows current that a lookup is about to read; where no gradients are taken, all rows.

        Args:
            weights, ids, columns, spec: the lookup's, see :func:`fastmtl.ops.embedding_bag`.

        Returns:
            The step that its backward is to take.
        """
        if not torch.is_grad_enabled():
            self.flush()
            return None
        found: list[Update | None] = []
        mine = [p in self._tables for p in weights]
        rows = self._module.embedding_bag_rows(ids, columns, spec, [p.shape for p in weights], mine)
        for p, listed in zip(weights, rows, strict=True):
            if listed is None:
                found.append(None)
                continue
            table = self._tables[p]
            self._replay(table, listed, 0, 0, -1, self._clock)
            found.append(Update(p, table.states, table.last, self._rule.number, self._step, self._clock))
        return found

    def sweep(self) -> None:
        """Make a 32nd of each table current: the rest of a step."""
        for table in self._tables.values():
            self._replay(table, None, 0, table.share, 0, self._clock)

    def flush(self) -> None:
        """Make every row current: the parameters are what the dense optimizer's would be.

        Raises:
            BackendError: a step was left without its sweep for so long that a row can't be caught up.
        """
        for table in self._tables.values():
            self._replay(table, None, 0, len(table.p), self.now, None)
        check_reached(self._clock.device)

    def states(self, p: nn.Parameter) -> dict[str, Tensor]:
        """The optimizer's states of a table, under torch's names; call :meth:`flush` first."""
        return dict(zip(self._rule.states, self._tables[p].states, strict=True))

    @torch.no_grad()
    def _replay(
        self, table: _Table, rows: Tensor | None, begin: int, end: int, upto: int, clock: Tensor | None
    ) -> None:
        self._module.table_replay(
            table.p, table.states, table.last, self._rule.number, self._ring, 1, rows, begin, end, upto, clock
        )
