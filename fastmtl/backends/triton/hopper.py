"""What lies between two hidden layers, in CUDA C++ for Hopper (csrc/cuda/up.cuh, down.cuh): one launch up and two down,
where products of the library and passes between them are eight, and move more than twice as many bytes.

Up: the next layer's z and the pieces of its statistics, from z of this one. Down: from dz of the next layer through its
weight to D of this one, once for the pieces of its sums, and, when these are added up, once more for dz; with it comes
the weight's gradient. Activations and their gradient stay where they are multiplied.

bf16, statistics and sums in fp32; deterministic. Everywhere else products.py and passes.py do this.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from .. import libraries
from . import configs
from .batch_norm import SUMS
from .hidden import Hidden
from .launch import Operation, call, cdiv, round_up

#: Activations that the kernels have, by their numbers (csrc/cuda/activation.cuh).
ACTIVATIONS = ("relu", "leakyrelu", "silu")
#: Units of the layers, at most, that a program has room for; fewer than half are padded to more than twice their work.
_BELOW, _ABOVE = 256, 128
#: Rows of a batch from which on they are faster, measured on an H200: below, a program that begins has little to do.
LEAST_ROWS = 8192
#: Rows of a tile.
_ROWS_UP, _ROWS_DOWN = 128, 64

_UP = Operation(
    "expert_gate_up",
    lambda *arguments: torch.ops.fastmtl_cuda.expert_gate_up(*arguments),
    ("Below_ptr", "Stat_ptr", "Weight_ptr", "n_experts", "n_below", "n_units", "activation", "run_rows", "Z_ptr",
     "Part_ptr"),
)  # fmt: skip
_SUMS = Operation(
    "expert_gate_down_sums",
    lambda *arguments: torch.ops.fastmtl_cuda.expert_gate_down_sums(*arguments),
    ("Dz_ptr", "Weight_ptr", "Z_ptr", "Stat_ptr", "n_experts", "n_units", "n_above", "activation", "run_rows",
     "Part_ptr"),
)  # fmt: skip
_DOWN = Operation(
    "expert_gate_down",
    lambda *arguments: torch.ops.fastmtl_cuda.expert_gate_down(*arguments),
    ("Dz_ptr", "Weight_ptr", "Z_ptr", "Stat_ptr", "Coef_ptr", "n_experts", "n_units", "n_above", "activation",
     "run_rows", "Out_ptr", "Parts_ptr"),
)  # fmt: skip


@functools.cache
def _is_here(device: torch.device) -> bool:
    if device.type != "cuda" or torch.cuda.get_device_capability(device) != (9, 0):
        return False
    return libraries.why_no_cuda() is None and hasattr(torch.ops.fastmtl_cuda, "expert_gate_down")


def takes(under: Hidden) -> bool:
    """Whether the kernels do what lies between ``under`` and the layer above it."""
    spec, z = under.spec, under.z
    if len(z) < LEAST_ROWS or z.dtype is not torch.bfloat16 or not _is_here(z.device):
        return False
    if under.dropped or spec.activation not in ACTIVATIONS:
        return False
    widths = spec.dims[under.layer : under.layer + 2]
    return len(widths) == 2 and all(
        most // 2 < width <= most and width % 8 == 0 for width, most in zip(widths, (_BELOW, _ABOVE), strict=True)
    )


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    if device.type != "cuda":  # what stands in for a GPU
        return configs.PROGRAMS
    return torch.cuda.get_device_properties(device).multi_processor_count


def _run(under: Hidden, tile: int) -> int:
    """Rows of a program, of which there is at most one a multiprocessor: a second one would wait for the first."""
    runs = max(min(_multiprocessors(under.z.device), configs.PIECES) // under.spec.n_experts, 1)
    return round_up(cdiv(len(under.z), runs), tile)


def up(under: Hidden, weight: Tensor, pitch: int) -> tuple[Tensor, Tensor, int]:
    """From a layer to the one above.

    Args:
        under: the layer below.
        weight: ``[columns of z, I]``, see operands.py.
        pitch: of the layer above.

    Returns:
        z ``[B, pitch]``, the pieces ``[runs, 2, pitch]`` of its statistics, and the rows of a run.
    """
    n_rows, spec = len(under.z), under.spec
    run = _run(under, _ROWS_UP)
    n_columns = spec.n_experts * spec.dims[under.layer + 1]
    z = (under.z.new_empty if n_columns == pitch else under.z.new_zeros)(n_rows, pitch)  # what pads a row is 0
    part = under.stat.new_empty(cdiv(n_rows, run), 2, pitch)
    call(
        _UP, Below_ptr=under.z, Stat_ptr=under.stat, Weight_ptr=weight, n_experts=spec.n_experts, n_below=under.units,
        n_units=spec.dims[under.layer + 1], activation=ACTIVATIONS.index(spec.activation), run_rows=run, Z_ptr=z,
        Part_ptr=part,
    )  # fmt: skip
    return z, part, run


def sums(dz: Tensor, weight: Tensor, under: Hidden) -> Tensor:
    """The pieces ``[runs, SUMS, pitch]`` of the sums of D of ``under``, from ``dz [B, pitch above]`` of the layer above
    and its weight."""
    run = _run(under, _ROWS_DOWN)
    part = under.stat.new_empty(cdiv(len(dz), run), SUMS, under.pitch)
    call(_SUMS, **_down(dz, weight, under, run), Part_ptr=part)
    return part


def gradients(dz: Tensor, weight: Tensor, under: Hidden, coef: Tensor, out: Tensor) -> Tensor:
    """dz of the experts' columns of ``under``, written to ``out [B, pitch]``; and returned the parts ``[runs, E, H
    above, H]`` of the gradient of the weight above, to be added up. ``coef``: see batch_norm.add_up."""
    spec = under.spec
    run = _run(under, _ROWS_DOWN)
    shape = cdiv(len(dz), run), spec.n_experts, spec.dims[under.layer + 1], under.units
    parts = under.stat.new_empty(shape)
    call(_DOWN, **_down(dz, weight, under, run), Coef_ptr=coef, Out_ptr=out, Parts_ptr=parts)
    return parts


def add_parts(parts: Tensor, out: Tensor) -> None:
    """Their sum, to ``out [E * H above, H]``."""
    torch.sum(parts, 0, out=out.view(parts.shape[1:]))


def _down(dz: Tensor, weight: Tensor, under: Hidden, run: int) -> dict[str, Any]:
    spec = under.spec
    return {
        "Dz_ptr": dz, "Weight_ptr": weight, "Z_ptr": under.z, "Stat_ptr": under.stat, "n_experts": spec.n_experts,
        "n_units": under.units, "n_above": spec.dims[under.layer + 1],
        "activation": ACTIVATIONS.index(spec.activation), "run_rows": run,
    }  # fmt: skip
