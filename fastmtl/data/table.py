"""Rows in a CSV or Parquet file, as raw columns for the encoder.

Rows are counted from 1, the first one after the header. Whatever is wrong with a file is one error that names file, row
and column. CSV columns stay texts: what a column means is the encoder's to say, not a guess from its first rows.
"""

from __future__ import annotations

import csv
import gzip
import os
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import BadDataError, require

#: Number of the first row in messages about a file.
FIRST_ROW = 1


@dataclass(frozen=True)
class Table:
    """The rows of one file.

    Args:
        path: the file.
        columns: name -> values [N]: texts (objects) from CSV, numbers or objects from Parquet.
    """

    path: str
    columns: dict[str, np.ndarray]

    def __len__(self) -> int:
        return len(next(iter(self.columns.values())))


def read_table(path: str | os.PathLike[str], columns: Iterable[str] | None = None) -> Table:
    """Read a CSV (plain or .gz) or Parquet file.

    Args:
        path: the file; ".parquet" and ".pq" are Parquet, everything else CSV with a header.
        columns: the columns to read; None reads all.

    Returns:
        The table, its columns in the order asked for, or the file's.

    Raises:
        BadDataError: for a file that is missing, empty, or no such file; a missing or repeated column; a row that is
            too short or too long.
        MissingExtraError: for Parquet without pyarrow.
    """
    path = Path(path)
    if not path.is_file():
        raise BadDataError(f"{path}: there is no such file.")
    if path.stat().st_size == 0:
        raise BadDataError(f"{path}: the file is empty.")
    wanted = None if columns is None else list(columns)
    read = _read_parquet if path.suffix.lower() in (".parquet", ".pq") else _read_csv
    found = read(path, wanted)
    if not found or not len(next(iter(found.values()))):
        raise BadDataError(f"{path}: the file has a header and no row.")
    return Table(str(path), found)


def check_names(path: str | os.PathLike[str], names: Sequence[str], wanted: Sequence[str] | None) -> list[str]:
    """The columns to read, once the file's column names are known.

    Args:
        path: the file, for the error.
        names: its columns.
        wanted: the columns asked for; None for all.

    Returns:
        The names to read, in order.

    Raises:
        BadDataError: when one is missing, or there twice.
    """
    twice = (
        [name for place, name in enumerate(names) if name in set(names[:place])] if len(set(names)) < len(names) else []
    )
    if twice:
        raise BadDataError(f"{path}: column '{twice[0]}' is in the header twice; give each column a name of its own.")
    known = set(names)
    for name in wanted or ():
        if name not in known:
            shown = ", ".join(names[:10]) + (f" and {len(names) - 10} more" if len(names) > 10 else "")
            raise BadDataError(f"{path}: column '{name}' is missing; the file has {shown}.")
    return list(names) if wanted is None else list(wanted)


def _read_csv(path: Path, wanted: list[str] | None) -> dict[str, np.ndarray]:
    with _open_text(path) as lines:
        names = check_names(path, _next_row(csv.reader(lines, strict=True), path, 0) or [], wanted)
    try:
        return _read_csv_with_pyarrow(path, names)
    except _PyarrowDeclinesError:
        # Not installed, or not happy: the slower reader tells exactly what is wrong, or copes.
        return _read_csv_by_rows(path, names)


class _PyarrowDeclinesError(Exception):
    """pyarrow is missing, or refuses the file."""


def _read_csv_with_pyarrow(path: Path, names: Sequence[str]) -> dict[str, np.ndarray]:
    try:
        import pyarrow as pa
        from pyarrow import csv as pa_csv
    except ImportError as error:
        raise _PyarrowDeclinesError from error
    convert = pa_csv.ConvertOptions(
        column_types=dict.fromkeys(names, pa.string()), include_columns=list(names), strings_can_be_null=False
    )
    try:
        table = pa_csv.read_csv(path, convert_options=convert)
    except (pa.ArrowException, OSError) as error:
        raise _PyarrowDeclinesError from error
    return {name: table[name].to_numpy() for name in names}


