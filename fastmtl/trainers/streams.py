"""Queues of work on a device, and the marks by which one waits for another; nothing at all on the CPU."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, Protocol

import torch


class Streams(Protocol):
    """A queue for the steps and one beside it for what the next step needs."""

    def steps(self) -> contextlib.AbstractContextManager[None]:
        """While this lasts work is queued with the steps, behind what was queued before it and before what follows."""

    def beside(self) -> contextlib.AbstractContextManager[None]:
        """While this lasts work is queued beside the steps."""

    def mark(self) -> Any:
        """A mark behind what has been queued where we are."""

    def wait(self, mark: Any) -> None:
        """Work that is queued from here on begins when ``mark`` is reached; the host goes on."""


class Inline:
    """The CPU's: work is done when it is called for."""

    @contextlib.contextmanager
    def steps(self) -> Iterator[None]:
        """See :class:`Streams`."""
        yield

    @contextlib.contextmanager
    def beside(self) -> Iterator[None]:
        """See :class:`Streams`."""
        yield

    def mark(self) -> Any:
        """See :class:`Streams`."""
        return None

    def wait(self, mark: Any) -> None:
        """See :class:`Streams`."""


class CudaStreams:
    """A GPU's. Steps have a stream of their own too: a graph can't be captured on the default one, and what autograd
    keeps of a stream must be the same in captured steps and others.

    Args:
        device: the GPU.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.main, self._side = torch.cuda.Stream(device), torch.cuda.Stream(device)

    @contextlib.contextmanager
    def steps(self) -> Iterator[None]:
        """See :class:`Streams`."""
        outside = torch.cuda.current_stream(self.device)
        self.main.wait_stream(outside)
        with torch.cuda.stream(self.main):
            try:
                yield
            finally:
                outside.wait_stream(self._side)
                outside.wait_stream(self.main)

    @contextlib.contextmanager
    def beside(self) -> Iterator[None]:
        """See :class:`Streams`."""
        with torch.cuda.stream(self._side):
            yield

    def mark(self) -> Any:
        """See :class:`Streams`."""
        return torch.cuda.current_stream(self.device).record_event()

    def wait(self, mark: Any) -> None:
        """See :class:`Streams`."""
        if mark is not None:
            torch.cuda.current_stream(self.device).wait_event(mark)
