"""The data set on the device: its columns lie there whole where they fit, else in page-locked memory of the host.

Either way they are narrowed first: ids to 32 bits, other numbers to float32, which is what a model computes with.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from .. import backend
from ..basic.batch import ColumnBatch, Layout
from ..errors import BadDataError, ConfigError
from . import shuffle
from .columns import to_tensor
from .datasets import PredictDataset, TorchDataset
from .loader import ColumnLoader
from .schema import ColumnInfo, Schema

#: Share of the device's free memory that columns may take.
BUDGET = 0.5
#: Rows that are narrowed and sent at a time.
_CHUNK = 1 << 20
#: Row numbers that are sent at a time, at most: as many as are drawn.
PIECE = shuffle.PIECE
#: Shape and dtype of each tensor of a batch.
Shapes = tuple[tuple[tuple[int, ...], torch.dtype], ...]


class Part(NamedTuple):
    """Some columns of the source that become one tensor: a block of 1-D columns, or one column of its own."""

    names: tuple[str, ...]
    dtype: torch.dtype
    is_wide: bool


def narrowed(schema: Schema) -> tuple[Layout, list[Part]]:
    """How a data set's columns are kept: ids as int32 where all of a column's fit, else int64; floats as float32."""
    parts: list[Part] = []
    for dtype in (torch.int32, torch.int64, torch.float32):
        names = tuple(c.name for c in schema.columns if c.kind in ("int", "float") and _dtype(c) is dtype)
        if names:
            parts.append(Part(names, dtype, False))
    wide = [Part((c.name,), _dtype(c), True) for c in schema.columns if c.kind not in ("int", "float")]
    layout = Layout(tuple(part.names for part in parts), tuple(part.names[0] for part in wide), schema.names)
    return layout, [*parts, *wide]


def _dtype(column: ColumnInfo) -> torch.dtype:
    if column.kind in ("float", "vector"):
        return torch.float32
    low, high = column.min_id or 0, column.max_id or 0
    return torch.int32 if low >= -(2**31) and high < 2**31 else torch.int64


class ResidentLoader:
    """A :class:`ColumnLoader` whose batches are on a device: the same rows in the same order for a seed.

    Args:
        loader: what is to be read.
        device: where the batches are wanted.
        budget: bytes that the columns may take there; None: half of what is free.

    Attributes:
        is_resident: whether the columns lie on the device; otherwise in memory of the host from which copies to a GPU
            overlap with its work.

    Yields:
        (ColumnBatch of B rows, labels ``[B, T]`` float32), without the labels for a PredictDataset. Ids are int32.
    """

    def __init__(self, loader: ColumnLoader, device: torch.device, budget: int | None = None) -> None:
        source = loader.source
        self.loader, self.device = loader, device
        self.layout, parts = narrowed(source.schema)
        self._sources: list[Sequence[Tensor]] = [[_column(source, name) for name in part.names] for part in parts]
        self._shapes = [
            (columns[0].shape[1:] if part.is_wide else (len(columns),))
            for part, columns in zip(parts, self._sources, strict=True)
        ]
        self._dtypes = [part.dtype for part in parts]
        self.has_labels = isinstance(source, TorchDataset)
        if isinstance(source, TorchDataset):
            self._sources.append([to_tensor(column) for column in source.y.T])
            self._shapes.append((source.y.shape[1],))
            self._dtypes.append(torch.float32)
        self._n_rows = len(source)
        budget = _half_of_free(device) if budget is None else budget
        self.is_resident = self.n_bytes <= budget
        try:
            self._tensors = self._placed()
        except torch.OutOfMemoryError:
            if not self.is_resident:
                raise
            self.is_resident = False  # another process took what was free
            self._tensors = self._placed()
        del self._sources
        self._staging = _Staging(device)
        #: That of row numbers on the device.
        self.row_dtype = torch.int32 if self._n_rows < 2**31 else torch.int64
        self._known_shapes: dict[int, Shapes] = {}
        self._memory = shuffle.Memory()
        self._sample = torch.empty(0, device=device)

    @property
    def n_bytes(self) -> int:
        """What the columns and labels take."""
        widths = [int(np.prod(shape)) * dtype.itemsize for shape, dtype in zip(self._shapes, self._dtypes, strict=True)]
        return self._n_rows * sum(widths)

    @property
    def dataset(self) -> Any:
        """The loader's."""
        return self.loader.dataset

    @property
    def schema(self) -> Schema:
        """The loader's."""
        return self.loader.schema

    @property
    def task_names(self) -> list[str]:
        """The loader's."""
        return self.loader.task_names

    @property
    def labels(self) -> np.ndarray | None:
        """The loader's."""
        return self.loader.labels

    def __len__(self) -> int:
        return len(self.loader)

    def _placed(self) -> list[Tensor]:
        parts = zip(self._sources, self._shapes, self._dtypes, strict=True)
        return [self._place(columns, shape, dtype) for columns, shape, dtype in parts]

    def _place(self, columns: Sequence[Tensor], shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        where = self.device if self.is_resident else torch.device("cpu")
        pin = not self.is_resident and self.device.type == "cuda"
        out = torch.empty(self._n_rows, *shape, dtype=dtype, device=where, pin_memory=pin)
        for start in range(0, self._n_rows, _CHUNK):
            rows = slice(start, start + _CHUNK)
            pieces = [column[rows].to(dtype) for column in columns]
            out[rows].copy_(torch.stack(pieces, dim=1) if pieces[0].ndim == 1 else pieces[0])
        return out

    def batches(self) -> Iterator[RowBatch]:
        """The batches of an epoch, not yet cut: each is written into buffers where they are wanted."""
        cut: Iterator[Any] = self.loader.row_batches(self.row_dtype, self._memory)
        if self.is_resident:
            cut = self._numbers_on_device(cut)
        return (RowBatch(self, rows) for rows in cut)

    def _numbers_on_device(self, cut: Iterator[Tensor | slice]) -> Iterator[Tensor | slice]:
        """Row numbers go to the device some batches at a time, where the epoch's order is known when it begins: a copy
        for each batch costs the host more than the batch's step. The first one's go alone, since the device waits for
        them, then as many as went before."""
        at_once, n_sent = PIECE if self.loader.draws_at_once else 1, 0
        for first in cut:
            if isinstance(first, slice):
                yield first
                continue
            ahead = max(1, min(at_once, n_sent) // max(1, len(first))) - 1
            pieces = [first, *(rows for rows in islice(cut, ahead) if isinstance(rows, Tensor))]
            sizes = [len(rows) for rows in pieces]
            if not self.loader.draws_rows:
                self._check(pieces)
            sent = torch.empty(sum(sizes), dtype=self.row_dtype, pin_memory=self.device.type == "cuda")
            # NumPy: torch.cat wakes its threads, which takes longer than the copy
            np.concatenate([rows.numpy() for rows in pieces], out=sent.numpy(), casting="same_kind")
            n_sent += len(sent)
            yield from sent.to(self.device, non_blocking=True).split(sizes)

    def _check(self, pieces: list[Tensor]) -> None:
        """Numbers that others gave: on the device nobody looks at them any more."""
        for rows in pieces:
            low, high = (0, 0) if not len(rows) else map(int, rows.aminmax())
            if low < 0 or high >= self._n_rows:
                bad = low if low < 0 else high
                raise BadDataError(
                    f"the loader asks for row {bad} of a data set of {self._n_rows} rows; look at its sampler or subset"
                )

    def shapes(self, n_rows: int) -> Shapes:
        """Shape and dtype of each tensor of a batch: the layout's blocks, its wide columns, the labels."""
        known = self._known_shapes.get(n_rows)
        if known is None:
            kinds = zip(self._shapes, self._dtypes, strict=True)
            known = self._known_shapes[n_rows] = tuple(((n_rows, *shape), dtype) for shape, dtype in kinds)
        return known

    def __iter__(self) -> Iterator[Any]:
        return (batch.make() for batch in self.batches())

    def write(self, rows: Tensor | slice, out: Sequence[Tensor]) -> None:
        """Write the batch of these rows into buffers on the device, one for each tensor."""
        if self.is_resident:
            if isinstance(rows, slice):
                cut_rows(self._tensors, rows, out)
            else:
                layers = backend.resolve("expert_gate", self._sample)
                getattr(layers, "cut_rows", cut_rows)(self._tensors, rows, out)
        else:
            with self._staging.buffers(out) as staged:
                cut_rows(self._tensors, rows, staged)
                for buffer, part in zip(out, staged, strict=True):
                    buffer.copy_(part, non_blocking=True)


def _column(source: PredictDataset, name: str) -> Tensor:
    place = source.layout.where.get(name)
    return source.wide[name] if place is None else source.blocks[place[0]][:, place[1]]


class RowBatch:
    """Rows of a :class:`ResidentLoader` that have not been cut yet.

    Args:
        loader: whose they are.
        rows: numbers ``[B]``, or a slice.
    """

    #: Its rows and columns are read where they were made.
    is_on_device = False

    def __init__(self, loader: ResidentLoader, rows: Tensor | slice) -> None:
        self.loader, self.rows = loader, rows
        self.n_rows = len(range(*rows.indices(loader._n_rows))) if isinstance(rows, slice) else len(rows)
        self.layout, self.has_labels = loader.layout, loader.has_labels

    @property
    def fixed(self) -> ResidentLoader | None:
        """Whose columns it is cut from on the device: they stay where they are, so that :meth:`write` can be recorded;
        None: they are cut on the host."""
        return self.loader if self.loader.is_resident else None

    def shapes(self) -> Shapes:
        """See :meth:`ResidentLoader.shapes`."""
        return self.loader.shapes(self.n_rows)

    def numbered(self) -> RowBatch:
        """A batch of as many rows whose numbers are yet to be written, by :meth:`number`."""
        loader = self.loader
        return RowBatch(loader, torch.empty(self.n_rows, dtype=loader.row_dtype, device=loader.device))

    def number(self, other: RowBatch) -> None:
        """Write the numbers of these rows into another batch's; nothing waits for it."""
        assert isinstance(other.rows, Tensor)
        if isinstance(self.rows, slice):
            start, stop, step = self.rows.indices(self.loader._n_rows)
            torch.arange(start, stop, step, out=other.rows)
        else:
            other.rows.copy_(self.rows, non_blocking=True)

    def write(self, out: Sequence[Tensor]) -> None:
        """Cut the batch into buffers of these shapes on the loader's device."""
        self.loader.write(self.rows, out)

    def make(self) -> Any:
        """The batch in memory of its own."""
        out = [torch.empty(shape, dtype=dtype, device=self.loader.device) for shape, dtype in self.shapes()]
        self.write(out)
        x, y = as_batch(self.layout, out)
        return (x, y) if self.has_labels else x


def as_batch(layout: Layout, tensors: Sequence[Tensor]) -> tuple[ColumnBatch, Tensor | None]:
    """Blocks, wide columns and perhaps labels as ``(x, y)``."""
    n, m = len(layout.blocks), len(layout.blocks) + len(layout.wide)
    x = ColumnBatch(layout, list(tensors[:n]), dict(zip(layout.wide, tensors[n:m], strict=True)))
    return x, tensors[m] if len(tensors) > m else None


def cut_rows(tensors: Sequence[Tensor], rows: Tensor | slice, out: Sequence[Tensor]) -> None:
    """Write ``tensor[rows]`` of each tensor ``[N, ...]`` into its buffer ``[B, ...]``."""
    for tensor, buffer in zip(tensors, out, strict=True):
        if isinstance(rows, slice):
            buffer.copy_(tensor[rows])
        else:
            torch.index_select(tensor, 0, rows, out=buffer)


class _Staging:
    """Page-locked buffers between the columns and the device, two sets in turn.

    Args:
        device: where they are copied to.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._sets: list[list[Tensor]] = [[], []]
        self._copied: list[Any] = [None, None]
        self._turn = 0

    def buffers(self, like: Sequence[Tensor]) -> _Set:
        """A set of buffers of these shapes, free when the copy out of it two sets ago has been made."""
        self._turn = 1 - self._turn
        if self._copied[self._turn] is not None:
            self._copied[self._turn].synchronize()
        kept, pin = self._sets[self._turn], self.device.type == "cuda"
        sizes = [t.numel() for t in like]
        if [t.dtype for t in kept] != [t.dtype for t in like] or any(
            k.numel() < n for k, n in zip(kept, sizes, strict=True)
        ):
            kept = [torch.empty(t.numel(), dtype=t.dtype, pin_memory=pin) for t in like]
            self._sets[self._turn] = kept
        return _Set(self, self._turn, [k[:n].view(t.shape) for k, n, t in zip(kept, sizes, like, strict=True)])

    def sent(self, turn: int) -> None:
        """The copies out of a set are queued."""
        if self.device.type == "cuda":
            self._copied[turn] = torch.cuda.current_stream(self.device).record_event()


class _Set(NamedTuple):
    """One set of buffers, for the time of a ``with``."""

    staging: _Staging
    turn: int
    tensors: list[Tensor]

    def __enter__(self) -> list[Tensor]:
        return self.tensors

    def __exit__(self, *_: object) -> None:
        self.staging.sent(self.turn)


def _half_of_free(device: torch.device) -> int:
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0] * BUDGET)
    return 2**62


def _numbered(device: torch.device) -> torch.device:
    """The device with its number, where "cuda" stands for the current one."""
    if device.type == "cuda" and device.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    return device


def has_columns(loader: Any) -> bool:
    """Whether a loader is one that :func:`resident` takes."""
    return isinstance(loader, (ColumnLoader, ResidentLoader))


def resident(loader: Any, device: torch.device) -> ResidentLoader:
    """The loader whose batches are on ``device``: made at the first call, kept as long as the loader itself.

    Args:
        loader: a ColumnLoader (whose data set is not changed from here on), or a ResidentLoader, which is returned.
        device: see :class:`ResidentLoader`.

    Raises:
        ConfigError: another kind of loader, or a ResidentLoader of another device.
    """
    if isinstance(loader, ResidentLoader):
        if _numbered(loader.device) != _numbered(device):
            raise ConfigError(f"the loader's batches are on {loader.device}, and are wanted on {device}")
        return loader
    if not isinstance(loader, ColumnLoader):
        raise ConfigError(f"resident: columns come from a ColumnLoader, not from {type(loader).__name__}")
    kept = vars(loader).setdefault("_resident", {})
    if device not in kept:
        kept[device] = ResidentLoader(loader, device)
    return kept[device]
