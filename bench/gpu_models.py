"""The contenders of bench.gpu: each trains and runs the same model on the same rows.

torch-rechub's weights are loaded into fastmtl's models, strictly, so that all must agree; the plain peer, which takes
torch-rechub's place where that is not at hand, has weights of its own.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bench import gpu_peer
from bench.models import build
from bench.shapes import PLE_LEVELS, PLE_SHARED, PLE_SPECIFIC, Shape
from fastmtl import backend
from fastmtl.basic.features import DenseFeature, SparseFeature
from fastmtl.models import MMOE, PLE
from fastmtl.trainers.device_tables import DeviceTables

SETTINGS = {"lr": 1e-3, "weight_decay": 1e-5}
SEED = 2022


class Contender(NamedTuple):
    """Who takes part.

    Args:
        package: ``"torch_rechub"``, ``"peer"`` or ``"fastmtl"``.
        backend: fastmtl's.
        compiled: by torch.compile.
        by_rows: tables are moved in the backward, exact, rather than by a dense optimizer.
    """

    package: str
    backend: str | None = None
    compiled: bool = False
    by_rows: bool = False


def contenders() -> dict[str, Contender]:
    """All of them by their names; the first is the one that ratios are given to."""
    package = "torch_rechub" if gpu_peer.is_here() else "peer"
    name = "torch-rechub" if package == "torch_rechub" else "peer"
    return {
        name: Contender(package),
        f"{name} compiled": Contender(package, compiled=True),
        "eager": Contender("fastmtl", "eager"),
        "eager compiled": Contender("fastmtl", "eager", compiled=True),
        "triton": Contender("fastmtl", "triton", by_rows=True),
        "cuda": Contender("fastmtl", "cuda", by_rows=True),
    }


class Batch(NamedTuple):
    """Rows on the device: columns by name ``[B]``, and labels ``[B, T]``."""

    columns: dict[str, Tensor]
    labels: Tensor


def make_batches(shape: Shape, batch_size: int, n: int, device: torch.device) -> list[Batch]:
    """``n`` batches of made-up rows, resident on the device."""
    x, y = shape.rows(n * batch_size)
    parts = [slice(i * batch_size, (i + 1) * batch_size) for i in range(n)]
    return [
        Batch(
            {name: torch.from_numpy(values[part]).to(device) for name, values in x.items()},
            torch.from_numpy(y[part]).to(device),
        )
        for part in parts
    ]


def make_model(shape: Shape, kind: str) -> Any:
    """fastmtl's model of a shape; ids are known to be good."""
    features: list[Any] = [
        SparseFeature(f"s{i}", rows, embed_dim=shape.embed_dim, oov="zero") for i, rows in enumerate(shape.vocabs)
    ]
    features += [DenseFeature(f"d{i}") for i in range(shape.n_dense)]
    types = ["classification"] * len(shape.task_names)
    towers = [{"dims": list(shape.tower_dims)} for _ in types]
    expert = {"dims": list(shape.expert_dims)}
    if kind == "mmoe":
        return MMOE(features, types, shape.n_expert, expert, towers)
    return PLE(features, types, PLE_LEVELS, PLE_SPECIFIC, PLE_SHARED, expert, towers)


def first_weights(shape: Shape, kind: str) -> dict[str, Tensor]:
    """torch-rechub's where it is here, else fastmtl's: what fastmtl's contenders begin with."""
    torch.manual_seed(SEED)
    made = build("torch_rechub", kind, shape) if gpu_peer.is_here() else make_model(shape, kind)
    return made.state_dict()


def precision_of(name: str, device: torch.device) -> Callable[[], AbstractContextManager[Any]]:
    """``ieee``, ``tf32`` or ``bf16``: torch's switch is set now, the autocast is entered for each forward."""
    torch.set_float32_matmul_precision("high" if name == "tf32" else "highest")
    if name == "bf16":
        return lambda: torch.autocast(device.type, torch.bfloat16)
    return nullcontext


class Runner:
    """A contender at work on a shape.

    Args:
        who: the contender.
        shape, kind: the data's, and ``"mmoe"`` or ``"ple"``.
        state: :func:`first_weights`.
        precision: see :func:`precision_of`.
        device: where it runs.
        stand_in: a backend that takes the place of one for GPUs, where there is none (tables are updated densely then).
        training: steps, or predictions alone.
    """

    def __init__(
        self,
        who: Contender,
        shape: Shape,
        kind: str,
        state: dict[str, Tensor],
        precision: str,
        device: torch.device,
        stand_in: str | None = None,
        training: bool = True,
    ) -> None:
        self.backend = who.backend and (stand_in or who.backend)
        self.context = precision_of(precision, device)
        torch.manual_seed(SEED)
        made: nn.Module
        if who.package == "peer":
            made = gpu_peer.Peer(shape, kind)
        else:
            made = build("torch_rechub", kind, shape) if who.package == "torch_rechub" else make_model(shape, kind)
            made.load_state_dict(state, strict=True)
        self.model: Any = made.to(device).train(training)
        self.updates: DeviceTables | None = None
        tables: list[Any] = []
        if training:
            if who.by_rows and stand_in is None:
                tables = self.model.embedding.weights()
                with self._on_backend():
                    self.updates = DeviceTables(torch.optim.Adam, tables, **SETTINGS)
                self.model.embedding.updater = self.updates
            others = [p for p in self.model.parameters() if all(p is not table for table in tables)]
            # torch-rechub's trainer takes torch's default; compiled or not, everyone else has the fused one
            fused = who.compiled or who.package != "torch_rechub"
            self.optimizer = torch.optim.Adam(others, fused=fused or None, **SETTINGS)
        self.forward = torch.compile(self.model) if who.compiled else self.model

    def step(self, batch: Batch) -> Tensor:
        """Train one batch; its loss, on the device."""
        with self._on_backend():
            if self.updates:
                self.updates.advance()
            with self.context():
                out = self.forward(batch.columns)
            # outside autocast, which refuses this loss; the clamp keeps logarithms of rounded probabilities finite
            loss = F.binary_cross_entropy(out.float().clamp(1e-7, 1 - 1e-7), batch.labels)
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            if self.updates:
                self.updates.sweep()
        return loss.detach()

    @torch.no_grad()
    def predict(self, batch: Batch) -> Tensor:
        """Probabilities ``[B, T]``."""
        with self._on_backend(), self.context():
            return self.forward(batch.columns)

    def _on_backend(self) -> AbstractContextManager[None]:
        return backend.use_backend(self.backend) if self.backend else nullcontext()
