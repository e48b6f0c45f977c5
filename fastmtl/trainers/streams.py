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

    def mark(self, kept: Any = None) -> Any:
        """A mark behind what has been queued where we are.

        Args:
            kept: a mark that nobody will wait for any more, to be set anew instead of making one.
        """

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

    def mark(self, kept: Any = None) -> Any:
        """See :class:`Streams`."""
        return None

    def wait(self, mark: Any) -> None:
        """See :class:`Streams`."""


class CudaStreams:
    """A GPU's. Steps have a stream of their own too: a graph can't be captured on the default one, and what autograd
    keeps of a stream must be the same in captured steps and others.

    All but :meth:`steps` is called within it. Which stream is current is remembered: to ask torch takes longer than to
    queue a graph.

    Args:
        device: the GPU.

    Attributes:
        main, side: the streams of the steps and of what is beside them.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.main, self.side = torch.cuda.Stream(device), torch.cuda.Stream(device)
        self._here = self.main

    @contextlib.contextmanager
    def steps(self) -> Iterator[None]:
        """See :class:`Streams`."""
        outside = torch.cuda.current_stream(self.device)
        self.main.wait_stream(outside)
        with torch.cuda.stream(self.main):
            self._here = self.main
            try:
                yield
            finally:
                outside.wait_stream(self.side)
                outside.wait_stream(self.main)

    @contextlib.contextmanager
    def beside(self) -> Iterator[None]:
        """See :class:`Streams`."""
        before, self._here = self._here, self.side
        torch.cuda.set_stream(self.side)
        try:
            yield
        finally:
            self._here = before
            torch.cuda.set_stream(before)

    def mark(self, kept: Any = None) -> Any:
        """See :class:`Streams`."""
        return self._here.record_event(kept)

    def wait(self, mark: Any) -> None:
        """See :class:`Streams`."""
        if mark is not None:
            self._here.wait_event(mark)