def _read_csv_by_rows(path: Path, names: Sequence[str]) -> dict[str, np.ndarray]:
    with _open_text(path) as lines:
        reader = csv.reader(lines, strict=True)
        header = _next_row(reader, path, 0) or []
        rows: list[list[str]] = []
        while (row := _next_row(reader, path, len(rows) + FIRST_ROW)) is not None:
            if len(row) != len(header):
                missing = (
                    f"no value for '{header[len(row)]}'" if len(row) < len(header) else f"one is {row[len(header)]!r}"
                )
                raise BadDataError(
                    f"{path}: row {len(rows) + FIRST_ROW} has {len(row)} values where the header names {len(header)} "
                    f"columns ({missing}); mend or remove the row."
                )
            rows.append(row)
    places = {name: place for place, name in enumerate(header)}
    return {name: np.fromiter((row[places[name]] for row in rows), object, len(rows)) for name in names}


def _next_row(reader: Any, path: Path, number: int) -> list[str] | None:
    """The next row that is not blank; None at the end."""
    where = f"row {number}" if number else "the header"
    try:
        return next((row for row in reader if row), None)
    except UnicodeDecodeError as error:
        raise BadDataError(f"{path}: {where} or one soon after is no UTF-8 text; save the file as UTF-8.") from error
    except csv.Error as error:
        raise BadDataError(f"{path}: {where} is no CSV ({error}); look for a stray quote.") from error
    except (OSError, EOFError, zlib.error) as error:
        raise BadDataError(f"{path}: cannot be read past {where} ({error}); the file may be cut off.") from error


def _open_text(path: Path) -> Any:
    try:
        # utf-8-sig drops the byte order mark that spreadsheets write.
        if path.suffix.lower() == ".gz":
            return gzip.open(path, "rt", encoding="utf-8-sig", newline="")
        return open(path, encoding="utf-8-sig", newline="")
    except OSError as error:
        raise BadDataError(f"{path}: cannot be read ({error.strerror}).") from error


def _read_parquet(path: Path, wanted: list[str] | None) -> dict[str, np.ndarray]:
    file = open_parquet(path)
    names = check_names(path, file.schema_arrow.names, wanted)
    pa = require("pyarrow", "parquet", "Reading Parquet files")
    try:
        table = file.read(columns=names)
    except (pa.ArrowException, OSError) as error:
        raise BadDataError(f"{path}: cannot be read ({_short(error)}); the file may be damaged.") from error
    return {name: _numpy_of(table[name], pa) for name in names}


def open_parquet(path: str | os.PathLike[str]) -> Any:
    """Open a Parquet file and read its footer.

    Args:
        path: the file.

    Returns:
        pyarrow.parquet.ParquetFile.

    Raises:
        BadDataError: when it is missing, empty or no Parquet file.
        MissingExtraError: without pyarrow.
    """
    pa = require("pyarrow", "parquet", "Reading Parquet files")
    parquet = require("pyarrow.parquet", "parquet", "Reading Parquet files")
    path = Path(path)
    if path.is_dir():
        raise BadDataError(f"{path}: this is a folder; give the Parquet files in it.")
    if not path.is_file():
        raise BadDataError(f"{path}: there is no such file.")
    if path.stat().st_size == 0:
        raise BadDataError(f"{path}: the file is empty.")
    try:
        return parquet.ParquetFile(path, page_checksum_verification=True)
    except (pa.ArrowException, OSError) as error:
        raise BadDataError(f"{path}: is no whole Parquet file ({_short(error)}).") from error


def _numpy_of(column: Any, pa: Any) -> np.ndarray:
    """A Parquet column as numbers, or as objects where it holds texts or lacks values (a float would round an id)."""
    if pa.types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    if column.null_count and not pa.types.is_floating(column.type):
        return np.array(column.to_pylist(), dtype=object)
    return column.to_numpy()


def _short(error: BaseException) -> str:
    return str(error).partition("\n")[0].rstrip(".")
