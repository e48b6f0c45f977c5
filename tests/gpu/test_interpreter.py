"""Triton's interpreter, quickened for the tests (tests/interpreter.py), computes what it computes as it comes."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="triton is not installed: 'fastmtl[gpu]'"
)
#: Layers in fp32 and bf16, forward and backward, of the kernels' own random cases; prints the bits of all results.
WORDS = """
import hashlib, sys
import interpreter
if sys.argv[1] == "quickened":
    interpreter.quicken()
import torch
from triton_cases import out_shape, random_layer
from fastmtl.backends import triton as backend
from fastmtl.backends.triton import configs
configs.EXPERT_GATE = configs.ExpertGateConfig(cap=16)
found = []
for case, dtype in enumerate((torch.float32, torch.bfloat16)):
    layer = random_layer(int(sys.argv[2]) + case, kind="gates", batch=19, dropout=0.2, depth=2).cast(torch.float32)
    torch.manual_seed(case)
    out, saved = backend.expert_gate_fwd(layer.x.to(dtype), layer.params, layer.spec, True)
    grad = torch.randn(out_shape(layer)).to(out.dtype)
    dx, grads = backend.expert_gate_bwd(
        grad, layer.x.to(dtype), layer.params, layer.spec, True, list(saved), True
    )
    found += [out, dx, *grads, *layer.params.running()]
print(hashlib.sha256(b"".join(t.float().numpy().tobytes() for t in found)).hexdigest(), len(found))
"""


def test_it_gives_the_same_bits(seed):
    paths = os.pathsep.join(str(ROOT / "tests" / folder) for folder in ("", "gpu/kernels"))
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": paths}
    told = []
    for how in ("as it comes", "quickened"):
        command = [sys.executable, "-c", WORDS, how, str(seed)]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)
        assert done.returncode == 0, done.stderr[-4000:]
        told.append(done.stdout)
    assert told[0] == told[1]
