"""The commands for a CUDA machine, as far as they go without one."""

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bench import gpu, gpu_models
from bench.shapes import ALI_CCP

ROOT = Path(__file__).parents[2]


def run(*command, **variables):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **variables}
    return subprocess.run([sys.executable, "-m", *command], cwd=ROOT, capture_output=True, text=True, env=environment)


def test_the_benchmark_runs_on_the_cpu_and_writes_its_report(tmp_path):
    done = run("bench.gpu", "--dry-run", "--no-compile", "--cases", "4", "--folder", str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    (data,) = tmp_path.glob("*.json")
    (page,) = tmp_path.glob("*.md")
    found = json.loads(data.read_text())
    assert found["left_out"] == []
    assert len(found["steps"]) == 4 * 4
    assert {row["contender"] for row in found["steps"]} == {"peer", "eager", "triton", "cuda"}
    assert all(row["us"] > 0 and row["samples_per_second"] > 0 for row in found["steps"])
    assert any("backward" in row["call"] for row in found["calls"])
    assert "## Single calls" in page.read_text()
    assert [line.split(": peer")[0] for line in done.stdout.splitlines()[-3:]] == [
        "ali-ccp mmoe 16 bf16",
        "ali-ccp ple 16 bf16",
        "ali-ccp mmoe 16 ieee",
    ]


def test_the_plan_has_every_shape_model_batch_and_precision():
    cases = gpu.plan(False)
    assert len({case[:4] for case in cases}) == len(cases) == 2 * 2 * 2 * 3
    assert gpu.plan(True)[0].contenders == tuple(gpu_models.CONTENDERS)


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed: 'fastmtl[gpu]'")
@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here")
def test_the_benchmark_takes_the_steps_of_tables_in_the_backward(tmp_path):
    """On the interpreter: triton's losses must agree with eager's, or it is left out."""
    more = ("--no-compile", "--cases", "1", "--folder", str(tmp_path))
    done = run("bench.gpu", "--dry-run", *more, TRITON_INTERPRET="1")
    assert done.returncode == 0, done.stdout + done.stderr
    (data,) = tmp_path.glob("*.json")
    found = json.loads(data.read_text())
    assert found["left_out"] == []
    assert "embedding_bag backward + Adam, triton" in {row["call"] for row in found["calls"]}


def test_the_benchmark_names_what_the_time_did_not_allow():
    done = run("bench.gpu", "--dry-run", "--seconds", "-1", "--no-compile")
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("the time was up") == 24


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here")
def test_without_a_gpu_the_commands_say_so():
    for command in ("bench.gpu", "bench.gpu_session"):
        done = run(command)
        assert done.returncode == 2
        assert "no GPU" in done.stderr


def test_the_session_stays_below_nine_minutes():
    done = run("bench.gpu_session", "--list")
    assert done.returncode == 0, done.stderr
    names = re.findall(r"^ *\d+ s  ([^:]+):", done.stdout, re.MULTILINE)
    assert names == ["install", "kernels on the device", "compute-sanitizer memcheck", "compute-sanitizer racecheck"]
    from bench.gpu_session import BENCH, BUDGET

    assert BENCH < BUDGET < 540


@pytest.mark.parametrize("kind", ["mmoe", "ple"])
def test_the_peer_has_the_models_parameters(kind):
    """As many as fastmtl's, layer by layer: the same structure in other words."""
    shape = gpu.tiny(ALI_CCP)
    peer = sum(p.numel() for p in gpu_models.Peer(shape, kind).parameters())
    mine = gpu_models.make_model(shape, kind)
    assert peer == sum(p.numel() for p in mine.parameters())


def test_the_flops_of_ple_are_those_of_its_layers():
    shape, flops = ALI_CCP, 0
    for level, width in enumerate((376, 128)):
        flops += 10 * (width * 256 + 256 * 128) + width * (2 * 6 + (10 if level == 0 else 0))
    flops += 2 * (128 * 64 + 64 * 32 + 32)
    assert gpu.training_flops(shape, "ple") == 6 * flops
    assert gpu.training_flops(shape, "mmoe") == shape.training_flops
