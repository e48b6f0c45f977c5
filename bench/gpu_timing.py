"""Clocks and limits of bench.gpu: the device's own events on a GPU, the wall clock on a CPU."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence

import torch

#: Written between calls so that none finds its data in a cache: several times the largest L2; and so much that the
#: device is still writing (0.2 ms) when Python has launched what is timed: else the launch is what is timed.
FLUSH_BYTES = 768 << 20


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


class Cold:
    """Times single calls that find nothing in the caches.

    Args:
        device: where they run.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        n = FLUSH_BYTES // 4 if device.type == "cuda" else 1
        self.flush = torch.empty(n, dtype=torch.int32, device=device)

    def times(self, work: Callable[[], object], repeats: int) -> list[float]:
        """Seconds of each of ``repeats`` calls."""
        if self.device.type != "cuda":
            return [seconds(work, self.device, 1) for _ in range(repeats)]
        events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repeats)]
        for begin, end in events:
            self.flush.zero_()
            begin.record()
            work()
            end.record()
        torch.cuda.synchronize()
        return [begin.elapsed_time(end) / 1e3 for begin, end in events]

    def alternated(self, works: Sequence[Callable[[], object]], rounds: int, repeats: int) -> list[float]:
        """The median of each over rounds in which they take turns, beginning with another one each time."""
        found: list[list[float]] = [[] for _ in works]
        for work in works:
            work()
        for turn in range(rounds):
            for i in range(len(works)):
                at = (i + turn) % len(works)
                found[at] += self.times(works[at], repeats)
        return [statistics.median(times) for times in found]


def graphed(work: Callable[[], object], device: torch.device) -> tuple[Callable[[], object], bool]:
    """``work`` as a CUDA graph, so that launches from Python are not what is timed; and whether that was possible."""
    if device.type != "cuda":
        return work, False
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            work()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            work()
    except RuntimeError:
        torch.cuda.synchronize()
        return work, False
    return graph.replay, True


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
    source, target = torch.randn(n, device=device), torch.empty(n, device=device)
    found = {"copy": 2 * 4 * n / seconds(lambda: target.copy_(source), device, 3 if tiny else 20)}
    side = 64 if tiny else 8192
    for name, dtype, switch in (
        ("ieee", torch.float32, "highest"),
        ("tf32", torch.float32, "high"),
        ("bf16", torch.bfloat16, "highest"),
    ):
        torch.set_float32_matmul_precision(switch)
        a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
        found[name] = 2 * side**3 / seconds(lambda a=a, b=b: a @ b, device, 2 if tiny or name == "ieee" else 10)
    torch.set_float32_matmul_precision("highest")
    return found
