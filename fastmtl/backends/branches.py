"""Work of a step that nobody waits for at once, queued beside what follows it: branches of a captured step's graph.

``beside(branch, work, *arguments)`` does ``work(*arguments)`` behind what has been queued so far and beside what is
queued next, until ``join(branch)``. Branches exist only while :func:`allowed` lasts, in the thread that says so: calls
of the ops by hand, and autograd's threads, do all work where it is called for.

What makes it safe is three rules:

- ``work`` makes nothing that others see: it writes into tensors that it is given, which nobody reads before the join;
- nobody writes to what it reads before the join;
- all arguments are held until the join is queued. torch gives memory away as soon as nobody holds it, to whoever asks
  next on the stream that it was made on, and knows nothing of the branch that still reads it.

What ``work`` makes for itself is memory of its branch: it goes back to it, and is used again in order.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import torch

#: The weights' gradients, which only the optimizer's step reads.
WEIGHTS = "weights"
#: The tables' backward with their optimizer's step, and the sweep.
TABLES = "tables"
#: What the losses need to know of the labels.
LABELS = "labels"
#: The weights as products read them.
OPERANDS = "operands"
NAMES = (WEIGHTS, TABLES, LABELS, OPERANDS)


class Branches(Protocol):
    """Queues beside that of the steps."""

    def queue(self, name: str, work: Callable[..., None], arguments: tuple[Any, ...]) -> None:
        """Do the work on a branch, behind all that has been queued, on the branch or beside it."""

    def join(self, name: str) -> None:
        """What is queued from here on is behind all that the branch has been given."""


class CudaBranches:
    """A GPU's: a stream for each name. In a capture the streams become branches of the graph.

    Args:
        device: the GPU.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._streams = {name: torch.cuda.Stream(device) for name in NAMES}
        self._held: dict[str, list[Any]] = {}

    def queue(self, name: str, work: Callable[..., None], arguments: tuple[Any, ...]) -> None:
        """See :class:`Branches`."""
        stream = self._streams[name]
        self._held.setdefault(name, []).append((work, arguments))
        stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(stream):
            work(*arguments)

    def join(self, name: str) -> None:
        """See :class:`Branches`."""
        if name in self._held:
            torch.cuda.current_stream(self._device).wait_stream(self._streams[name])
            del self._held[name]


class _Here(threading.local):
    """What a thread may use."""

    branches: Branches | None = None


_here = _Here()


@contextlib.contextmanager
def allowed(branches: Branches | None) -> Iterator[None]:
    """While this lasts this thread's work may be queued on branches; at its end all of them are joined.

    Args:
        branches: None: there are none, work is done where it is called for.
    """
    before, _here.branches = _here.branches, branches
    try:
        yield
    except BaseException:
        with contextlib.suppress(RuntimeError):  # a capture that was cut short can't be joined
            join(*NAMES)
        raise
    else:
        join(*NAMES)
    finally:
        _here.branches = before


def beside(name: str, work: Callable[..., None], *arguments: Any) -> None:
    """Do ``work(*arguments)`` on a branch, see above; at once where there are none."""
    if _here.branches is None:
        work(*arguments)
    else:
        _here.branches.queue(name, work, arguments)


def join(*names: str) -> None:
    """What follows is behind all that these branches have been given."""
    if _here.branches is not None:
        for name in names:
            _here.branches.join(name)
