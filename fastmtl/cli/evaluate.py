"""``fastmtl evaluate``: the scores of a trained model on a data set or a file."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np

from .. import backend
from ..data.datasets import TorchDataset
from ..data.loader import ColumnLoader
from ..data.multitask import MultiTaskData
from ..data.schema import validate_labels
from ..data.table import FIRST_ROW, Table, read_table
from ..errors import BadDataError, ConfigError
from ..models.multi_task import ESMM
from ..trainers import evaluate_multi_task
from . import config
from .keys import DATA_SETS
from .report import Voice, print_table, scores_table
from .run_folder import to_json
from .saved import Saved, load_saved
from .setup import backends_of, check_device, chosen_backend, listed
from .tasks import esmm_labels, load_data


def run(args: argparse.Namespace) -> None:
    """Score the model; the table or JSON goes to stdout."""
    voice = Voice(args.quiet)
    device = check_device(args.device)
    forced = chosen_backend(args.backend)
    saved = load_saved(args.run)
    with backend.use_backend(None if forced == "auto" else forced):
        loaders, best_auc, note = _loaders(saved, args.data, args.batch_size or _batch_size(saved))
        backends = backends_of(device)
        voice.facts({"model": str(saved.folder), "data": note, "backend": listed(backends)})
        model = saved.model.to(device)
        scores = {split: evaluate_multi_task(model, loader) for split, loader in loaders.items()}
    if args.json:
        rows = {split: len(loader.sampler) for split, loader in loaders.items()}  # type: ignore[arg-type]
        result = {"model": str(saved.folder), "data": {"note": note, "rows": rows}, "metrics": scores}
        print(to_json({**result, "best_auc": best_auc, "backend": backends}))
    else:
        print_table(*scores_table(scores, best_auc), sys.stdout)


def _loaders(saved: Saved, data: str | None, batch_size: int) -> tuple[dict[str, ColumnLoader], dict[str, float], str]:
    """(split -> loader, task -> best AUC possible on the test rows, a note about the data)."""
    if data is None and saved.settings is None:
        raise ConfigError(
            f"{saved.folder}: is not inside a run, so say on what to evaluate: {', '.join(DATA_SETS)}, or a file"
        )
    if data is None or data in DATA_SETS:
        content = _data_set(saved, data)
        _, valid, test = content.loaders(batch_size)
        return {"valid": valid, "test": test}, dict(content.best_auc), content.note
    if not ("/" in data or "." in data or Path(data).exists()):
        raise ConfigError(f"no data set {data!r}; {config.nearest(data, DATA_SETS)}, or give a CSV or Parquet file")
    table = read_table(data)
    dataset = TorchDataset(saved.encode(table), _labels(saved, table))
    return {"file": ColumnLoader(dataset, batch_size)}, {}, f"{data}, {len(table):,} rows"


def _batch_size(saved: Saved) -> int:
    """The run's, so that the same numbers come out to the last bit; else one that is fast."""
    return 4096 if saved.settings is None else saved.settings["train.batch_size"]


def _data_set(saved: Saved, name: str | None) -> MultiTaskData:
    """The data set, the run's own unless named otherwise, once it is sure that its ids mean what the model learned."""
    settings = saved.settings
    if settings is None or name not in (None, settings["data.name"]):
        model = type(saved.model).__name__.lower()
        settings = config.resolve(config.Given(), str(name), model)
    data = load_data(settings)
    if data.encoder.to_dict() != saved.encoder.to_dict():
        raise BadDataError(
            f"{data.note}: is encoded otherwise than what {saved.folder} was trained on; "
            "evaluate on the same files, or give the rows as a CSV or Parquet file"
        )
    return data


def _labels(saved: Saved, table: Table) -> dict[str, np.ndarray]:
    """Task -> labels [N] of a file; NaN where the file has none."""
    names = saved.label_names
    columns = []
    for name in names:
        if name not in table.columns:
            raise BadDataError(f"{table.path}: the label column {name!r} is missing; evaluate needs {', '.join(names)}")
        columns.append(_numbers(table.path, name, table.columns[name]))
    labels = np.stack(columns, axis=1).astype(np.float32)
    is_esmm = isinstance(saved.model, ESMM)
    kinds = ["classification"] * len(names) if is_esmm else saved.model.task_types
    try:
        validate_labels(labels, kinds, names, FIRST_ROW)
    except BadDataError as error:
        raise BadDataError(f"{table.path}: {error}") from None
    labels = esmm_labels(labels) if is_esmm else labels
    return dict(zip(saved.model.task_names, labels.T, strict=True))


def _numbers(path: str, name: str, column: np.ndarray) -> np.ndarray:
    """A label column as numbers; an empty cell is NaN, "unknown"."""
    numbers = np.empty(len(column))
    for row, value in enumerate(column.tolist()):
        try:
            numbers[row] = np.nan if value in (None, "") else float(value)
        except ValueError:
            raise BadDataError(
                f"{path}: label {name!r} is {value!r} in row {row + FIRST_ROW}; "
                "write a number between 0 and 1, or nothing where it is unknown"
            ) from None
    return numbers
