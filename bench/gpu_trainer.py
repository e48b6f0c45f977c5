"""MTLTrainer on a GPU, from a loader to the losses of an epoch: what a user sees."""

from __future__ import annotations

import tempfile
import time
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from bench.gpu_models import SETTINGS, make_model, precision_of
from bench.shapes import Shape
from fastmtl import backend
from fastmtl.data.loader import ColumnLoader, TorchDataset
from fastmtl.errors import ConfigError
from fastmtl.trainers import MTLTrainer

#: Rows of an epoch: the first one, which compiles, fills the device and is captured, is not counted.
ROWS = 2_000_000


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
    """Samples a second of the second of two epochs, shuffled; the losses of both."""
    x, y = shape.rows(rows)
    loader = ColumnLoader(TorchDataset(x, y), batch_size, shuffle=True)
    precision_of(precision, device)
    held = backend.use_backend(stand_in) if stand_in else nullcontext()
    with tempfile.TemporaryDirectory() as folder, held:
        trainer, tables = trainer_of(shape, kind, state, precision, device, folder)
        losses, seconds = [], 0.0
        for _ in range(2):
            start = time.perf_counter()
            losses.append(trainer.train_one_epoch(loader))  # gives numbers: the device has finished
            seconds = time.perf_counter() - start
    return {"seconds": seconds, "losses": losses, "tables": tables}
