"""The benchmarks' models, made alike by torch-rechub and by fastmtl."""

from __future__ import annotations

import importlib
from collections.abc import Mapping

from torch import nn

from bench.shapes import PLE_LEVELS, PLE_SHARED, PLE_SPECIFIC, Shape

MODELS = ("mmoe", "ple")


def columns(shape: Shape) -> dict[str, int | None]:
    """Each column of ``shape.rows`` and its vocabulary; None: dense."""
    sparse = {f"s{i}": size for i, size in enumerate(shape.vocabs)}
    return sparse | dict.fromkeys(f"d{i}" for i in range(shape.n_dense))


def build(package: str, model: str, shape: Shape, vocabs: Mapping[str, int | None] | None = None) -> nn.Module:
    """A model with the shape's layers.

    Args:
        package: ``"torch_rechub"`` or ``"fastmtl"``.
        model: one of :data:`MODELS`.
        shape: the layers, and the columns where they are not given.
        vocabs: each column and its vocabulary, None for a dense one.
    """
    features = importlib.import_module(f"{package}.basic.features")
    models = importlib.import_module(f"{package}.models.multi_task")
    listed = [
        features.DenseFeature(name) if vocab is None else features.SparseFeature(name, vocab, shape.embed_dim)
        for name, vocab in (columns(shape) if vocabs is None else vocabs).items()
    ]
    tasks = ["classification"] * len(shape.task_names)
    experts = {"dims": list(shape.expert_dims)}
    towers = [{"dims": list(shape.tower_dims)} for _ in tasks]
    if model == "mmoe":
        return models.MMOE(
            listed, tasks, n_expert=shape.n_expert, expert_params=experts, tower_params_list=towers
        )  # fmt: skip
    return models.PLE(
        listed, tasks, n_level=PLE_LEVELS, n_expert_specific=PLE_SPECIFIC, n_expert_shared=PLE_SHARED,
        expert_params=experts, tower_params_list=towers,
    )  # fmt: skip
