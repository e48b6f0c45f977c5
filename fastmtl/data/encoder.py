"""From raw columns to what a model reads, fitted on the training rows and kept with the model."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import repeat
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import BadDataError, ConfigError

#: Raised when the shape of the JSON changes.
_FORMAT = 1


@dataclass(frozen=True)
class FeatureSpec:
    """One feature of a data set.

    Args:
        name: its column.
        kind: "sparse" (an id) or "dense" (a number).
        vocab: ids of a sparse feature; a value that was not learnt gets the id after the last. None: dense.
    """

    name: str
    kind: str
    vocab: int | None = None


@dataclass(frozen=True)
class _Texts:
    """The texts of a sparse column in sorted order; the place of a text is its id."""

    values: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.values)

    def ids(self, column: Any) -> np.ndarray:
        """Ids [N]; a value that is none of the texts, or missing, gets the id after the last."""
        place: dict[str | None, int] = {value: index for index, value in enumerate(self.values)}
        texts = _as_texts(column)
        return np.fromiter(map(place.get, texts, repeat(len(self))), np.int64, len(texts))

    def to_dict(self) -> dict[str, Any]:
        return {"type": "text", "values": list(self.values)}


@dataclass(frozen=True, eq=False)
class _Numbers:
    """The numbers of a sparse column in sorted order; the place of a number is its id."""

    values: np.ndarray

    def __len__(self) -> int:
        return len(self.values)

    def ids(self, column: Any) -> np.ndarray:
        """Ids [N]; a value that is none of the numbers, or missing, gets the id after the last."""
        numbers, known = _as_numbers(column)
        if len(self) == 0:
            return np.zeros(len(numbers), np.int64)
        at = np.searchsorted(self.values, numbers).clip(max=len(self) - 1)
        return np.where(known & (self.values[at] == numbers), at, len(self))

    def to_dict(self) -> dict[str, Any]:
        return {"type": self.values.dtype.name, "values": self.values.tolist()}


@dataclass(frozen=True)
class _Range:
    """A sparse column that holds ids already: 0 to size - 1."""

    size: int

    def __len__(self) -> int:
        return self.size

    def ids(self, column: Any) -> np.ndarray:
        """The ids themselves; one outside the range gets the id after the last."""
        numbers, known = _as_numbers(column)
        inside = known & (numbers >= 0) & (numbers < self.size) & (numbers == np.floor(numbers))
        return np.where(inside, numbers, self.size).astype(np.int64)

    def to_dict(self) -> dict[str, Any]:
        return {"type": "range", "size": self.size}


_Vocabulary = _Texts | _Numbers | _Range


class Encoder:
    """Sparse values to ids in sorted order, dense ones to their place between the least and the greatest.

    A value that was not there to learn from gets the id after the last, for which no table has a row: give the feature
    ``oov="zero"``, and such a value adds nothing.

    Args:
        sparse: name -> values or range of ids.
        dense: name -> (least, greatest) value.
        order: names of all features, in order.
    """

    def __init__(
        self,
        sparse: Mapping[str, _Vocabulary],
        dense: Mapping[str, tuple[float, float]],
        order: Sequence[str],
    ) -> None:
        self._sparse, self._dense, self._order = dict(sparse), dict(dense), tuple(order)

    @classmethod
    def fit(cls, columns: Mapping[str, Any], sparse: Iterable[str], dense: Iterable[str], source: str = "") -> Encoder:
        """Learn values and ranges from rows.

        Args:
            columns: name -> raw column [N], texts or numbers.
            sparse: names of the sparse features. Missing values (None, NaN) count as never seen.
            dense: names of the dense features.
            source: where the rows come from, for errors.

        Returns:
            The fitted encoder; its features are ``sparse``, then ``dense``.

        Raises:
            BadDataError: for a missing column, or a dense value that is no finite number.
        """
        sparse, dense = list(sparse), list(dense)
        _require(columns, [*sparse, *dense], source)
        ranges = {}
        for name in dense:
            numbers = _dense_numbers(name, columns[name], source, 0)
            if not len(numbers):
                raise BadDataError(f"{_at(source)}there is no row to learn the range of '{name}' from.")
            ranges[name] = (float(numbers.min()), float(numbers.max()))
        return cls({name: _vocabulary_of(columns[name]) for name in sparse}, ranges, [*sparse, *dense])

    @classmethod
    def for_ids(cls, vocabs: Mapping[str, int], dense: Iterable[str]) -> Encoder:
        """The encoder of data that holds ids (0 to vocab - 1) and scaled numbers already.

        Args:
            vocabs: sparse feature -> how many ids it has.
            dense: names of the dense features, which are left as they are.

        Returns:
            An encoder that changes nothing but ids out of range.
        """
        ranges = dict.fromkeys(dense, (0.0, 1.0))
        return cls({name: _Range(size) for name, size in vocabs.items()}, ranges, [*vocabs, *ranges])

    @property
    def features(self) -> tuple[FeatureSpec, ...]:
        """The features, in order."""
        return tuple(
            FeatureSpec(name, "sparse", max(len(self._sparse[name]), 1))
            if name in self._sparse
            else FeatureSpec(name, "dense")
            for name in self._order
        )

    def transform(self, columns: Mapping[str, Any], source: str = "", first_row: int = 0) -> dict[str, np.ndarray]:
        """Encode rows.

        Args:
            columns: name -> raw column [N], texts or numbers; further columns are ignored.
            source: where the rows come from, for errors.
            first_row: number of the first row, for errors.

        Returns:
            dict name -> ids (int64) or numbers (float32), [N] each, in the order of the features.

        Raises:
            BadDataError: for a missing column, or a dense value that is no finite number.
        """
        _require(columns, self._order, source)
        encoded = {}
        for name in self._order:
            if name in self._sparse:
                encoded[name] = self._sparse[name].ids(columns[name])
                continue
            numbers = _dense_numbers(name, columns[name], source, first_row)
            low, high = self._dense[name]
            # A constant column tells nothing: 0, and no division by 0.
            encoded[name] = ((numbers - low) / (high - low) if high > low else 0.0 * numbers).astype(np.float32)
        return encoded

    def to_dict(self) -> dict[str, Any]:
        """Plain lists, dicts, strings and numbers, for JSON."""
        return {
            "format": _FORMAT,
            "order": list(self._order),
            "sparse": {name: values.to_dict() for name, values in self._sparse.items()},
            "dense": {name: list(limits) for name, limits in self._dense.items()},
        }

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> Encoder:
        """The encoder that ``to_dict`` gave."""
        if fields.get("format") != _FORMAT:
            raise ConfigError(f"this encoder has format {fields.get('format')!r}, and this version reads {_FORMAT}.")
        sparse: dict[str, _Vocabulary] = {}
        for name, values in fields["sparse"].items():
            if values["type"] == "range":
                sparse[name] = _Range(int(values["size"]))
            elif values["type"] == "text":
                sparse[name] = _Texts(tuple(values["values"]))
            else:
                sparse[name] = _Numbers(np.array(values["values"], dtype=np.dtype(values["type"])))
        return cls(sparse, {name: (low, high) for name, (low, high) in fields["dense"].items()}, fields["order"])

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the encoder as JSON; ``load`` gives exactly the same one back."""
        Path(path).write_text(json.dumps(self.to_dict(), ensure_ascii=False), encoding="utf-8")

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Encoder:
        """Read what ``save`` wrote.

        Raises:
            BadDataError: when the file is missing or damaged.
        """
        try:
            return cls.from_dict(json.loads(Path(path).read_text(encoding="utf-8")))
        except OSError as error:
            raise BadDataError(f"{path}: cannot be read ({error.strerror}); it is written by training.") from error
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            if isinstance(error, ConfigError):
                raise
            raise BadDataError(f"{path}: is no encoder ({error}); train again, or copy the file again.") from error


