"""The model of a configuration."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ..data.multitask import MultiTaskData
from ..models import AITM, ESMM, MMOE, PLE, SharedBottom
from ..models.multi_task import MTLModel

Settings = Mapping[str, Any]


def make_model(settings: Settings, data: MultiTaskData) -> MTLModel:
    """The model that the configuration describes, for the features and tasks of the data.

    Raises:
        ConfigError: a value that the model refuses.
    """
    features = data.model_features(settings["model.embed_dim"])
    model = _MAKERS[settings["model.name"]](settings, features, data.task_types)
    model.take_task_names(data.task_names)
    return model


def describe(settings: Settings, model: MTLModel) -> str:
    """One line about the model."""
    own = {
        name.partition(".")[2]: value
        for name, value in settings.items()
        if name.startswith("model.") and name != "model.name"
    }
    parts = ", ".join(f"{name} {value}" for name, value in own.items())
    n_parameters = sum(parameter.numel() for parameter in model.parameters())
    return f"{settings['model.name']} ({parts}), {n_parameters:,} parameters"


def _mlp(settings: Settings, dims: str) -> dict[str, Any]:
    return {
        "dims": settings[f"model.{dims}"],
        "activation": settings["model.activation"],
        "dropout": settings["model.dropout"],
    }


def _towers(settings: Settings, task_types: Sequence[str]) -> list[dict[str, Any]]:
    return [_mlp(settings, "tower_dims") for _ in task_types]


def _shared_bottom(settings: Settings, features: list, task_types: Sequence[str]) -> MTLModel:
    return SharedBottom(features, task_types, _mlp(settings, "bottom_dims"), _towers(settings, task_types))


def _mmoe(settings: Settings, features: list, task_types: Sequence[str]) -> MTLModel:
    return MMOE(
        features, task_types, settings["model.n_expert"], _mlp(settings, "expert_dims"), _towers(settings, task_types)
    )


def _ple(settings: Settings, features: list, task_types: Sequence[str]) -> MTLModel:
    return PLE(
        features,
        task_types,
        settings["model.n_level"],
        settings["model.n_expert_specific"],
        settings["model.n_expert_shared"],
        _mlp(settings, "expert_dims"),
        _towers(settings, task_types),
    )


def _esmm(settings: Settings, features: list, task_types: Sequence[str]) -> MTLModel:
    return ESMM(features, [], _mlp(settings, "tower_dims"), _mlp(settings, "tower_dims"))


def _aitm(settings: Settings, features: list, task_types: Sequence[str]) -> MTLModel:
    return AITM(features, len(task_types), _mlp(settings, "bottom_dims"), _towers(settings, task_types))


_MAKERS: dict[str, Callable[[Settings, list, Sequence[str]], MTLModel]] = {
    "sharedbottom": _shared_bottom,
    "mmoe": _mmoe,
    "ple": _ple,
    "esmm": _esmm,
    "aitm": _aitm,
}
