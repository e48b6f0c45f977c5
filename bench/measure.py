"""Rounds in which all contenders take turns, and what is made of their times."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

Times = dict[str, list[float]]


class Turns:
    """Every contender's seconds a call, round by round; each round begins with another contender.

    Args:
        calls: contender -> what it does.
        seconds: a turn goes on for so long, and has one call at least.
    """

    def __init__(self, calls: Mapping[str, Callable[[], object]], seconds: float) -> None:
        self.calls, self.seconds = dict(calls), seconds
        self.times: Times = {name: [] for name in calls}
        self.number = 0

    def round(self) -> None:
        """One turn for each; a turn's time is the median of its calls."""
        names = list(self.calls)
        first = self.number % len(names)
        self.number += 1
        for name in (*names[first:], *names[:first]):
            found: list[float] = []
            end = time.perf_counter() + self.seconds
            while not found or time.perf_counter() < end:
                start = time.perf_counter()
                self.calls[name]()
                found.append(time.perf_counter() - start)
            self.times[name].append(statistics.median(found))


def figures(
    times: Times, rows: int, flops: float, floors: Mapping[str, float], bases: Sequence[str]
) -> list[dict[str, Any]]:
    """Each contender's figures.

    Args:
        times: seconds a call, a number a round.
        rows: samples of a call.
        flops: floating-point operations of a call.
        floors: contender -> seconds that a call takes at least.
        bases: contenders that ratios are given to; one that did not run is left out.

    Returns:
        For each contender ``ms`` and its ``best_ms``, ``samples_per_second``, ``gflops``, ``floor_ms``, ``over_floor``
        (time over floor) and ``ratios`` {base: median of the rounds' ratios, above 1 is faster}.
    """
    listed = []
    for name, seconds in times.items():
        middle = statistics.median(seconds)
        listed.append(
            {
                "contender": name,
                "ms": 1e3 * middle,
                "best_ms": 1e3 * min(seconds),
                "samples_per_second": rows / middle,
                "gflops": flops / middle / 1e9,
                "floor_ms": 1e3 * floors[name],
                "over_floor": middle / floors[name],
                "ratios": {
                    base: statistics.median(a / b for a, b in zip(times[base], seconds, strict=True))
                    for base in bases
                    if base in times
                },
            }
        )
    return listed


def table(listed: Sequence[Mapping[str, Any]], distances: Mapping[str, float]) -> list[str]:
    """Figures as lines of text."""
    bases = list(listed[0]["ratios"])
    head = f"{'':34} {'samples/s':>11} {'ms':>9} {'best ms':>9} {'GFLOP/s':>8} {'x floor':>8} {'ratio':>6}"
    lines = [head + (f" {'to bf16':>8}" if len(bases) > 1 else "") + f" {'distance':>9}"]
    for one in listed:
        line = f"{one['contender']:34} {one['samples_per_second']:>11,.0f} {one['ms']:>9.3f} {one['best_ms']:>9.3f} "
        line += f"{one['gflops']:>8.1f} {one['over_floor']:>8.2f} {one['ratios'][bases[0]]:>6.2f}"
        line += f" {one['ratios'][bases[1]]:>8.2f}" if len(bases) > 1 else ""
        lines.append(line + f" {distances.get(one['contender'], float('nan')):>9.1e}")
    return lines
