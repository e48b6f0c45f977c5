"""Model folders: ``config.json`` (how to make the model) and ``model.safetensors`` (its state_dict)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from ...basic.features import DenseFeature, Feature, SequenceFeature, SparseFeature
from ...basic.initializers import Pretrained
from ...errors import ConfigError, NotBuiltError
from .aitm import AITM
from .base import LOSS_WEIGHT, MTLModel
from .esmm import ESMM
from .mmoe import MMOE
from .ple import PLE
from .shared_bottom import SharedBottom

MODELS: dict[str, type[MTLModel]] = {model.__name__: model for model in (SharedBottom, MMOE, PLE, ESMM, AITM)}
FEATURES = {kind.__name__: kind for kind in (SparseFeature, SequenceFeature, DenseFeature)}
FORMAT = 1


def _feature_config(feature: Feature) -> dict[str, Any]:
    config = {name: value for name, value in vars(feature).items() if name != "initializer"}
    config["kind"] = type(feature).__name__
    initializer = getattr(feature, "initializer", None)
    if isinstance(initializer, Pretrained) and initializer.freeze:
        config["frozen"] = True
    return config


def _feature(config: dict[str, Any]) -> Feature:
    config = dict(config)
    make = FEATURES[config.pop("kind")]
    if config.pop("frozen", False):
        config["initializer"] = Pretrained(torch.zeros(config["vocab_size"], config["embed_dim"]))
    return make(**config)


def save_pretrained(model: MTLModel, folder: str | Path) -> None:
    """See :meth:`MTLModel.save_pretrained`."""
    if not model.is_built:
        raise NotBuiltError(f"{type(model).__name__}: save_pretrained before the model is built; fit it first")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    config = {
        "format": FORMAT,
        "model": type(model).__name__,
        "feature_lists": {
            name: [_feature_config(f) for f in features] for name, features in model.feature_lists.items()
        },
        "task_types": model.task_types,
        "task_names": model.task_names,
        "config": model.config,
    }
    # the state_dict holds views of a few large tensors; the file holds each tensor by itself
    save_file({name: tensor.clone() for name, tensor in model.state_dict().items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def from_pretrained(folder: str | Path) -> MTLModel:
    """The model saved by :meth:`MTLModel.save_pretrained` in ``folder``, on the CPU, in evaluation mode.

    Raises:
        ConfigError: a folder that holds no model, or one of a newer format.
    """
    folder = Path(folder)
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        state = load_file(folder / "model.safetensors")
    except FileNotFoundError as error:
        raise ConfigError(f"{folder}: no model here ({Path(error.filename or folder).name} is missing)") from None
    except (ValueError, OSError, SafetensorError) as error:
        raise ConfigError(f"{folder}: the saved model can't be read: {error}") from error
    if config.get("format") != FORMAT or config.get("model") not in MODELS:
        raise ConfigError(
            f"{folder}: config.json of format {config.get('format')!r}, model {config.get('model')!r}; this version "
            f"reads format {FORMAT} of {', '.join(MODELS)}"
        )
    make = MODELS[config["model"]]
    arguments: dict[str, Any] = {
        name: [_feature(f) for f in features] for name, features in config["feature_lists"].items()
    }
    arguments |= config["config"]
    if make is AITM:
        arguments["n_task"] = len(config["task_types"])
    elif make is not ESMM:
        arguments["task_types"] = config["task_types"]
    with torch.random.fork_rng(devices=[]):  # the weights drawn here are replaced; the user's seed is not touched
        model = make(**arguments)
    model.task_names = config["task_names"]
    if any(name.startswith(f"{LOSS_WEIGHT}.") for name in state):
        model.loss_weights(0.0)
    model.load_state_dict(state)
    return model.eval()
