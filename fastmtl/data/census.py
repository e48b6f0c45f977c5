"""Census-Income (KDD): the raw files, read, checked, split and encoded.

299,285 people of the 1994 and 1995 surveys in two halves (``census-income.data``, 199,523 rows; ``census-income.test``,
99,762), 42 columns, comma-separated without a header. Tasks: income above 50,000 dollars, and never married.
Source: UCI Machine Learning Repository, "Census-Income (KDD)", CC BY 4.0.
"""

from __future__ import annotations

import csv
import gzip
import hashlib
import io
import os
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ..errors import BadDataError
from .encoder import Encoder
from .multitask import MultiTaskData, Split

HALVES = ("census-income.data", "census-income.test")

#: sha256 of a half's text, unpacked; the other half's is not known to us.
KNOWN_TEXT = {"census-income.test": "98402b1ab879573d0a7f38a699a40258080e25e33d3401e7bf9c96d3fa0fab8c"}

ORIGIN = 'the UCI Machine Learning Repository (archive.ics.uci.edu), data set "Census-Income (KDD)"'

COLUMNS = (
    "age",
    "class of worker",
    "industry code",
    "occupation code",
    "education",
    "wage per hour",
    "enrolled in edu inst last wk",
    "marital status",
    "major industry code",
    "major occupation code",
    "race",
    "hispanic origin",
    "sex",
    "member of a labor union",
    "reason for unemployment",
    "full or part time employment stat",
    "capital gains",
    "capital losses",
    "divdends from stocks",
    "tax filer status",
    "region of previous residence",
    "state of previous residence",
    "detailed household and family stat",
    "detailed household summary in household",
    "instance weight",
    "migration code-change in msa",
    "migration code-change in reg",
    "migration code-move within reg",
    "live in this house 1 year ago",
    "migration prev res in sunbelt",
    "num persons worked for employer",
    "family members under 18",
    "country of birth father",
    "country of birth mother",
    "country of birth self",
    "citizenship",
    "own business or self employed",
    "fill inc questionnaire for veterans admin",
    "veterans benefits",
    "weeks worked in year",
    "year",
    "income",
)
DENSE = (
    "age",
    "wage per hour",
    "capital gains",
    "capital losses",
    "divdends from stocks",
    "num persons worked for employer",
    "weeks worked in year",
)
SPARSE = tuple(name for name in COLUMNS if name not in (*DENSE, "instance weight", "marital status", "income"))
TASKS = ("income", "marital")

_INCOMES = {"- 50000.": 0.0, "50000+.": 1.0}
_NEVER_MARRIED = "Never married"


def find_census(path: str | os.PathLike[str] | None = None) -> tuple[Path, ...]:
    """Where the files are on this machine.

    Args:
        path: a file, or the folder that holds them; None looks in $FASTMTL_DATA, then in the user's cache folder.

    Returns:
        The halves found, the training half first; empty when there is none.
    """
    if path is not None and Path(path).is_file():
        return (Path(path),)
    for folder in [Path(path)] if path is not None else _folders():
        found = [half for name in HALVES if (half := _half_in(folder, name)) is not None]
        if found:
            return tuple(found)
    return ()


def load_census(path: str | os.PathLike[str] | None = None, *, seed: int = 2022, verify: bool = True) -> MultiTaskData:
    """Read, split and encode Census-Income.

    Of the test half alone, 60,000 rows are for training, 20,000 for validation and 19,762 for test, drawn by
    ``numpy.random.default_rng(seed).permutation``; of both halves (the training half's rows first) the same shares.

    Args:
        path: a file, or the folder that holds the files; None looks in $FASTMTL_DATA, then in the user's cache folder.
        seed: of the split.
        verify: compare the files with their published sha256 where that is known.

    Returns:
        The data set: 32 sparse and 7 dense features, tasks "income" and "marital".

    Raises:
        BadDataError: when no file is found (says where to get it and where to put it), or one is damaged (names file,
            row and column).
    """
    files = find_census(path)
    if not files:
        raise BadDataError(_how_to_get_it(path))
    parts = [_read_half(file, verify) for file in files]
    raw = {name: np.concatenate([part[name] for part in parts]) for name in COLUMNS}
    labels = np.stack([raw["income"], raw["marital status"]], axis=1).astype(np.float32)
    n_rows = len(labels)
    order = np.random.default_rng(seed).permutation(n_rows)
    n_train, n_valid = n_rows * 60_000 // 99_762, n_rows * 20_000 // 99_762
    train, valid, test = np.split(order, [n_train, n_train + n_valid])
    # from all rows, as in the reference runs: a column's values and range say nothing about the labels
    encoder = Encoder.fit(raw, SPARSE, DENSE)
    x = encoder.transform(raw)

    def rows_of(rows: np.ndarray) -> Split:
        return Split({name: column[rows] for name, column in x.items()}, labels[rows])

    return MultiTaskData(
        name="census",
        train=rows_of(train),
        valid=rows_of(valid),
        test=rows_of(test),
        task_names=TASKS,
        task_types=("classification",) * 2,
        encoder=encoder,
        note=f"Census-Income (KDD), {n_rows:,} rows from {', '.join(str(file) for file in files)}",
    )


