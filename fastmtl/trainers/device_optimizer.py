"""torch's optimizers for steps that the host does not wait for: fused, learning rate and count on the device."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ConfigError
from ..optim.dense import unhooked
from ..optim.rules import Rule
from ..optim.tables import ROWWISE_RULE, check_row_sums, make_row_sums
from ..spec import EmbeddingSpec
from . import dense_steps
from .device_tables import DeviceTables


class DeviceOptimizer(torch.optim.Optimizer):
    """What :class:`Adam`, :class:`AdamW`, :class:`SGD` and :class:`Adagrad` add to torch's classes of these names.

    Parameters take a step that reads the learning rate on the device, so that all of :meth:`step` can be captured in a
    CUDA graph: one of ours (dense_steps.py), else torch's fused one. Tables move in the backward
    (:class:`DeviceTables`). ``param_groups``, ``state`` and ``state_dict`` are torch's: a checkpoint of the one
    continues in the other, and schedules work.

    A step is: :meth:`begin`; forward and backward; :meth:`step`. Where the last two are replayed from a graph,
    :meth:`end` takes the place of ``step``.

    Args:
        params: as in torch; the tables among them.
        tables: the float32 parameters ``[V, D]`` that are trained where they are looked up.
        embedding_update: of these: ``"exact"``, torch's numbers; ``"lazy"``: rows without a gradient do not move.
        *args, **settings: torch's.

    Raises:
        ConfigError: tables with settings that have no sparse form.
    """

    #: The tables' rule; None: that of torch's class.
    _table_rule: Rule | None = None

    def __init__(
        self,
        params: Iterable[Any],
        *args: Any,
        tables: Sequence[nn.Parameter] = (),
        embedding_update: str = "exact",
        **settings: Any,
    ) -> None:
        self.updates: DeviceTables | None = None
        self.found_inf: Tensor | None = None  # where torch's fused steps look for a veto
        super().__init__(params, *args, **settings)
        self._set_up(tables, embedding_update == "lazy")

    def _set_up(self, tables: Sequence[nn.Parameter], is_lazy: bool) -> None:
        self.updates = DeviceTables.of(self, tables, is_lazy, self._table_rule) if tables else None
        self._is_lazy = is_lazy
        self._rates: list[tuple[float, Tensor]] = []
        self._has_begun = False
        self._lost: Tensor | None = None
        self._may_be_vetoed = False
        self._warned_capturable_if_run_uncaptured = True  # which is what is meant
        self._need_device_dtype_check_for_fused = False  # torch has Adagrad's kernel for GPUs, and its check denies it
        self._place_counts()

    def _place_counts(self) -> None:
        """Put the numbers of steps where fused steps count them; torch leaves them where a checkpoint had them, and
        makes Adagrad's on the host."""
        for p, state in self.state.items():
            if isinstance(state.get("step"), Tensor):
                state["step"] = state["step"].to(p.device, torch.float32)

    @property
    def tables(self) -> list[nn.Parameter]:
        """The parameters that are trained where they are looked up."""
        return [] if self.updates is None else self.updates.tables

    # ------------------------------------------------------------------------------------------------ a step

    def begin(self) -> None:
        """Put the next step's learning rates, and what else its number decides, on the device, where they are not
        there already."""
        if len(self._rates) != len(self.param_groups):
            self._rates = [
                (0.0, torch.zeros((), device=next((p.device for p in group["params"]), None)))
                for group in self.param_groups
            ]
        for place, (group, (held, rate)) in enumerate(zip(self.param_groups, self._rates, strict=True)):
            now = float(group["lr"])
            if now != held:
                rate.fill_(now)
                self._rates[place] = now, rate
        if self.updates is not None:
            self.updates.advance()
        self._has_begun = True

    def veto_places(self) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Where a step under way is vetoed between forward and backward, when its loss is NaN and so will be its
        gradients: a float32 that becomes 1 (else 0); where there are tables, see :meth:`DeviceTables.clock_and_step`.

        Settings other than fused ones take no notice of it.
        """
        self._may_be_vetoed = True
        if self._lost is None:
            self._lost = torch.zeros((), device=self.param_groups[0]["params"][0].device)
        return (self._lost, None, None) if self.updates is None else (self._lost, *self.updates.clock_and_step())

    def again(self) -> None:
        """The step that was begun is to be taken after all: recording it has failed half-way."""
        self._has_begun, self._may_be_vetoed = True, False
        if self.updates is not None:
            self.updates.again()

    def end(self) -> None:
        """The step that was begun has been taken by a graph."""
        self._has_begun = False
        if self.updates is not None:
            self.updates.end()

    def index(
        self,
        ids: Tensor,
        columns: tuple[int, ...],
        spec: EmbeddingSpec,
        weights: Sequence[Tensor],
        alone: bool = False,
    ) -> list[Any] | None:
        """See :meth:`DeviceTables.index`; ``alone``, that another thread asks, makes no difference here."""
        return None if self.updates is None else self.updates.index(ids, columns, spec, weights)

    def before_lookup(
        self,
        weights: list[nn.Parameter],
        ids: Tensor,
        columns: tuple[int, ...],
        spec: EmbeddingSpec,
        index: list[Any] | None = None,
    ) -> list[Any] | None:
        """See :meth:`DeviceTables.before_lookup`."""
        if self.updates is None:
            return None
        if torch.is_grad_enabled() and not self._has_begun:
            self.begin()
        return self.updates.before_lookup(weights, ids, columns, spec, index)

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take a step with the gradients in ``.grad``; the tables' has been taken in the backward."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if not self._has_begun:
            self.begin()
        dense = [(table, table.grad) for table in self.tables if table.grad is not None]
        for table, _ in dense:  # of a backward that was not told of the step
            assert self.updates is not None
            self.updates.take(table)
            table.grad = None
        if self.updates is not None:  # before the parameters' step, which it may run beside
            self.updates.sweep()
        try:
            lost = self._lost if self._may_be_vetoed else None
            if not dense_steps.take(self, [rate for _, rate in self._rates], lost):
                self._take_torchs(super().step, lost)
        finally:
            self._may_be_vetoed = False
            for table, grad in dense:
                table.grad = grad
        self._has_begun = False
        return loss

    def _take_torchs(self, step: Any, lost: Tensor | None) -> None:
        """torch's fused step of the parameters; where ``lost`` is 1 it moves nothing."""
        fresh = [p for p in self._without_momentum() if p.grad is not None]
        with self._on_device():
            unhooked(step)(self)
        if lost is not None:  # torch has not written to a buffer whose first step was vetoed
            for p in fresh:
                buffer = self.state[p]["momentum_buffer"]
                buffer.copy_(torch.where(lost == 1, 0, buffer))

    @contextlib.contextmanager
    def _on_device(self) -> Iterator[None]:
        """While this lasts the groups say what a captured step needs; otherwise they read as the user wrote them."""
        before = []
        for group, (_, rate) in zip(self.param_groups, self._rates, strict=True):
            before.append({name: group[name] for name in ("lr", "fused", "capturable") if name in group})
            group["lr"] = rate
            if group.get("fused") is None and not group.get("foreach"):
                group["fused"] = True
            if "capturable" in group:
                group["capturable"] = True
        if self._may_be_vetoed and all(group.get("fused") for group in self.param_groups):
            self.found_inf = self._lost
        try:
            yield
        finally:
            self.found_inf = None
            for group, held in zip(self.param_groups, before, strict=True):
                for name, value in held.items():
                    group[name] = value

    def _without_momentum(self) -> list[Tensor]:
        """Parameters whose first step with momentum is yet to come."""
        groups = [group for group in self.param_groups if group.get("momentum")]
        return [p for group in groups for p in group["params"] if self.state.get(p, {}).get("momentum_buffer") is None]

    def why_uncapturable(self) -> str | None:
        """Why :meth:`step` can't be part of a CUDA graph; None: it can."""
        for group in self.param_groups:
            for name, wrong in (("foreach", True), ("fused", False), ("differentiable", True)):
                if group.get(name) is wrong:
                    return f"the optimizer's {name}={wrong}"
        if self._optimizer_step_pre_hooks or self._optimizer_step_post_hooks:
            return "hooks of the optimizer"
        return None

    def stamp(self) -> tuple[Any, ...]:
        """Changes with whatever a captured step has fixed: settings, and where the states lie."""
        settings = [{k: v for k, v in group.items() if k not in ("params", "lr", "initial_lr")} for group in
                    self.param_groups]  # fmt: skip
        places = [t.data_ptr() for state in self.state.values() for t in state.values() if isinstance(t, Tensor)
                  and not (t.ndim == 0 and self._is_of_table(state))]  # fmt: skip
        return str(settings), tuple(places), self.updates is not None and self.updates.is_still

    def _is_of_table(self, state: dict[str, Any]) -> bool:
        return any(self.state.get(table) is state for table in self.tables)

    def flush(self) -> None:
        """Make every row of the tables current."""
        if self.updates is not None:
            self.updates.flush()

    # ---------------------------------------------------------------------------------------------- checkpoints

    def __getstate__(self) -> dict[str, Any]:
        self.flush()
        return super().__getstate__() | {"_tables": self.tables, "_is_lazy": self._is_lazy}

    def __setstate__(self, state: dict[str, Any]) -> None:
        tables, is_lazy = state.pop("_tables", None), state.pop("_is_lazy", False)
        super().__setstate__(state)
        if tables is not None:  # a copy, or from a pickle
            self._set_up(tables, is_lazy)
            self._restart()

    def state_dict(self) -> dict[str, Any]:
        """torch's state_dict, every row current: torch's optimizer of the same name continues from it."""
        self.flush()
        return super().state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from a state_dict of this optimizer or of torch's of the same name, on any device.

        Raises:
            ConfigError: tables whose steps are not counted alike.
        """
        self.flush()
        super().load_state_dict(state_dict)
        self._restart()

    def _restart(self) -> None:
        self._place_counts()
        if self.updates is not None:
            counts = {int(self.state.get(table, {}).get("step", self.updates.now)) for table in self.tables}
            if len(counts) > 1:
                raise ConfigError(f"the checkpoint counts {sorted(counts)} steps for tables that move together")
            self.updates.restart(counts.pop())


class Adam(DeviceOptimizer, torch.optim.Adam):
    """torch.optim.Adam for captured steps."""


class AdamW(DeviceOptimizer, torch.optim.AdamW):
    """torch.optim.AdamW for captured steps."""


class SGD(DeviceOptimizer, torch.optim.SGD):
    """torch.optim.SGD for captured steps."""


class Adagrad(DeviceOptimizer, torch.optim.Adagrad):
    """torch.optim.Adagrad for captured steps."""


class RowwiseAdagrad(DeviceOptimizer, torch.optim.Adagrad):
    """fastmtl.optim.RowwiseAdagrad for captured steps: Adagrad with one number of state for a table's row."""

    _table_rule = ROWWISE_RULE

    def __init__(self, params: Iterable[Any], *args: Any, tables: Sequence[nn.Parameter] = (), **settings: Any) -> None:
        super().__init__(params, *args, tables=tables, **settings)
        make_row_sums(self, tables)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from a state_dict of this class or the CPU's; another's raises ConfigError."""
        super().load_state_dict(state_dict)
        check_row_sums(self, self.tables)
