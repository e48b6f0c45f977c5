"""Random models of all five kinds, described as plain data and built in either package from one seed.

Source of the ranges: what torch-rechub 0.9.0 accepts. Its own limits hold here too: one embedding width a model, no
dense features in ESMM, an expert's dims never empty.
"""

from __future__ import annotations

import importlib
import os
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from devices import place
from torch import Tensor, nn

OURS, THEIRS = "fastmtl", "torch_rechub"
KINDS = ("SharedBottom", "MMOE", "PLE", "ESMM", "AITM")
ACTIVATIONS = ("relu", "sigmoid", "leakyrelu", "prelu", "dice", "softmax")
WIDTHS = (1, 2, 3, 5, 7, 8, 13, 16, 17, 24, 31, 33)


@dataclass(frozen=True)
class Feature:
    """One column of the batch and how it enters the model.

    Args:
        kind: "sparse", "sequence" or "dense".
        name: the column.
        dim: embedding width D, or the width of a dense vector.
        vocab: rows V of the table (id features).
        length: ids a row L (sequences).
        pooling, shared_with, padding_idx: as in the feature classes.
        init: (initializer class, arguments), or None for the default N(0, 1e-4).
    """

    kind: str
    name: str
    dim: int
    vocab: int = 0
    length: int = 0
    pooling: str = "mean"
    shared_with: str | None = None
    padding_idx: int | None = None
    init: tuple[str, tuple[Any, ...]] | None = None


@dataclass(frozen=True)
class Case:
    """A model and a batch, as plain data.

    Args:
        kind: class name of the model.
        features: its features; for ESMM the first ``n_user`` are the user's.
        settings: the constructor's other keywords.
        task_types: one a column of the output.
        batch: rows B.
        seed: of the weights, the perturbation and the batch.
    """

    kind: str
    features: tuple[Feature, ...]
    settings: dict[str, Any]
    task_types: tuple[str, ...]
    batch: int
    seed: int
    n_user: int = 0

    @property
    def has_dropout(self) -> bool:
        params = [v for v in self.settings.values() if isinstance(v, dict)] + self.settings.get("tower_params_list", [])
        return any(p.get("dropout", 0) > 0 for p in params)


def base_seed() -> int:
    """The run's base seed (conftest draws and prints it)."""
    return int(os.environ["FASTMTL_TEST_SEED"])


