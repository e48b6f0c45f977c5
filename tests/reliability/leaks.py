"""Memory is flat after warm-up: training steps, predictions of any size, saves and loads."""

from __future__ import annotations

import gc
import re
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch

from fastmtl import backend, models
from fastmtl.basic.features import DenseFeature, SequenceFeature, SparseFeature
from fastmtl.data.loader import ColumnLoader, TorchDataset
from fastmtl.trainers import MTLTrainer

#: The allocator's own wandering, once every size of batch has been seen. A leak of one batch a step is far beyond.
SLACK = 12e6


def resident_bytes() -> int:
    """This process's resident memory."""
    gc.collect()
    found = re.search(r"VmRSS:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return 1024 * int(found.group(1))


def flat(work: Callable[[int], None], count: int, what: str) -> None:
    """Assert that the last two thirds of ``count`` calls leave memory and the number of tensors as they were."""
    warm = count // 3
    for i in range(warm):
        work(i)
    before, tensors = resident_bytes(), _tensors()
    for i in range(warm, count):
        work(i)
    grown, more = resident_bytes() - before, _tensors() - tensors
    assert grown <= SLACK, f"{what}: {grown / 1e6:.1f} MB more after {count - warm:,} more calls"
    assert more <= 0, f"{what}: {more} more tensors live after {count - warm:,} more calls"


def _tensors() -> int:
    return sum(issubclass(type(one), torch.Tensor) for one in gc.get_objects())


def _made(seed: int) -> tuple[torch.nn.Module, dict[str, torch.Tensor], torch.Tensor]:
    torch.manual_seed(seed)
    features = [
        SparseFeature("user", 20_000, 16),
        SparseFeature("day", 7, 16),
        SequenceFeature("history", 100, 16, pooling="mean"),
        DenseFeature("age"),
    ]
    model = models.MMOE(features, ["classification"] * 2, 4, {"dims": [32]}, [{"dims": [8]}] * 2)
    n = 4096
    x = {
        "user": torch.randint(0, 20_000, (n,)),
        "day": torch.randint(0, 7, (n,)),
        "history": torch.randint(-1, 100, (n, 5)),
        "age": torch.randn(n),
    }
    return model, x, (torch.rand(n, 2) < 0.3).float()


def check_steps(count: int, seed: int) -> None:
    """Training steps with exact sparse updates, an epoch of 16 at a time."""
    model, x, y = _made(seed)
    loader = ColumnLoader(TorchDataset(x, y), 256, shuffle=True)
    with tempfile.TemporaryDirectory() as folder:
        update = "exact" if "native" in backend.available() else None
        trainer = MTLTrainer(model, model_path=folder, progress=False, embedding_update=update)
        flat(lambda _: trainer.train_one_epoch(loader), max(count // 16, 6), f"{count:,} training steps, seed {seed}")


def check_predictions(count: int, seed: int) -> None:
    """Predictions of batches of all sizes and of sequences of several lengths."""
    model, x, _ = _made(seed)
    model.eval()

    def predict(i: int) -> None:
        rows, length = 1 + (i * 37) % 511, 1 + i % 5
        with torch.no_grad():
            model({name: v[:rows, :length] if v.ndim == 2 else v[:rows] for name, v in x.items()})

    flat(predict, count, f"{count:,} predictions, seed {seed}")


def check_saves(count: int, seed: int) -> None:
    """Saved, loaded into itself, saved."""
    model, _, _ = _made(seed)
    with tempfile.TemporaryDirectory() as folder:

        def save(i: int) -> None:
            path = f"{folder}/{i % 2}"
            model.save_pretrained(path)
            model.load_state_dict(type(model).from_pretrained(path).state_dict())

        flat(save, count, f"{count:,} saves, seed {seed}")


def soak(count: int, seed: int) -> str:
    """``count`` steps, a tenth as many predictions, a hundredth as many saves."""
    check_steps(count, seed)
    check_predictions(count // 10, seed)
    check_saves(max(count // 100, 10), seed)
    return f"{count:,} steps, {count // 10:,} predictions, {max(count // 100, 10):,} saves: memory flat after a third"
