"""The data set of a run, and the tasks that a model sees in it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from ..basic.metric import auc
from ..data.census import TASKS as CENSUS_TASKS
from ..data.census import find_census, load_census
from ..data.multitask import MultiTaskData, Split
from ..data.synthetic import TASKS as SYNTHETIC_TASKS
from ..data.synthetic import load_synthetic
from ..errors import ConfigError

#: The label columns of each data set.
LABELS = {"census": CENSUS_TASKS, "synthetic": SYNTHETIC_TASKS}
#: ESMM's outputs, made of the labels (click, purchase).
ESMM_TASKS = ("cvr", "ctr", "ctcvr")
ESMM_LABELS = SYNTHETIC_TASKS
#: The task whose validation score chooses the best epoch, where it is not the first.
STOP_TASK = {"esmm": "ctcvr"}


def choose_data(name: str, path: str | None, model: str) -> tuple[str, str]:
    """Decide what "auto" means.

    Args:
        name: "auto", or a data set.
        path: where census is, if the user said so.
        model: the model to train.

    Returns:
        (data set, why: one clause; empty where the user chose).

    Raises:
        ConfigError: census with ESMM.
    """
    if name == "census" and model == "esmm":
        raise ConfigError(
            "esmm models a click and a conversion that only a click can bring, and the tasks of census (income, never "
            "married) are no such chain; train it on synthetic, or take sharedbottom, mmoe, ple or aitm for census"
        )
    if name != "auto":
        return name, ""
    if model == "esmm":
        return "synthetic", "esmm needs clicks and conversions, which census has not"
    if path is not None:
        return "census", f"data.path is {path}"
    found = find_census()
    if found:
        return "census", f"found {', '.join(map(str, found))}"
    return "synthetic", "no census file is on this machine ('fastmtl train census' says where to put it)"


def load_data(settings: Mapping[str, Any]) -> MultiTaskData:
    """The data set of a configuration, its tasks as the model sees them.

    Raises:
        BadDataError: see :func:`fastmtl.data.load_census`.
        ConfigError: a check that is switched off for files that the user did not choose.
    """
    if settings["data.name"] == "census":
        path, verify = settings["data.path"], settings["data.verify"]
        if path is None and not verify:
            raise ConfigError("data.verify=false needs data.path: only a file that you name is read unchecked")
        data = load_census(path, seed=settings["data.split_seed"], verify=verify)
    else:
        data = load_synthetic(
            settings["data.rows"],
            settings["data.seed"],
            relatedness=settings["data.relatedness"],
            scale=settings["data.scale"],
        )
    return _for_esmm(data) if settings["model.name"] == "esmm" else data


def esmm_labels(labels: np.ndarray) -> np.ndarray:
    """Labels (click, purchase) ``[N, 2]`` as (cvr, ctr, ctcvr) ``[N, 3]``; cvr is NaN, unknown, without a click."""
    click, purchase = labels.T
    return np.stack([np.where(click == 1, purchase, np.nan), click, click * purchase], axis=1).astype(np.float32)


def _for_esmm(data: MultiTaskData) -> MultiTaskData:
    """A data set of clicks and purchases with ESMM's three tasks."""
    best = {}
    test = data.test
    if test.probabilities is not None:
        click, bought = test.probabilities.T
        clicked = test.y[:, 0] == 1
        best = {
            "cvr": auc(test.y[clicked, 1], bought[clicked] / click[clicked]),
            "ctr": data.best_auc["click"],
            "ctcvr": data.best_auc["purchase"],
        }
    train, valid, test = (Split(s.x, esmm_labels(s.y), s.probabilities) for s in (data.train, data.valid, data.test))
    return replace(
        data, train=train, valid=valid, test=test, task_names=ESMM_TASKS,
        task_types=("classification",) * len(ESMM_TASKS), best_auc=best,
    )  # fmt: skip
