"""The products between two hidden layers for Hopper (csrc/cuda/up.cuh, down.cuh) on the CPU, by
emulation/: places of operands in shared memory and registers, and who waits for whom, against float64 with the same
roundings to bf16."""

import importlib.util

import pytest
import torch
from emulated import COMPILER, emulator
from torch.nn.functional import leaky_relu, relu, silu

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed: 'fastmtl[gpu]'"),
    pytest.mark.skipif(COMPILER is None, reason="no C++ compiler is here"),
]
ACTIVATIONS = {"relu": relu, "leakyrelu": leaky_relu, "silu": silu}
SUMS = 6


@pytest.fixture(scope="module")
def emulate(tmp_path_factory):
    """See :func:`emulated.emulator`."""
    return emulator(tmp_path_factory.mktemp("hidden"), "emulate_hidden.cpp")


class Layer:
    """Random z of a layer of experts with its statistics, and the weight of the next, in buffers with room behind."""

    def __init__(self, seed, n_rows, n_experts=2, below=256, above=128, activation="relu", behind=16):
        self.rng = torch.Generator().manual_seed(seed)
        self.n_rows, self.n_experts, self.below, self.above = n_rows, n_experts, below, above
        self.activation, self.act = list(ACTIVATIONS).index(activation), ACTIVATIONS[activation]
        self.pitch, self.pitch_above = n_experts * below + behind, n_experts * above + behind
        self.z = self.matrix(n_rows, self.pitch, n_experts * below)
        self.weight = self.matrix(n_experts * above, below + 8, below, scale=below**-0.5)
        self.stat = self.numbers(4, self.pitch)

    def matrix(self, rows, pitch, columns, scale=1.0):
        """bf16; what lies behind the columns is nobody's."""
        found = torch.full((rows, pitch), torch.nan, dtype=torch.bfloat16)
        found[:, :columns] = scale * torch.randn(rows, columns, generator=self.rng)
        return found

    def numbers(self, rows, columns):
        return torch.rand(rows, columns, generator=self.rng) + 0.5

    def by_expert(self, matrix, width):
        return matrix[:, : self.n_experts * width].double().view(len(matrix), self.n_experts, width)

    def normal(self):
        """z minus its mean, and the BatchNorm's output, ``[B, E, units]``."""
        mean, _, scale, beta = (self.by_expert(row[None], self.below) for row in self.stat)
        centred = self.by_expert(self.z, self.below) - mean
        return centred, centred * scale + beta

    def activated(self):
        """The activations as operands, of operations in fp32 as the kernels make them: rounded twice, they are as
        near a tie as these."""
        z, (mean, _, scale, beta) = self.by_expert(self.z, self.below).float(), self.stat[:, None, :]
        n, shape = self.n_experts * self.below, (1, self.n_experts, self.below)
        mean, scale, beta = (row[:, :n].view(shape) for row in (mean, scale, beta))
        return self.act((z - mean) * scale + beta).bfloat16().double()

    @property
    def flips(self):
        """How far a sum may be off for activations that are rounded the other way: those of approximate functions."""
        return 0.1 if self.activation == list(ACTIVATIONS).index("silu") else 2e-3

    def weights(self):
        return self.weight[:, : self.below].double().view(self.n_experts, self.above, self.below)

    def run(self, emulate, kernel, run_rows, kind="plain", **arrays):
        arrays = {"z": self.z, "weight": self.weight, "stat": self.stat} | arrays
        given = {name: (value.view(torch.int16) if value.dtype is torch.bfloat16 else value).numpy()
                 for name, value in arrays.items()}  # fmt: skip
        found = emulate(
            given, kind, kernel=kernel, activation=self.activation, n_rows=self.n_rows, run_rows=run_rows,
            n_experts=self.n_experts, n_below=self.below, n_units=self.above if kernel == 0 else self.below,
            n_above=self.above, n_sums=SUMS, pitch_weight=self.weight.shape[1],
            pitch=self.pitch_above if kernel == 0 else self.pitch, pitch_below=self.pitch,
            pitch_above=self.pitch_above,
        )  # fmt: skip

        def array(name):
            made = torch.from_numpy(found(name, given[name]))
            return made.view(torch.bfloat16) if made.dtype is torch.int16 else made

        return array


def untouched(matrix, columns):
    return bool(matrix[:, columns:].isnan().all())


