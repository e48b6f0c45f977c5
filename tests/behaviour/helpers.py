"""A small log, small models and a logger that remembers: what the behaviour tests share."""

from __future__ import annotations

import importlib
from typing import Any

import numpy as np
import pytest
import torch
from devices import DEVICE, place

from fastmtl.basic.tracking import BaseLogger
from fastmtl.data.loader import ColumnLoader, TorchDataset
from fastmtl.trainers import MTLTrainer

USERS, ITEMS = 50, 80
KINDS = ("SharedBottom", "MMOE", "PLE", "ESMM", "AITM")
CLASSIFICATION = ("classification", "classification")


def features(dense: bool = True, history: bool = True, package: str = "fastmtl") -> list[Any]:
    """user, item, a padded history on the item's table, and two dense columns."""
    classes = importlib.import_module(f"{package}.basic.features")
    # Wide enough a start that no BatchNorm divides by sqrt(eps): the numbers are not rounding noise.
    init = importlib.import_module(f"{package}.basic.initializers").RandomNormal(0, 0.3)
    listed = [
        classes.SparseFeature("user", USERS, 4, initializer=init),
        classes.SparseFeature("item", ITEMS, 4, padding_idx=0, initializer=init),
    ]
    if history:
        listed.append(classes.SequenceFeature("history", ITEMS, 4, shared_with="item", padding_idx=0))
    if dense:
        listed += [classes.DenseFeature("age"), classes.DenseFeature("profile", 3)]
    return listed


def data(n: int = 240, n_task: int = 2, seed: int = 0) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Columns for :func:`features`, and 0/1 labels ``[n, n_task]`` that rise with age (task 0, 2) or fall with it."""
    rng = np.random.default_rng(seed)
    history = rng.integers(1, ITEMS, (n, 5))
    history[np.arange(5) >= rng.integers(1, 6, (n, 1))] = 0
    x = {
        "user": rng.integers(0, USERS, n),
        "item": rng.integers(1, ITEMS, n),
        "history": history,
        "age": rng.normal(0, 1, n).astype(np.float32),
        "profile": rng.normal(0, 1, (n, 3)).astype(np.float32),
    }
    signs = (-1.0) ** np.arange(n_task)
    y = (signs * x["age"][:, None] + rng.normal(0, 0.5, (n, n_task)) > 0).astype(np.float32)
    if n_task == 3:
        y[:, 2] = y[:, 0] * y[:, 1]
    return x, y


def loader(x: Any, y: Any, batch_size: int = 64, shuffle: bool = False) -> ColumnLoader:
    """A loader over these rows, in order unless told otherwise."""
    return ColumnLoader(TorchDataset(x, y), batch_size, shuffle=shuffle)


def model(
    kind: str = "SharedBottom",
    seed: int = 0,
    task_types: tuple[str, ...] = CLASSIFICATION,
    package: str = "fastmtl",
    **keywords: Any,
) -> Any:
    """A small model of one kind, its weights drawn from ``seed``; ``keywords`` replace constructor arguments.

    Ours is on the device under test, torch-rechub's on the CPU.
    """
    torch.manual_seed(seed)
    listed = keywords.pop("features", None)
    listed = features(dense=kind != "ESMM" or package == "fastmtl", package=package) if listed is None else listed
    made = getattr(importlib.import_module(f"{package}.models.multi_task"), kind)
    where = place if package == "fastmtl" else lambda model: model
    if kind == "ESMM":
        widths = {"cvr_params": {"dims": [8]}, "ctr_params": {"dims": [8]}, **keywords}
        return where(made(listed[:1], listed[1:], **widths))
    settings: dict[str, dict[str, Any]] = {
        "SharedBottom": {"bottom_params": {"dims": [12, 8]}},
        "MMOE": {"n_expert": 3, "expert_params": {"dims": [8]}},
        "PLE": {"n_level": 2, "n_expert_specific": 2, "n_expert_shared": 1, "expert_params": {"dims": [8]}},
        "AITM": {"bottom_params": {"dims": [12, 8]}},
    }
    arguments = {**settings[kind], "tower_params_list": [{"dims": [6]} for _ in task_types], **keywords}
    return where(made(listed, len(task_types) if kind == "AITM" else list(task_types), **arguments))


def pair(kind: str = "SharedBottom", task_types: tuple[str, ...] = CLASSIFICATION) -> tuple[Any, Any]:
    """Our model and torch-rechub's, with the same weights."""
    pytest.importorskip("torch_rechub", reason="torch-rechub is not here: nothing to compare with")
    ours = model(kind, task_types=task_types)
    theirs = model(kind, task_types=task_types, package="torch_rechub")
    theirs.load_state_dict(ours.state_dict(), strict=True)
    return ours, theirs


def trainer(trained, path: Any, task_types: tuple[str, ...] = CLASSIFICATION, **keywords: Any) -> MTLTrainer:
    """A trainer that saves into ``path``; Adam, lr 1e-2, unless told otherwise."""
    keywords = {"optimizer_params": {"lr": 1e-2}, **keywords}
    return MTLTrainer(trained, list(task_types), model_path=str(path), device=DEVICE, **keywords)


class Memory(BaseLogger):
    """A logger that keeps what it is given."""

    def __init__(self) -> None:
        self.epochs: list[dict[str, Any]] = []
        self.hyperparams: dict[str, Any] = {}
        self.finished = False

    def log_metrics(self, metrics: dict[str, Any], step: int | None = None) -> None:
        """Keep one epoch's metrics."""
        assert step == len(self.epochs)
        self.epochs.append(dict(metrics))

    def log_hyperparams(self, params: dict[str, Any]) -> None:
        """Keep the hyperparameters."""
        self.hyperparams.update(params)

    def finish(self) -> None:
        """Note the end of the run."""
        self.finished = True

    def column(self, key: str) -> list[Any]:
        """One metric over the epochs."""
        return [epoch[key] for epoch in self.epochs]


def same_state(a, b) -> bool:
    """Whether two modules hold bitwise equal states."""
    left, right = a.state_dict(), b.state_dict()
    return set(left) == set(right) and all(torch.equal(left[name], value) for name, value in right.items())
