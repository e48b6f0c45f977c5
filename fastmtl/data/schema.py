"""What is known of a data set's columns: enough to build a model from column names, and to say what is wrong."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from ..errors import BadDataError


@dataclass(frozen=True)
class ColumnInfo:
    """One column.

    Args:
        name: its name.
        kind: "int" [N], "float" [N], "sequence" (integers [N, L]) or "vector" (floats [N, L]).
        min_id: the least integer of an "int" or "sequence" column (-1 where sequences are padded), else None.
        max_id: the greatest one, else None.
        length: L of a "sequence" or "vector", else None.
        bad_row: the first row that holds NaN or an infinity, None when there is none.
    """

    name: str
    kind: str
    min_id: int | None = None
    max_id: int | None = None
    length: int | None = None
    bad_row: int | None = None

    @property
    def vocab_size(self) -> int | None:
        """Rows a table needs for the ids of this column; None for floats."""
        return None if self.max_id is None else max(self.max_id, 0) + 1


@dataclass(frozen=True)
class Schema:
    """The columns and tasks of a data set.

    Args:
        columns: what is known of each column, in the user's order.
        task_names: names of the tasks; empty where the data has no labels.
    """

    columns: tuple[ColumnInfo, ...]
    task_names: tuple[str, ...] = ()

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the columns, in order."""
        return tuple(column.name for column in self.columns)

    def __contains__(self, name: str) -> bool:
        return any(column.name == name for column in self.columns)

    def __getitem__(self, name: str) -> ColumnInfo:
        for column in self.columns:
            if column.name == name:
                return column
        raise BadDataError(f"the data has no column '{name}'; it has {', '.join(self.names)}.")

    def check(self, names: Iterable[str]) -> None:
        """Refuse data that a model with these features cannot use.

        Args:
            names: the columns that the model reads.

        Raises:
            BadDataError: when one is missing, or holds NaN or an infinity; the message names column and row.
        """
        for name in names:
            column = self[name]
            if column.bad_row is not None:
                raise BadDataError(
                    f"feature '{name}' holds NaN or an infinity, first in row {column.bad_row}; "
                    "fill or drop such rows before training."
                )

    def merge(self, other: Schema) -> Schema:
        """The schema of both data sets together: the wider range of ids for each column that both have.

        Args:
            other: another data set's schema, for example the validation rows'.

        Returns:
            This schema's columns and tasks, with ranges that cover ``other`` too.
        """
        theirs = {column.name: column for column in other.columns}
        return Schema(tuple(_wider(c, theirs.get(c.name)) for c in self.columns), self.task_names)

    def with_vocabs(self, vocabs: Mapping[str, int | None]) -> Schema:
        """The schema with vocabularies that are known from elsewhere, for example from an encoder.

        Args:
            vocabs: column -> rows of its table; None leaves the column as it is.

        Returns:
            This schema, no vocabulary smaller than before.
        """
        known = {name: size for name, size in vocabs.items() if size is not None}
        return Schema(
            tuple(
                c if c.max_id is None or c.name not in known else replace(c, max_id=max(c.max_id, known[c.name] - 1))
                for c in self.columns
            ),
            self.task_names,
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain lists, dicts, strings and numbers, for JSON."""
        return {"columns": [asdict(column) for column in self.columns], "task_names": list(self.task_names)}

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> Schema:
        """The schema that ``to_dict`` gave."""
        return cls(tuple(ColumnInfo(**column) for column in fields["columns"]), tuple(fields["task_names"]))

    @classmethod
    def from_columns(cls, columns: Mapping[str, np.ndarray], task_names: Iterable[str] = ()) -> Schema:
        """Look the columns over once.

        Args:
            columns: name -> array [N] or [N, L] of numbers.
            task_names: names of the tasks.

        Returns:
            Their schema.
        """
        return cls(tuple(_describe(name, column) for name, column in columns.items()), tuple(task_names))


def validate_labels(y: np.ndarray, task_types: Iterable[str], task_names: Iterable[str], first_row: int = 0) -> None:
    """Refuse labels that a loss cannot take; NaN means "unknown" and is let through.

    Args:
        y: labels [N, T].
        task_types: "classification" (alias "binary") or "regression" for each task.
        task_names: a name for each task.
        first_row: what to add to the row in the message, for data that comes in pieces.

    Raises:
        BadDataError: for another number of tasks, for a classification label outside [0, 1], or for an infinite one;
            the message names task, row and value.
    """
    y = np.asarray(y)
    y = y[:, None] if y.ndim == 1 else y
    types, names = list(task_types), list(task_names)
    if y.shape[1] != len(types):
        raise BadDataError(
            f"the labels have {y.shape[1]} columns ({', '.join(names)}) and the model {len(types)} tasks; "
            "give one label column per task."
        )
    for column, kind, name in zip(y.T, types, names, strict=True):
        if kind == "regression":
            bad, rule = np.isinf(column), "a finite number"
        else:
            bad, rule = (column < 0) | (column > 1), "between 0 and 1"
        if bad.any():
            row = int(bad.argmax())
            raise BadDataError(
                f"label '{name}' is {column[row]} in row {first_row + row}; a {kind} label is {rule}, "
                "or NaN where it is unknown."
            )


def _describe(name: str, column: np.ndarray) -> ColumnInfo:
    wide = column.ndim == 2
    length = column.shape[1] if wide else None
    if column.dtype.kind == "f":
        # A sum is one pass without a temporary; it is finite unless a value is not (or it overflows: then look closer).
        with np.errstate(over="ignore", invalid="ignore"):
            suspicious = not np.isfinite(column.sum())
        bad_row = None
        if suspicious:
            bad = ~np.isfinite(column)
            bad = bad.any(axis=1) if wide else bad
            bad_row = int(bad.argmax()) if bad.any() else None
        return ColumnInfo(name, "vector" if wide else "float", length=length, bad_row=bad_row)
    low, high = (int(column.min()), int(column.max())) if column.size else (0, 0)
    return ColumnInfo(name, "sequence" if wide else "int", low, high, length)


def _wider(mine: ColumnInfo, theirs: ColumnInfo | None) -> ColumnInfo:
    if theirs is None or mine.max_id is None or theirs.max_id is None:
        return mine
    low, high = min(mine.min_id or 0, theirs.min_id or 0), max(mine.max_id, theirs.max_id)
    return replace(mine, min_id=low, max_id=high)
