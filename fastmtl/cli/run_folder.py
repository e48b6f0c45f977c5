"""The folder of a run: what is in it, and how it is written.

config.yaml      the resolved configuration; `fastmtl train --config` repeats the run with it
metrics.jsonl    one line an epoch, written as soon as the epoch is over
metrics.json     the final scores
curves.png       loss and validation score of each task over the epochs
best/            the best weights (config.json, model.safetensors) and encoder.json: what predict needs
model_*.pth      the same weights as a state_dict
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import IO, Any

from ..basic.tracking import BaseLogger
from ..errors import ConfigError

CONFIG, EPOCHS, METRICS, CURVES, BEST = "config.yaml", "metrics.jsonl", "metrics.json", "curves.png", "best"
#: Beside the model's own two files in BEST.
ENCODER = "encoder.json"


def default_folder(data_set: str, model: str) -> Path:
    """``runs/<data>-<model>-<time>``, with a number behind it where there is one already."""
    name = Path("runs") / f"{data_set}-{model}-{datetime.now():%Y%m%d-%H%M%S}"
    folder, number = name, 1
    while folder.exists():
        number += 1
        folder = name.with_name(f"{name.name}-{number}")
    return folder


def make_folder(folder: Path) -> None:
    """Make a run's folder, and try it by writing to it.

    Raises:
        ConfigError: when it cannot be made or written, or holds something already.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if any(folder.iterdir()):
            raise ConfigError(f"run folder {folder}: holds files already; give another --run-dir, or empty it")
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ConfigError(
            f"run folder {folder}: cannot be written ({error.strerror or error}); give another --run-dir"
        ) from None


def drop_if_empty(folder: Path) -> None:
    """Remove the folder of a run that never began."""
    with contextlib.suppress(OSError):
        folder.rmdir()


@contextlib.contextmanager
def replacing(path: Path, mode: str = "w") -> Iterator[IO[Any]]:
    """Write a file so that its old content or the whole new one is there, never a part.

    Args:
        path: the file.
        mode: "w" for UTF-8 text, "wb" for bytes.
    """
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with open(handle, mode, encoding=None if "b" in mode else "utf-8") as file:
            yield file
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)  # mkstemp's are the owner's alone
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise


def to_json(content: Any, indent: int | None = None) -> str:
    """JSON in which a number that is none (NaN: an AUC that is undefined) is null."""
    return json.dumps(_plain(content), indent=indent, ensure_ascii=False, allow_nan=False)


def _plain(content: Any) -> Any:
    if isinstance(content, Mapping):
        return {str(key): _plain(value) for key, value in content.items()}
    if isinstance(content, (list, tuple)):
        return [_plain(value) for value in content]
    return None if isinstance(content, float) and not math.isfinite(content) else content


class EpochLog(BaseLogger):
    """``metrics.jsonl``: one line an epoch, with the tasks' names.

    Args:
        path: the file.
        task_names: T names.
        task_types: "classification" (its score is called auc) or "regression" (mse) for each.

    Attributes:
        epochs: the lines so far, as dicts.
    """

    def __init__(self, path: Path, task_names: Sequence[str], task_types: Sequence[str]) -> None:
        self._path = path
        scores = {"classification": "auc", "regression": "mse"}
        self._names = {f"train/task_{t}_loss": f"train/{name}/loss" for t, name in enumerate(task_names)}
        self._names |= {
            f"val/task_{t}_score": f"valid/{name}/{scores[kind]}"
            for t, (name, kind) in enumerate(zip(task_names, task_types, strict=True))
        }
        self._names |= {f"loss_weight/task_{t}": f"loss_weight/{name}" for t, name in enumerate(task_names)}
        self.epochs: list[dict[str, Any]] = []

    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        line: dict[str, Any] = {"epoch": len(self.epochs) if step is None else step}
        line |= {self._names.get(name, name): value for name, value in metrics.items() if name != "auc"}
        self.epochs.append(line)
        with open(self._path, "a", encoding="utf-8") as file:
            file.write(to_json(line) + "\n")

    def log_hyperparams(self, params: Mapping[str, Any]) -> None:
        """Nothing: they are in config.yaml."""

    def finish(self) -> None:
        """Nothing: the file is closed after each line."""
