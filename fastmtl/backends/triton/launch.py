"""The one way to start a kernel, and the two facts about the machine that kernels are told.

All launches go through :func:`launch` so that a test can record them, shapes and constants included, and compile each
for GPUs that are not there.
"""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

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


def starts_early(device: torch.device) -> bool:
    """What kernels that call common.begin are told as EARLY: whether such a launch may come to the machine before the
    one ahead of it has ended, and wait for its data there. From Hopper on."""
    return not INTERPRET.value and generation(device) >= 9


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


class Launched(NamedTuple):
    """A launch that was made, and the kernel that Triton compiled for it (None: the interpreter made it)."""

    kernel: Any
    grid: tuple[int, ...]
    warps: Warps
    arguments: dict[str, Any]
    compiled: Any

    def again(self) -> Callable[..., Any]:
        """What makes such a launch of the kernel's arguments in their order; they must be such as Triton compiles the
        same kernel for."""
        if self.compiled is None:
            return functools.partial(self.kernel[self.grid], **self.warps.options())
        return self.compiled[(*self.grid, 1, 1)[:3]]


class Called(NamedTuple):
    """A call of an op that is no kernel of Triton's, noted like a launch: it takes tensors, not their addresses."""

    kernel: Operation
    arguments: dict[str, Any]
    compiled: None = None

    def again(self) -> Callable[..., Any]:
        """What makes such a call of the op's arguments in their order."""
        return self.kernel.run


@dataclass(frozen=True)
class Operation:
    """An op of the CUDA library, named as a kernel is.

    Args:
        name: its own.
        run: takes the arguments in their order.
        arg_names: their names; those in :data:`fastmtl.backends.triton.replay.WRITTEN` are written to.
    """

    name: str
    run: Callable[..., Any]
    arg_names: tuple[str, ...]

    @property
    def __name__(self) -> str:
        return self.name


class _Notes(threading.local):
    """What a thread is noting."""

    launches: list[Launched | Called] | None = None


_notes = _Notes()


@contextlib.contextmanager
def noting() -> Iterator[list[Launched | Called]]:
    """While this lasts the launches that this thread makes are written down."""
    before, made = _notes.launches, list[Launched | Called]()
    _notes.launches = made
    try:
        yield made
    finally:
        _notes.launches = before


def repeatable() -> bool:
    """Whether launches can be noted: they are made at once, on the one GPU."""
    return recorder is None and not several_gpus()


def launch(kernel: Any, grid: tuple[int, ...], warps: Warps, **arguments: Any) -> None:
    """Run ``kernel`` on ``grid`` programs, on the GPU of its tensors; an empty grid runs nothing."""
    if 0 in grid:
        return
    options = warps.options()
    if arguments.get("EARLY"):
        options["launch_pdl"] = True
    if recorder is not None:
        recorder(kernel, grid, warps, arguments)
    elif several_gpus():  # Triton launches on the current one, wherever the tensors lie
        with torch.cuda.device_of(next(value for value in arguments.values() if isinstance(value, Tensor))):
            kernel[grid](**arguments, **options)
    else:
        compiled = kernel[grid](**arguments, **options)
        if _notes.launches is not None:
            _notes.launches.append(Launched(kernel, grid, warps, arguments, compiled))


def call(operation: Operation, **arguments: Any) -> None:
    """Run an op of the CUDA library. (To :data:`recorder` it is a launch of one program.)"""
    if recorder is not None:
        recorder(operation, (1,), Warps(), arguments)
        return
    operation.run(*(arguments[name] for name in operation.arg_names))
    if _notes.launches is not None:
        _notes.launches.append(Called(operation, arguments))


@functools.cache
def several_gpus() -> bool:
    """Whether the current GPU need not be that of a tensor."""
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
