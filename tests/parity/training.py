"""Training runs to compare: one problem a model kind, driven through either package by its trainer or by hand."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from devices import DEVICE, call
from torch import nn
from torch.utils.data import DataLoader

from parity.cases import KINDS, OURS, Case, Feature, base_seed, build, columns
from parity.compare import nudged, task_losses

STEPS_AN_EPOCH = 5
BATCH = 96
ROWS = 600  # 80% of it is 480 rows: five steps an epoch
ADAM = {"lr": 1e-3, "weight_decay": 1e-5}

_TOWERS = [{"dims": [8]}, {"dims": [12, 6], "activation": "prelu"}]
_SETTINGS: dict[str, dict[str, Any]] = {
    "SharedBottom": {"bottom_params": {"dims": [32, 16]}, "tower_params_list": _TOWERS},
    "MMOE": {"n_expert": 8, "expert_params": {"dims": [16]}, "tower_params_list": _TOWERS},
    "PLE": {
        "n_level": 2, "n_expert_specific": 2, "n_expert_shared": 1, "expert_params": {"dims": [16, 8]},
        "tower_params_list": _TOWERS,
    },
    "ESMM": {"cvr_params": {"dims": [16, 8]}, "ctr_params": {"dims": [16, 8], "activation": "dice"}},
    "AITM": {"n_task": 2, "bottom_params": {"dims": [32, 16]}, "tower_params_list": _TOWERS},
}  # fmt: skip


def problem(kind: str, regression: bool = False, smooth: bool = False) -> Case:
    """A small log for one model kind: five sparse features, a padded history on a shared table, dense columns.

    Args:
        smooth: sigmoid instead of ReLU and PReLU: no kink on whose two sides rounding can put an activation.
    """
    features = [Feature("sparse", f"id{i}", 4, vocab) for i, vocab in enumerate((7, 40, 300, 900))]
    features += [
        Feature("sparse", "item", 4, 500, padding_idx=0),
        Feature("sequence", "history", 4, 500, length=6, shared_with="item", padding_idx=0),
    ]
    task_types = ("classification", "regression" if regression else "classification")
    if kind == "ESMM":
        features = [replace(f, init=("RandomNormal", (0.0, 0.3))) for f in features]
        task_types = ("classification",) * 3
    else:
        features += [Feature("dense", "age", 1), Feature("dense", "profile", 3)]
    seed = (base_seed() + KINDS.index(kind)) % 2**31
    settings = _with_sigmoid(_SETTINGS[kind]) if smooth else _SETTINGS[kind]
    return Case(kind, tuple(features), settings, task_types, BATCH, seed, n_user=3 if kind == "ESMM" else 0)


def _with_sigmoid(settings: Any) -> Any:
    if isinstance(settings, list):
        return [_with_sigmoid(value) for value in settings]
    if not isinstance(settings, dict):
        return settings
    smooth = {key: _with_sigmoid(value) for key, value in settings.items()}
    return {**smooth, "activation": "sigmoid"} if "dims" in smooth else smooth


def loaders(case: Case, package: str, x: Any = None, y: Any = None) -> tuple[DataLoader, DataLoader, DataLoader]:
    """The package's own train, validation and test loaders over the case's rows."""
    if x is None:
        x, y = columns(case, ROWS)
    generator = importlib.import_module(f"{package}.utils.data").DataGenerator(x, y)
    return generator.generate_dataloader(split_ratio=[0.8, 0.1], batch_size=case.batch)


def trainer(case: Case, package: str, model: nn.Module, **keywords: Any) -> Any:
    """The package's own MTLTrainer, with the issue's optimizer unless told otherwise; ours on the device under test."""
    trainers = importlib.import_module(f"{package}.trainers")
    where = {"device": DEVICE} if package == OURS else {}
    return trainers.MTLTrainer(model, list(case.task_types), **{"optimizer_params": ADAM, **where, **keywords})


def losses_by_epoch(
    case: Case, package: str, n_epoch: int, path: str, make: Callable[[Case, str], nn.Module] = build
) -> np.ndarray:
    """What ``train_one_epoch`` returns, ``[n_epoch, T]``."""
    model = make(case, package)
    train, _, _ = loaders(case, package)
    runner = trainer(case, package, model, model_path=path)
    return np.array([runner.train_one_epoch(train) for _ in range(n_epoch)])


def losses_by_step(case: Case, package: str, n_step: int, make: Callable[[Case, str], nn.Module] = build) -> np.ndarray:
    """The total loss before each of ``n_step`` updates of a loop written by hand."""
    model = make(case, package).train()
    train, _, _ = loaders(case, package)
    optimizer = torch.optim.Adam(model.parameters(), **ADAM)
    losses: list[float] = []
    while len(losses) < n_step:
        for x, y in train:
            by_task = task_losses(case.task_types, call(model, x), y)
            loss = sum(by_task[1:]) if case.kind == "ESMM" else sum(by_task) / len(by_task)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    return np.array(losses)


def build_nudged(seed: int) -> Callable[[Case, str], nn.Module]:
    """:func:`build`, with every weight moved by at most one unit in the last place."""

    def make(case: Case, package: str) -> nn.Module:
        model = build(case, package)
        rng_state = torch.get_rng_state()
        model.load_state_dict(nudged(model.state_dict(), seed))
        torch.set_rng_state(rng_state)
        return model

    return make