def _read_half(file: Path, verify: bool) -> dict[str, np.ndarray]:
    """One file as columns: dense ones float64, labels float64, the others texts (objects)."""
    content = _content_of(file)
    name = file.name.removesuffix(".gz")
    known = KNOWN_TEXT.get(name)
    if verify and known is not None:
        digest = hashlib.sha256(content).hexdigest()
        if digest != known:
            raise BadDataError(
                f"{file}: this is not the published {name} (sha256 of its text is {digest}, expected {known}); "
                f"get it again from {ORIGIN}, or give another file with verify=False."
            )
    rows = _rows_in(content, file)
    shared: dict[str, str] = {}
    columns = {}
    for name, values in zip(COLUMNS, zip(*rows, strict=True), strict=True):
        if name in DENSE:
            columns[name] = _numbers(name, values, file)
        elif name == "income":
            columns[name] = _incomes(values, file)
        elif name == "marital status":
            columns[name] = np.fromiter((value == _NEVER_MARRIED for value in values), np.float64, len(values))
        else:
            # Equal texts share one object: less memory, and the encoder's look-ups stay in the cache.
            columns[name] = np.fromiter(map(shared.setdefault, values, values), object, len(values))
    return columns


def _content_of(file: Path) -> bytes:
    try:
        content = file.read_bytes()
        if content[:2] == b"\x1f\x8b":
            content = gzip.decompress(content)
    except (OSError, EOFError, zlib.error) as error:
        raise BadDataError(f"{file}: cannot be read ({error}); get it again from {ORIGIN}.") from error
    if not content.strip():
        raise BadDataError(f"{file}: the file is empty; get it again from {ORIGIN}.")
    return content


def _rows_in(content: bytes, file: Path) -> list[list[str]]:
    try:
        text = content.decode("ascii")
    except UnicodeDecodeError as error:
        row = content.count(b"\n", 0, error.start) + 1
        raise BadDataError(f"{file}: row {row} holds bytes that are no text; get it again from {ORIGIN}.") from error
    reader = csv.reader(io.StringIO(text), skipinitialspace=True, quoting=csv.QUOTE_NONE)
    rows = [row for row in reader if row]
    for number, cells in enumerate(rows, start=1):
        if len(cells) != len(COLUMNS):
            where = (
                f"'{COLUMNS[len(cells)]}' and what follows is missing"
                if len(cells) < len(COLUMNS)
                else "some are too many"
            )
            raise BadDataError(
                f"{file}: row {number} has {len(cells)} columns instead of {len(COLUMNS)} ({where}); "
                f"mend the row, or get the file again from {ORIGIN}."
            )
    return rows


def _numbers(name: str, values: Sequence[str], file: Path) -> np.ndarray:
    try:
        numbers = np.fromiter(map(float, values), np.float64, len(values))
        bad = np.flatnonzero(~np.isfinite(numbers))
    except ValueError:
        bad = np.array([row for row, value in enumerate(values) if not _is_number(value)])
    if len(bad):
        raise _bad_value(name, int(bad[0]), values, "a number", file)
    return numbers


def _incomes(values: Sequence[str], file: Path) -> np.ndarray:
    for row, value in enumerate(values):
        if value not in _INCOMES:
            raise _bad_value("income", row, values, " or ".join(f"'{known}'" for known in _INCOMES), file)
    return np.fromiter(map(_INCOMES.__getitem__, values), np.float64, len(values))


def _bad_value(name: str, row: int, values: Sequence[str], expected: str, file: Path) -> BadDataError:
    return BadDataError(
        f"{file}: row {row + 1}, column '{name}' holds {values[row]!r}, where {expected} belongs; "
        f"mend the row, or get the file again from {ORIGIN}."
    )


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _folders() -> list[Path]:
    """Where files are looked for when no path is given."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fastmtl"
    given = os.environ.get("FASTMTL_DATA")
    return [Path(given), cache] if given else [cache]


def _half_in(folder: Path, name: str) -> Path | None:
    """The plain or packed file of this half in the folder, if any."""
    return next((file for file in (folder / name, folder / f"{name}.gz") if file.is_file()), None)


def _how_to_get_it(path: str | os.PathLike[str] | None) -> str:
    names = " and/or ".join(f"{name}[.gz]" for name in HALVES)
    if path is not None:
        return f"{path}: no Census-Income file is here ({names}); get it from {ORIGIN}."
    *others, cache = _folders()
    places = [str(folder) for folder in others] + [str(cache)]
    unset = "" if others else ", or into any folder that the environment variable FASTMTL_DATA names"
    return (
        f"Census-Income is not on this machine. Get {names} from {ORIGIN} and put it into {' or '.join(places)}{unset}."
    )
