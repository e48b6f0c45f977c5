"""The batches of an epoch on the CPU, made while the step on the one before computes."""

from __future__ import annotations

from collections.abc import Generator, Iterable, Mapping
from typing import Any

from torch import Tensor

from ..data.ahead import ahead, draws_at_once
from .evaluation import split_batch
from .native_gradients import ChainGradients


def training_batches(loader: Iterable, gradients: ChainGradients | None) -> Generator[Any, None, None]:
    """``(x, y)`` of each batch.

    Where the tables' optimizer wants a batch's ids sorted, another thread does that, and makes the batch, one ahead of
    its use (a loader that may draw random numbers between its batches is asked by this one). For small tables that does
    not pay: census's epochs were 4% slower, at 2 ms a step (docs/performance.md).
    """

    def make(batch: Any) -> tuple[Mapping[str, Tensor], Tensor | None]:
        x, y = split_batch(batch)
        return x if gradients is None or y is None else gradients.ready(x), y

    if gradients is not None and gradients.model.embedding.updater is not None and draws_at_once(loader):
        yield from ahead(loader, make)
    else:
        yield from map(split_batch, loader)
