"""Work that is done once in Python and then again without it: CUDA graphs, and what stands in for them."""

from __future__ import annotations

import contextlib
import gc
import sys
from collections.abc import Callable
from typing import Any, Protocol
from weakref import WeakSet

import torch

from ..backends import triton


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
    """CUDA graphs that share their memory, since they are replayed one after the other on their stream.

    torch registers its generator with each, so that dropout draws the numbers that unrecorded steps would draw.

    Args:
        stream: the one that the work runs on.
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
            torch.cuda.synchronize()  # torch has written its generator's place, which graphs on other streams read
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


class Recordings:
    """Records work that is done beside the steps, until that is refused once.

    Args:
        recorder: how.
        what: the work, in the words of the message.
        is_quiet: say nothing where recording fails.
    """

    def __init__(self, recorder: Recorder, what: str, is_quiet: bool = False) -> None:
        self._recorder, self._what, self._is_quiet = recorder, what, is_quiet
        self._is_refused = False

    def record(self, work: Callable[[], None]) -> Callable[[], None] | None:
        """See :class:`Recorder`; None: do the work as it is."""
        if self._is_refused:
            return None
        try:
            return self._recorder.record(work)
        except RuntimeError as error:
            self._is_refused = True
            if not self._is_quiet:
                tell(str(error).splitlines()[0], self._what)
            return None


def tell(reason: str, what: str = "steps run") -> None:
    """Say once why work is not recorded."""
    print(f"fastmtl: {what} without CUDA graphs: {reason}", file=sys.stderr)
