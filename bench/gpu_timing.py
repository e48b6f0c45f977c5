"""Clocks and limits of bench.gpu: the device's own events on a GPU, the wall clock on a CPU."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence

import torch


def seconds(work: Callable[[], object], device: torch.device, repeats: int) -> float:
    """Of one call of ``work``, ``repeats`` of them one behind the other, after one that is not counted."""
    work()
    if device.type != "cuda":
        start = time.perf_counter()
        for _ in range(repeats):
            work()
        return (time.perf_counter() - start) / repeats
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    begin.record()
    for _ in range(repeats):
        work()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end) / 1e3 / repeats


def alternated(works: Sequence[Callable[[], object]], device: torch.device, rounds: int, repeats: int) -> list[float]:
    """The median of each over rounds in which they take turns, beginning with another one each time."""
    found: list[list[float]] = [[] for _ in works]
    for turn in range(rounds):
        for i in range(len(works)):
            at = (i + turn) % len(works)
            found[at].append(seconds(works[at], device, repeats))
    return [statistics.median(times) for times in found]


def limits(device: torch.device, tiny: bool) -> dict[str, float]:
    """What this machine reaches in this run: bytes/s of a copy, and FLOP/s of a product in each precision."""
    n = 1 << (16 if tiny else 28)
    source, target = torch.empty(n, device=device), torch.empty(n, device=device)
    found = {"copy": 2 * 4 * n / seconds(lambda: target.copy_(source), device, 3 if tiny else 20)}
    side = 64 if tiny else 8192
    for name, dtype, switch in (
        ("ieee", torch.float32, "highest"),
        ("tf32", torch.float32, "high"),
        ("bf16", torch.bfloat16, "highest"),
    ):
        torch.set_float32_matmul_precision(switch)
        a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
        found[name] = 2 * side**3 / seconds(lambda a=a, b=b: a @ b, device, 2 if tiny or name == "ieee" else 10)
    torch.set_float32_matmul_precision("highest")
    return found
