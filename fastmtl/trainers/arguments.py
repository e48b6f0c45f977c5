"""What the trainer's arguments, of either dialect, ask for."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from ..errors import ConfigError
from ..weighting import MetaBalance, Strategy, make_strategy


def library_task_type(kind: str) -> str:
    """A task type of either dialect in the library's words."""
    return "classification" if kind == "binary" else kind


def strategy_of(
    adaptive_params: Mapping[str, Any] | None,
    optimizer: torch.optim.Optimizer | None,
    method: str | None,
    alpha: float | None,
    task_weights: Sequence[float] | None,
) -> Strategy:
    """The one strategy that the trainer's arguments, of either dialect, ask for."""
    asked: list[tuple[str, dict[str, Any]]] = []
    if adaptive_params is not None:
        params = dict(adaptive_params)
        if "method" not in params:
            raise ConfigError("adaptive_params: the key 'method' is missing, e.g. {'method': 'uwl'}")
        asked.append((params.pop("method"), params))
    if method is not None:
        asked.append((method, {} if alpha is None else {"alpha": alpha}))
    if isinstance(optimizer, MetaBalance):
        asked.append(("metabalance", {"optimizer": optimizer}))
    if task_weights is not None:
        asked.append(("static", {"weights": task_weights}))
    if len(asked) > 1:
        raise ConfigError(f"several ways to weigh the losses were given ({', '.join(m for m, _ in asked)}); give one")
    name, params = asked[0] if asked else ("mean", {})
    if name != "gradnorm":
        params.pop("alpha", None)  # torch-rechub's scripts pass it beside every method
    return make_strategy(name, **params)


def writable_folder(folder: str) -> str:
    """The folder, made if missing; tried out by writing a file."""
    try:
        os.makedirs(folder, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ConfigError(f"model_path {folder!r} can't be written: {error.strerror or error}") from None
    return folder


def save_weights(weights: Mapping[str, torch.Tensor], path: str) -> None:
    """Write weights beside ``path`` and put the whole file in its place; a failure leaves what was there.

    Raises:
        ConfigError: the file can't be written; the message names it, its size and the reason.
    """
    unfinished = f"{path}.unfinished"
    try:
        torch.save(dict(weights), unfinished)
        os.replace(unfinished, path)
    except (OSError, RuntimeError) as error:  # torch tells of a full disk by a RuntimeError
        with contextlib.suppress(OSError):
            os.unlink(unfinished)
        size = sum(weight.numel() * weight.element_size() for weight in weights.values())
        raise ConfigError(
            f"{path}: the weights ({size:,} bytes) can't be written, is the disk full? ({str(error).splitlines()[0]}); "
            f"the model itself is trained: save it to another folder"
        ) from error
