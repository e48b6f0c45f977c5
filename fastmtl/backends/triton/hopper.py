"""What lies between two hidden layers, in CUDA C++ for Hopper (csrc/cuda/up.cuh, down.cuh, weight_gradient.cuh): one
launch up, two down and one for the weight, where products of the library and passes between them are eight, and move
twice as many bytes.

Up: the next layer's z and the pieces of its statistics, from z of this one. Down: from dz of the next layer through its
weight to D of this one, once for the pieces of its sums, and, when these are added up, once more for dz. Activations
and their gradient stay where they are multiplied.

bf16, statistics and sums in fp32; deterministic. Everywhere else products.py and passes.py do this.
"""

from __future__ import annotations

import functools

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
_WEIGHT = Operation(
    "expert_gate_weight",
    lambda *arguments: torch.ops.fastmtl_cuda.expert_gate_weight(*arguments),
    ("Dz_ptr", "Below_ptr", "Stat_ptr", "n_experts", "n_below", "n_above", "activation", "run_rows", "Parts_ptr"),
)
_DOWN = Operation(
    "expert_gate_down",
    lambda *arguments: torch.ops.fastmtl_cuda.expert_gate_down(*arguments),
    ("Dz_ptr", "Weight_ptr", "Z_ptr", "Stat_ptr", "Coef_ptr", "n_experts", "n_units", "n_above", "activation",
     "run_rows", "Part_ptr", "Out_ptr"),
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


def _run(n_rows: int, n_experts: int, tile: int) -> int:
    """Rows of a program: one for each multiprocessor."""
    runs = max(configs.PROGRAMS // n_experts, 1)
    return round_up(cdiv(n_rows, runs), tile)


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
    run = _run(n_rows, spec.n_experts, _ROWS_UP)
    z = under.z.new_empty(n_rows, pitch)
    part = under.stat.new_empty(cdiv(n_rows, run), 2, pitch)
    call(
        _UP, Below_ptr=under.z, Stat_ptr=under.stat, Weight_ptr=weight, n_experts=spec.n_experts, n_below=under.units,
        n_units=spec.dims[under.layer + 1], activation=ACTIVATIONS.index(spec.activation), run_rows=run, Z_ptr=z,
        Part_ptr=part,
    )  # fmt: skip
    return z, part, run


def weight_gradient(dz: Tensor, under: Hidden, out: Tensor) -> None:
    """Write dW to ``out [columns of the experts, I]`` fp32, from ``dz [B, pitch]`` of a layer and the one under it."""
    n_rows, spec = len(dz), under.spec
    n_above = spec.dims[under.layer + 1]
    run = _run(n_rows, spec.n_experts, _ROWS_DOWN)
    parts = out.new_empty(cdiv(n_rows, run), spec.n_experts, n_above, under.units)
    call(
        _WEIGHT, Dz_ptr=dz, Below_ptr=under.z, Stat_ptr=under.stat, n_experts=spec.n_experts, n_below=under.units,
        n_above=n_above, activation=ACTIVATIONS.index(spec.activation), run_rows=run, Parts_ptr=parts,
    )  # fmt: skip
    torch.sum(parts, 0, out=out.view(parts.shape[1:]))


def sums(dz: Tensor, weight: Tensor, under: Hidden) -> Tensor:
    """The pieces ``[runs, SUMS, pitch]`` of the sums of D of ``under``, from ``dz [B, pitch above]`` of the layer above
    and its weight."""
    part = under.stat.new_empty(cdiv(len(dz), _run(len(dz), under.spec.n_experts, _ROWS_DOWN)), SUMS, under.pitch)
    _down(dz, weight, under, None, part, None)
    return part


def gradient(dz: Tensor, weight: Tensor, under: Hidden, coef: Tensor, out: Tensor) -> None:
    """dz of the experts' columns of ``under``, written to ``out [B, pitch]``; ``coef``: see batch_norm.add_up."""
    _down(dz, weight, under, coef, None, out)


def _down(
    dz: Tensor, weight: Tensor, under: Hidden, coef: Tensor | None, part: Tensor | None, out: Tensor | None
) -> None:
    spec = under.spec
    call(
        _DOWN, Dz_ptr=dz, Weight_ptr=weight, Z_ptr=under.z, Stat_ptr=under.stat, Coef_ptr=coef,
        n_experts=spec.n_experts, n_units=under.units, n_above=spec.dims[under.layer + 1],
        activation=ACTIVATIONS.index(spec.activation), run_rows=_run(len(dz), spec.n_experts, _ROWS_DOWN),
        Part_ptr=part, Out_ptr=out,
    )  # fmt: skip
