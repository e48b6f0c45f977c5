"""An epoch on a GPU, during which the host waits for nothing.

The next batch is cut, and its ids sorted, beside the step on this one. A step is replayed from a CUDA graph where that
is possible. Losses are summed on the device; refused ids and losses that are NaN are written down there, copied behind
each step and looked at before a later one.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from .. import backend
from ..backends import branches
from ..backends.deferred import PLACES, Watch, watching
from ..basic.loss_func import RegularizationLoss, device_losses
from ..data.resident import RowBatch, has_columns, resident
from ..errors import BadDataError
from ..weighting import Strategy
from .device_optimizer import DeviceOptimizer
from .evaluation import split_batch, unwrap
from .graph_step import GraphStep, why_plain
from .native_gradients import ChainGradients, is_unwatched
from .optimizer import sparse_updates
from .progress import Progress
from .recorders import CudaGraphs, Recorder, Recordings, Rerun, tell
from .slots import GivenBatch, Layouts, Slot, Slots
from .streams import CudaStreams, Inline, Streams

NO_LABELS = "the training loader has no labels; give one that yields (x, y)"


class DeviceEpochs:
    """Trains a model on a device, epoch by epoch.

    Args:
        model: what is trained, wrapped or not.
        strategy, optimizer, penalty: how its losses become an update.
        update: moves the parameters by their gradients.
        autocast: makes the context of the forward.
        device: a GPU, or what stands in for one.
        progress: show a bar; None: where stderr is a terminal.
        recorder, fills, streams, beside: stand-ins of tests; None: the device's. The first records steps, the second
            how places are filled; the last is for parts of a step that do not wait for each other.
    """

    def __init__(
        self,
        model: nn.Module,
        strategy: Strategy,
        optimizer: Any,
        penalty: RegularizationLoss,
        update: Callable[[], None],
        autocast: Callable[[], contextlib.AbstractContextManager],
        device: torch.device,
        progress: bool | None = None,
        recorder: Recorder | None = None,
        fills: Recorder | None = None,
        streams: Streams | None = None,
        beside: branches.Branches | None = None,
    ) -> None:
        self.model, self.inner, self.device = model, unwrap(model), device
        self.strategy, self.optimizer, self.penalty = strategy, optimizer, penalty
        self._update, self._autocast, self._progress = update, autocast, progress
        is_cuda = device.type == "cuda"
        self.streams: Streams = streams or (CudaStreams(device) if is_cuda else Inline())
        if isinstance(self.streams, CudaStreams):  # they run at once: each has memory of its own
            recorder = recorder or CudaGraphs(self.streams.main)
            fills = fills or CudaGraphs(self.streams.side)
            beside = beside or branches.CudaBranches(device)
        self._beside = beside
        self._recorder = recorder or Rerun()
        self._fills = Recordings(fills or Rerun(), "batches are cut", progress is False)
        n_task = self.inner.n_task
        self.watch = Watch(device, n_task)
        self._total = torch.zeros(n_task, device=device)
        self._losses = torch.zeros(n_task, device=device)
        self._count = torch.zeros((), dtype=torch.int64, device=device)
        self._layouts = Layouts()
        self._chain: ChainGradients | None = None
        self._note_losses: Callable[..., None] = note_losses
        self._graphs: GraphStep | None = None
        self._slots: Slots | None = None
        self._was_told = False

    # --------------------------------------------------------------------------------------------------- a step

    def work(self, slot: Slot) -> None:
        """Forward, losses, backward and update of the batch in ``slot``; what a graph records."""
        if self._chain is not None:
            with branches.allowed(self._beside):
                with self._autocast():
                    self._chain(slot.x, slot.labels, self._note)
                branches.join(branches.WEIGHTS)  # gradients, for whoever moves by them
                self._update()
            return
        with self._autocast():
            outputs = self.model(slot.x)
        losses = device_losses(outputs.float(), slot.labels, self.inner.is_classification)
        self._note(losses.detach())
        for p in self.model.parameters():
            p.grad = None
        self.strategy.backward(losses, self.penalty(self.model))
        self._update()

    def _note(self, losses: Tensor) -> None:
        """Take note of a step's losses between forward and backward. One that is NaN vetoes the step, so that one can
        see what was wrong before it."""
        is_ours = isinstance(self.optimizer, DeviceOptimizer)
        veto = self.optimizer.veto_places() if is_ours else (torch.zeros_like(self._total[0]), None, None)
        first = self.watch.found[PLACES:]
        self._note_losses(losses, self._losses, self._total, self._count, first, *veto)

    def step(self, slot: Slot) -> None:
        """Take the step on ``slot``, recorded or not."""
        if isinstance(self.optimizer, DeviceOptimizer):
            self.optimizer.begin()
        self.streams.wait(slot.filled)
        if self._graphs is None:
            self.work(slot)
        else:
            self._graphs(slot)
        slot.used = self.streams.mark()

    # ------------------------------------------------------------------------------------------------- an epoch

    def run(self, loader: Iterable) -> tuple[list[float], int]:
        """One pass over the loader.

        Args:
            loader: yields ``(x, y)``. A ColumnLoader's columns are kept on the device from the first epoch on, where
                they fit.

        Returns:
            The mean loss of each task over the batches, and the rows seen.

        Raises:
            BadIdError: of the epoch's first refused id, some steps later.
            FloatingPointError: a loss that is NaN, some steps later.
        """
        for tensor in (self._total, self._losses, self._count):
            tensor.zero_()
        rows = batches = 0
        bar = Progress(loader, "train", self._progress)
        with (
            self.streams.steps(),
            sparse_updates(self.inner, self.optimizer),
            watching(self.watch),
            bar.bar,
        ):
            filled = self._filled(self._places(), loader)
            slot = next(filled, None)
            self._begin()  # meanwhile the device cuts the first batch
            try:
                while slot is not None:
                    self._look(self.watch.seen())
                    self.step(slot)
                    self.watch.post()
                    rows += slot.n_rows
                    batches += 1
                    bar.update(slot.n_rows, self._losses)
                    slot = next(filled, None)
            finally:
                if self._graphs is not None:
                    self._graphs.show()
            self._look(self.watch.wait())
        if not batches:
            raise BadDataError("the training loader has no rows")
        return (self._total / batches).tolist(), rows

    def _places(self) -> Slots:
        """Places for batches."""
        is_ready = self.model is self.inner and is_unwatched(self.model)
        if self._slots is None or is_ready != self._slots.is_ready:
            optimizer = self.optimizer if isinstance(self.optimizer, DeviceOptimizer) else None
            self._slots = Slots(self.device, self.inner, optimizer, is_ready, self._fills, self.streams)
            self._graphs = None
        return self._slots

    def _begin(self) -> None:
        """Look at how steps are taken in this epoch, and make graphs where they can be recorded."""
        assert self._slots is not None
        reason = why_plain(self.model, self.strategy, self.optimizer)
        if reason and not self._was_told and self._progress is not False:
            tell(reason)
            self._was_told = True
        with self._autocast():
            self._chain = ChainGradients.of(self.model, self.strategy) if self.penalty.is_zero else None
        layers = backend.resolve("expert_gate", *(p for p in self.model.parameters() if p.is_floating_point()))
        self._note_losses = getattr(layers, "note_losses", note_losses)
        if reason:
            self._graphs = None
        else:
            if self._graphs is None:
                self._graphs = GraphStep(self.work, self._recorder, self.model, self.optimizer, self._progress is False)
            with self._autocast():
                precision = torch.is_autocast_enabled(self.device.type)
            factors = None if self.strategy.weights() is not None else self.strategy.factors()
            stamp = precision, self._chain is None, None if factors is None else factors.tolist()
            self._graphs.begin_epoch(self._slots.live(), stamp, self._chain)

    def _filled(self, slots: Slots, loader: Iterable) -> Iterator[Slot]:
        """Each batch in its place; the next one is put into its own while the step on this one runs: it is when that
        step has been queued, so that the first one is not behind two batches. One that was made on the device is put
        there before: it waits for what was queued before it."""
        before: Slot | None = None
        for batch in self._batches(loader):
            slot = slots.fill(batch)
            if before is not None:
                yield before
            before = slot
            if not batch.is_on_device:
                yield slot
                before = None
        if before is not None:
            yield before

    def _batches(self, loader: Iterable) -> Iterator[RowBatch | GivenBatch]:
        if has_columns(loader):
            with self.streams.beside():  # row numbers are read there
                held = resident(loader, self.device)
                batches = held.batches()
                batch = next(batches, None)
            if not held.has_labels:
                raise BadDataError(NO_LABELS)
            while batch is not None:
                yield batch
                with self.streams.beside():
                    batch = next(batches, None)
            return
        for given in loader:
            x, y = split_batch(given)
            if y is None:
                raise BadDataError(NO_LABELS)
            y = torch.as_tensor(y)
            yield self._layouts.given(x, y.unsqueeze(1) if y.ndim == 1 else y)

    def _look(self, places: list[int] | None) -> None:
        """Raise what was found."""
        if places is None or all(place < 0 for place in places):
            return
        self.watch.clear()
        self.watch.raise_bad_id(places)
        task = min((step, t) for t, step in enumerate(places[PLACES:]) if step > 0)
        raise FloatingPointError(self._explain(*task))

    def _explain(self, step: int, task: int) -> str:
        # batch statistics have seen what the parameters made of the batch
        state = sorted(self.inner.state_dict().items(), key=lambda item: ".running_" in item[0])
        broken = next((key for key, value in state if not torch.isfinite(value).all()), None)
        cause = f"the parameter {broken!r} is not finite" if broken else "all parameters are finite"
        return (
            f"task {self.inner.task_names[task]!r}: the loss of step {step} of the epoch is NaN; {cause}. "
            f"Lower the learning rate, or look for extreme values in the dense features"
        )


def epochs_of(trainer: Any) -> DeviceEpochs:
    """Those of an MTLTrainer that is ready, made when they are first wanted (and when its parts were exchanged)."""
    kept, parts = trainer._epochs, (trainer.model, trainer.strategy, trainer.optimizer, trainer.device)
    if kept is None or any(
        mine is not theirs
        for mine, theirs in zip((kept.model, kept.strategy, kept.optimizer, kept.device), parts, strict=True)
    ):
        trainer._epochs = DeviceEpochs(
            trainer.model, trainer.strategy, trainer.optimizer, trainer.reg_loss_fn, trainer._update, trainer._autocast,
            trainer.device, trainer.progress,
        )  # fmt: skip
    return trainer._epochs


def trains_here(model: nn.Module, device: torch.device) -> bool:
    """Whether :class:`DeviceEpochs` is for a model on ``device``; DataParallel has several."""
    return backend.is_device(device) and not isinstance(model, nn.DataParallel)


@torch.no_grad()
def note_losses(
    losses: Tensor,
    last: Tensor,
    total: Tensor,
    count: Tensor,
    first: Tensor,
    lost: Tensor,
    clock: Tensor | None,
    now: Tensor | None,
) -> None:
    """:func:`fastmtl.backends.triton.notes.note_losses` in torch's operations."""
    last.copy_(losses)
    total.add_(last)
    count.add_(1)
    bad = torch.isnan(last)
    first.copy_(torch.where(bad & (first < 0), count, first))
    lost.copy_(bad.any())
    if now is not None and clock is not None:
        now.copy_(torch.where(bad.any(), -1, clock))
