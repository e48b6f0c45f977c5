"""How fast the native core's products are on one thread, in the shapes of the models' layers, beside torch's.

    python -m bench.products
    FASTMTL_ISA=avx2 python -m bench.products

GFLOP/s of the fastest of many calls, operands as near as the caches let them lie: what a step's products can reach at
best, not what they have in it. docs/performance.md and docs/serving.md have the figures.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from fastmtl.backends import native

#: name -> rows, depth and columns of x W^T; a weight's gradient sums over STRETCH rows instead.
SHAPES: dict[str, tuple[int, int, int]] = {
    "ali-ccp first layer": (256, 376, 256),
    "ali-ccp second layer": (256, 256, 128),
    "aliexpress first layer": (256, 143, 256),
    "aliexpress second layer": (256, 512, 256),
    "census first layer": (128, 135, 128),
}
STRETCH = 512


def fastest(timed: Callable[[], float], seconds: float) -> float:
    """The fewest seconds that ``timed`` says within a span of time."""
    best, end = timed(), time.perf_counter() + seconds
    while time.perf_counter() < end:
        best = min(best, timed())
    return best


def apart(rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    """Random numbers whose rows are an odd number of cache lines apart, as the core's own matrices are."""
    line = 64 // dtype.itemsize
    return torch.randn(rows, (-(-columns // line) | 1) * line).to(dtype)[:, :columns]


def torch_seconds(x: Tensor, w: Tensor, out: Tensor) -> float:
    """How long torch's product takes."""
    start = time.perf_counter()
    torch.mm(x, w.t(), out=out)
    return time.perf_counter() - start


def rates(rows: int, depth: int, columns: int, seconds: float) -> dict[str, float]:
    """GFLOP/s of each product of a layer, each measured for so many seconds."""
    operations, repeat = 2 * rows * depth * columns, 5
    ops = torch.ops.fastmtl

    found: dict[str, float] = {}
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        x, w, z = torch.randn(rows, depth).to(dtype), torch.randn(columns, depth).to(dtype), torch.empty(rows, columns)
        dz, h = apart(STRETCH, columns, dtype), apart(STRETCH, depth, dtype)
        dw = torch.empty(columns, depth)
        gradient = ops.check_wgrad_f32.default if dtype is torch.float32 else ops.check_wgrad.default
        out = torch.empty(rows, columns, dtype=dtype)
        product = partial(ops.check_packed_gemm.default, x, w, False, False, z, False, repeat)
        found[name] = operations / fastest(product, seconds)
        found[f"{name} gradient"] = (
            operations / rows * STRETCH / fastest(partial(gradient, dz, h, dw, False, repeat), seconds)
        )
        found[f"{name} torch"] = operations / fastest(partial(torch_seconds, x, w, out), seconds)
        error = (z - x.float() @ w.float().t()).abs().max()
        if not error <= 1e-3 * depth**0.5:
            raise SystemExit(f"bench.products: {name}: the product is off by {float(error):.1e}; nothing is printed")
    return {name: rate / 1e9 for name, rate in found.items()}


def main() -> None:
    missing = native.unavailable()
    if missing:
        raise SystemExit(f"bench.products: there is no native library: {missing}")
    torch.set_num_threads(1)
    torch.manual_seed(0)
    table: dict[str, dict[str, float]] = {name: rates(*shape, seconds=0.2) for name, shape in SHAPES.items()}
    heads = next(iter(table.values()))
    print(f"GFLOP/s, one thread, products of the build {torch.ops.fastmtl.gemm_isa.default()!r}")
    print(" " * 40 + "".join(f"{head:>15}" for head in heads))
    for name, found in table.items():
        size = " x ".join(map(str, SHAPES[name]))
        print(f"{name:24}{size:16}" + "".join(f"{rate:15.1f}" for rate in found.values()))


if __name__ == "__main__":
    main()
