"""Steps replayed from CUDA graphs: all of a step's launches at once, instead of one by one from Python.

A graph is recorded for each place where a batch may lie (slots.py): its addresses are fixed. So an epoch's last,
shorter batch has graphs of its own, and no row of padding exists that statistics or losses would have to leave out.
"""

from __future__ import annotations

import contextlib
import gc
import sys
from collections.abc import Callable
from typing import Any, Protocol
from weakref import WeakKeyDictionary, WeakSet

import torch
from torch import nn

from .. import backend
from ..backends import triton
from ..models.multi_task import MTLModel
from ..weighting import Strategy
from .device_optimizer import DeviceOptimizer
from .native_gradients import is_unwatched
from .slots import MOST_SHAPES, Shape, Slot

#: Steps that run unrecorded first: of a training, and of each shape of batches, and anew where what a step has fixed
#: is another. They make what is made once: the optimizer's states, and plans and compiled kernels, which can't be
#: loaded while a step is recorded.
WARM_UPS = (2, 1)
#: Recordings of an epoch. Where shapes come and go, those of places that were given up are kept until its end.
MOST_RECORDINGS = 4 * MOST_SHAPES


class Recorder(Protocol):
    """Turns work into something that does it again."""

    def record(self, work: Callable[[], None]) -> Callable[[], None]:
        """What does ``work`` when called. Recording does not do it.

        Raises:
            RuntimeError: something in it can't be recorded.
        """


class Rerun:
    """Stands in for a graph where there is no GPU: the work is run again, on the same places."""

    def record(self, work: Callable[[], None]) -> Callable[[], None]:
        """See :class:`Recorder`."""
        return work


class CudaGraphs:
    """CUDA graphs that share their memory, since they are replayed one after the other.

    torch registers its generator with each, so that dropout draws the numbers that unrecorded steps would draw.

    Args:
        stream: the one that steps run on.
    """

    def __init__(self, stream: torch.cuda.Stream) -> None:
        self._stream = stream
        self._live: WeakSet[torch.cuda.CUDAGraph] = WeakSet()
        self._pool: Any = None

    def record(self, work: Callable[[], None]) -> Callable[[], None]:
        """See :class:`Recorder`."""
        if not self._live:  # torch refuses memory whose graphs are all gone, where a gradient is left in it
            self._pool = torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        collects = gc.isenabled()
        gc.disable()  # an old trainer's events and page-locked memory can't be given up while this stream is recorded
        try:
            # thread_local: another thread may pin memory for its batches meanwhile
            with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
                work()
        except RuntimeError as error:
            self._mend(graph)
            raise RuntimeError(str(_first(error))) from error
        finally:
            if collects:
                gc.enable()
        self._live.add(graph)
        kept = triton.plans_in_use()

        def replay(graph: Any = graph, kept: Any = kept) -> None:
            graph.replay()

        return replay

    def _mend(self, graph: torch.cuda.CUDAGraph) -> None:
        """Go on after a capture that was cut short: torch leaves its allocator and its generator recording, and would
        refuse the next random number."""
        _CUT_SHORT.append(graph)
        with contextlib.suppress(RuntimeError):  # it is not where the capture itself came to its end
            torch._C._cuda_endAllocateToPool(self._stream.device_index, self._pool)
            torch._C._cuda_releasePool(self._stream.device_index, self._pool)
        place = torch.zeros(1, device=self._stream.device)
        whole = torch.cuda.graph(torch.cuda.CUDAGraph(), stream=self._stream, capture_error_mode="thread_local")
        with contextlib.suppress(RuntimeError), whole:  # one that comes to its end: the generator's state is whole
            place.add_(1)


#: Graphs whose capture was cut short. The allocators may ask them whose memory it is that is wanted.
_CUT_SHORT: list[Any] = []


def _first(error: BaseException) -> BaseException:
    """The error that others followed: the end of a capture says only that there was one."""
    while isinstance(error.__context__, RuntimeError):
        error = error.__context__
    return error


class _Recording:
    """A place's recorded step, the gradients that it leaves, and what else must live as long as it does."""

    def __init__(self, replay: Callable[[], None], params: list[nn.Parameter], reads: Any) -> None:
        self.replay, self.reads = replay, reads
        self.grads = [p.grad for p in params]


