"""Exact Adam with decay over ali-ccp's tables against torch's fused sweep: bench/optimizer.py, in its own process."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from fastmtl import backend

ROOT = Path(__file__).parents[1]


def test_optimizer(benchmark, report):
    if "native" not in backend.available():
        pytest.skip("the exact optimizer's kernels are native: " + str(backend.report()[0].others.get("native")))

    def run():
        words = [sys.executable, "-m", "bench.optimizer", "--steps", "40", "--json"]
        done = subprocess.run(words, capture_output=True, text=True, cwd=ROOT)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    found = benchmark.pedantic(run, rounds=1, iterations=1)
    lines = [f"{key:24} {value:.3g}" for key, value in found.items()]
    report.add("exact Adam with decay, ali-ccp's tables, B=4096 (fused: torch's)", lines, kind="optimizer", **found)
    benchmark.extra_info.update(found)
