"""The loader: whole batches as columns, in torch's order for torch's seed."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import closing
from typing import Any

import numpy as np
import torch
from torch.utils.data import BatchSampler, DataLoader, Dataset, RandomSampler, Sampler, SequentialSampler, Subset

from ..errors import BadDataError, ConfigError
from .datasets import PredictDataset, TorchDataset
from .schema import Schema
from .shuffle import Memory, Shuffle

__all__ = ["ColumnLoader", "PredictDataset", "TorchDataset"]


class ColumnLoader(DataLoader):
    """A DataLoader whose batches are cut from whole columns: one copy of rows for each dtype, no loop over rows.

    Batches, their order and what is drawn from torch's random numbers are those of
    ``torch.utils.data.DataLoader(dataset, batch_size, shuffle)``, so one seed gives one run with either.

    Args:
        dataset: TorchDataset or PredictDataset, or a torch Subset of one.
        batch_size: rows in a batch, at least 1.
        shuffle: draw a new order each epoch.
        sampler: yields row numbers, instead of ``shuffle`` (for example a DistributedSampler).
        num_workers: accepted for torch's sake. Cutting a batch costs less than sending it from another process, so
            batches are always made in this one; only the moment when the order is drawn is torch's for workers.
        drop_last: leave out a last batch that is not full.
        generator: source of the order; torch's default one when None.
        schema: what is known of the columns, where that is more than these rows tell (all splits' vocabularies).

    Yields:
        (ColumnBatch of B rows, labels [B, T] in their own dtype) for a TorchDataset, ColumnBatch for a PredictDataset.

    Raises:
        BadDataError: when there is no row to shuffle.
        ConfigError: for another kind of data set, or a batch size below 1.
    """

    def __init__(
        self,
        dataset: Dataset,
        batch_size: int = 1,
        shuffle: bool = False,
        *,
        sampler: Sampler | Iterable | None = None,
        num_workers: int = 0,
        drop_last: bool = False,
        generator: torch.Generator | None = None,
        schema: Schema | None = None,
    ) -> None:
        source, rows = _source_of(dataset)
        if not isinstance(batch_size, (int, np.integer)) or batch_size < 1:
            raise ConfigError(f"batch_size is {batch_size!r}; give a whole number of rows, at least 1.")
        if shuffle and rows is not None and len(rows) == 0:
            raise BadDataError("the data set is empty: this split has no row; give it a larger share or more rows.")
        super().__init__(
            dataset,
            batch_size=int(batch_size),
            shuffle=shuffle,
            sampler=sampler,
            drop_last=drop_last,
            generator=generator,
        )
        # Set afterwards: torch would warn of too many processes where there is none.
        self.num_workers = num_workers
        self._source, self._rows, self._step = source, rows, int(batch_size)
        self.schema = source.schema if schema is None else schema

    @property
    def task_names(self) -> list[str]:
        """A name for each label column; empty where there are no labels."""
        return list(self.schema.task_names)

    @property
    def labels(self) -> np.ndarray | None:
        """All labels of this loader's rows [N, T], in the data's order; None where there are none."""
        if not isinstance(self._source, TorchDataset):
            return None
        return self._source.y if self._rows is None else self._source.y[self._rows.numpy()]

    @property
    def source(self) -> PredictDataset:
        """The data set whose rows :meth:`row_batches` numbers."""
        return self._source

    @property
    def draws_at_once(self) -> bool:
        """Whether an epoch's order is known when it begins; a sampler of the user's may draw it row by row."""
        return type(self.sampler) is SequentialSampler or _is_plain(self.sampler)

    @property
    def draws_rows(self) -> bool:
        """Whether all rows are taken, as they are or in an order that is drawn here: no number comes from elsewhere."""
        return self._rows is None and self.draws_at_once

    def row_batches(
        self, dtype: torch.dtype = torch.int64, memory: Memory | None = None
    ) -> Iterator[torch.Tensor | slice]:
        """The rows of each batch of an epoch, as numbers ``[B]`` in :attr:`source` or a slice of it.

        What is drawn from torch's random numbers, and when, is what an iteration over the batches draws.

        Args:
            dtype: of an order that is drawn here, int32 or int64. Numbers that come from elsewhere are int64.
            memory: where such an order may be drawn, kept from epoch to epoch.
        """
        # torch's iterator draws its workers' seed when it is made; ours must leave the same random state behind.
        torch.empty((), dtype=torch.int64).random_(generator=self.generator)
        rows = self._row_batches(dtype, memory)
        if self._rows is not None:
            rows = map(self._rows.__getitem__, rows)
        if self.num_workers > 0:
            # With workers torch asks for the first batches at once, and so draws the order here rather than at next().
            first = next(rows, None)
            return iter(()) if first is None else _after(first, rows)
        return rows

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        return map(self._source.take, self.row_batches())

    def _row_batches(self, dtype: torch.dtype, memory: Memory | None) -> Iterator[torch.Tensor | slice]:
        """Row numbers of each batch within this loader's rows: a slice where they follow one another."""
        sampler, step = self.sampler, self._step
        n = len(self.dataset)  # type: ignore[arg-type]
        end = n - n % step if self.drop_last else n
        if type(sampler) is SequentialSampler:
            for start in range(0, end, step):
                yield slice(start, min(start + step, end))
        elif _is_plain(sampler):
            seed = int(torch.empty((), dtype=torch.int64).random_().item())
            with closing(Shuffle(n, seed, dtype, memory)) as order:
                for start in range(0, end, step):
                    yield order.rows(start, min(start + step, end))
        else:
            for indices in BatchSampler(sampler, step, self.drop_last):
                yield torch.as_tensor(indices, dtype=torch.int64)


def _is_plain(sampler: Any) -> bool:
    """Whether the sampler draws one permutation from a seed of torch's default generator."""
    if type(sampler) is not RandomSampler:
        return False
    return sampler.generator is None and not sampler.replacement and sampler._num_samples is None


def _after(first: Any, rest: Iterator[Any]) -> Iterator[Any]:
    yield first
    yield from rest


def _source_of(dataset: Dataset) -> tuple[PredictDataset, torch.Tensor | None]:
    """The columns behind a data set, and the row numbers [n] that it picks from them (None: all, in order)."""
    rows: torch.Tensor | None = None
    while isinstance(dataset, Subset):
        picked = torch.as_tensor(dataset.indices, dtype=torch.int64)
        rows = picked if rows is None else picked[rows]
        dataset = dataset.dataset
    if not isinstance(dataset, PredictDataset):
        raise ConfigError(
            f"ColumnLoader reads TorchDataset and PredictDataset, not {type(dataset).__name__}; "
            "use torch.utils.data.DataLoader for other data sets."
        )
    return dataset, rows
