"""The one way to start a kernel, and the two facts about the machine that kernels are told.

All launches go through :func:`launch` so that a test can record them, shapes and constants included, and compile each
for GPUs that are not there.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from . import interpreting

#: The interpreter's bf16 product is wrong: kernels widen rounded operands to fp32 there.
INTERPRET = tl.constexpr(interpreting())

#: Called as ``record(kernel, grid, warps, arguments)`` in place of every launch, where set.
recorder: Callable[[Any, tuple[int, ...], Warps, dict[str, Any]], None] | None = None


#: The generation that launches are chosen for where there is no GPU: an architecture that a test compiles for.
compiling_for = 9


@functools.cache
def _generation(index: int | None) -> int:
    return torch.cuda.get_device_capability(index)[0]


def generation(device: torch.device) -> int:
    """The first number of a GPU's compute capability: 8 (Ampere), 9 (Hopper), 10 (Blackwell)."""
    return _generation(device.index) if device.type == "cuda" else compiling_for


@dataclass(frozen=True)
class Warps:
    """How a program is laid out on the machine: its warps, the depth of its software pipeline, and whether the compiler
    may fuse a product and a sum that stand apart."""

    num_warps: int = 4
    num_stages: int = 1
    contract: bool = True

    def options(self) -> dict[str, Any]:
        """As Triton's compiler takes them."""
        return {
            "num_warps": self.num_warps,
            "num_stages": self.num_stages,
            "enable_fp_fusion": self.contract,
        }


def launch(kernel: Any, grid: tuple[int, ...], warps: Warps, **arguments: Any) -> None:
    """Run ``kernel`` on ``grid`` programs, on the GPU of its tensors; an empty grid runs nothing."""
    if 0 in grid:
        return
    if recorder is not None:
        recorder(kernel, grid, warps, arguments)
    elif _several_gpus():  # Triton launches on the current one, wherever the tensors lie
        with torch.cuda.device_of(next(value for value in arguments.values() if isinstance(value, Tensor))):
            kernel[grid](**arguments, **warps.options())
    else:
        kernel[grid](**arguments, **warps.options())


@functools.cache
def _several_gpus() -> bool:
    return torch.cuda.device_count() > 1


def cdiv(a: int, b: int) -> int:
    """a / b rounded up."""
    return -(-a // b)


def round_up(a: int, b: int) -> int:
    """The next multiple of b."""
    return cdiv(a, b) * b


def power_of_two(n: int, least: int = 1) -> int:
    """The next power of two, which the sides of a block must be."""
    return max(least, 1 << max(n - 1, 0).bit_length())


def alignment(*values: int, most: int = 16) -> int:
    """The largest power of two up to ``most`` that divides every value: what a kernel may rely on to load vectors."""
    found = most
    for value in values:
        while value % found:
            found //= 2
    return found
