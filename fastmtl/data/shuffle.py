"""The order of an epoch's rows: torch's permutation for a seed, drawn as far as it is needed.

``torch.randperm`` waits for memory at each row: of 80 million rows longer than a GPU trains on them. Here a row costs a
third of that, and the first steps of an epoch run while later rows are not drawn yet.
"""

from __future__ import annotations

import functools

import numpy as np
import torch
from torch import Tensor

from ..backends import native

#: Rows that are drawn at once, at least, once as many were drawn.
PIECE = 1 << 16
#: From here on torch draws in another way, which gives no row before the last one.
_TOO_MANY = (2**32 - 1) // 20


class _Work:
    """What one shuffle works in.

    Args:
        n, dtype: see :class:`Shuffle`.
    """

    def __init__(self, n: int, dtype: torch.dtype) -> None:
        self.order = torch.arange(n, dtype=dtype)
        #: The entries before it are their places' numbers.
        self.whole = n
        self.bits = np.random.MT19937(0)
        self._seeds = np.random.RandomState(self.bits)

    def seed(self, seed: int) -> None:
        """Let ``bits`` be what torch's generator on the CPU draws from: it takes 32 bits of a seed."""
        self._seeds.seed(seed & 0xFFFFFFFF)

    def mend(self, upto: int) -> None:
        """Entries ``whole .. upto - 1`` are their places' numbers again."""
        if upto > self.whole:
            # NumPy: torch would wake its threads for it, which takes longer than a piece
            numbers = np.arange(self.whole, upto, dtype=self.order.numpy().dtype)
            self.order.numpy()[self.whole : upto] = numbers
            self.whole = upto


class Memory:
    """Keeps what a shuffle worked in for the next one of as many rows.

    A step of a shuffle reads no entry before its own. So what was given away can be numbered again at once, and an
    epoch that came to its end leaves the rows as the next one wants them: that need not write them all, into memory
    that the system has to find first, before it draws one.
    """

    def __init__(self) -> None:
        self._kept: list[_Work] = []

    def take(self, n: int, dtype: torch.dtype) -> _Work:
        """For one shuffle; another one that begins meanwhile has its own."""
        try:
            work = self._kept.pop()
        except IndexError:
            return _Work(n, dtype)
        if len(work.order) != n or work.order.dtype is not dtype:
            return _Work(n, dtype)
        work.mend(n)  # an epoch may have been given up
        return work

    def give(self, work: _Work) -> None:
        """What was taken, for the next one."""
        self._kept[:] = [work]


class Shuffle:
    """``torch.randperm(n, generator)`` with a generator of this seed.

    Args:
        n: rows.
        seed: of torch's generator.
        dtype: of the row numbers, int32 or int64.
        memory: where it may work. Rows are asked for in order then, each once, and are copies; it is closed at its end.
    """

    def __init__(self, n: int, seed: int, dtype: torch.dtype, memory: Memory | None = None) -> None:
        self._n, self._drawn = n, 0
        self._memory: Memory | None = None
        if n >= _TOO_MANY or native.unavailable() or not _draws_as_torch():
            self._order = torch.randperm(n, generator=torch.Generator().manual_seed(seed), dtype=dtype)
            self._drawn = n
            return
        self._memory = memory
        self._work = _Work(n, dtype) if memory is None else memory.take(n, dtype)
        self._work.seed(seed)
        self._work.whole = 0
        self._order = self._work.order

    def rows(self, start: int, end: int) -> Tensor:
        """Entries ``start .. end - 1``: they do not change any more."""
        if end > self._drawn:
            # few at first, which somebody waits for; then as many as were drawn before
            upto = min(self._n, max(end, self._drawn + min(PIECE, self._drawn)))
            _draw(self._order, self._drawn, upto, self._work.bits)
            self._drawn = upto
        given = self._order[start:end]
        if self._memory is None:
            return given
        given = torch.from_numpy(given.numpy().copy())
        self._work.mend(end)
        return given

    def close(self) -> None:
        """No more rows are wanted."""
        if self._memory is not None:
            self._memory.give(self._work)
            self._memory = None


def _draw(order: Tensor, begin: int, end: int, bits: np.random.MT19937) -> None:
    draws = bits.random_raw(end - begin)
    native.shuffle_ahead(order, begin, torch.from_numpy(draws.view(np.int64)))


@functools.cache
def _draws_as_torch() -> bool:
    """Whether this torch still shuffles as it always has."""
    n, seed = 1000, 2**40 + 7
    work = _Work(n, torch.int64)
    work.seed(seed)
    _draw(work.order, 0, n, work.bits)
    return torch.equal(work.order, torch.randperm(n, generator=torch.Generator().manual_seed(seed)))
