"""Training twice in fresh processes gives the same weights, whatever the number of threads; on a GPU on each backend.

python -m reliability.repeatability MMOE Adam fp32 2 native 7    # model, optimizer, precision, threads, backend, seed
"""

from __future__ import annotations

import hashlib
import itertools
import os
import random
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from devices import DEVICE, KERNELS, fetch, place

from fastmtl import models
from fastmtl.backend import use_backend
from fastmtl.basic.features import DenseFeature, SequenceFeature, SparseFeature
from fastmtl.data.loader import ColumnLoader, TorchDataset
from fastmtl.trainers import MTLTrainer

THREADS = (1, 2, 4)
MODELS = ("MMOE", "PLE", "SharedBottom", "AITM")
OPTIMIZERS = ("Adam", "AdamW", "SGD", "Adagrad")
KINDS = ["classification", "regression"]


def weights_hash(
    model_name: str, optimizer: str, precision: str, n_threads: int, backend: str, seed: int, n: int = 1500
) -> str:
    """SHA-256 of every tensor of the state_dict after training on ``n`` rows, in three batches and twice, with
    shuffling, dropout and exact sparse updates."""
    torch.set_num_threads(n_threads)
    torch.use_deterministic_algorithms(DEVICE.type == "cpu")
    rng = torch.Generator().manual_seed(seed)
    x = {
        "user": torch.randint(0, n // 3, (n,), generator=rng),
        "item": torch.randint(0, 40, (n,), generator=rng),
        "history": torch.randint(-1, 40, (n, 4), generator=rng),
        "age": torch.randn(n, generator=rng),
    }
    y = torch.stack([(x["age"] > 0).float(), x["age"] ** 2], dim=1)
    features = [
        SparseFeature("user", n // 3, 16),
        SparseFeature("item", 40, 16),
        SequenceFeature("history", 40, 16, pooling="mean", shared_with="item"),
        DenseFeature("age"),
    ]
    bank, towers = {"dims": [48, 20], "dropout": 0.1}, [{"dims": [16]}, {"dims": [8]}]
    torch.manual_seed(seed)
    made = {
        "MMOE": lambda: models.MMOE(features, KINDS, 4, bank, towers),
        "PLE": lambda: models.PLE(features, KINDS, 2, 2, 1, bank, towers),
        "SharedBottom": lambda: models.SharedBottom(features, KINDS, bank, towers),
        "AITM": lambda: models.AITM(features, 2, bank, towers),
    }[model_name]()
    made = place(made)
    if model_name == "AITM":
        y = (y > 0.5).float()
    loader = ColumnLoader(TorchDataset(x, y), n // 3, shuffle=True)
    with tempfile.TemporaryDirectory() as folder, use_backend(backend):
        trainer = MTLTrainer(
            made, optimizer_fn=getattr(torch.optim, optimizer), optimizer_params={"lr": 0.01, "weight_decay": 1e-4},
            model_path=folder, progress=False, embedding_update="exact",
            amp=None if precision == "fp32" else precision, device=DEVICE,
        )  # fmt: skip
        for _ in range(2):
            trainer.train_one_epoch(loader)
    digest = hashlib.sha256()
    for name, value in fetch(made.state_dict()).items():
        digest.update(name.encode())
        digest.update(value.contiguous().numpy().tobytes())
    return digest.hexdigest()


def in_a_process(*words: object) -> str:
    """:func:`weights_hash` in a process of its own."""
    tests = Path(__file__).parents[1]
    paths = [str(tests), str(tests.parent), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_WAIT_POLICY": "passive"}
    command = [sys.executable, "-m", "reliability.repeatability", *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        raise AssertionError(f"{' '.join(command)}: {done.stderr[-2000:]}")
    return done.stdout.strip()


def check(model_name: str, optimizer: str, precision: str, backend: str, seed: int) -> None:
    """Assert one hash for every number of threads, each in a fresh process; on a GPU for two processes."""
    runs = THREADS if backend == "native" else (2, 2)
    hashes = [in_a_process(model_name, optimizer, precision, n, backend, seed) for n in runs]
    assert len(set(hashes)) == 1, f"{backend}, {model_name}, {optimizer}, {precision}, seed {seed}: {hashes}"


def soak(count: int, seed: int) -> str:
    """``count`` of the combinations, drawn at random."""
    drawn = list(itertools.product(MODELS, OPTIMIZERS, ("fp32", "bf16")))
    random.Random(seed).shuffle(drawn)
    for i, combination in enumerate(drawn[:count]):
        for backend in KERNELS:
            check(*combination, backend, seed + i)
    how = "a fresh process for 1, 2 and 4 threads each" if DEVICE.type == "cpu" else "two fresh processes each"
    return f"{min(count, len(drawn))} of {len(drawn)} combinations on {', '.join(KERNELS)}, {how}, one hash"


if __name__ == "__main__":
    model_name, optimizer, precision, n_threads, backend, seed = sys.argv[1:]
    print(weights_hash(model_name, optimizer, precision, int(n_threads), backend, int(seed)))
