"""The products with packed weights on each build of them, against float64."""

import os
import random
import subprocess
import sys

import pytest
import torch

ISAS = ("baseline", "avx2", "avx512", "avx512_bf16", "amx")
CASES = 150
#: Relative to the sum of the products' sizes: one rounding a product and one a sum, which mostly cancel.
EPSILON = 2.0**-23

ops = torch.ops.fastmtl


def sizes(rng: random.Random) -> list[int]:
    """m, n, k: small, odd, whole tiles, one more or less than those, now and then 0."""
    return [rng.choice((0, 1, 2, 15, 16, 17, 31, 32, 33, 48, 64, 65, rng.randrange(300))) for _ in range(3)]


def strided(rows: int, cols: int, rng: random.Random, generator: torch.Generator) -> torch.Tensor:
    """Normal numbers with a row stride of their own; around them lies NaN, which must not be read."""
    left, right = rng.choice((0, 1, 5)), rng.choice((0, 3, 8))
    whole = torch.full((rows, left + cols + right), torch.nan)
    whole[:, left : left + cols] = torch.randn(rows, cols, generator=generator)
    return whole[:, left : left + cols]


def like_strided(values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The same in another dtype, NaN around it."""
    whole = torch.full((values.shape[0], values.stride(0)), torch.nan, dtype=dtype) if len(values) else values.to(dtype)
    out = whole[:, : values.shape[1]]
    out.copy_(values)
    return out


def check(got: torch.Tensor, exact: torch.Tensor, size: torch.Tensor, k: int) -> None:
    bound = EPSILON * (2 + k**0.5) * size + 1e-30
    error = (got.double() - exact).abs()
    assert (error <= bound).all(), f"error {error.max()} over {bound[error == error.max()]}"


@pytest.mark.parametrize("kind", ["f32", "rounded", "bf16"])
def test_random_products(kind, base_seed):
    rng = random.Random(base_seed)
    generator = torch.Generator().manual_seed(base_seed)
    for _ in range(CASES):
        m, n, k = sizes(rng)
        a, by_depth, accumulate = strided(m, k, rng, generator), rng.random() < 0.5, rng.random() < 0.5
        w = strided(k, n, rng, generator) if by_depth else strided(n, k, rng, generator)
        if kind == "bf16":
            a, w = like_strided(a, torch.bfloat16), like_strided(w, torch.bfloat16)
        c = strided(m, n, rng, generator)
        around = c._base if c._base is not None else c
        exact_a, exact_w = (x.bfloat16() if kind == "rounded" else x for x in (a, w))
        exact_a, exact_w = exact_a.double(), exact_w.double() if by_depth else exact_w.double().T
        start = c.double() if accumulate else torch.zeros(m, n, dtype=torch.float64)
        exact, size = start + exact_a @ exact_w, start.abs() + exact_a.abs() @ exact_w.abs()
        untouched = around.isnan()
        ops.check_packed_gemm.default(a, w, by_depth, kind == "rounded", c, accumulate, 1)
        check(c, exact, size, k)
        assert torch.equal(around.isnan(), untouched)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_random_weight_gradients(dtype, base_seed):
    rng = random.Random(base_seed)
    generator = torch.Generator().manual_seed(base_seed)
    op = ops.check_wgrad.default if dtype is torch.bfloat16 else ops.check_wgrad_f32.default
    for _ in range(CASES):
        m, n, k = sizes(rng)
        m *= rng.choice((1, 1, 5))  # beyond one stretch of rows
        dz, h = (like_strided(strided(m, size, rng, generator), dtype) for size in (n, k))
        dw, accumulate = strided(n, k, rng, generator), rng.random() < 0.5
        around = dw._base if dw._base is not None else dw
        untouched = around.isnan()
        start = dw.double() if accumulate else torch.zeros(n, k, dtype=torch.float64)
        exact = start + dz.double().T @ h.double()
        size = start.abs() + dz.double().abs().T @ h.double().abs()
        op(dz, h, dw, accumulate, 1)
        check(dw, exact, size, m)
        assert torch.equal(around.isnan(), untouched)


def test_rounding_is_torchs(base_seed):
    """A product with the unit matrix gives the rounded numbers back, ties, infinities and NaN included."""
    generator = torch.Generator().manual_seed(base_seed)
    bits = torch.randint(-(2**31), 2**31, (64, 64), generator=generator, dtype=torch.int64).to(torch.int32)
    bits[:8] = bits[:8] >> 16 << 16 | 0x8000
    a = bits.view(torch.float32).clone()
    a[0, :4] = torch.tensor([torch.inf, -torch.inf, torch.nan, 3.4028e38])
    a[(a.abs() < 1e-37)] = 0
    unit = torch.eye(64)
    for row in range(64):  # one row at a time: an infinity times zero is NaN in the columns beside it
        values = torch.where(torch.arange(64)[:, None] == torch.arange(64), a[row], 0.0)
        c = torch.empty(64, 64)
        ops.check_packed_gemm.default(values, unit, False, True, c, False, 1)
        expected = a[row].bfloat16().float()
        got = c.diagonal()
        assert torch.equal(got.isnan(), expected.isnan())
        assert torch.equal(got.nan_to_num(7.0), expected.nan_to_num(7.0))


@pytest.mark.parametrize("bf16", [False, True])
def test_nan_and_infinity_go_through(bf16):
    a, w = torch.ones(40, 50), torch.ones(30, 50)
    a[3, 49], w[7, 0] = torch.inf, torch.nan
    c = torch.empty(40, 30)
    ops.check_packed_gemm.default(a, w, False, bf16, c, False, 1)
    expected = torch.full((40, 30), 50.0)
    expected[3], expected[:, 7] = torch.inf, torch.nan
    assert torch.equal(c.isnan(), expected.isnan())
    assert torch.equal(c.nan_to_num(nan=7.0), expected.nan_to_num(nan=7.0))


@pytest.mark.parametrize("isa", ISAS)
def test_each_build(isa):
    """The tests above on each build but the one that runs anyway; one that this processor lacks falls back."""
    if os.environ.get("FASTMTL_ISA") or isa == ops.gemm_isa.default():
        pytest.skip("every other test runs on it")
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", __file__]
    environment = {**os.environ, "FASTMTL_ISA": isa}
    done = subprocess.run([*command, "-k", "not each_build"], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
