"""The layer with its towers for Hopper (csrc/cuda/folded.cuh) on the CPU, by emulation/: its packed weights, the places
of operands in shared memory and registers, and who waits for whom, against float64 with the same roundings to bf16."""

import importlib.util

import numpy as np
import pytest
import torch
from emulated import COMPILER, emulator
from kernels.triton_cases import Layer, drawer, random_params

from fastmtl.spec import ExpertGateSpec, Gate

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed: 'fastmtl[gpu]'"),
    pytest.mark.skipif(COMPILER is None, reason="no C++ compiler is here"),
]


@pytest.fixture(scope="module")
def emulate(tmp_path_factory):
    """See :func:`emulated.emulator`."""
    return emulator(tmp_path_factory.mktemp("folded"), "emulate_folded.cpp")


def packed(rng, n_in, dims, tower_dims, gates, n_experts):
    """A layer and its towers as the triton backend packs them; an expert that no gate mixes gives NaN."""
    from fastmtl.backends.triton.packing import PackedLayer, PackedTowers

    spec = ExpertGateSpec(n_in, (0,) * n_experts, dims, "relu", 0.0, gates, False)
    towers = ExpertGateSpec(dims[1], tuple(range(len(gates))), tower_dims, "relu", 0.0, (), True)
    nothing = torch.empty(0)
    params, tower_params = (
        Layer(one, random_params(one, rng), nothing).cast(torch.float32).params for one in (spec, towers)
    )
    for e in set(range(n_experts)) - {e for gate in gates for e in gate.experts}:
        params.bias[1][e * dims[1] : (e + 1) * dims[1]] = torch.nan
    layer = PackedLayer(spec, params, None, torch.bfloat16)
    return layer, PackedTowers(towers, tower_params, layer.h2, None, torch.bfloat16)


def wanted(x, layer, towers):
    """Logits ``[B, G]`` in float64, rounded to bf16 where the kernel rounds."""

    def rounded(value):
        return value.relu().bfloat16().double()

    w = {name: value.double() for name, value in layer.arguments().items() if isinstance(value, torch.Tensor)}
    t = {name: value.double() for name, value in towers.tower_arguments().items() if isinstance(value, torch.Tensor)}
    n = x.shape[1]
    logits = x @ w["Wg_ptr"][0, :, :n].T + w["Bg_ptr"]
    first = rounded(x @ w["W1_ptr"][:, :, :n].mT + w["B1_ptr"][:, None])
    h = rounded(first @ w["W2_ptr"].mT + w["B2_ptr"][:, None])
    found = []
    for g, (gate, span) in enumerate(zip(layer.spec.gates, layer.spec.gate_spans, strict=True)):
        share = logits[:, slice(*span)].softmax(1)
        y = sum(share[:, [i]] * h[e] for i, e in enumerate(gate.experts))
        z = rounded(y.bfloat16().double() @ t["T1_ptr"][g].T + t["Tb1_ptr"][g])
        z = (z @ t["T2_ptr"][g].T + t["Tb2_ptr"][g]).relu()
        found.append(z @ t["Head_ptr"][g] + t["Headb_ptr"].flatten()[g])
    return torch.stack(found, 1)


def run(emulate, seed, n_rows, kind="plain", n_experts=2, programs=1, lag=0, **fixed):
    """A random layer on random rows: logits or predictions, those wanted, and whether each is a probability."""
    from fastmtl.backends.triton.stages import stages_of, why_not

    rng = torch.Generator().manual_seed(seed)
    draw = drawer(rng)
    n_in = fixed.get("n_in") or draw(65, 385)
    dims, tower_dims = (draw(129, 257), draw(65, 129)), (draw(33, 65), draw(17, 33))
    everyone = range(n_experts)
    gates = fixed.get("gates") or tuple(
        Gate(0, tuple(e for e in everyone if draw(0, 2)) or (draw(0, n_experts),)) for _ in range(draw(1, 5))
    )
    layer, towers = packed(rng, n_in, dims, tower_dims, gates, n_experts)
    assert why_not(layer, towers) is None
    pitch = -(-n_in // 8) * 8 + 8 * draw(0, 2)
    x = torch.full((n_rows, pitch), torch.nan, dtype=torch.bfloat16)  # what lies behind a row is nobody's
    x[:, :n_in] = torch.randn(n_rows, n_in, generator=rng)
    is_probability = torch.rand(len(gates), generator=rng) < 0.5
    stages = stages_of(layer, towers)._asdict()
    out = np.full((n_rows, len(gates)), np.nan, np.float32)
    arrays = {name: value.detach().numpy() for name, value in stages.items() if name != "weights"}
    arrays |= {"stages": stages["weights"].numpy(), "x": x.view(torch.int16).numpy(), "out": out}
    found = emulate(
        {**arrays, "is_probability": is_probability.numpy()},
        kind,
        offset=0,
        row_bytes=2 * pitch,
        n_rows=n_rows,
        n_in=n_in,
        n_experts=n_experts,
        n_outputs=len(gates),
        programs=programs,
        lag=lag,
    )
    right = wanted(x[:, :n_in].double(), layer, towers)
    return torch.from_numpy(found("out", out)), torch.where(is_probability, right.sigmoid(), right)


@pytest.mark.parametrize("case", range(4))
def test_random_layers(emulate, case, seed):
    """Tiles that are not full, programs with several tiles and with none, one to four gates over some experts."""
    n_rows, programs, lag = ((70, 1, 0), (300, 2, 3), (1, 2, 2), (400, 1, 1))[case]
    found, right = run(emulate, seed + case, n_rows, programs=programs, lag=lag, n_experts=1 + case)
    torch.testing.assert_close(found.double(), right, rtol=3e-3, atol=3e-3)


def test_the_widest_input(emulate, seed):
    found, right = run(emulate, seed, 130, n_in=384, gates=(Gate(0, (0, 1)),) * 2, lag=3)
    torch.testing.assert_close(found.double(), right, rtol=3e-3, atol=3e-3)


@pytest.mark.parametrize("kind", ["race", "memory"])
def test_sanitized(emulate, kind, seed):
    """Two tiles of one program: stages and rows of x come while others are read."""
    found, right = run(emulate, seed, 150, kind, n_in=70, gates=(Gate(0, (0,)), Gate(0, (0, 1))), lag=2)
    torch.testing.assert_close(found.double(), right, rtol=3e-3, atol=3e-3)


def test_pieces_lie_where_the_tensor_cores_look_for_them():
    """By the rule of the swizzle on addresses: bits 4 to 6 are changed by bits 7 to 9 (rows of 128 bytes), bits 4 and 5
    by 7 and 8 (64 bytes)."""
    from fastmtl.backends.triton.stages import _swizzled

    for columns, bits in ((64, 7), (32, 3)):
        block = torch.arange(24 * columns).reshape(24, columns).short().view(torch.bfloat16)
        laid = _swizzled(block).view(torch.int16)
        for r in range(24):
            for k in range(columns):
                at = 2 * (r * columns + k)
                assert laid[(at ^ ((at >> 7 & bits) << 4)) // 2] == r * columns + k
