"""MTLTrainer on a GPU, from a loader to the losses of an epoch: what a user sees."""

from __future__ import annotations

import functools
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bench.gpu_models import SETTINGS, make_model, precision_of
from bench.shapes import Shape
from fastmtl import backend
from fastmtl.data.loader import ColumnLoader, TorchDataset
from fastmtl.errors import ConfigError
from fastmtl.trainers import MTLTrainer

#: Rows of an epoch: a quarter of a second at the speed aimed at, so that what it begins with does not decide. Those
#: that are made are repeated, and lie on the device as often. The first epoch, which compiles, fills the device and is
#: captured, is not counted.
ROWS, MADE = 2**23, 2**20


def trainer_of(
    shape: Shape, kind: str, state: dict[str, Tensor], precision: str, device: torch.device, folder: str
) -> tuple[MTLTrainer, str]:
    """A trainer with exact updates where it can do them by rows, and which of the two it is."""
    for update in ("exact", None):
        model = make_model(shape, kind)
        model.load_state_dict(state, strict=True)
        try:
            trainer = MTLTrainer(
                model, optimizer_params=SETTINGS, device=device, model_path=folder, progress=False,
                amp="bf16" if precision == "bf16" else None, embedding_update=update,
            )  # fmt: skip
        except ConfigError:
            if update is None:
                raise
            continue
        return trainer, "exact by rows" if update else "dense"
    raise AssertionError("unreachable")


@functools.lru_cache(maxsize=2)
def loader_of(shape: Shape, rows: int, batch_size: int) -> ColumnLoader:
    """Shuffled batches; kept for the next model, since to make them and to send them takes longer than an epoch."""
    x, y = shape.rows(min(rows, MADE))
    numbers = np.arange(rows) % len(y)
    columns = {name: (c if c.dtype == np.float32 else c.astype(np.int32))[numbers] for name, c in x.items()}
    return ColumnLoader(TorchDataset(columns, y[numbers]), batch_size, shuffle=True)


def epoch(
    shape: Shape,
    kind: str,
    batch_size: int,
    state: dict[str, Tensor],
    precision: str,
    device: torch.device,
    rows: int = ROWS,
    stand_in: str | None = None,
) -> dict[str, Any]:
    """The second of two epochs: its seconds, those of them before its first step, and the losses of both."""
    loader = loader_of(shape, rows, batch_size)
    precision_of(precision, device)
    held = backend.use_backend(stand_in) if stand_in else nullcontext()
    with tempfile.TemporaryDirectory() as folder, held:
        trainer, tables = trainer_of(shape, kind, state, precision, device, folder)
        losses, seconds, begun = [], 0.0, 0.0
        for _ in range(2):
            start = time.perf_counter()
            with first_step(trainer) as noted:
                losses.append(trainer.train_one_epoch(loader))  # gives numbers: the device has finished
            seconds, begun = time.perf_counter() - start, noted[0] - start if noted else 0.0
    return {"seconds": seconds, "start": begun, "losses": losses, "tables": tables}


@contextmanager
def first_step(trainer: MTLTrainer) -> Iterator[list[float]]:
    """When the first step was queued of an epoch that runs on a device (of a trainer's first one, nobody knows)."""
    noted: list[float] = []
    epochs = trainer._epochs
    if epochs is None:
        yield noted
        return
    step = epochs.step

    def noting(slot: Any) -> None:
        if not noted:
            noted.append(time.perf_counter())
        step(slot)

    epochs.step = noting  # type: ignore[method-assign]
    try:
        yield noted
    finally:
        del epochs.step
