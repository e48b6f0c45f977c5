"""Optimizers whose tables are updated where a gradient reached them, with the numbers of dense updates."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..backends import native
from ..errors import BackendError, ConfigError
from ..spec import EmbeddingSpec
from .dense import DenseStep, prepare_state, unhooked
from .rules import ROWWISE_ADAGRAD, Rule, rule_of, step_numbers, why_not
from .waiting import Waiting, waiting


class _Pending:
    """A table, and what it still owes its rows."""

    def __init__(self, table: nn.Parameter) -> None:
        self.table = table
        self.last = torch.zeros(len(table), dtype=torch.int32)  # for each row the step up to which it is current
        self.is_placed = False  # whether huge pages were asked for
        self.restart(0)

    def restart(self, now: int) -> None:
        """Every row is current at step ``now``."""
        self.now = now
        self.waiting: Waiting | None = None  # made with the first step

    def flush(self) -> None:
        """Make every row current."""
        if self.waiting is not None and not self.waiting.is_current:
            self.waiting.flush()
            torch.autograd.graph.increment_version(self.table)

    def for_step(self, states: list[Tensor], rule: Rule, numbers: list[float]) -> Waiting:
        """What takes a step with these numbers; every row is current where that is not what took the last one."""
        if self.waiting is None or not self.waiting.serves(states, rule.number, numbers):
            self.flush()
            self.waiting = waiting(self.table, states, rule.number, numbers, self.now, self.last)
        return self.waiting


class TableOptimizer(torch.optim.Optimizer):
    """What :class:`Adam`, :class:`AdamW`, :class:`SGD` and :class:`Adagrad` add to torch's classes of these names.

    A table's sparse gradient updates the rows it names. All other rows, which a dense optimizer would move too (by
    momentum, by weight decay), wait: :meth:`catch_up` makes them current before they are read, a sweep through the
    table after :data:`MOST_MISSED` steps, :meth:`flush` at once. ``state`` and ``state_dict`` are torch's.

    Args:
        params: as in torch; the tables among them.
        tables: the float32 parameters ``[V, D]`` on the CPU whose gradients come sparse. A dense gradient of theirs
            works too, at the cost of a dense update.
        embedding_update: ``"exact"``, torch's numbers; ``"lazy"``: rows without a gradient do not move at all, which
            trains another model.
        *args, **settings: torch's.

    Raises:
        BackendError: there is no native library.
        ConfigError: settings with no sparse form, or an unknown ``embedding_update``.

    Source: temporal blocking of the update, as stencil codes do it; the order of operations is torch's.
    """

    _pending: dict[nn.Parameter, _Pending]
    #: What moves all other parameters.
    dense: DenseStep
    #: Whether torch's step can take a table's dense gradient; else that too is taken by rows.
    _takes_dense_tables = True

    def __init__(
        self,
        params: Iterable[Any],
        *args: Any,
        tables: Sequence[nn.Parameter] = (),
        embedding_update: str = "exact",
        **settings: Any,
    ) -> None:
        missing = native.unavailable()
        if missing:
            raise BackendError(f"{type(self).__name__}: sparse updates need the native backend: {missing}")
        if embedding_update not in ("exact", "lazy"):
            raise ConfigError(f"embedding_update {embedding_update!r} is not known; use 'exact' or 'lazy'")
        self._pending = {}
        self.dense = DenseStep(self)
        self._is_lazy = embedding_update == "lazy"
        super().__init__(params, *args, **settings)
        for group in self.param_groups:
            reason = why_not(type(self), group)
            if reason:
                raise ConfigError(f"{type(self).__name__}: tables can't be updated sparsely with {reason}")
        self._pending = {table: _Pending(table) for table in tables}

    @property
    def tables(self) -> list[nn.Parameter]:
        """The parameters that are updated at sparse cost."""
        return list(self._pending)

    # ------------------------------------------------------------------------------------------------ a step

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take a step with the gradients in ``.grad``; see torch's optimizer."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if not self._pending:
            self._dense_step()
            return loss
        for table in self._pending:
            if not self._takes_dense_tables and table.grad is not None and not table.grad.is_sparse:
                table.grad = table.grad.to_sparse(1)
        sparse = [table for table in self._pending if table.grad is not None and table.grad.is_sparse]
        dense = [table for table in self._pending if table.grad is not None and not table.grad.is_sparse]
        for table in dense:
            self._pending[table].flush()
        grads = [table.grad for table in sparse]
        for table in sparse:
            table.grad = None
        try:
            self._dense_step()
        finally:
            for table, grad in zip(sparse, grads, strict=True):
                table.grad = grad
        for group in self.param_groups:
            for table in group["params"]:
                if table in self._pending and table.grad is not None and table.grad.is_sparse:
                    self._sparse_step(self._pending[table], group)
        for table in dense:
            self._pending[table].restart(self._pending[table].now + 1)
        return loss

    def _table_rule(self, group: dict[str, Any]) -> Rule:
        return rule_of(self, group)

    def _dense_step(self) -> None:
        if self.dense.take():
            return
        step: Any = super().step
        unhooked(step)(self)

    @torch.no_grad()
    def _sparse_step(self, pending: _Pending, group: dict[str, Any]) -> None:
        table, rule = pending.table, self._table_rule(group)
        rows, values = _rows_of(table.grad)
        state = self.state[table]
        is_first = prepare_state(self, table, rule)
        states = [state[name] for name in rule.states]
        if not pending.is_placed:
            torch.ops.fastmtl.in_huge_pages([table, pending.last, *states])
            pending.is_placed = True
        if "step" in state:
            state["step"] += 1
        numbers = step_numbers(rule, group, float(state.get("step", pending.now + 1)), is_first)
        rows_wait = pending.for_step(states, rule, numbers)
        # nothing moves without a gradient: neither by memory nor, as far as the steps before tell, by weight decay
        is_still = self._is_lazy or (not rule.remembers and rows_wait.is_current and not group["weight_decay"])
        rows_wait.step(numbers, rows, values, is_still)
        pending.now = rows_wait.now
        torch.autograd.graph.increment_version(table)

    # --------------------------------------------------------------------------------------- rows made current

    def index(
        self,
        ids: Tensor,
        columns: tuple[int, ...],
        spec: EmbeddingSpec,
        weights: Sequence[Tensor],
        alone: bool = False,
    ) -> list[native.RowIndex | None] | None:
        """The rows that a lookup reads of this optimizer's tables, None where it reads none; depends on the ids alone,
        so that it may be made by another thread while an earlier batch computes.

        Args:
            ids, columns, spec, weights: the lookup's, see :func:`fastmtl.ops.embedding_bag`.
            alone: on the calling thread only, because the others are at work.
        """
        mine = [weight in self._pending for weight in weights]
        if not any(mine):
            return None
        return native.embedding_bag_index(ids, columns, spec, [weight.shape for weight in weights], mine, alone)

    def before_lookup(
        self,
        weights: list[nn.Parameter],
        ids: Tensor,
        columns: tuple[int, ...],
        spec: EmbeddingSpec,
        index: list[native.RowIndex | None] | None = None,
    ) -> list[native.RowIndex | None] | None:
        """Make the rows current that a lookup is about to read; without gradients, all rows.

        Args:
            weights, ids, columns, spec: the lookup's, see :func:`fastmtl.ops.embedding_bag`.
            index: what :meth:`index` says of them, where that is known.

        Returns:
            What the lookup needs for sparse gradients of the weights that are tables of this optimizer.
        """
        if index is None and torch.is_grad_enabled():
            index = self.index(ids, columns, spec, weights)
        if index is None or not torch.is_grad_enabled():
            self.flush()
            return None
        for weight, found in zip(weights, index, strict=True):
            if found is not None:
                self.catch_up(weight, found.rows)
        mine = [found is not None for found in index]
        return index if mine == [weight.requires_grad for weight in weights] else None

    def catch_up(self, table: Tensor, rows: Tensor) -> None:
        """Make rows current before they are read.

        Args:
            table: a parameter; others than this optimizer's tables are left alone.
            rows: ``[n]`` int64, ascending and unique.
        """
        pending = self._pending.get(table)  # type: ignore[call-overload]
        if pending is not None and pending.waiting is not None:
            pending.waiting.catch_up(rows)

    def flush(self) -> None:
        """Make every row of every table current, so that the parameters and the state are what torch's would be."""
        for pending in self._pending.values():
            pending.flush()

    # ---------------------------------------------------------------------------------------------- checkpoints

    def __getstate__(self) -> dict[str, Any]:
        self.flush()
        return super().__getstate__() | {"_tables": self.tables, "_is_lazy": self._is_lazy}

    def __setstate__(self, state: dict[str, Any]) -> None:
        tables = state.pop("_tables", None)
        super().__setstate__(state)
        if tables is not None:  # a copy, or from a pickle
            self.dense = DenseStep(self)
            self._pending = {table: _Pending(table) for table in tables}
            self._restart()

    def state_dict(self) -> dict[str, Any]:
        """torch's state_dict, every row current: torch's optimizer of the same name continues from it."""
        self.flush()
        return super().state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from a state_dict of this optimizer or of torch's of the same name."""
        self.flush()
        super().load_state_dict(state_dict)
        self._restart()

    def _restart(self) -> None:
        for table, pending in self._pending.items():
            pending.restart(int(self.state.get(table, {}).get("step", pending.now)))