def random_case(index: int) -> Case:
    """Case number ``index`` of this run; the five kinds take turns."""
    rng = np.random.default_rng([base_seed(), index])
    kind = KINDS[index % len(KINDS)]
    features = _features(rng, dense=kind != "ESMM")
    n_task = int(rng.integers(1, 5))
    task_types = tuple(str(rng.choice(["classification", "regression"], p=[0.7, 0.3])) for _ in range(n_task))
    towers = [_tower(rng) for _ in range(n_task)]
    n_user = 0
    if kind == "SharedBottom":
        settings = {"bottom_params": _mlp(rng), "tower_params_list": towers}
    elif kind == "MMOE":
        settings = {"n_expert": int(rng.integers(1, 18)), "expert_params": _mlp(rng), "tower_params_list": towers}
    elif kind == "PLE":
        settings = {
            "n_level": int(rng.integers(1, 4)),
            "n_expert_specific": int(rng.integers(1, 6)),
            "n_expert_shared": int(rng.integers(1, 6)),
            "expert_params": _mlp(rng),
            "tower_params_list": towers,
        }
    elif kind == "AITM":
        settings = {"n_task": n_task, "bottom_params": _mlp(rng), "tower_params_list": towers}
        task_types = ("classification",) * n_task
    else:
        settings = {"cvr_params": _tower(rng), "ctr_params": _tower(rng)}
        task_types = ("classification",) * 3
        n_user = int(rng.integers(1, len(features)))
    if rng.random() < 0.1:
        _with_dropout(settings, float(rng.choice([0.1, 0.5])))
    batch = min(_batch_size(rng), max(64, 40_000 // _n_mlp(settings, n_task)))
    return Case(kind, features, settings, task_types, batch, int(rng.integers(2**31)), n_user)


def _batch_size(rng: np.random.Generator) -> int:
    draw = rng.random()
    if draw < 0.15:
        return 2
    return int(np.exp(rng.uniform(np.log(3), np.log(4096 if draw > 0.8 else 600)))) if draw < 0.98 else 4096


def _n_mlp(settings: dict[str, Any], n_task: int) -> int:
    """About how many MLPs a model has: many of them over many rows would take the whole suite's time."""
    experts = n_task * settings.get("n_expert_specific", 1) + settings.get("n_expert_shared", 1)
    return settings.get("n_expert", 1) + settings.get("n_level", 1) * experts + n_task


def _mlp(rng: np.random.Generator) -> dict[str, Any]:
    depth = int(rng.choice([1, 2, 3], p=[0.5, 0.35, 0.15]))
    params: dict[str, Any] = {"dims": [int(d) for d in rng.choice(WIDTHS, depth)]}
    if rng.random() < 0.8:
        params["activation"] = str(rng.choice(ACTIVATIONS))
    if params.get("activation") == "softmax":
        # Over one column it is 1 whatever the input; the next BatchNorm then shows the last bit of a constant.
        params["dims"] = [max(2, width) for width in params["dims"]]
    return params


def _tower(rng: np.random.Generator) -> dict[str, Any]:
    params = _mlp(rng) if rng.random() > 0.15 else {}
    if rng.random() < 0.1:
        params["output_layer"] = True
    return params


def _with_dropout(settings: dict[str, Any], p: float) -> None:
    for name in ("bottom_params", "expert_params", "cvr_params"):
        if name in settings:
            settings[name]["dropout"] = p


def _features(rng: np.random.Generator, dense: bool) -> tuple[Feature, ...]:
    dim = int(rng.choice([1, 2, 3, 4, 5, 8, 13, 16]))
    default_init = rng.random() < 0.3
    features: list[Feature] = []
    for i in range(int(rng.integers(2, 8))):
        kind = str(rng.choice(["sparse", "sequence"], p=[0.7, 0.3]))
        tables = [f for f in features if f.shared_with is None]
        vocab = int(np.exp(rng.uniform(np.log(3), np.log(3000))))
        pooling = str(rng.choice(["mean", "sum"]))
        length = int(rng.integers(1, 9)) if kind == "sequence" else 0
        if tables and rng.random() < 0.25:
            table = tables[int(rng.integers(len(tables)))]
            shared, vocab, init, padding = table.name, table.vocab, table.init, table.padding_idx
            if kind == "sequence" and rng.random() < 0.6:
                padding = _other_padding(padding, pooling)
        else:
            shared, init, padding = None, _init(rng, default_init, vocab, dim), None
            if rng.random() < 0.4:
                padding = int(rng.choice([0, vocab - 1]))
        features.append(Feature(kind, f"f{i}", dim, vocab, length, pooling, shared, padding, init))
    for i in range(int(rng.integers(0, 4)) if dense else 0):
        features.append(Feature("dense", f"d{i}", int(rng.choice([1, 1, 2, 5]))))
    if dense and rng.random() < 0.04:
        features = [Feature("dense", "d0", 1), Feature("dense", "d1", 3)]
    return tuple(features[i] for i in rng.permutation(len(features)))


def _other_padding(of_table: int | None, pooling: str) -> int | None:
    """A sequence's padding that is not its table's: one of its own, or none.

    A mean over ids that its table calls padding and the sequence does not is left out: there torch-rechub counts the
    padding, see docs/differences.md.
    """
    if of_table is None:
        return 0
    return of_table if pooling == "mean" else None


def _init(rng: np.random.Generator, default: bool, vocab: int, dim: int) -> tuple[str, tuple[Any, ...]] | None:
    if default:
        return None
    name = str(rng.choice(["RandomNormal", "RandomUniform", "XavierNormal", "XavierUniform", "Pretrained"]))
    arguments: dict[str, tuple[Any, ...]] = {
        "RandomNormal": (0.0, 0.3),
        "RandomUniform": (-0.5, 0.5),
        "XavierNormal": (2.0,),
        "XavierUniform": (1.0,),
        "Pretrained": (int(rng.integers(2**31)), bool(rng.random() < 0.5)),
    }
    return name, arguments[name]


def build_features(case: Case, package: str) -> list[Any]:
    """The case's feature objects of one package, made anew (torch-rechub's cache their table)."""
    classes = importlib.import_module(f"{package}.basic.features")
    initializers = importlib.import_module(f"{package}.basic.initializers")
    built = []
    for f in case.features:
        if f.kind == "dense":
            built.append(classes.DenseFeature(f.name, f.dim))
            continue
        keywords: dict[str, Any] = {"embed_dim": f.dim, "shared_with": f.shared_with, "padding_idx": f.padding_idx}
        if f.init is not None and f.init[0] == "Pretrained":
            keywords["initializer"] = initializers.Pretrained(_pretrained(f).tolist(), freeze=f.init[1][1])
        elif f.init is not None:
            keywords["initializer"] = getattr(initializers, f.init[0])(*f.init[1])
        if f.kind == "sequence":
            built.append(classes.SequenceFeature(f.name, f.vocab, pooling=f.pooling, **keywords))
        else:
            built.append(classes.SparseFeature(f.name, f.vocab, **keywords))
    return built


def _pretrained(feature: Feature) -> np.ndarray:
    table = np.random.default_rng(feature.init[1][0]).normal(0, 0.5, (feature.vocab, feature.dim)).astype(np.float32)
    if feature.padding_idx is not None:
        table[feature.padding_idx] = 0
    return table


def build(case: Case, package: str) -> nn.Module:
    """Build the case's model in one package under ``torch.manual_seed(case.seed)``; ours on the device under test."""
    models = importlib.import_module(f"{package}.models.multi_task")
    torch.manual_seed(case.seed)
    features = build_features(case, package)
    settings = {k: _copy(v) for k, v in case.settings.items()}
    model = getattr(models, case.kind)
    if case.kind == "ESMM":
        made = model(features[: case.n_user], features[case.n_user :], **settings)
    elif case.kind == "AITM":
        made = model(features, **settings)
    else:
        made = model(features, list(case.task_types), **settings)
    return place(made) if package == OURS else made


def _copy(value: Any) -> Any:
    """A copy of the nested settings, so that no package sees what another one did to them."""
    if isinstance(value, dict):
        return {k: _copy(v) for k, v in value.items()}
    return [_copy(v) for v in value] if isinstance(value, list) else value


def columns(case: Case, n_rows: int | None = None) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Columns and labels for the case.

    Returns:
        ``(x, y)``: ids ``[N]`` or ``[N, L]`` (int64 or int32; sequences hold padding, some rows nothing else), dense
        columns ``[N]`` or ``[N, D]`` (float32 or float64); labels ``[N, T]`` float32, 0/1 or real by task type.
    """
    n = case.batch if n_rows is None else n_rows
    rng = np.random.default_rng(case.seed)
    x = _inputs(case, n, rng)
    # Rows that are all alike have gradients that cancel to zero, to the bit or not by the order of summation.
    for _ in range(20):
        if n < 2 or any((column != column[0]).any() for column in x.values()):
            break
        x = _inputs(case, n, rng)
    y = rng.normal(0, 1, (n, len(case.task_types)))
    for t, task_type in enumerate(case.task_types):
        if task_type == "classification":
            y[:, t] = y[:, t] > 0.3
    if case.kind == "ESMM":
        y[:, 2] = y[:, 0] * y[:, 1]
    return x, y.astype(np.float32)


def _inputs(case: Case, n: int, rng: np.random.Generator) -> dict[str, np.ndarray]:
    x: dict[str, np.ndarray] = {}
    for f in case.features:
        if f.kind == "dense":
            x[f.name] = rng.normal(0, 1, (n,) if f.dim == 1 else (n, f.dim)).astype(rng.choice(["f4", "f8"]))
            continue
        # A skewed draw, as in real logs: repeated ids in a batch, and rows of the table that nothing touches.
        draw = rng.random((n, f.length) if f.kind == "sequence" else n) ** 2
        ids = (draw * f.vocab).astype(rng.choice(["i4", "i8"]))
        if f.kind == "sequence" and f.padding_idx is not None:
            ids[np.arange(f.length) >= rng.integers(0, f.length + 1, (n, 1))] = f.padding_idx
        x[f.name] = ids
    return x


def tensors(x: dict[str, np.ndarray]) -> dict[str, Tensor]:
    """The batch as a model takes it: one tensor a column."""
    return {name: torch.from_numpy(column) for name, column in x.items()}
