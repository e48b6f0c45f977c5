"""The library itself: its schemas tell the truth, bad calls are refused, each build of the kernels works."""

import os
import subprocess
import sys

import pytest
import torch
from torch.library import opcheck

from fastmtl.backends import native
from fastmtl.spec import ExpertGateSpec, Gate

from .layers import new_params, random_case
from .lookups import random_lookup


def test_schemas_name_every_mutation(base_seed):
    lookup = random_lookup(base_seed, batch=40)
    plan = native.bag_plan(lookup.spec, lookup.columns)
    width = lookup.spec.width(lookup.columns)
    ops = torch.ops.fastmtl
    opcheck(
        ops.embedding_bag_fwd.default, (lookup.weights, lookup.ids, lookup.dense, plan, width), test_utils="test_schema"
    )
    shapes = [n for w in lookup.weights for n in w.shape]
    opcheck(ops.embedding_bag_bwd.default, (lookup.grad, lookup.ids, plan, shapes), test_utils="test_schema")
    spec = ExpertGateSpec(5, (0, 0), (8,), gates=(Gate(0, (0, 1)),))
    case = random_case(base_seed, spec, 40)
    params, plan = case.params, native.layer_plan(spec)
    args = (case.x, params.learned(), params.running(), plan, True, 0.0, 0)
    opcheck(ops.expert_gate_fwd.default, args, test_utils="test_schema")
    _, *saved = ops.expert_gate_fwd.default(*args)
    args = (case.grad, case.x, params.learned(), saved, plan, True, 0.0, 0, 5)
    opcheck(ops.expert_gate_bwd.default, args, test_utils="test_schema")


def test_a_plan_that_does_not_fit_is_refused():
    """Plans come from our own code, but a wrong one must raise and never read out of bounds."""
    weights, ids = [torch.zeros(10, 4)], torch.zeros(3, 1, dtype=torch.int64)
    good = [0, 0, 10, 4, 0, 0, 1, 0, 0, 0, 0, -2]
    torch.ops.fastmtl.embedding_bag_fwd.default(weights, ids, None, torch.tensor([good]), 4)
    for field, value in ((0, 1), (0, -1), (1, 1), (1, -1), (2, 11), (3, 5), (5, 1), (6, 2), (7, 1), (11, 10)):
        plan = torch.tensor([good])
        plan[0, field] = value
        with pytest.raises(RuntimeError):
            torch.ops.fastmtl.embedding_bag_fwd.default(weights, ids, None, plan, 4)
    spec = ExpertGateSpec(5, (0, 0), (8,), gates=(Gate(0, (0, 1)),))
    params = new_params(spec, torch.Generator().manual_seed(0))
    plan = native.layer_plan(spec)
    for i in range(len(plan)):
        for value in (-1, 3, 1000):
            wrong = plan.clone()
            wrong[i] = value
            if i in (4, 6) or torch.equal(wrong, plan):  # the activation may be another, a bool anything
                continue
            with pytest.raises(RuntimeError):
                torch.ops.fastmtl.expert_gate_fwd.default(
                    torch.zeros(1, 4, 5), params.learned(), params.running(), wrong, True, 0.0, 0
                )


def test_unsupported_tensors_are_named():
    assert "float64" in native.unsupported("expert_gate", torch.zeros(1, dtype=torch.float64))
    assert "meta" in native.unsupported("expert_gate", torch.zeros(1, device="meta"))
    assert native.unsupported("expert_gate", torch.zeros(1)) is None


@pytest.mark.parametrize("isa", ["baseline", "avx2", "avx512"])
def test_each_build_of_the_kernels(isa):
    """Random layers on each build but the one that runs anyway; one that this processor lacks falls back."""
    if isa == torch.ops.fastmtl.isa.default():
        pytest.skip("every other test runs on it")
    here = os.path.dirname(__file__)
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", f"{here}/test_expert_gate.py"]
    environment = {**os.environ, "FASTMTL_ISA": isa}
    done = subprocess.run([*command, "-k", "random or activation"], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]


def test_a_library_that_does_not_load_gives_the_reason(tmp_path):
    (tmp_path / "_native.so").write_bytes(b"not a library")
    code = (
        "import importlib.util, fastmtl.backends as b, sys\n"
        "found = importlib.util.find_spec\n"
        "class Spec: origin = sys.argv[1]\n"
        "importlib.util.find_spec = lambda name: Spec if name == 'fastmtl._native' else found(name)\n"
        "from fastmtl.backends import native\n"
        "print(native.unavailable())"
    )
    path = str(tmp_path / "_native.so")
    done = subprocess.run([sys.executable, "-c", code, path], capture_output=True, text=True, check=True)
    assert path in done.stdout
    assert torch.__version__ in done.stdout
