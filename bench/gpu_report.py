"""What bench.gpu found, as JSON and as a page."""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
import subprocess
import time
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from bench import gpu_peer, gpu_work

#: The columns of the tables.
STEPS = (
    "mode", "shape", "model", "batch", "precision", "contender", "tables", "us", "samples_per_second", "tflops",
    "of_limit", "floor_us", "over_floor", "start_ms", "after_start",
)  # fmt: skip
CALLS = ("shape", "batch", "precision", "call", "us", "gbytes_per_second", "of_limit", "how")
KERNELS = ("shape", "model", "batch", "precision", "call", "us", "gbytes_per_second", "tflops", "of_limit")


def head(device: torch.device) -> dict[str, Any]:
    """Where and with what."""
    on_gpu = device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name() if on_gpu else "dry run",
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "commit": _output("git", "rev-parse", "--short", "HEAD"),
        "driver": _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        "versions": {
            "torch": torch.__version__, "triton": _version("triton"), "cuda": str(torch.version.cuda),
            "nvcc": (re.findall(r"release (\S+),", _output("nvcc", "--version")) or ["none"])[0],
            "python": platform.python_version(),
        },
        "load": f"{os.getloadavg()[0]:.1f} on {os.cpu_count()} CPUs",
        "peer": f"torch-rechub {_version('torch-rechub')}" if gpu_peer.is_here() else "a plain model in our own words",
    }  # fmt: skip


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def _output(*command: str) -> str:
    if shutil.which(command[0]) is None:
        return f"no {command[0]}"
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent)
    return done.stdout.strip() or "unknown"


def number(value: Any) -> str:
    """A figure with as many digits as it is worth."""
    if not isinstance(value, float):
        return str(value)
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def table(rows: Sequence[dict[str, Any]], columns: Sequence[str]) -> list[str]:
    """Rows as Markdown."""
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    return lines + ["| " + " | ".join(number(row.get(column, "")) for column in columns) + " |" for row in rows]


def targets(found: dict[str, Any]) -> list[str]:
    """A line for each aim: wanted, measured, met or missed; on another GPU than an H200 the aims are not its own."""
    peer = "torch-rechub" if found["peer"].startswith("torch-rechub") else "peer"
    speeds = {
        (row["mode"], row["model"], row["batch"], row["precision"], row["contender"]): row["samples_per_second"]
        for row in found["steps"]
        if row["shape"] == "ali-ccp"
    }
    lines = []
    for target in gpu_work.TARGETS:
        mine = max((speeds.get((*target.key, name), 0.0) for name in gpu_work.OURS), default=0.0)
        unit = 1e6
        if target.base is not None:
            name, precision = target.base
            unit = speeds.get((*target.key[:3], precision, name.format(peer=peer)), 0.0)
        lines.append(_line(target.what.replace("the peer", peer), target.wanted, mine / unit if unit else 0.0))
    backward = [
        row["of_limit"]
        for row in found["calls"]
        if row["shape"] == "ali-ccp" and re.match(r"embedding_bag backward \+ Adam, \w+$", row["call"])
    ]
    what = "embedding backward + Adam, D=16, power-law ids, of the copy's bandwidth"
    return [*lines, _line(what, gpu_work.BACKWARD_TARGET, max(backward, default=0.0))]


def _line(what: str, wanted: float, measured: float) -> str:
    verdict = "NOT MEASURED" if not measured else "met" if measured >= wanted else "MISSED"
    return f"{what}: wanted {number(float(wanted))}, measured {number(measured) if measured else '-'}: {verdict}"


def page(found: dict[str, Any]) -> str:
    """The whole report."""
    limits = found["limits"]
    reached = ", ".join(f"{name} {limits[name] / 1e12:.3g} TFLOP/s" for name in ("ieee", "tf32", "bf16"))
    versions = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
    lines = [
        f"# {found['device']}, {found['date']}",
        "",
        f"Driver {found['driver']}, {versions}; commit {found['commit']}; load {found['load']}. Peer: {found['peer']}.",
        "",
        f"Limits measured in this run: copy {limits['copy'] / 1e9:.4g} GB/s, {reached}.",
        "",
        "Adam with weight decay; tables: dense, or exact by rows (the dense numbers at the cost of the rows that are",
        "looked up). Medians of alternated rounds; trainer: MTLTrainer, an epoch after a first one, call to losses;",
        "start_ms: its part before the first step; after_start: samples a second of the rest. of_limit: of the",
        "rate of products in this precision, or for kernels of the nearer of the two limits. Floors and formulas:",
        "bench/gpu_work.py.",
        "",
        "## Targets (of one H200)",
        "",
        *(f"- {line}" for line in targets(found)),
        "",
        "## Training steps and predictions",
        "",
        *table(found["steps"], STEPS),
        "",
        "## Calls of the lookup, caches cold",
        "",
        *table(found["calls"], CALLS),
        "",
        "## Kernels of a training step, each alone, caches cold",
        "",
        *table(found["kernels"], KERNELS),
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
    """The table that is read first: samples a second of each contender, how many times the peer's, and the targets."""
    lines = []
    cases: dict[tuple, dict[str, float]] = {}
    for row in found["steps"]:
        case = (row["mode"], row["shape"], row["model"], row["batch"], row["precision"])
        cases.setdefault(case, {})[row["contender"]] = row["samples_per_second"]
    for case, speeds in cases.items():
        peer = speeds.get("torch-rechub") or speeds.get("peer")
        parts = [
            f"{name} {speed / 1e6:.3g} M/s" + (f" ({speed / peer:.2f}x)" if peer else "")
            for name, speed in speeds.items()
        ]
        lines.append(" ".join(map(str, case)) + ": " + ", ".join(parts))
    return "\n".join([*lines, "", *targets(found)])
