"""Options, and the report: `python -m pytest bench`, tables at the end, everything as JSON with `--json FILE`."""

from __future__ import annotations

import os

# before torch is loaded: threads that wait by spinning spoil every figure on a machine with other work on it
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import json
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from bench.floors import Machine


def pytest_addoption(parser):
    """The benchmarks' own options."""
    group = parser.getgroup("fastmtl's benchmarks")
    group.addoption("--json", metavar="FILE", help="write all figures there")
    group.addoption("--rounds", type=int, default=7, help="rounds in which all contenders take turns (%(default)s)")
    group.addoption("--turn", type=float, default=0.25, help="seconds of a contender's turn (%(default)s)")
    group.addoption("--no-compile", action="store_true", help="leave out torch.compile's contenders (a minute each)")


class Report:
    """What the session found."""

    def __init__(self) -> None:
        self.sections: list[dict[str, Any]] = []
        self.machine: Machine | None = None

    def add(self, title: str, lines: list[str], **figures: Any) -> None:
        """A table and its figures."""
        self.sections.append({"title": title, "lines": lines, **figures})


_report = Report()


@pytest.fixture(scope="session")
def report() -> Report:
    """The session's report."""
    return _report


@pytest.fixture(scope="session")
def machine() -> Machine:
    """The machine's rates, measured once a session."""
    _report.machine = Machine.measured()
    return _report.machine


def _commit() -> str:
    words = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=10"]
    done = subprocess.run(words, capture_output=True, text=True)
    return done.stdout.strip() or "unknown"


def pytest_terminal_summary(terminalreporter, config):
    """Print the tables; write the JSON."""
    if not _report.sections:
        return
    head = {
        "commit": _commit(),
        "date": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
        "load": os.getloadavg()[0],
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "OMP_WAIT_POLICY": os.environ["OMP_WAIT_POLICY"],
    }
    write = terminalreporter.write_line
    terminalreporter.section("figures")
    write(", ".join(f"{key} {value}" for key, value in head.items()))
    if _report.machine is not None:
        write(str(_report.machine))
    for section in _report.sections:
        write("")
        write(section["title"])
        for line in section["lines"]:
            write(line)
    target = config.getoption("--json")
    if target:
        rates = None if _report.machine is None else vars(_report.machine)
        Path(target).write_text(json.dumps({**head, "machine": rates, "sections": _report.sections}, indent=1))
