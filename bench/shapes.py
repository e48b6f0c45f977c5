"""The shapes of all benchmarks, after real data sets. The one place that names them."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np

#: PLE on every shape: its levels, the experts of each task's own and the shared ones of a level.
PLE_LEVELS, PLE_SPECIFIC, PLE_SHARED = 2, 4, 2


@dataclass(frozen=True)
class Shape:
    """A data set's columns, and the MMoE or PLE that is trained on it.

    Args:
        name: the data set.
        vocabs: rows of the table of each sparse feature.
        n_dense: dense features.
        embed_dim: width of the tables.
        n_expert: experts.
        expert_dims: layers of an expert.
        tower_dims: layers of a tower, without its output.
        batch_size: rows in a batch.
        task_names: the tasks, all binary.
        positives: share of ones of each task, for made-up rows.
    """

    name: str
    vocabs: tuple[int, ...]
    n_dense: int
    embed_dim: int
    n_expert: int
    expert_dims: tuple[int, ...]
    tower_dims: tuple[int, ...]
    batch_size: int
    task_names: tuple[str, ...]
    positives: tuple[float, ...]

    @property
    def input_width(self) -> int:
        """Columns of a looked-up row."""
        return len(self.vocabs) * self.embed_dim + self.n_dense

    def flops(self, model: str = "mmoe") -> int:
        """Floating-point operations of the linear layers for one row, forward.

        Args:
            model: ``"mmoe"`` or ``"ple"``.
        """
        n_task = len(self.task_names)
        towers = n_task * sum(a * b for a, b in pairwise((self.expert_dims[-1], *self.tower_dims, 1)))
        if model == "mmoe":
            expert = sum(a * b for a, b in pairwise((self.input_width, *self.expert_dims)))
            return 2 * (self.n_expert * expert + n_task * self.input_width * self.n_expert + towers)
        experts = n_task * PLE_SPECIFIC + PLE_SHARED
        width, total = self.input_width, towers
        for level in range(PLE_LEVELS):
            gates = n_task * (PLE_SPECIFIC + PLE_SHARED) + (experts if level + 1 < PLE_LEVELS else 0)
            total += experts * sum(a * b for a, b in pairwise((width, *self.expert_dims))) + width * gates
            width = self.expert_dims[-1]
        return 2 * total

    @property
    def training_flops(self) -> int:
        """The same of MMoE's training for one row: forward, and twice that backward."""
        return 3 * self.flops()

    def rows(self, n: int, seed: int = 0) -> tuple[dict[str, np.ndarray], np.ndarray]:
        """Made-up rows of this shape.

        Args:
            n: how many.
            seed: every number follows from it.

        Returns:
            (name -> ids int64 or numbers float32, [n] each; labels [n, T] float32).
        """
        rng = np.random.default_rng(seed)
        # Cubes of uniform numbers: small ids are frequent, as in a log.
        x = {f"s{i}": (size * rng.random(n) ** 3).astype(np.int64) for i, size in enumerate(self.vocabs)}
        x |= {f"d{i}": rng.random(n, dtype=np.float32) for i in range(self.n_dense)}
        return x, (rng.random((n, len(self.positives))) < self.positives).astype(np.float32)


CENSUS = Shape(
    name="census",
    vocabs=(
        10, 53, 48, 18, 4, 25, 16, 6, 11, 3, 4, 7, 9, 7, 7, 52, 37, 9, 11, 10, 11, 4, 5, 6, 44, 44, 44, 6, 4, 4, 4, 3,
    ),
    n_dense=7,
    embed_dim=4,
    n_expert=8,
    expert_dims=(16,),
    tower_dims=(8,),
    batch_size=1024,
    task_names=("income", "marital"),
    positives=(0.062, 0.432),
)  # fmt: skip

ALI_CCP = Shape(
    name="ali-ccp",
    vocabs=(
        238635, 98, 14, 3, 8, 4, 4, 3, 5, 467298, 6929, 263942, 80232, 106399, 5888, 104830, 51878, 37148, 4, 5853,
        105622, 53843, 31858,
    ),
    n_dense=8,
    embed_dim=16,
    n_expert=8,
    expert_dims=(256, 128),
    tower_dims=(64, 32),
    batch_size=4096,
    task_names=("click", "purchase"),
    positives=(0.04, 0.0002),
)  # fmt: skip

#: The sizes of the vocabularies and the embedding width are not published with the shape; these are made up.
ALIEXPRESS = Shape(
    name="aliexpress",
    vocabs=(10, 10, 15, 20, 30, 50, 80, 100, 150, 300, 500, 800, 1000, 3000, 10000, 30000),
    n_dense=63,
    embed_dim=5,
    n_expert=8,
    expert_dims=(512, 256),
    tower_dims=(128, 64),
    batch_size=2048,
    task_names=("click", "conversion"),
    positives=(0.02, 0.0008),
)

SHAPES: dict[str, Shape] = {shape.name: shape for shape in (CENSUS, ALI_CCP, ALIEXPRESS)}