def _rows_of(grad: Tensor | None) -> tuple[Tensor, Tensor]:
    """Ascending unique rows ``[n]`` and their gradients ``[n, D]`` of a sparse gradient."""
    assert grad is not None
    rows, values = grad._indices()[0], grad._values()
    # one backward's rows are ascending; several are laid one behind the other. torch forgets which it is.
    if len(rows) > 1 and not bool((rows[1:] > rows[:-1]).all()):
        grad = grad.coalesce()
        rows, values = grad._indices()[0], grad._values()
    return rows.contiguous(), values.contiguous()


class Adam(TableOptimizer, torch.optim.Adam):
    """torch.optim.Adam, tables at sparse cost; coupled weight decay moves (and in time erases) untouched rows too."""


class AdamW(TableOptimizer, torch.optim.AdamW):
    """torch.optim.AdamW, tables at sparse cost."""


class SGD(TableOptimizer, torch.optim.SGD):
    """torch.optim.SGD with or without momentum, tables at sparse cost."""


class Adagrad(TableOptimizer, torch.optim.Adagrad):
    """torch.optim.Adagrad, tables at sparse cost."""


class RowwiseAdagrad(TableOptimizer, torch.optim.Adagrad):
    """Adagrad with one number of state for a table's row, the mean square of its gradients: another rule than
    Adagrad's, with 1 / D of its memory. All other parameters are Adagrad's.

    Args:
        params, *args, **settings: as for torch.optim.Adagrad; see :class:`TableOptimizer`.
        tables: at least one. Their ``state["sum"]`` is ``[V]``.

    Raises:
        ConfigError: no tables.

    Source: the row-wise rule of DLRM's trainers (Mudigere et al., ISCA'22) and of FBGEMM.
    """

    _takes_dense_tables = False

    def __init__(self, params: Iterable[Any], *args: Any, tables: Sequence[nn.Parameter] = (), **settings: Any) -> None:
        super().__init__(params, *args, tables=tables, **settings)
        make_row_sums(self, tables)

    def _table_rule(self, group: dict[str, Any]) -> Rule:
        return ROWWISE_RULE

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from a state_dict of this class; another's raises ConfigError."""
        super().load_state_dict(state_dict)
        check_row_sums(self, self.tables)


