"""The contenders of bench.gpu: each takes training steps of the same model on the same rows."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bench.shapes import Shape
from fastmtl import backend
from fastmtl.basic.features import DenseFeature, SparseFeature
from fastmtl.models import MMOE, PLE
from fastmtl.trainers.device_tables import DeviceTables

#: PLE's experts: specific ones of a task, shared ones, levels.
PLE_EXPERTS = (4, 2, 2)
SETTINGS = {"lr": 1e-3, "weight_decay": 1e-5}
#: Who takes part: name -> (backend or None for the peer, whether compiled by torch.compile, exact updates by rows).
CONTENDERS: dict[str, tuple[str | None, bool, bool]] = {
    "peer": (None, False, False),
    "peer compiled": (None, True, False),
    "eager": ("eager", False, False),
    "eager compiled": ("eager", True, False),
    "triton": ("triton", False, True),
    "cuda": ("cuda", False, True),
}


class Perceptron(nn.Sequential):
    """Linear, BatchNorm, ReLU for each width."""

    def __init__(self, width: int, dims: tuple[int, ...]) -> None:
        layers: list[nn.Module] = []
        for dim in dims:
            layers += [nn.Linear(width, dim), nn.BatchNorm1d(dim), nn.ReLU()]
            width = dim
        super().__init__(*layers)


class Gate(nn.Sequential):
    """Linear, BatchNorm, softmax over experts."""

    def __init__(self, width: int, experts: int) -> None:
        super().__init__(nn.Linear(width, experts), nn.BatchNorm1d(experts), nn.Softmax(dim=1))


def mixed(gate: nn.Module, x: Tensor, experts: list[Tensor]) -> Tensor:
    """The experts' outputs, weighed by the gate."""
    return (gate(x).unsqueeze(2) * torch.stack(experts, 1)).sum(1)