class GraphStep:
    """Takes the step on a place: as it is for the first times, then recorded.

    Args:
        work: the step; what it reads and writes lies at the same addresses for the same place.
        recorder: how steps are recorded.
        model, optimizer: whose step it is.
        is_quiet: say nothing where recording fails.
    """

    def __init__(
        self,
        work: Callable[[Slot], None],
        recorder: Recorder,
        model: nn.Module,
        optimizer: DeviceOptimizer,
        is_quiet: bool = False,
    ) -> None:
        self._work, self._recorder, self._optimizer, self._is_quiet = work, recorder, optimizer, is_quiet
        self._model = model
        self._params = [p for p in model.parameters() if p.requires_grad]
        self._recordings: dict[int, tuple[Slot, _Recording]] = {}
        self._shown: _Recording | None = None
        self._fixed: Any = None
        self._reads: Any = None
        self._stamp: Any = None
        self._failed = False
        self._steps = 0
        self._steps_of: WeakKeyDictionary[Shape, int] = WeakKeyDictionary()

    @property
    def n_recorded(self) -> int:
        """Places whose step is recorded."""
        return len(self._recordings)

    def __call__(self, slot: Slot) -> None:
        """Take the step; the optimizer has begun it."""
        kept = self._recordings.get(id(slot))
        steps_of_shape = self._steps_of.get(slot.shape, 0)
        is_warm = self._steps >= WARM_UPS[0] and steps_of_shape >= WARM_UPS[1]
        if kept is None and is_warm and not self._failed and len(self._recordings) < MOST_RECORDINGS:
            kept = self._record(slot)
        if kept is None:
            self._work(slot)
            self._shown = None
        else:
            self._shown = kept[1]
            self._shown.replay()
            self._optimizer.end()
        self._steps += 1
        self._steps_of[slot.shape] = steps_of_shape + 1

    def show(self) -> None:
        """Let ``.grad`` be the last step's gradients, which it need not be between steps."""
        if self._shown is not None:
            for p, grad in zip(self._params, self._shown.grads, strict=True):
                p.grad = grad

    def _record(self, slot: Slot) -> tuple[Slot, _Recording] | None:
        try:
            replay = self._recorder.record(lambda: self._work(slot))
        except RuntimeError as error:
            self._failed = True
            self._optimizer.again()
            if not self._is_quiet:
                tell(str(error).splitlines()[0])
            return None
        self._stamp = self._stamp_now()
        kept = self._recordings[id(slot)] = slot, _Recording(replay, self._params, self._reads)
        return kept

    def begin_epoch(self, live: set[int], stamp: Any, reads: Any = None) -> None:
        """Forget recordings of places that are gone; all of them, where what they have fixed is not so any more.

        Args:
            live: ids of the slots that are kept.
            stamp: changes with what the trainer has fixed.
            reads: what holds tensors that steps of this epoch read, beside parameters, states and places.
        """
        self._reads = reads
        self._fixed = stamp
        now = self._stamp_now()
        if now != self._stamp:
            self._recordings.clear()
            self._steps = 0
            self._steps_of.clear()
        self._stamp = now
        self._shown = None
        self._params = [p for p in self._model.parameters() if p.requires_grad]
        self._recordings = {number: kept for number, kept in self._recordings.items() if number in live}

    def _stamp_now(self) -> Any:
        """What recorded steps have fixed."""
        tensors = [*self._model.parameters(), *self._model.buffers()]
        return (
            self._fixed,
            self._optimizer.stamp(),
            tuple((t.data_ptr(), t.requires_grad) for t in tensors),
            torch.get_float32_matmul_precision(),
            torch.are_deterministic_algorithms_enabled(),
            backend.forced(),
        )


def why_plain(model: nn.Module, strategy: Strategy, optimizer: Any) -> str | None:
    """Why the steps of this training can't be recorded; None: they can.

    Who watches (hooks, wrappers, torch.compile) runs in Python, which a replayed step does not. GradNorm and
    MetaBalance look at gradients on the host.
    """
    if not isinstance(model, MTLModel) or not is_unwatched(model):
        return "the model is wrapped, compiled, has hooks or parts in evaluation mode"
    if type(strategy).backward is not Strategy.backward or type(strategy).after_step is not Strategy.after_step:
        return f"{type(strategy).__name__} looks at gradients between backward and step"
    if not isinstance(optimizer, DeviceOptimizer):
        return f"{type(optimizer).__name__} is not one of torch.optim's {', '.join(KNOWN)} as the trainer makes them"
    reason = optimizer.why_uncapturable()
    if reason:
        return reason
    for op in backend.TABLE:
        params = [p for p in model.parameters() if p.is_floating_point()]
        if backend.resolve(op, *params).DIFFERENTIABLE:
            return f"{op} runs on eager"
    if any(getattr(feature, "pooling", None) == "max" for feature in model.embedding.features):
        return "a feature takes a maximum, which runs on eager"
    return None


KNOWN = ("Adam", "AdamW", "SGD", "Adagrad")


def tell(reason: str) -> None:
    """Say once why steps are not recorded."""
    print(f"fastmtl: steps run without CUDA graphs: {reason}", file=sys.stderr)