def _vocabulary_of(column: Any) -> _Vocabulary:
    """The distinct values of a raw column, sorted: as numbers if all are numbers, else as texts."""
    if isinstance(column, np.ndarray) and column.dtype.kind in "iufb":
        if column.dtype.kind == "f":
            return _Numbers(np.unique(column[np.isfinite(column)].astype(np.float64)))
        return _Numbers(np.unique(column.astype(np.int64)))
    values = [value for value in dict.fromkeys(_listed(column)) if not _is_missing(value)]
    if values and not any(isinstance(value, str) for value in values):
        return _Numbers(np.unique(np.array(values)))
    return _Texts(tuple(sorted({text for text in _as_texts(values) if text is not None})))


def _as_texts(column: Any) -> Sequence[str | None]:
    """Texts as they are; numbers as one would write them, so that 3, 3.0 and "3" are one value; None where missing."""
    values = _listed(column)
    if {str}.issuperset(map(type, values)):
        return values
    return [value if isinstance(value, str) else _as_text(value) for value in values]


def _as_text(value: Any) -> str | None:
    if _is_missing(value):
        return None
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    return str(value)


def _as_numbers(column: Any) -> tuple[np.ndarray, np.ndarray]:
    """(numbers [N], known [N]): int64 where all are whole, else float64; what is no number is not known."""
    if isinstance(column, np.ndarray) and column.dtype.kind in "iub":
        return column.astype(np.int64, copy=False), np.ones(len(column), np.bool_)
    if isinstance(column, np.ndarray) and column.dtype.kind == "f":
        return np.nan_to_num(column.astype(np.float64)), np.isfinite(column)
    values = _listed(column)
    if {int, str}.issuperset(map(type, values)):
        try:
            return np.fromiter(map(int, values), np.int64, len(values)), np.ones(len(values), np.bool_)
        except (ValueError, OverflowError):
            pass  # some text is no whole number of 64 bits: look at each below
    numbers = np.array([_as_float(value) for value in values], dtype=np.float64)
    return np.nan_to_num(numbers), np.isfinite(numbers)


