"""Errors that a device finds while the host is already further: written down there, copied behind the work, read later.

A lookup with a refused id raises at once, which waits for the device. Inside :func:`watching` it does not wait: the
first refused id of all lookups is written down on the device, and whoever watches asks for it when it suits.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator

import torch

from ..errors import BadIdError
from ..spec import EmbeddingSpec

#: Places of ``Watch.found`` that are the lookups': a context (or -1), row and column in the batch's ids, the id.
PLACES = 4
#: What stands for "no position", larger than any.
NO_POSITION = 2**63 - 1


class Watch:
    """What went wrong on a device since it was last asked.

    Args:
        device: where the work is done.
        extra: places behind the lookups' that belong to the owner.

    Attributes:
        found: ``[4 + extra]`` int64 on the device, -1 where nothing was found.
        bad: ``[1]`` int64 on the device, the smallest refused position of a lookup under way.
    """

    def __init__(self, device: torch.device, extra: int = 0) -> None:
        self.found = torch.full((PLACES + extra,), -1, dtype=torch.int64, device=device)
        self.bad = torch.full((1,), NO_POSITION, dtype=torch.int64, device=device)
        # in page-locked memory, which a copy can reach without anybody waiting for it
        self._seen = torch.full((PLACES + extra,), -1, dtype=torch.int64, pin_memory=device.type == "cuda")
        self._view = self._seen.numpy()
        self._contexts: list[tuple[EmbeddingSpec, tuple[int, ...]]] = []

    def context(self, spec: EmbeddingSpec, columns: tuple[int, ...]) -> int:
        """The number under which a lookup of this kind is written down."""
        for number, (known, same) in enumerate(self._contexts):
            if known is spec and same == columns:
                return number
        self._contexts.append((spec, columns))
        return len(self._contexts) - 1

    def post(self) -> None:
        """Copy what was found to the host, behind all work that was queued; waits for nothing."""
        self._seen.copy_(self.found, non_blocking=True)

    def seen(self) -> list[int] | None:
        """What the last copy to arrive says, all places; None: nothing was found. Waits only where something was."""
        return self.wait() if (self._view >= 0).any() else None

    def wait(self) -> list[int]:
        """All places of ``found``, once the device has done what it was given."""
        return self.found.tolist()

    def clear(self) -> None:
        """Forget what was found."""
        self.found.fill_(-1)
        if self.found.is_cuda:  # a copy on its way would bring it back
            torch.cuda.synchronize(self.found.device)
        self._seen.fill_(-1)

    def raise_bad_id(self, places: list[int]) -> None:
        """Raise :class:`BadIdError` where a lookup was refused an id.

        Args:
            places: of :meth:`seen` or :meth:`wait`.
        """
        number, row, column, value = places[:PLACES]
        if number >= 0:
            spec, columns = self._contexts[number]
            raise bad_id(row, column, value, columns, spec)


def bad_id(row: int, column: int, value: int, columns: tuple[int, ...], spec: EmbeddingSpec) -> BadIdError:
    """The error for the id ``value`` in ``row`` and ``column`` of a batch's ids ``[B, S]``."""
    bag = next(bag for f, bag in enumerate(spec.bags) if columns[f] <= column < columns[f + 1])
    return BadIdError.at(bag.name, value, row, bag.vocab)


_here = threading.local()


def active() -> Watch | None:
    """The watch of this thread, or None: errors are to be raised at once."""
    return getattr(_here, "watch", None)


@contextlib.contextmanager
def watching(watch: Watch) -> Iterator[Watch]:
    """While this lasts, lookups of this thread write refused ids down in ``watch`` instead of raising."""
    before = active()
    _here.watch = watch
    try:
        yield watch
    finally:
        _here.watch = before
