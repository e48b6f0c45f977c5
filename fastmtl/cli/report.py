"""What a command says: lines on stderr, tables, JSON on stdout."""

from __future__ import annotations

import importlib.util
import math
import sys
from collections.abc import Mapping, Sequence
from typing import Any, TextIO

from ..basic.tracking import BaseLogger

Scores = Mapping[str, Mapping[str, float]]


class Voice:
    """Says lines on stderr, or keeps quiet.

    Args:
        quiet: say nothing.
    """

    def __init__(self, quiet: bool = False) -> None:
        self.quiet = quiet

    def say(self, line: str) -> None:
        """One line."""
        if not self.quiet:
            print(line, file=sys.stderr, flush=True)

    def facts(self, facts: Mapping[str, str]) -> None:
        """Named facts, one a line, aligned."""
        width = max(map(len, facts), default=0)
        for name, value in facts.items():
            self.say(f"{name:{width}}  {value}")


class EpochLines(BaseLogger):
    """One line an epoch where the trainer's bar, which brings its own lines, is switched off."""

    def __init__(self, voice: Voice, task_names: Sequence[str]) -> None:
        self.voice, self.task_names = voice, list(task_names)

    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        tasks = ", ".join(
            f"{name} loss {metrics[f'train/task_{t}_loss']:.4f} score {metrics[f'val/task_{t}_score']:.4f}"
            for t, name in enumerate(self.task_names)
        )
        self.voice.say(f"epoch {step}: {tasks} ({metrics['samples_per_second']:,.0f} samples/s)")

    def log_hyperparams(self, params: Mapping[str, Any]) -> None:
        """Nothing: the start of the run said them."""

    def finish(self) -> None:
        """Nothing to close."""


def scores_table(
    scores: Mapping[str, Scores], best: Mapping[str, float] | None = None
) -> tuple[list[str], list[list[str]]]:
    """Scores of several splits as a table.

    Args:
        scores: split -> task -> metric -> value.
        best: task -> the best AUC possible on the test rows, where that is known.

    Returns:
        (headings, one row a task).
    """
    headings, tasks = ["task"], list(next(iter(scores.values())))
    rows = [[task] for task in tasks]
    for split, of_task in scores.items():
        for metric in dict.fromkeys(metric for values in of_task.values() for metric in values):
            headings.append(f"{split} {metric}")
            for task, row in zip(tasks, rows, strict=True):
                row.append(_number(of_task[task].get(metric)))
        if best and split == "test":
            headings.append("best auc possible")
            for task, row in zip(tasks, rows, strict=True):
                row.append(_number(best.get(task)))
    return headings, rows


def print_table(headings: Sequence[str], rows: Sequence[Sequence[str]], stream: TextIO) -> None:
    """A table: drawn by rich on a terminal where rich is installed, else plain text in aligned columns.

    The first column is text, the others are numbers.
    """
    if stream.isatty() and importlib.util.find_spec("rich"):
        from rich.console import Console
        from rich.table import Table

        table = Table(header_style="bold")
        for place, heading in enumerate(headings):
            table.add_column(heading, justify="right" if place else "left", style=None if place else "cyan")
        for row in rows:
            table.add_row(*row)
        Console(file=stream).print(table)
        return
    widths = [max(len(cell) for cell in column) for column in zip(headings, *rows, strict=True)]
    for row in (headings, *rows):
        cells = [
            f"{cell:>{width}}" if place else f"{cell:<{width}}"
            for place, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        print("  ".join(cells).rstrip(), file=stream)


def _number(value: float | None) -> str:
    if value is None:
        return ""
    return "undefined" if math.isnan(value) else f"{value:.4f}"
