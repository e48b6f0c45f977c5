"""Who fastmtl is compared with on a GPU: torch-rechub where it can be imported, else a plain model in our own words.

torch-rechub is pure Python. A machine without a network can be given its wheel: ``make gpu ARGS=--peer-wheel`` where
there is a network puts it into build/peers, and what lies there is unpacked and put on Python's path by make gpu.
"""

from __future__ import annotations

import importlib.util
import os
import zipfile
from pathlib import Path

import torch
from torch import Tensor, nn

from bench.shapes import PLE_LEVELS, PLE_SHARED, PLE_SPECIFIC, Shape

WHEELS = Path(__file__).resolve().parents[1] / "build" / "peers"
REQUIREMENT = "torch-rechub==0.9.0"


def is_here() -> bool:
    """Whether torch-rechub can be imported."""
    return importlib.util.find_spec("torch_rechub") is not None


def unpacked() -> Path | None:
    """The folder to put on Python's path, made from the wheel in build/peers or in FASTMTL_PEER_WHEEL; None: no wheel.

    Raises:
        zipfile.BadZipFile: what lies there is no wheel.
    """
    named = os.environ.get("FASTMTL_PEER_WHEEL")
    wheels = [Path(named)] if named else sorted(WHEELS.glob("torch_rechub-*.whl"))
    if not wheels:
        return None
    target = WHEELS / "site"
    with zipfile.ZipFile(wheels[-1]) as wheel:
        wheel.extractall(target)
    return target


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
        self.names = [f"s{i}" for i in range(len(shape.vocabs))]
        self.numbers = [f"d{i}" for i in range(shape.n_dense)]
        self.levels = nn.ModuleList()
        width, dims = shape.input_width, shape.expert_dims
        if kind == "mmoe":
            experts = nn.ModuleList([Perceptron(width, dims) for _ in range(shape.n_expert)])
            gates = nn.ModuleList([Gate(width, shape.n_expert) for _ in range(self.n_tasks)])
            self.levels.append(nn.ModuleDict({"experts": experts, "gates": gates}))
        else:
            for level in range(PLE_LEVELS):
                last = level + 1 == PLE_LEVELS
                everyone = self.n_tasks * PLE_SPECIFIC + PLE_SHARED
                experts = nn.ModuleList([Perceptron(width, dims) for _ in range(everyone)])
                sizes = [PLE_SPECIFIC + PLE_SHARED] * self.n_tasks + [everyone] * (not last)
                gates = nn.ModuleList([Gate(width, size) for size in sizes])
                self.levels.append(nn.ModuleDict({"experts": experts, "gates": gates}))
                width = dims[-1]
        self.towers = nn.ModuleList(
            [
                nn.Sequential(Perceptron(dims[-1], shape.tower_dims), nn.Linear(shape.tower_dims[-1], 1))
                for _ in range(self.n_tasks)
            ]
        )

    def forward(self, columns: dict[str, Tensor]) -> Tensor:
        """Probabilities ``[B, T]`` of columns ``[B]``."""
        looked = [embedding(columns[name]) for name, embedding in zip(self.names, self.embeddings, strict=True)]
        x = torch.cat([*looked, *(columns[name].unsqueeze(1) for name in self.numbers)], 1)
        inputs = [x] * (self.n_tasks + 1)
        for level in self.levels:
            experts, gates = level["experts"], level["gates"]
            if self.kind == "mmoe":
                outs = [expert(x) for expert in experts]
                inputs = [mixed(gate, x, outs) for gate in gates]
                continue
            outs = [expert(inputs[min(i // PLE_SPECIFIC, self.n_tasks)]) for i, expert in enumerate(experts)]
            common = outs[self.n_tasks * PLE_SPECIFIC :]
            mine = [outs[t * PLE_SPECIFIC : (t + 1) * PLE_SPECIFIC] + common for t in range(self.n_tasks)]
            mine += [outs] * (len(gates) - self.n_tasks)
            inputs = [
                mixed(gate, inputs[t], members) for t, (gate, members) in enumerate(zip(gates, mine, strict=True))
            ]
        return torch.sigmoid(torch.cat([tower(inputs[t]) for t, tower in enumerate(self.towers)], 1))
