"""`python -m bench.end_to_end`: it checks equality, times everybody, and its figures fit together."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from fastmtl import backend

ROOT = Path(__file__).parents[2]


def test_a_small_round_gives_figures_that_fit_together():
    pytest.importorskip("torch_rechub")
    words = ["--shape", "census", "--rows", "3000", "--rounds", "1", "--json"]
    done = subprocess.run([sys.executable, "-m", "bench.end_to_end", *words], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["rows"] == {"note": "made-up rows", "train": 3000, "valid": 1000}
    names = [f"fastmtl {name}" for name in ("eager", "native") if name in backend.available()]
    assert set(result["loss_distance"]) == {"torch-rechub", *names}
    assert max(result["loss_distance"].values()) <= 1e-4
    assert [figures["contender"] for figures in result["contenders"]] == ["torch-rechub", *names]
    assert result["contenders"][0]["ratio"] == 1
    for figures in result["contenders"]:
        assert figures["us_per_batch"] == pytest.approx(1024e6 / figures["samples_per_second"])
        assert figures["gflops"] == pytest.approx(figures["samples_per_second"] * 118_272 / 1e9)
