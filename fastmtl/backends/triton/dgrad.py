"""The GEMM that carries a layer's gradient to what the layer reads: dh = dz W.

dz is rebuilt in the prologue from D, the gradient of the BatchNorm's output, and z (common.gradient_of_z; D itself too
where gates follow, rebuilt.py). In the first
layer the product runs over the experts' columns and then over the gates', and writes the input's gradient. In the
others its epilogue goes on through the dropout and the activation of the layer below, writes that layer's D, and leaves
the sums of its columns for batch_norm.add_up, so that the layer needs no pass of its own.

Accumulation in fp32; deterministic.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...spec import LEARNED_ACTIVATIONS
from . import configs
from .activations import activate_bwd, kept, learned_scalar
from .batch_norm import SUMS
from .common import aligned, gradient_of_z, narrow, normalise, operand
from .hidden import Hidden
from .launch import alignment, cdiv, generation, launch, round_up
from .layer_plan import LayerPlan
from .precision import Precision
from .rebuilt import Mixed, rebuilt_gradient_of_z


@triton.jit
def expert_gate_dgrad_kernel(
    D_ptr,  # [B, pitch]; not read where REBUILT
    Z_ptr,  # [B, pitch]
    Stat_ptr,  # [4, pitch]
    Coef_ptr,  # [2, pitch]
    W_ptr,  # [E * H, n_out]
    Wg_ptr,  # [C, n_out]; read where MIXED
    Tiles_ptr,  # [n_tiles, 7] int32: LayerPlan.dgrad_tiles
    Out_ptr,  # N matrices [B, n_out]: the gradient of what was read, or D of the layer below
    Zb_ptr,  # [B, pitch_b], of the layer below; read where BELOW, as are those that follow
    Statb_ptr,  # [4, pitch_b]
    Alphab_ptr,
    Seedb_ptr,
    Part_ptr,  # [row tiles, SUMS, pitch_b]
    Dy_ptr,  # [G, B, n_units]; read where REBUILT, as are those that follow
    Share_ptr,  # [B, n_shares] fp32
    Members_ptr,  # [E, GATES2] int32
    Alphaz_ptr,
    n_rows,
    n_tiles,
    n_out,  # units that are written: those there are, or more where rows are padded and W ends in zeros
    pitch,
    pitch_b,
    stride_w,
    stride_wg,
    stride_os,
    stride_ob,
    stride_de,
    stride_db,
    n_shares,
    first_share,
    n_units,
    drop,
    BELOW: tl.constexpr,
    ACT: tl.constexpr,
    DROPOUT: tl.constexpr,
    LAYER: tl.constexpr,
    LEARNED: tl.constexpr,
    MIXED: tl.constexpr,  # whether gates read the layer's input too
    REBUILT: tl.constexpr,
    GATES: tl.constexpr,
    GATES2: tl.constexpr,
    SUMS: tl.constexpr,
    DOT: tl.constexpr,
    ALIGN_TILE: tl.constexpr,
    ALIGN_W: tl.constexpr,
    ALIGN_OUT: tl.constexpr,
    ALIGN_UNITS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    tile = Tiles_ptr + (tl.program_id(0) % n_tiles) * 7
    row_tile = tl.program_id(0) // n_tiles
    source = tl.load(tile)
    first = aligned(tl.load(tile + 1), ALIGN_TILE)
    n_columns = aligned(tl.load(tile + 2), ALIGN_TILE)
    first_unit = aligned(tl.load(tile + 6), ALIGN_TILE)
    unit = first_unit + tl.arange(0, BLOCK_N)
    inside = unit < aligned(n_out, ALIGN_UNITS)
    m = tl.arange(0, BLOCK_M)
    first_row = row_tile.to(tl.int64) * BLOCK_M
    live = m < n_rows - first_row
    dtype: tl.constexpr = Z_ptr.dtype.element_ty
    d_rows = D_ptr + first_row * pitch
    z_rows = Z_ptr + first_row * pitch
    dh = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in range(0, n_columns, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        known = k < n_columns
        c = first + k
        at = m[:, None] * pitch + c[None, :]
        mask = live[:, None] & known[None, :]
        if REBUILT:
            dz = rebuilt_gradient_of_z(
                Z_ptr, Stat_ptr, Coef_ptr, Dy_ptr, Share_ptr, Members_ptr, Seedb_ptr,
                learned_scalar(Alphaz_ptr, source, ACT), source, first_row, m, live, c, known, pitch, stride_de,
                stride_db, n_shares, first_share, n_units, start, drop, ACT, DROPOUT, LAYER + 1, GATES, GATES2, BLOCK_K,
            )  # fmt: skip
        else:
            dz = gradient_of_z(d_rows, z_rows, Stat_ptr, Coef_ptr, at, c[None, :], pitch, mask, known[None, :])
        w = W_ptr + c[:, None] * aligned(stride_w, ALIGN_W) + unit[None, :]
        weight = tl.load(w, mask=known[:, None] & inside[None, :], other=0.0)
        dh = tl.dot(operand(dz, dtype), operand(weight, dtype), dh, input_precision=DOT)
    if MIXED:
        first_g = tl.load(tile + 3)
        w_row = tl.load(tile + 4)
        n_gate_columns = tl.load(tile + 5)
        for start in range(0, n_gate_columns, BLOCK_K):
            k = start + tl.arange(0, BLOCK_K)
            known = k < n_gate_columns
            c = first_g + k
            at = m[:, None] * pitch + c[None, :]
            mask = live[:, None] & known[None, :]
            dz = gradient_of_z(d_rows, z_rows, Stat_ptr, Coef_ptr, at, c[None, :], pitch, mask, known[None, :])
            w = Wg_ptr + (w_row + k)[:, None] * aligned(stride_wg, ALIGN_W) + unit[None, :]
            weight = tl.load(w, mask=known[:, None] & inside[None, :], other=0.0)
            dh = tl.dot(operand(dz, dtype), operand(weight, dtype), dh, input_precision=DOT)
    mask = live[:, None] & inside[None, :]
    out_rows = Out_ptr + source.to(tl.int64) * aligned(stride_os, ALIGN_OUT) + first_row * aligned(stride_ob, ALIGN_OUT)
    out = out_rows + m[:, None] * aligned(stride_ob, ALIGN_OUT) + unit[None, :]
    if BELOW:
        c = source * aligned(n_out, ALIGN_UNITS) + unit
        alpha = learned_scalar(Alphab_ptr, source, ACT)
        centred, y = normalise(Zb_ptr, Statb_ptr, first_row, m, live, c, inside, pitch_b)
        if DROPOUT:
            dh = tl.where(
                kept(Seedb_ptr, first_row + m, source, first_unit, drop, LAYER, BLOCK_N), dh * (1.0 / (1.0 - drop)), 0.0
            )
        d, dalpha = activate_bwd(y, dh, alpha, inside[None, :], n_out, ACT)
        stored = narrow(d, Out_ptr.dtype.element_ty)
        tl.store(out, stored, mask=mask)
        d = tl.where(mask, stored.to(tl.float32), 0.0)
        part = Part_ptr + row_tile.to(tl.int64) * SUMS * pitch_b + c
        inv_std = tl.load(Statb_ptr + pitch_b + c, mask=inside, other=0.0)
        tl.store(part, tl.sum(d, axis=0), mask=inside)
        tl.store(part + pitch_b, tl.sum(d * centred, axis=0) * inv_std, mask=inside)
        if LEARNED:
            tl.store(part + 2 * pitch_b, tl.sum(tl.where(mask, dalpha, 0.0), axis=0), mask=inside)
    else:
        tl.store(out, narrow(dh, Out_ptr.dtype.element_ty), mask=mask)


def dgrad(
    d: Tensor | Mixed,
    hidden: Hidden,
    coef: Tensor,
    weight: Tensor,
    gate_weight: Tensor | None,
    out: Tensor,
    strides: tuple[int, int],
    below: Hidden | None,
    plan: LayerPlan,
    precision: Precision,
) -> Tensor:
    """Write the gradient of what ``hidden`` reads to ``out``, whose matrices and rows are ``strides`` apart; where
    ``below`` is given, go on to that layer's D and return the pieces of its sums (else nothing of use)."""
    n_rows, layer = len(hidden.z), hidden.layer
    n_out = plan.width_in(layer) if layer else min(weight.stride(0), strides[1])
    is_tight = isinstance(d, Mixed) and generation(coef.device) == 8
    config = configs.GEMM.dgrad(precision.name, n_rows, n_out, hidden.dropped, is_tight)
    tiles, align = plan.dgrad_tiles(layer, config.block_n)
    n_row_tiles = cdiv(n_rows, config.block_m)
    part = coef
    if below is not None:
        part = torch.empty(n_row_tiles, SUMS, below.pitch, dtype=torch.float32, device=coef.device)
    stride_wg = 0 if gate_weight is None else gate_weight.stride(0)
    source = hidden if below is None else below
    arguments = source.arguments()
    launch(
        expert_gate_dgrad_kernel,
        (n_row_tiles * len(tiles),),
        config.warps,
        D_ptr=hidden.z if isinstance(d, Mixed) else d,
        **(d.arguments(hidden) if isinstance(d, Mixed) else Mixed.no_arguments(coef)),
        Z_ptr=hidden.z,
        Stat_ptr=hidden.stat,
        Coef_ptr=coef,
        W_ptr=weight,
        Wg_ptr=weight if gate_weight is None else gate_weight,
        Tiles_ptr=tiles,
        Out_ptr=out,
        Zb_ptr=source.z,
        Statb_ptr=source.stat,
        Alphab_ptr=arguments["Alpha_ptr"],
        Seedb_ptr=arguments["Seed_ptr"],
        Part_ptr=part,
        n_rows=n_rows,
        n_tiles=len(tiles),
        n_out=n_out,
        pitch=hidden.pitch,
        pitch_b=source.pitch,
        stride_w=weight.stride(0),
        stride_wg=stride_wg,
        stride_os=strides[0],
        stride_ob=strides[1],
        drop=arguments["drop"],
        BELOW=below is not None,
        ACT=arguments["ACT"],
        DROPOUT=arguments["DROPOUT"],
        LAYER=arguments["LAYER"],
        LEARNED=hidden.spec.activation in LEARNED_ACTIVATIONS,
        MIXED=gate_weight is not None,
        SUMS=SUMS,
        DOT=precision.dot,
        ALIGN_TILE=align,
        ALIGN_W=alignment(weight.stride(0), stride_wg),
        ALIGN_OUT=alignment(*strides),
        ALIGN_UNITS=alignment(n_out),
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        BLOCK_K=config.block_k,
    )
    return part


def input_gradient(
    x: Tensor,
    d: Tensor,
    hidden: Hidden,
    coef: Tensor,
    weight: Tensor,
    gate_weight: Tensor | None,
    plan: LayerPlan,
    precision: Precision,
) -> Tensor:
    """The gradient of ``x [N, B, I]``, whose rows begin on 16 bytes."""
    n_inputs, n_rows, width = x.shape
    pitch = round_up(width, 16 // x.dtype.itemsize)
    dx = torch.empty(n_inputs, n_rows, pitch, dtype=x.dtype, device=x.device)
    dgrad(d, hidden, coef, weight, gate_weight, dx, (n_rows * pitch, pitch), None, plan, precision)
    return dx[..., :width]
