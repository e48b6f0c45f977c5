"""The weights of a layer as its products read them, one launch for all: in their dtype, rows on 16 bytes, the gates'
rows behind the experts'."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...spec import ExpertGateParams, ExpertGateSpec
from .. import branches
from . import configs
from .common import narrow
from .launch import cdiv, launch, round_up
from .layer_plan import LayerPlan, layer_plan
from .precision import Precision, of_input


@triton.jit
def operands_kernel(
    From,  # matrices [rows, width] fp32
    Out,  # [rows, pitch]
    Rows,  # of what is written
    Width,
    Pitch,
    Listed_ptr,  # [rows of the last one] int32: which row of From each is, or -1: 0; read where LISTED
    LISTED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    program = tl.program_id(0)
    source, out, rows, width, pitch = From[0], Out[0], Rows[0], Width[0], Pitch[0]
    begin = 0
    next_begin = 0
    for i in tl.static_range(len(From)):
        here = program >= next_begin
        source = tl.where(here, From[i], source)
        out = tl.where(here, Out[i], out)
        rows = tl.where(here, Rows[i], rows)
        width = tl.where(here, Width[i], width)
        pitch = tl.where(here, Pitch[i], pitch)
        begin = tl.where(here, next_begin, begin)
        is_last = here
        next_begin += tl.cdiv(Rows[i] * Pitch[i], BLOCK)
    at = (program - begin) * BLOCK + tl.arange(0, BLOCK)
    live = at < rows * pitch
    row = at // pitch
    column = at - row * pitch
    if LISTED:
        row = tl.where(is_last, tl.load(Listed_ptr + row, mask=live & is_last, other=-1), row)
    inside = live & (row >= 0) & (column < width)
    value = tl.load(source + row * width + column, mask=inside, other=0.0)
    tl.store(out + at, narrow(value, Out[0].dtype.element_ty), mask=live)


def weights_ahead(layers: Sequence[tuple[ExpertGateParams, ExpertGateSpec]]) -> list[tuple[Tensor, ...]]:
    """The operands of each layer that has hidden ones, made beside what is queued until
    :data:`fastmtl.backends.branches.OPERANDS` is joined."""
    found: list[tuple[Tensor, ...]] = []
    for params, spec in layers:
        if not spec.dims:
            found.append(())
            continue
        device = params.weight[0].device
        found.append(operands(params, layer_plan(spec, device), of_input(params.weight[0])))
    return found


def operands(params: ExpertGateParams, plan: LayerPlan, precision: Precision) -> tuple[Tensor, ...]:
    """Each hidden layer's weight, ``[columns of z, I]``: a row for each column, those that pad the gates 0; made
    beside what is queued until :data:`fastmtl.backends.branches.OPERANDS` is joined.

    A weight that is one already is given as it is.
    """
    found: list[Tensor] = []
    pieces: list[tuple[Tensor, Tensor]] = []
    of_gates: list[tuple[Tensor, Tensor]] = []
    for layer, weight in enumerate(params.weight):
        rows, width = weight.shape
        pitch = round_up(width, 16 // precision.dtype.itemsize)
        gate = None if layer else params.gate
        if gate is None and weight.dtype is precision.dtype and pitch == width and weight.is_contiguous():
            found.append(weight)
            continue
        out = weight.new_empty(rows if gate is None else plan.pitch[0], pitch, dtype=precision.dtype)
        pieces.append((weight.contiguous(), out[:rows]))
        if gate is not None:
            of_gates.append((gate.weight.contiguous(), out[rows:]))
        found.append(out[:, :width])
    if pieces:
        listed = plan.rows_of_gates if of_gates else None
        branches.beside(branches.OPERANDS, _copy, [*pieces, *of_gates], listed)
    return tuple(found)


def _copy(pieces: list[tuple[Tensor, Tensor]], listed: Tensor | None) -> None:
    """Write the first of each pair to the second; of the last pair the rows that are listed."""
    block = configs.OPERANDS.block
    launch(
        operands_kernel,
        (sum(cdiv(out.numel(), block) for _, out in pieces),),
        configs.OPERANDS.warps,
        From=tuple(source for source, _ in pieces),
        Out=tuple(out for _, out in pieces),
        Rows=tuple(len(out) for _, out in pieces),
        Width=tuple(source.shape[1] for source, _ in pieces),
        Pitch=tuple(out.shape[1] for _, out in pieces),
        Listed_ptr=torch.empty(0, dtype=torch.int32, device=pieces[0][0].device) if listed is None else listed,
        LISTED=listed is not None,
        BLOCK=block,
    )