class Peer(nn.Module):
    """The model as one writes it module by module: an embedding a feature, a perceptron an expert, a gate a task."""

    def __init__(self, shape: Shape, kind: str) -> None:
        super().__init__()
        self.embeddings = nn.ModuleList([nn.Embedding(rows, shape.embed_dim) for rows in shape.vocabs])
        for embedding in self.embeddings:
            nn.init.normal_(embedding.weight, std=1e-4)
        self.n_tasks, self.kind = len(shape.task_names), kind
        self.levels = nn.ModuleList()
        width, dims = shape.input_width, shape.expert_dims
        if kind == "mmoe":
            experts = nn.ModuleList([Perceptron(width, dims) for _ in range(shape.n_expert)])
            gates = nn.ModuleList([Gate(width, shape.n_expert) for _ in range(self.n_tasks)])
            self.levels.append(nn.ModuleDict({"experts": experts, "gates": gates}))
        else:
            specific, shared, n_levels = PLE_EXPERTS
            for level in range(n_levels):
                last = level + 1 == n_levels
                everyone = self.n_tasks * specific + shared
                experts = nn.ModuleList([Perceptron(width, dims) for _ in range(everyone)])
                sizes = [specific + shared] * self.n_tasks + [everyone] * (not last)
                gates = nn.ModuleList([Gate(width, size) for size in sizes])
                self.levels.append(nn.ModuleDict({"experts": experts, "gates": gates}))
                width = dims[-1]
        self.towers = nn.ModuleList(
            [
                nn.Sequential(Perceptron(dims[-1], shape.tower_dims), nn.Linear(shape.tower_dims[-1], 1))
                for _ in range(self.n_tasks)
            ]
        )

    def forward(self, ids: Tensor, dense: Tensor) -> Tensor:
        """Logits ``[B, T]`` of ids ``[B, F]`` and dense columns ``[B, n]``."""
        x = torch.cat([embedding(ids[:, f]) for f, embedding in enumerate(self.embeddings)] + [dense], 1)
        inputs = [x] * (self.n_tasks + 1)
        for level in self.levels:
            experts, gates = level["experts"], level["gates"]
            if self.kind == "mmoe":
                outs = [expert(x) for expert in experts]
                inputs = [mixed(gate, x, outs) for gate in gates]
                continue
            specific = PLE_EXPERTS[0]
            outs = []
            for i, expert in enumerate(experts):
                outs.append(expert(inputs[min(i // specific, self.n_tasks)]))
            common = outs[self.n_tasks * specific :]
            mine = [outs[t * specific : (t + 1) * specific] + common for t in range(self.n_tasks)]
            mine += [outs] * (len(gates) - self.n_tasks)
            inputs = [
                mixed(gate, inputs[t], members) for t, (gate, members) in enumerate(zip(gates, mine, strict=True))
            ]
        return torch.cat([tower(inputs[t]) for t, tower in enumerate(self.towers)], 1)


class Batch(NamedTuple):
    """Rows on the device: ids ``[B, F]``, dense columns ``[B, n]``, labels ``[B, T]``, and the columns by name."""

    ids: Tensor
    dense: Tensor
    labels: Tensor
    columns: dict[str, Tensor]


def make_batches(shape: Shape, batch_size: int, n: int, device: torch.device) -> list[Batch]:
    """``n`` batches of made-up rows, resident on the device."""
    x, y = shape.rows(n * batch_size)
    names = [f"s{i}" for i in range(len(shape.vocabs))]
    numbers = [f"d{i}" for i in range(shape.n_dense)]
    batches = []
    for i in range(n):
        part = slice(i * batch_size, (i + 1) * batch_size)
        columns = {name: torch.from_numpy(values[part]).to(device) for name, values in x.items()}
        batches.append(
            Batch(
                torch.stack([columns[name] for name in names], 1),
                torch.stack([columns[name] for name in numbers], 1)
                if numbers
                else torch.empty(batch_size, 0).to(device),
                torch.from_numpy(y[part]).to(device),
                columns,
            )
        )
    return batches


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
    specific, shared, levels = PLE_EXPERTS
    return PLE(features, types, levels, specific, shared, expert, towers)


def precision_of(name: str, device: torch.device) -> Callable[[], AbstractContextManager[Any]]:
    """``ieee``, ``tf32`` or ``bf16``: torch's switch is set now, the autocast is entered for each forward."""
    torch.set_float32_matmul_precision("high" if name == "tf32" else "highest")
    if name == "bf16":
        return lambda: torch.autocast(device.type, torch.bfloat16)
    return nullcontext


def make_step(
    contender: str, shape: Shape, kind: str, precision: str, device: torch.device, stand_in: str | None = None
) -> Callable[[Batch], Tensor]:
    """A function that trains one batch and returns its loss, on the device.

    Args:
        contender: of :data:`CONTENDERS`.
        shape, kind: the data's, and ``"mmoe"`` or ``"ple"``.
        precision: see :func:`precision_of`.
        device: where it runs.
        stand_in: a backend that takes the place of one for GPUs, where there is none (its tables are updated densely).
    """
    name, is_compiled, by_rows = CONTENDERS[contender]
    name = name and (stand_in or name)
    by_rows = by_rows and stand_in is None
    context = precision_of(precision, device)
    held = backend.use_backend(name) if name else nullcontext()
    torch.manual_seed(0)  # the same weights for all of fastmtl's
    with held:
        model = (make_model(shape, kind) if name else Peer(shape, kind)).to(device).train()
        tables = model.embedding.weights() if by_rows else []
        updates = DeviceTables(torch.optim.Adam, tables, **SETTINGS) if by_rows else None
    if updates:
        model.embedding.updater = updates
    others = [p for p in model.parameters() if all(p is not table for table in tables)]
    optimizer = torch.optim.Adam(others, fused=True, **SETTINGS)
    forward = torch.compile(model) if is_compiled else model

    def step(batch: Batch) -> Tensor:
        with backend.use_backend(name) if name else nullcontext():
            if updates:
                updates.advance()
            with context():
                out = forward(batch.columns) if name else torch.sigmoid(forward(batch.ids, batch.dense).float())
            # outside autocast, which refuses this loss; the clamp keeps logarithms of rounded probabilities finite
            loss = F.binary_cross_entropy(out.float().clamp(1e-7, 1 - 1e-7), batch.labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if updates:
                updates.sweep()
        return loss.detach()

    return step
