"""``curves.png``: how the loss and the validation score of each task went over the epochs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import require

_SCORE, _LOSS, _INK, _GRID = "#1f6fb2", "#c8553d", "#333333", "#e4e4e4"


def draw_curves(
    path: Path, epochs: Sequence[Mapping[str, Any]], task_names: Sequence[str], best_epoch: int | None, title: str
) -> None:
    """Draw a column of two panels a task: validation score above, training loss below.

    Args:
        path: the PNG file.
        epochs: the lines of metrics.jsonl.
        task_names: T names.
        best_epoch: marked in every panel; None marks nothing.
        title: above all.

    Raises:
        MissingExtraError: without matplotlib.
    """
    require("matplotlib", "plot", "Drawing curves.png")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(1.2 + 4.2 * len(task_names), 5.6), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(2, len(task_names), sharex=True, squeeze=False)
    at = [line["epoch"] for line in epochs]
    for column, name in enumerate(task_names):
        score = next(key for key in epochs[0] if key.startswith(f"valid/{name}/"))
        rows = ((panels[0][column], score, _SCORE), (panels[1][column], f"train/{name}/loss", _LOSS))
        for panel, key, colour in rows:
            values = [line[key] for line in epochs]
            panel.plot(at, values, color=colour, linewidth=2, marker="o", markersize=4)
            if best_epoch is not None:
                _mark(panel, at[best_epoch], values[best_epoch], colour)
            _dress(panel)
        panels[0][column].set_title(name, color=_INK, fontsize=12, fontweight="bold")
        panels[1][column].set_xlabel("epoch", color=_INK)
        panels[1][column].xaxis.get_major_locator().set_params(integer=True)
    panels[0][0].set_ylabel(f"validation {score.rpartition('/')[2].upper()}", color=_INK)
    panels[1][0].set_ylabel("training loss", color=_INK)
    figure.suptitle(title, color=_INK, fontsize=11)
    figure.savefig(path, dpi=150)


def _mark(panel: Any, epoch: int, value: float, colour: str) -> None:
    """A ring around the best epoch's point, with its value."""
    panel.axvline(epoch, color=_INK, linewidth=0.8, linestyle=":", zorder=0)
    panel.plot(
        [epoch], [value], "o", markersize=10, markerfacecolor="none", markeredgecolor=colour, markeredgewidth=1.6
    )
    panel.annotate(
        f"{value:.4f}", (epoch, value), xytext=(0, 9), textcoords="offset points", ha="center", fontsize=9, color=_INK
    )
    panel.margins(y=0.18)


def _dress(panel: Any) -> None:
    panel.grid(color=_GRID, linewidth=0.8)
    panel.set_axisbelow(True)
    for side in ("top", "right"):
        panel.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        panel.spines[side].set_color("#aaaaaa")
    panel.tick_params(colors=_INK, labelsize=9)
