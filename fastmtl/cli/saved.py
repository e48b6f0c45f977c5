"""A trained model with what it needs to read raw rows, found in a run's folder or a model's."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..data.datasets import PredictDataset
from ..data.encoder import Encoder
from ..data.loader import ColumnLoader
from ..data.table import Table
from ..errors import ConfigError
from ..models import from_pretrained
from ..models.multi_task import ESMM, MTLModel
from . import config, run_folder
from .tasks import ESMM_LABELS


@dataclass(frozen=True)
class Saved:
    """A model and its encoder.

    Args:
        folder: where they are.
        model: in evaluation mode, on the CPU.
        encoder: from raw columns to the model's.
        settings: the run's configuration; None where only the model's folder is there.
    """

    folder: Path
    model: MTLModel
    encoder: Encoder
    settings: dict[str, Any] | None

    @property
    def label_names(self) -> list[str]:
        """The label columns that the model's tasks are made of."""
        return list(ESMM_LABELS) if isinstance(self.model, ESMM) else self.model.task_names

    def encode(self, table: Table) -> dict[str, np.ndarray]:
        """The rows of a file as the model reads them."""
        return self.encoder.transform(table.columns, table.path, first_row=1)


def load_saved(path: str) -> Saved:
    """Load a model by its folder.

    Args:
        path: a run's folder, or one with config.json, model.safetensors and encoder.json.

    Raises:
        ConfigError: when there is no model in it, or no encoder.
    """
    given = Path(path)
    if not given.is_dir():
        raise ConfigError(f"{given}: there is no such folder; give a run's, such as runs/census-mmoe-20260102-101500")
    folder = given if (given / "config.json").is_file() else given / run_folder.BEST
    if not folder.is_dir():
        raise ConfigError(f"{given}: is no run and no model: neither {run_folder.BEST}/ nor config.json is in it")
    model = from_pretrained(folder)
    if not (folder / run_folder.ENCODER).is_file():
        raise ConfigError(
            f"{folder}: {run_folder.ENCODER} is missing, without which raw rows cannot be read; "
            "copy it from the run that made the model"
        )
    encoder = Encoder.load(folder / run_folder.ENCODER)
    missing = {str(getattr(feature, "name", feature)) for feature in model.features} - {
        spec.name for spec in encoder.features
    }
    if missing:
        raise ConfigError(
            f"{folder}: {run_folder.ENCODER} lacks the model's feature {sorted(missing)[0]!r}; "
            "the two belong to different models"
        )
    return Saved(folder, model, encoder, _settings_of(given, folder))


def _settings_of(given: Path, folder: Path) -> dict[str, Any] | None:
    """The configuration of the run that the folder belongs to."""
    for place in (given, folder.parent):
        file = place / run_folder.CONFIG
        if file.is_file():
            said = config.gather(str(file), [], {})
            return config.resolve(said, said.value("data.name"), said.value("model.name"))
    return None


def loader_of(x: dict[str, np.ndarray], batch_size: int) -> ColumnLoader:
    """A loader of encoded rows without labels."""
    return ColumnLoader(PredictDataset(x), batch_size)
