"""The layer with its towers for Hopper (csrc/cuda/folded.cuh) on the CPU, by emulation/: its packed weights, the places
of operands in shared memory and registers, and who waits for whom, against float64 with the same roundings to bf16."""

import importlib.util

import numpy as np
import pytest
import torch
from emulated import COMPILER, emulator
from kernels.triton_cases import check_staged, drawer, staged_layer, staged_logits

from fastmtl.spec import Gate

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed: 'fastmtl[gpu]'"),
    pytest.mark.skipif(COMPILER is None, reason="no C++ compiler is here"),
]


@pytest.fixture(scope="module")
def emulate(tmp_path_factory):
    """See :func:`emulated.emulator`."""
    return emulator(tmp_path_factory.mktemp("folded"), "emulate_folded.cpp")


def run(emulate, seed, n_rows, kind="plain", n_experts=2, programs=1, activation="relu", **fixed):
    """A random layer on random rows: logits or predictions, those wanted, and whether each is a probability."""
    from fastmtl.backends.triton.folded_stages import ACTIVATIONS, stages_of, why_not

    rng = torch.Generator().manual_seed(seed)
    layer, towers = staged_layer(rng, n_experts, activation, **fixed)
    n_in, gates = layer.spec.in_features, layer.spec.gates
    assert why_not(layer, towers) is None
    pitch = -(-n_in // 8) * 8 + 8 * drawer(rng)(0, 2)
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
        programs=programs,
        activation=ACTIVATIONS.index(activation),
    )
    right = staged_logits(x[:, :n_in].double(), layer, towers)
    return torch.from_numpy(found("out", out)), torch.where(is_probability, right.sigmoid(), right)


@pytest.mark.parametrize("case", range(4))
def test_random_layers(emulate, case, seed):
    """Tiles that are not full, programs with several tiles and with none, one to four gates over some experts."""
    n_rows, programs = ((70, 1), (300, 2), (1, 2), (400, 1))[case]
    found, right = run(emulate, seed + case, n_rows, programs=programs, n_experts=1 + case)
    check_staged(found, right)


@pytest.mark.parametrize("activation", ["leakyrelu", "silu"])
def test_activations(emulate, activation, seed):
    found, right = run(emulate, seed, 130, n_in=70, activation=activation)
    check_staged(found, right)


def test_the_widest_input(emulate, seed):
    found, right = run(emulate, seed, 130, n_in=384, gates=(Gate(0, (0, 1)),) * 2)
    check_staged(found, right)


@pytest.mark.parametrize("kind", ["race", "memory"])
def test_sanitized(emulate, kind, seed):
    """Two tiles of one program: stages and rows of x come while others are read."""
    found, right = run(emulate, seed, 150, kind, n_in=70, gates=(Gate(0, (0,)), Gate(0, (0, 1))))
    check_staged(found, right)


def test_pieces_lie_where_the_tensor_cores_look_for_them():
    """By the rule of the swizzle on addresses: bits 4 to 6 are changed by bits 7 to 9 (rows of 128 bytes), bits 4 and 5
    by 7 and 8 (64 bytes)."""
    from fastmtl.backends.triton.folded_stages import _swizzled

    for columns, bits in ((64, 7), (32, 3)):
        block = torch.arange(24 * columns).reshape(24, columns).short().view(torch.bfloat16)
        laid = _swizzled(block).view(torch.int16)
        for r in range(24):
            for k in range(columns):
                at = 2 * (r * columns + k)
                assert laid[(at ^ ((at >> 7 & bits) << 4)) // 2] == r * columns + k
