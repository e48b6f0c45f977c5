"""What bench.gpu found, as JSON and as a page."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

#: The columns of the two tables.
STEPS = ("shape", "model", "batch", "precision", "contender", "us", "samples_per_second", "tflops", "of_limit")
CALLS = ("shape", "batch", "precision", "call", "us", "gbytes_per_second", "of_limit")


def number(value: Any) -> str:
    """A figure with as many digits as it is worth."""
    if not isinstance(value, float):
        return str(value)
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def table(rows: Sequence[dict[str, Any]], columns: Sequence[str]) -> list[str]:
    """Rows as Markdown."""
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    return lines + ["| " + " | ".join(number(row.get(column, "")) for column in columns) + " |" for row in rows]


def page(found: dict[str, Any]) -> str:
    """The whole report."""
    limits = found["limits"]
    reached = ", ".join(f"{name} {limits[name] / 1e12:.3g} TFLOP/s" for name in ("ieee", "tf32", "bf16"))
    lines = [
        f"# {found['device']}, {found['date']}",
        "",
        f"torch {found['torch']}, commit {found['commit']}, driver and load: {found['machine']}.",
        f"Limits measured in this run: copy {limits['copy'] / 1e9:.4g} GB/s, {reached}.",
        "Adam with weight decay: triton and cuda move only the rows that are looked up (exact, the dense numbers), the",
        "others all rows. Medians of alternated rounds.",
        "",
        "## Training steps",
        "",
        *table(found["steps"], STEPS),
        "",
        "## Single calls",
        "",
        *table(found["calls"], CALLS),
    ]
    if found["left_out"]:
        lines += ["", "## Left out", "", *(f"- {what}" for what in found["left_out"])]
    return "\n".join(lines) + "\n"


def write(found: dict[str, Any], folder: Path) -> tuple[Path, Path]:
    """``<device>-<date>.json`` and ``.md`` in the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    stem = re.sub(r"[^a-z0-9]+", "-", f"{found['device']} {found['date']}".lower()).strip("-")
    data, text = folder / f"{stem}.json", folder / f"{stem}.md"
    data.write_text(json.dumps(found, indent=1) + "\n")
    text.write_text(page(found))
    return data, text


def short(found: dict[str, Any]) -> str:
    """The table that is read first: samples a second of each contender, and how many times the peer's."""
    lines = []
    cases: dict[tuple, dict[str, float]] = {}
    for row in found["steps"]:
        case = (row["shape"], row["model"], row["batch"], row["precision"])
        cases.setdefault(case, {})[row["contender"]] = row["samples_per_second"]
    for case, speeds in cases.items():
        peer = speeds.get("peer")
        parts = [
            f"{name} {speed / 1e6:.3g} M/s" + (f" ({speed / peer:.2f}x)" if peer else "")
            for name, speed in speeds.items()
        ]
        lines.append(" ".join(map(str, case)) + ": " + ", ".join(parts))
    return "\n".join(lines)
