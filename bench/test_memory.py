"""Peak resident memory of a training process of each contender, in processes of their own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from bench.contenders import PEER, contenders

ROOT = Path(__file__).parents[1]


def peak(contender, shape, steps=5):
    """Bytes."""
    words = ["--contender", contender, "--shape", shape, "--steps", str(steps)]
    done = subprocess.run([sys.executable, "-m", "bench.memory", *words], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


@pytest.mark.parametrize("shape", ["ali-ccp"])
def test_memory(shape, benchmark, report):
    names = [one.name for one in contenders(compiled=False)[0]]
    found = benchmark.pedantic(lambda: {name: peak(name, shape) for name in names}, rounds=1, iterations=1)
    lines = [f"{'':34} {'peak MB':>9} {'of torch-rechub':>16}"]
    lines += [f"{name:34} {got / 1e6:>9,.0f} {got / found[PEER]:>16.2f}" for name, got in found.items()]
    report.add(f"peak memory of training, mmoe {shape}", lines, kind="memory", shape=shape, bytes=found)
    benchmark.extra_info.update(found)
