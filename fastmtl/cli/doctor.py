"""``fastmtl doctor``: what runs on this machine, and why the rest does not."""

from __future__ import annotations

import argparse
import importlib.util
import os
import platform
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from .. import __version__, backend
from ..data.census import find_census
from .run_folder import to_json
from .setup import backends_of, listed, why_no_gpu

#: extra -> (the modules it brings, what for). A test compares it with pyproject.toml.
EXTRAS: dict[str, tuple[tuple[str, ...], str]] = {
    "parquet": (("pyarrow",), "reading and writing Parquet, faster CSV"),
    "gpu": (("triton",), "kernels for the GPU"),
    "plot": (("matplotlib",), "curves.png"),
    "onnx": (("onnx", "onnxruntime", "onnxscript"), "export_onnx"),
    "visualization": (("torchview", "graphviz"), "drawings of a model"),
    "wandb": (("wandb",), "WandbLogger"),
    "swanlab": (("swanlab",), "SwanLabLogger"),
    "tensorboardx": (("tensorboardX",), "TensorBoardXLogger"),
    "report": (("rich",), "tables on a terminal"),
}
_VERSIONS = ("torch", "numpy", "scikit-learn", "safetensors", "tqdm", "PyYAML")
_VARIABLES = ("FASTMTL_BACKEND", "FASTMTL_DATA", "OMP_NUM_THREADS", "OMP_WAIT_POLICY", "NO_COLOR")


def run(args: argparse.Namespace) -> None:
    """Examine the machine; the report goes to stdout."""
    findings = examine()
    if args.json:
        print(to_json(findings))
        return
    gpus = ", ".join(findings["gpu"]["names"])
    facts = {
        "versions": ", ".join(f"{name} {version}" for name, version in findings["versions"].items()),
        "system": findings["system"],
        "cpu": f"{findings['cpu']['model']}, {findings['cpu']['cores']} cores, {findings['cpu']['capability']}",
        "threads": str(findings["cpu"]["threads"]),
        "gpu": f"{gpus} ({listed(findings['gpu']['backends'])})" if gpus else f"none: {findings['gpu']['why_none']}",
        "census": ", ".join(findings["data"]["census"]) or "not found; 'fastmtl train census' says where to put it",
        "environment": ", ".join(f"{name}={value}" for name, value in findings["environment"].items()) or "nothing set",
    }
    width = max(map(len, facts))
    for name, value in facts.items():
        print(f"{name:{width}}  {value}")
    print()
    rows = [[op, found["runs"], _reasons(found["others"])] for op, found in findings["backends"].items()]
    _print_texts(["op", "runs on", "others"], rows)
    print()
    extras = findings["extras"]
    rows = [
        [name, "yes" if not found["missing"] else f"no {', '.join(found['missing'])}", found["purpose"]]
        for name, found in extras.items()
    ]
    _print_texts(["extra", "installed", "for"], rows)


def examine() -> dict[str, Any]:
    """What the report says, as plain data."""
    cuda = torch.cuda.is_available()
    return {
        "versions": {"fastmtl": __version__, "python": platform.python_version()}
        | {name: _version(name) for name in _VERSIONS},
        "system": platform.platform(),
        "cpu": {
            "model": _cpu_model(),
            "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
            "capability": torch.backends.cpu.get_cpu_capability(),
            "threads": torch.get_num_threads(),
        },
        "gpu": {
            "names": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] if cuda else [],
            "why_none": None if cuda else why_no_gpu(),
            "backends": backends_of(torch.device("cuda")) if cuda else {},
        },
        "backends": {row.op: {"runs": row.runs, "others": row.others} for row in backend.report()},
        "extras": {
            name: {"missing": [m for m in modules if importlib.util.find_spec(m) is None], "purpose": purpose}
            for name, (modules, purpose) in EXTRAS.items()
        },
        "data": {"census": [str(file) for file in find_census()]},
        "environment": {name: os.environ[name] for name in _VARIABLES if name in os.environ},
    }


def _print_texts(headings: list[str], rows: list[list[str]]) -> None:
    """A table of texts, all to the left."""
    widths = [max(map(len, column)) for column in zip(headings, *rows, strict=True)]
    for row in (headings, *rows):
        print("  ".join(f"{cell:{width}}" for cell, width in zip(row, widths, strict=True)).rstrip())


def _reasons(others: dict[str, str]) -> str:
    return "; ".join(f"not {name}: {why}" for name, why in others.items())


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "missing"


def _cpu_model() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
