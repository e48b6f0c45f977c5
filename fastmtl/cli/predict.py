"""``fastmtl predict``: a probability for each task and each row of a file."""

from __future__ import annotations

import argparse
import csv
import gzip
import io
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import IO

import numpy as np

from .. import backend
from ..data.encoder import Encoder
from ..data.table import Table, read_table
from ..errors import ConfigError, require
from ..trainers.evaluation import collect
from .report import Voice
from .run_folder import replacing
from .saved import load_saved, loader_of
from .setup import backends_of, check_device, chosen_backend, listed

_SUFFIXES = (".csv", ".csv.gz", ".parquet", ".pq")
_SHOWN = 5


def run(args: argparse.Namespace) -> None:
    """Predict; the file is there whole, or not at all."""
    voice = Voice(args.quiet)
    device = check_device(args.device)
    forced = chosen_backend(args.backend)
    _check_out(args.out)
    saved = load_saved(args.run)
    table = read_table(args.file)
    x = saved.encode(table)
    _tell_about_columns(voice, table, saved.encoder)
    _tell_about_unseen(voice, x, saved.encoder)
    with backend.use_backend(None if forced == "auto" else forced):
        voice.facts({"model": str(saved.folder), "backend": listed(backends_of(device))})
        start = time.perf_counter()
        predictions, _ = collect(saved.model.to(device), loader_of(x, args.batch_size), device)
        seconds = time.perf_counter() - start
    _write(args.out, saved.model.task_names, predictions)
    n_rows = len(predictions)
    voice.say(f"{n_rows:,} rows in {seconds:.2f} s ({n_rows / seconds:,.0f} rows/s), written to {args.out}")


def _check_out(out: str) -> None:
    """Refuse, before anything is computed, a file that can't be written."""
    if out == "-":
        return
    path = Path(out)
    if not path.name.lower().endswith(_SUFFIXES):
        raise ConfigError(f"--out {out}: the name must end in {', '.join(_SUFFIXES)}, or be - for CSV on stdout")
    if path.name.lower().endswith((".parquet", ".pq")):
        require("pyarrow.parquet", "parquet", "Writing Parquet files")
    if path.is_dir():
        raise ConfigError(f"--out {out}: is a folder")
    try:
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise ConfigError(f"--out {out}: cannot be written ({error.strerror or error})") from None


def _tell_about_columns(voice: Voice, table: Table, encoder: Encoder) -> None:
    names = {spec.name for spec in encoder.features}
    extra = [name for name in table.columns if name not in names]
    if extra:
        voice.say(f"ignored, because the model does not read them: {_some(extra)}")


def _tell_about_unseen(voice: Voice, x: Mapping[str, np.ndarray], encoder: Encoder) -> None:
    unseen = []
    for spec in encoder.features:
        if spec.vocab is not None:
            n_rows = int(np.count_nonzero(x[spec.name] >= spec.vocab))
            if n_rows:
                unseen.append(f"{spec.name} ({n_rows:,} rows)")
    if unseen:
        voice.say(f"values that training never saw are read as unknown: {_some(unseen)}")


def _some(names: list[str]) -> str:
    more = len(names) - _SHOWN
    return ", ".join(names[:_SHOWN]) + (f" and {more} more" if more > 0 else "")


def _write(out: str, names: list[str], predictions: np.ndarray) -> None:
    """Write predictions ``[N, T]`` under the tasks' names."""
    if out == "-":
        _write_csv(sys.stdout, names, predictions)
        return
    path = Path(out)
    try:
        with replacing(path, "wb") as file:
            _write_file(file, path.name.lower(), names, predictions)
    except OSError as error:
        raise ConfigError(f"--out {out}: cannot be written ({error.strerror or error})") from error


def _write_file(file: IO[bytes], name: str, names: list[str], predictions: np.ndarray) -> None:
    """Write in the format that the file's name asks for."""
    if name.endswith((".parquet", ".pq")):
        pa = require("pyarrow", "parquet", "Writing Parquet files")
        parquet = require("pyarrow.parquet", "parquet", "Writing Parquet files")
        parquet.write_table(pa.table(dict(zip(names, predictions.T, strict=True))), file)
    elif name.endswith(".gz"):
        with gzip.GzipFile(fileobj=file, mode="wb", mtime=0) as packed, io.TextIOWrapper(packed, "utf-8") as text:
            _write_csv(text, names, predictions)
    else:
        with io.TextIOWrapper(file, "utf-8") as text:
            _write_csv(text, names, predictions)


def _write_csv(stream: IO[str], names: list[str], predictions: np.ndarray) -> None:
    """CSV whose numbers have the nine digits that give a float32 back exactly."""
    csv.writer(stream, lineterminator="\n").writerow(names)
    np.savetxt(stream, predictions, fmt="%.9g", delimiter=",")
