"""Where batches lie on the device while they are trained on: two places for each shape, filled in turn.

A captured step reads fixed addresses. While it reads one place, the next batch, its ids laid out for the lookup and the
index of its rows are written into the other, on a stream of their own.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..basic.batch import ColumnBatch, Layout, ReadyBatch
from ..data.resident import RowBatch, as_batch
from ..models.multi_task import MTLModel
from .device_optimizer import DeviceOptimizer
from .evaluation import labels_of
from .streams import Streams

#: Shapes of batches that keep their places: a full batch, an epoch's last one, those of a second loader.
MOST_SHAPES = 4


class GivenBatch:
    """A batch of any loader, to be written like a :class:`RowBatch`.

    Args:
        layout: of x.
        tensors: its blocks, wide columns and labels.
    """

    has_labels = True

    def __init__(self, layout: Layout, tensors: list[Tensor]) -> None:
        self.layout, self._tensors = layout, tensors
        self.n_rows = len(tensors[-1])
        #: Whether its tensors were made by work that was queued with the steps.
        self.is_on_device = any(t.is_cuda for t in tensors)

    def shapes(self) -> list[tuple[tuple[int, ...], torch.dtype]]:
        """Shape and dtype of each tensor."""
        return [(tuple(t.shape), t.dtype) for t in self._tensors]

    def write(self, out: list[Tensor]) -> None:
        """Copy the batch into buffers of these shapes."""
        for buffer, tensor in zip(out, self._tensors, strict=True):
            buffer.copy_(tensor, non_blocking=True)


class Layouts:
    """Layouts of batches that come as dicts, the same object for the same columns."""

    def __init__(self) -> None:
        self._known: dict[tuple[str, ...], Layout] = {}

    def given(self, x: Mapping[str, Tensor], y: Tensor) -> GivenBatch:
        """A batch ``(x, y)``, labels ``[B, T]``."""
        if isinstance(x, ColumnBatch):
            return GivenBatch(x.layout, [*x.blocks, *x.wide.values(), y])
        names = tuple(x)
        layout = self._known.setdefault(names, Layout((), names, names))
        return GivenBatch(layout, [*(torch.as_tensor(column) for column in x.values()), y])


class Shape:
    """What the places of one shape of batches have in common.

    Attributes:
        slots: the places.
        turn: which is to be filled next.
    """

    def __init__(self) -> None:
        self.slots: list[Slot] = []
        self.turn = 0


class Slot:
    """One place.

    Args:
        batch: of the shape that it is for.
        device: where.
        model: who reads it.
        optimizer: who has its lookup indexed, or None.
        is_ready: whether the batch is laid out for the lookup, so that a step begins with it.
        shape: shared with the other places of this shape.
    """

    def __init__(
        self,
        batch: RowBatch | GivenBatch,
        device: torch.device,
        model: MTLModel,
        optimizer: DeviceOptimizer | None,
        is_ready: bool,
        shape: Shape,
    ) -> None:
        self._raw = [torch.empty(shape, dtype=dtype, device=device) for shape, dtype in batch.shapes()]
        self._columns, self._labels = as_batch(batch.layout, self._raw)
        self._model, self._is_ready = model, is_ready
        self._updates = None if optimizer is None or not is_ready else optimizer.updates
        self._index: list[Any] | None = None
        self.n_rows = batch.n_rows
        #: What the model is given: the columns, or, ready for its lookup, ids and dense values.
        self.x: Mapping[str, Tensor] = self._columns
        self.labels: Tensor
        self.shape = shape
        #: When it was filled, and when its last step was taken.
        self.filled: Any = None
        self.used: Any = None

    def fill(self, batch: RowBatch | GivenBatch, streams: Streams) -> None:
        """Write a batch of the slot's shape, beside the steps and behind the one that reads what is there now."""
        given = streams.mark() if batch.is_on_device else None
        self._source = batch  # its memory must not be given away before it was read
        with streams.beside():
            streams.wait(self.used)
            streams.wait(given)
            batch.write(self._raw)
            assert self._labels is not None
            labels = labels_of(self._labels, self._model)
            is_first = not hasattr(self, "labels")
            self.labels = _kept(None if is_first else self.labels, labels)
            if self._is_ready:
                self._lay_out()
            self.filled = streams.mark()

    def _lay_out(self) -> None:
        embedding = self._model.embedding
        ids, columns, dense = embedding.inputs(self._columns, embedding.features)
        kept_ids, kept_dense = (self.x.ids, self.x.dense) if isinstance(self.x, ReadyBatch) else (None, None)
        names = tuple(feature.name for feature in embedding.features)
        ids = None if ids is None else _kept(kept_ids, ids)
        if self._updates is not None and ids is not None:
            spec = embedding.spec_of(embedding.features)
            self._index = self._updates.index(ids, columns, spec, embedding.weights(), self._index)
        dense = None if dense is None else _kept(kept_dense, dense)
        self.x = ReadyBatch(names, ids, columns, dense, self._index)


def _kept(buffer: Tensor | None, value: Tensor) -> Tensor:
    """``value`` at an address that stays: its own where it is made of the slot's buffers in place."""
    if buffer is None or buffer.data_ptr() == value.data_ptr():
        return value
    return buffer.copy_(value)


class Slots:
    """The places of the last few shapes.

    Args:
        device, model, optimizer, is_ready: see :class:`Slot`.
        streams: where work is queued.
    """

    def __init__(
        self,
        device: torch.device,
        model: MTLModel,
        optimizer: DeviceOptimizer | None,
        is_ready: bool,
        streams: Streams,
    ) -> None:
        self._made = (device, model, optimizer, is_ready)
        self.is_ready, self.streams = is_ready, streams
        self._shapes: OrderedDict[tuple[Any, ...], Shape] = OrderedDict()

    def fill(self, batch: RowBatch | GivenBatch) -> Slot:
        """A slot that holds the batch; its last but one of this shape is overwritten."""
        key = (batch.layout, *batch.shapes())
        shape = self._shapes.get(key)
        if shape is None:
            if len(self._shapes) >= MOST_SHAPES:
                self._drop()
            shape = self._shapes[key] = Shape()
        self._shapes.move_to_end(key)
        turn, shape.turn = shape.turn, 1 - shape.turn
        if len(shape.slots) <= turn:
            made = Slot(batch, *self._made, shape)
            made.used = self.streams.mark()  # whoever had this memory before is done then
            shape.slots.append(made)
        slot = shape.slots[turn]
        slot.fill(batch, self.streams)
        return slot

    def live(self) -> set[int]:
        """Ids of the slots that are still kept."""
        return {id(slot) for shape in self._shapes.values() for slot in shape.slots}

    def _drop(self) -> None:
        device = self._made[0]
        if device.type == "cuda":  # its memory may be given away only when nobody reads it any more
            torch.cuda.synchronize(device)
        self._shapes.popitem(last=False)
