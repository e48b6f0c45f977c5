"""Batches made by another thread, one ahead of their use."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

_END = object()
#: How much the thread steps back behind those that compute: where all cores are busy it takes the gaps between them.
_NICENESS = 5


def _step_back() -> None:
    if sys.platform == "linux":  # where a thread has a priority of its own
        thread = threading.get_native_id()
        os.setpriority(os.PRIO_PROCESS, thread, os.getpriority(os.PRIO_PROCESS, thread) + _NICENESS)


def draws_at_once(loader: Any) -> bool:
    """Whether ``loader`` draws from torch's random numbers before its first batch only, or never, and may be asked for
    the next batch by another thread than for the first.

    Fastmtl's loaders say so themselves; others do by an attribute ``draws_at_once``.
    """
    own = getattr(loader, "draws_at_once", None)
    if own is None:
        # workers of torch's loader make their batches ahead already
        own = getattr(loader, "num_workers", 0) == 0 and getattr(
            getattr(loader, "dataset", None), "draws_at_once", False
        )
    return bool(own)


def ahead(loader: Iterable[Any], make: Callable[[Any], Any] | None = None) -> Iterator[Any]:
    """The batches of ``loader`` in its order, each made by a thread while the one before is in use.

    The first batch is made by the caller's thread, so that what is drawn from torch's random numbers before it is drawn
    when it always was. What the loader or ``make`` raises is raised where its batch is asked for. The thread has ended,
    and a loader that is a generator was closed, when the batches have ended or are closed.

    Args:
        loader: what :func:`draws_at_once` is true of.
        make: what is to be made of each batch.
    """
    source = iter(loader)

    def next_one() -> Any:
        batch = next(source, _END)
        return batch if make is None or batch is _END else make(batch)

    try:
        batch = next_one()
        with ThreadPoolExecutor(1, "fastmtl-batches", _step_back) as thread:
            while batch is not _END:
                coming = thread.submit(next_one)
                yield batch
                batch = coming.result()
    finally:
        close = getattr(source, "close", None)
        if close is not None:
            close()
