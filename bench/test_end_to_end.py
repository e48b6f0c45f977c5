"""From rows to a validated model, each package with its own loader and trainer: bench/end_to_end.py in its process."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
#: A loader that takes row by row is slow: no more of them than a figure needs.
ROWS = {"census": 40_000, "ali-ccp": 24_576, "aliexpress": 20_480}
CASES = [("mmoe", "census"), ("mmoe", "ali-ccp"), ("mmoe", "aliexpress"), ("ple", "ali-ccp")]


@pytest.mark.parametrize(("model", "shape"), CASES, ids=["-".join(case) for case in CASES])
def test_end_to_end(model, shape, benchmark, report, request):
    rounds = min(request.config.getoption("--rounds"), 3)

    def run():
        words = ["--model", model, "--shape", shape, "--rows", str(ROWS[shape]), "--rounds", str(rounds)]
        command = [sys.executable, "-m", "bench.end_to_end", *words, "--amp", "bf16", "--json"]
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    found = benchmark.pedantic(run, rounds=1, iterations=1)
    lines = [f"{'':34} {'samples/s':>11} {'ms a batch':>11} {'GFLOP/s':>8} {'ratio':>6}"]
    lines += [
        f"{one['contender']:34} {one['samples_per_second']:>11,.0f} {one['us_per_batch'] / 1e3:>11.2f} "
        f"{one['gflops']:>8.1f} {one['ratio']:>6.2f}"
        for one in found["contenders"]
    ]
    rows = found["rows"]
    title = f"end to end, {model} {shape}, {rows['train']:,} + {rows['valid']:,} {rows['note']}"
    report.add(title, lines, kind="end to end", **found)
    benchmark.extra_info.update({one["contender"]: one["samples_per_second"] for one in found["contenders"]})
