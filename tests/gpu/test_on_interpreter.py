"""The kernels' numbers where there is no GPU: kernels/ in processes of their own, on Triton's interpreter."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed: 'fastmtl[gpu]'"),
    pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here: tests/gpu/kernels runs on it itself"),
]
FILES = sorted((Path(__file__).parent / "kernels").glob("test_triton_*.py"))


@pytest.fixture(scope="module")
def runs():
    """All files at once: each takes about a minute, and the interpreter uses one core."""
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": ""}
    command = [sys.executable, "-m", "pytest", "-q", "--color=no", "-p", "no:cacheprovider"]
    processes = {
        file: subprocess.Popen(
            [*command, str(file)], env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        for file in FILES
    }
    yield processes
    for process in processes.values():
        process.kill()


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_on_the_interpreter(file, runs):
    output = runs[file].communicate()[0]
    print(output)
    assert runs[file].returncode == 0, output[-6000:]
    passed = re.search(r"(\d+) passed", output)
    assert passed, output[-2000:]
    least = {"layers": 40, "lookups": 30, "optimizer": 32, "inference": 40, "losses": 18}
    assert int(passed[1]) >= least.get(file.stem.removeprefix("test_triton_"), 3)