def _dense_numbers(name: str, column: Any, source: str, first_row: int) -> np.ndarray:
    """A dense column as float64 [N], or the error that names the first row that is no finite number."""
    if isinstance(column, np.ndarray) and column.dtype.kind in "iufb":
        numbers = column.astype(np.float64)
    else:
        column = _listed(column)
        numbers = np.array([_as_float(value) for value in column], dtype=np.float64)
    bad = ~np.isfinite(numbers)
    if bad.any():
        row = int(bad.argmax())
        value = column[row]
        value = value.item() if isinstance(value, np.generic) else value
        where = f"in row {first_row + row}"
        empty = _is_missing(value) or value == ""
        what = f"no value {where}" if empty else f"{value!r} {where}, which is no finite number"
        raise BadDataError(f"{_at(source)}feature '{name}' has {what}; write a number there, or drop the row.")
    return numbers


def _as_float(value: Any) -> float:
    try:
        return float(value)
    except (TypeError, ValueError):
        return float("nan")


def _is_missing(value: Any) -> bool:
    return value is None or value != value or type(value).__name__ == "NAType"


def _listed(column: Any) -> Sequence[Any]:
    return column.tolist() if hasattr(column, "tolist") else column


def _require(columns: Mapping[str, Any], names: Sequence[str], source: str) -> None:
    missing = [name for name in names if name not in columns]
    if missing:
        shown = ", ".join(f"'{name}'" for name in missing[:5]) + (" and others" if len(missing) > 5 else "")
        has = ", ".join(list(columns)[:10]) + (" and others" if len(columns) > 10 else "")
        raise BadDataError(f"{_at(source)}column {shown} is missing; the data has {has or 'no columns'}.")


def _at(source: str) -> str:
    return f"{source}: " if source else ""
