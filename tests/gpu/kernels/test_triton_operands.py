"""Weights as the products read them: rounded once, gates behind the experts, zeros where nothing is."""

import numpy as np
import pytest
import torch

from fastmtl.backends.triton import configs
from fastmtl.backends.triton.layer_plan import layer_plan
from fastmtl.backends.triton.operands import operands
from fastmtl.backends.triton.precision import of_dtype
from fastmtl.spec import ExpertGateParams, ExpertGateSpec, Gate, GateParams


def random_layer(rng, n_inputs, with_gates):
    """Experts of one or more inputs, gates of each over some of them."""
    n_experts, dims = int(rng.integers(n_inputs, 7)), tuple(int(n) for n in rng.integers(1, 20, rng.integers(1, 4)))
    inputs = tuple(sorted([*range(n_inputs), *rng.integers(0, n_inputs, n_experts - n_inputs).tolist()]))
    gates = ()
    if with_gates:
        readers = sorted(rng.integers(0, n_inputs, rng.integers(1, 4)).tolist())
        members = [
            sorted(rng.choice(n_experts, rng.integers(1, n_experts + 1), replace=False).tolist()) for _ in readers
        ]
        gates = tuple(Gate(n, tuple(held)) for n, held in zip(readers, members, strict=True))
    return ExpertGateSpec(int(rng.integers(1, 30)), inputs, dims, gates=gates)


def random_params(rng, spec, device):
    def made(*shape):
        return torch.tensor(rng.standard_normal(shape), dtype=torch.float32, device=device)

    widths = (spec.in_features, *spec.dims)
    weight = tuple(made(spec.n_experts * out, wide) for wide, out in zip(widths, spec.dims, strict=False))
    columns = [tuple(made(spec.n_experts * out) for out in spec.dims) for _ in range(5)]
    gate = None
    if spec.gates:
        gate = GateParams(made(spec.gate_rows, spec.in_features), *(made(spec.gate_rows) for _ in range(5)))
    return ExpertGateParams(weight, *columns, (), None, None, gate)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("with_gates", [True, False])
@pytest.mark.parametrize("n_inputs", [1, 3])
def test_operands(n_inputs, with_gates, dtype, seed, device, monkeypatch):
    if device.type == "cpu":  # on the interpreter: blocks smaller than those of other tests, which have more launches
        monkeypatch.setattr(configs, "OPERANDS", configs.Elements(64, configs.OPERANDS.warps))
    rng = np.random.default_rng(seed)
    for _ in range(4):
        spec = random_layer(rng, n_inputs, with_gates)
        params, plan = random_params(rng, spec, device), layer_plan(spec, device)
        found = operands(params, plan, of_dtype(dtype))
        for layer, (weight, mine) in enumerate(zip(params.weight, found, strict=True)):
            wanted = weight.to(dtype)
            if params.gate is not None and not layer:
                wanted = torch.zeros(plan.pitch[0], weight.shape[1], dtype=dtype, device=device)
                wanted[: len(weight)] = weight.to(dtype)
                wanted[plan.gate_columns] = params.gate.weight.to(dtype)
            assert torch.equal(mine, wanted)
            assert mine.stride(0) * mine.element_size() % 16 == 0
            assert mine.stride(1) == 1 or mine.shape[1] == 1