def check_up(emulate, layer, run_rows, kind="plain"):
    runs = -(-layer.n_rows // run_rows)
    nothing = torch.full((layer.n_rows, layer.pitch_above), torch.nan, dtype=torch.bfloat16)
    made = layer.run(
        emulate, 0, run_rows, kind, below=layer.z, z=nothing,
        part=torch.full((runs, 2, layer.pitch_above), torch.nan),
    )  # fmt: skip
    z, part = made("z"), made("part").double()
    above = layer.n_experts * layer.above
    assert untouched(z, above)
    product = torch.einsum("bek,enk->ben", layer.activated(), layer.weights())
    torch.testing.assert_close(layer.by_expert(z, layer.above), product, rtol=2**-8, atol=layer.flips)
    for run, rows in enumerate(z[:, :above].double().split(run_rows)):
        torch.testing.assert_close(part[run, 0, :above], rows.mean(0), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(part[run, 1, :above], rows.var(0, correction=0) * len(rows), rtol=1e-4, atol=1e-5)


def check_down(emulate, layer, run_rows, kind="plain"):
    dz = layer.matrix(layer.n_rows, layer.pitch_above, layer.n_experts * layer.above)
    coef = layer.numbers(2, layer.pitch) - 1
    runs, n = -(-layer.n_rows // run_rows), layer.n_experts * layer.below
    given = {
        "dz": dz, "coef": coef, "out": torch.full_like(layer.z, torch.nan),
        "part": torch.full((runs, SUMS, layer.pitch), torch.nan),
        "parts": torch.full((runs, layer.n_experts, layer.above, layer.below), torch.nan),
    }  # fmt: skip
    dh = torch.einsum("ben,enk->bek", layer.by_expert(dz, layer.above), layer.weights())
    centred, y = layer.normal()
    y.requires_grad_()
    (d,) = torch.autograd.grad(layer.act(y), y, dh)
    part = layer.run(emulate, 1, run_rows, kind, **given)("part").double()
    d_rows, dz_rows = d.reshape(layer.n_rows, n), (d * centred).reshape(layer.n_rows, n) * layer.stat[1, :n]
    for run, (a, b) in enumerate(zip(d_rows.split(run_rows), dz_rows.split(run_rows), strict=True)):
        torch.testing.assert_close(part[run, 0, :n], a.sum(0), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(part[run, 1, :n], b.sum(0), rtol=1e-4, atol=1e-4)
    assert part[:, 2:].isnan().all()
    made = layer.run(emulate, 2, run_rows, kind, **given)
    out, parts = made("out"), made("parts").double()
    assert untouched(out, n)
    slope, shift = (layer.by_expert(row[None], layer.below) for row in coef)
    scale = layer.by_expert(layer.stat[2:3], layer.below)
    right = ((d - shift) - centred * slope) * scale
    torch.testing.assert_close(layer.by_expert(out, layer.below), right, rtol=2**-8, atol=1e-4)
    both = layer.by_expert(dz, layer.above).split(run_rows), layer.activated().split(run_rows)
    right = torch.stack([torch.einsum("bem,bek->emk", a, h) for a, h in zip(*both, strict=True)])
    torch.testing.assert_close(parts, right, rtol=1e-4, atol=layer.flips)


CHECKS = [check_up, check_down]


@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize("case", range(3))
def test_random_layers(emulate, check, case, seed):
    """Runs of an odd number of tiles and of an even one, tiles that are not full, one row; narrower layers."""
    n_rows, run_rows = ((330, 200), (520, 512), (1, 128))[case]
    sizes = {} if case == 0 else {"below": 136 + 8 * case, "above": 64 + 8 * case, "n_experts": 1 + case}
    check(emulate, Layer(seed + case, n_rows, **sizes), run_rows)


@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize("activation", ["leakyrelu", "silu"])
def test_activations(emulate, check, activation, seed):
    check(emulate, Layer(seed, 70, 1, activation=activation), 128)


def test_units_of_several_programs(emulate, seed):
    check_down(emulate, Layer(seed, 100, 2, below=264), 64)


@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize("kind", ["race", "memory"])
def test_sanitized(emulate, check, kind, seed):
    """Some tiles of one program: strips come while others are read."""
    check(emulate, Layer(seed, 300, 1), 320, kind)
