"""What a step costs at least on this machine, from rates measured in the same run.

    floor of a step    = 3 F B / R + S / W
    floor of a forward =   F B / R + G / W

F  floating-point operations of the linear layers for a row, forward (``Shape.flops``); the backward is twice that.
B  rows of a batch.
R  GEMM rate in the contender's precision, FLOP/s: the better of torch's matmul and the native core's own product with
   packed weights, all threads at once, on [1024, 512] x [512, 512], operands in cache.
W  copy bandwidth, bytes/s, read and written, of 100 MB.
G  bytes of a lookup: B (table ids of 8 B, D numbers of 4 B read and written for each feature).
S  G, and B F D numbers read again by the backward, and the optimizer's traffic. For exact Adam with decay that is: each
   unique row touched reads and writes weight, m and v once to catch up and once to step and reads its gradient (13 of
   its D numbers), every table once in MOST_MISSED steps (6 numbers each), and the dense parameters read p, g, m, v and
   write p, m, v (7 numbers each).

Activations are taken to stay in cache and everything else to be free: good code comes near. What the plain algorithm
multiplies is counted, whether or not a contender does (docs/performance.md, "Small tables").
"""

from __future__ import annotations

import statistics
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import astuple, dataclass

import numpy as np
import torch
from torch import Tensor

from bench.shapes import Shape
from fastmtl.backends import native
from fastmtl.optim.waiting import MOST_MISSED

M, K, N = 1024, 512, 512


def _fastest(work: Callable[[], object], seconds: float) -> float:
    """Seconds of the fastest call within a span of time."""
    work()
    best, end = float("inf"), time.perf_counter() + seconds
    while True:
        start = time.perf_counter()
        work()
        now = time.perf_counter()
        best = min(best, now - start)
        if now > end:
            return best


def _matmul_rate(dtype: torch.dtype, seconds: float) -> float:
    a, b = torch.randn(M, K).to(dtype), torch.randn(N, K).to(dtype)
    out = torch.empty(M, N, dtype=dtype)
    return 2 * M * N * K / _fastest(lambda: torch.mm(a, b.t(), out=out), seconds)


def _packed_rate(dtype: torch.dtype) -> float:
    """The native core's products, one a thread; 0 where there is no native library."""
    if native.unavailable():
        return 0.0
    threads, rates = torch.get_num_threads(), []

    def work(a: Tensor, w: Tensor, c: Tensor) -> None:
        seconds = torch.ops.fastmtl.check_packed_gemm.default(a, w, False, False, c, False, 60)
        rates.append(2 * M * N * K / seconds)

    operands = [(torch.randn(M, K).to(dtype), torch.randn(N, K).to(dtype), torch.empty(M, N)) for _ in range(threads)]
    team = [threading.Thread(target=work, args=one) for one in operands]
    for one in team:
        one.start()
    for one in team:
        one.join()
    return sum(rates)


def copy_bandwidth(megabytes: int = 100, seconds: float = 0.4) -> float:
    """Bytes a second, read and written, of a copy."""
    source, target = torch.randn(megabytes * 250_000), torch.empty(megabytes * 250_000)
    return 2 * 4 * len(source) / _fastest(lambda: target.copy_(source), seconds)


@dataclass(frozen=True)
class Machine:
    """Rates of this machine, now: FLOP/s of products in fp32 and bf16, bytes/s of a copy."""

    fp32: float
    bf16: float
    copy: float

    @classmethod
    def measured(cls, seconds: float = 0.4) -> Machine:
        """The fastest calls within ``seconds`` for each rate of torch's."""
        dtypes = torch.float32, torch.bfloat16
        fp32, bf16 = (max(_matmul_rate(dtype, seconds), _packed_rate(dtype)) for dtype in dtypes)
        return cls(fp32, bf16, copy_bandwidth(seconds=seconds))

    @classmethod
    def median(cls, machines: Sequence[Machine]) -> Machine:
        """Of each rate the median."""
        return cls(*(statistics.median(rates) for rates in zip(*map(astuple, machines), strict=True)))

    def rate(self, precision: str) -> float:
        """FLOP/s of products in ``"fp32"`` or ``"bf16"``."""
        return self.fp32 if precision == "fp32" else self.bf16

    def __str__(self) -> str:
        return (
            f"GEMM {self.fp32 / 1e9:,.0f} GFLOP/s fp32, {self.bf16 / 1e9:,.0f} bf16, copy {self.copy / 1e9:.1f} GB/s, "
            f"{torch.get_num_threads()} threads"
        )


def lookup_bytes(shape: Shape, batch: int) -> float:
    """G."""
    return batch * len(shape.vocabs) * (8 + 2 * 4 * shape.embed_dim)


def unique_rows(ids: list[np.ndarray]) -> int:
    """Rows of all tables that a batch looks up; one array of ids a table."""
    return sum(len(np.unique(column)) for column in ids)


def forward_floor(machine: Machine, shape: Shape, model: str, batch: int, precision: str) -> float:
    """Seconds of the lookup and the layers, forward."""
    return shape.flops(model) * batch / machine.rate(precision) + lookup_bytes(shape, batch) / machine.copy


def step_floor(
    machine: Machine, shape: Shape, model: str, batch: int, precision: str, touched: int, dense_params: int
) -> float:
    """Seconds of a training step.

    Args:
        touched: unique rows of the batch (:func:`unique_rows`).
        dense_params: parameters that are in no table.
    """
    compute = 3 * shape.flops(model) * batch / machine.rate(precision)
    backward = batch * len(shape.vocabs) * shape.embed_dim
    tables = shape.embed_dim * (13 * touched + 6 * sum(shape.vocabs) / MOST_MISSED)
    moved = lookup_bytes(shape, batch) + 4 * (backward + tables + 7 * dense_params)
    return compute + moved / machine.copy