#: The rule of ``RowwiseAdagrad``.
ROWWISE_RULE = Rule(ROWWISE_ADAGRAD, ("sum",), False)


def make_row_sums(optimizer: torch.optim.Adagrad, tables: Sequence[nn.Parameter]) -> None:
    """Give row-wise tables their states in the place of Adagrad's.

    Raises:
        ConfigError: no tables.
    """
    if not tables:
        raise ConfigError(
            "RowwiseAdagrad: no tables to train by rows: name them (MTLTrainer does, except with "
            "embedding_update='dense', GradNorm or MetaBalance), or use torch.optim.Adagrad"
        )
    start = optimizer.defaults["initial_accumulator_value"]
    for table in tables:
        optimizer.state[table]["sum"] = torch.full((len(table),), start, dtype=torch.float32, device=table.device)


def check_row_sums(optimizer: torch.optim.Optimizer, tables: Sequence[nn.Parameter]) -> None:
    """Raise ConfigError where a table's state is not row-wise."""
    for table in tables:
        found = optimizer.state.get(table, {}).get("sum")
        if found is None or found.shape != (len(table),):
            shape = None if found is None else list(found.shape)
            raise ConfigError(
                f"RowwiseAdagrad: a table's state 'sum' must be [{len(table)}], one number a row, not {shape}: "
                f"a checkpoint of another optimizer does not fit"
            )
