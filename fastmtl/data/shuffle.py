"""The order of an epoch's rows: torch's permutation for a seed, drawn as far as it is needed.

``torch.randperm`` waits for memory at each row: of 80 million rows longer than a GPU trains on them. Here a row costs a
third of that, and the first steps of an epoch run while later rows are not drawn yet.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..backends import native

#: Rows that are drawn at once, at least.
PIECE = 1 << 16
#: From here on torch draws in another way, which gives no row before the last one.
_TOO_MANY = (2**32 - 1) // 20


class Shuffle:
    """``torch.randperm(n, generator)`` with a generator of this seed.

    Args:
        n: rows.
        seed: of torch's generator.
        dtype: of the row numbers, int32 or int64.
    """

    def __init__(self, n: int, seed: int, dtype: torch.dtype) -> None:
        self._n, self._drawn = n, 0
        if n >= _TOO_MANY or native.unavailable() or not _draws_as_torch():
            self._order = torch.randperm(n, generator=torch.Generator().manual_seed(seed), dtype=dtype)
            self._drawn = n
        else:
            self._order, self._bits = torch.arange(n, dtype=dtype), _bits(seed)

    def rows(self, start: int, end: int) -> Tensor:
        """Entries ``start .. end - 1``: they do not change any more."""
        if end > self._drawn:
            upto = min(self._n, max(end, self._drawn + PIECE))
            _draw(self._order, self._drawn, upto, self._bits)
            self._drawn = upto
        return self._order[start:end]


def _bits(seed: int) -> np.random.MT19937:
    """What torch's generator on the CPU draws from: it takes 32 bits of a seed."""
    bits = np.random.MT19937()
    seeded: Any = np.random.RandomState(seed & 0xFFFFFFFF).get_state(legacy=False)
    bits.state = seeded
    return bits


def _draw(order: Tensor, begin: int, end: int, bits: np.random.MT19937) -> None:
    draws = bits.random_raw(end - begin)
    native.shuffle_ahead(order, begin, torch.from_numpy(draws.view(np.int64)))


@functools.cache
def _draws_as_torch() -> bool:
    """Whether this torch still shuffles as it always has."""
    n, seed = 1000, 2**40 + 7
    mine = torch.arange(n)
    _draw(mine, 0, n, _bits(seed))
    return torch.equal(mine, torch.randperm(n, generator=torch.Generator().manual_seed(seed)))
