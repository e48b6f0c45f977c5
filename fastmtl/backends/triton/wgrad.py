"""The GEMM of a layer's weight gradient: dW = dz^T h, summed over the batch.

Both sides are rebuilt as they are read: dz from D and z (common.gradient_of_z), h from the z of the layer below, where
there is one. The batch is split over programs so that the machine is full; the splits' products are added in their
order afterwards. The gates' rows of the first layer are tiles of the same launch, behind the experts'.

Accumulation in fp32; deterministic.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import configs
from .activations import activate, kept, learned_scalar
from .common import aligned, gradient_of_z, operand
from .hidden import Hidden, Operand
from .launch import cdiv, launch
from .layer_plan import LayerPlan
from .precision import Precision
from .rebuilt import Mixed, rebuilt_gradient_of_z


@triton.jit
def expert_gate_wgrad_kernel(
    A_ptr,  # N matrices [B, n_in]: the input, or a z of the layer below
    D_ptr,  # [B, pitch]; not read where REBUILT
    Z_ptr,  # [B, pitch]
    Statz_ptr,  # [4, pitch]
    Coef_ptr,  # [2, pitch]
    Tiles_ptr,  # [n_tiles, 6] int32: LayerPlan.wgrad_tiles
    Out_ptr,  # [splits, n_weight_rows, n_in] fp32
    Stat_ptr,  # [4, pitch_a]; read where NORM, as are those that follow
    Alpha_ptr,
    Seed_ptr,
    Dy_ptr,  # [G, B, n_units]; read where REBUILT, as are those that follow
    Share_ptr,  # [B, n_shares] fp32
    Members_ptr,  # [E, GATES2] int32
    Alphaz_ptr,
    n_rows,
    n_tiles,
    n_in,
    n_read,
    n_weight_rows,
    split_rows,
    stride_as,
    stride_ab,
    pitch,
    pitch_a,
    stride_de,
    stride_db,
    n_shares,
    first_share,
    n_units,
    drop,
    NORM: tl.constexpr,
    ACT: tl.constexpr,
    DROPOUT: tl.constexpr,
    LAYER: tl.constexpr,
    REBUILT: tl.constexpr,
    GATES: tl.constexpr,
    GATES2: tl.constexpr,
    DOT: tl.constexpr,
    ALIGN_A: tl.constexpr,
    ALIGN_TILE: tl.constexpr,
    ALIGN_READ: tl.constexpr,
    PADDED: tl.constexpr,  # whether n_read, up to which rows are read, lies behind n_in
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    tile = Tiles_ptr + (tl.program_id(0) % n_tiles) * 6
    split = (tl.program_id(0) // n_tiles).to(tl.int64)
    source = tl.load(tile)
    first_column = aligned(tl.load(tile + 1), ALIGN_TILE)
    column = first_column + tl.arange(0, BLOCK_M)
    read = tl.arange(0, BLOCK_M) < aligned(tl.load(tile + 5), ALIGN_TILE)
    first_unit = aligned(tl.load(tile + 4), ALIGN_TILE)
    unit = first_unit + tl.arange(0, BLOCK_N)
    inside = unit < aligned(n_read, ALIGN_READ)
    first_row = split * split_rows
    row_pitch = aligned(stride_ab, ALIGN_A)
    a_rows = A_ptr + source.to(tl.int64) * aligned(stride_as, ALIGN_A) + first_row * row_pitch
    d_rows = D_ptr + first_row * pitch
    z_rows = Z_ptr + first_row * pitch
    dtype: tl.constexpr = Z_ptr.dtype.element_ty
    n_live = tl.minimum(n_rows - first_row, split_rows).to(tl.int32)
    if NORM:
        c = source * aligned(n_read, ALIGN_READ) + unit
        mean = tl.load(Stat_ptr + c, mask=inside, other=0.0)
        scale = tl.load(Stat_ptr + 2 * pitch_a + c, mask=inside, other=0.0)
        beta = tl.load(Stat_ptr + 3 * pitch_a + c, mask=inside, other=0.0)
        alpha = learned_scalar(Alpha_ptr, source, ACT)
    dw = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in range(0, n_live, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        live = k < n_live
        at = k[:, None] * pitch + column[None, :]
        mask = live[:, None] & read[None, :]
        if REBUILT:
            dz = rebuilt_gradient_of_z(
                Z_ptr, Statz_ptr, Coef_ptr, Dy_ptr, Share_ptr, Members_ptr, Seed_ptr,
                learned_scalar(Alphaz_ptr, source, ACT), source, first_row, k, live, column, read, pitch, stride_de,
                stride_db, n_shares, first_share, n_units, first_column - source * n_units, drop, ACT, DROPOUT,
                LAYER + 1, GATES, GATES2, BLOCK_M,
            )  # fmt: skip
        else:
            dz = gradient_of_z(d_rows, z_rows, Statz_ptr, Coef_ptr, at, column[None, :], pitch, mask, read[None, :])
        dz = tl.where(mask, dz, 0.0)
        h = tl.load(a_rows + k[:, None] * row_pitch + unit[None, :], mask=live[:, None] & inside[None, :], other=0.0)
        if NORM:
            y = (h.to(tl.float32) - mean[None, :]) * scale[None, :] + beta[None, :]
            h = activate(y, alpha, inside[None, :], n_in, ACT)
            if DROPOUT:
                h = tl.where(
                    kept(Seed_ptr, first_row + k, source, first_unit, drop, LAYER, BLOCK_N),
                    h * (1.0 / (1.0 - drop)),
                    0.0,
                )
        dw = tl.dot(operand(dz, dtype).T, operand(h, dtype), dw, input_precision=DOT)
    m = tl.arange(0, BLOCK_M)
    row = split * n_weight_rows + tl.load(tile + 3) + m
    n_units = n_in if PADDED else aligned(n_read, ALIGN_READ)
    written = (m < tl.load(tile + 2))[:, None] & (unit < n_units)[None, :]
    tl.store(Out_ptr + row[:, None] * n_units + unit[None, :], dw, mask=written)


def wgrad(
    a: Operand, d: Tensor | Mixed, hidden: Hidden, coef: Tensor, plan: LayerPlan, precision: Precision
) -> tuple[Tensor, Tensor]:
    """The gradients of a layer's weight and, behind them in the first layer, of the gates': ``[E * H, n_in]`` and
    ``[C, n_in]`` fp32 (no rows where the layer has no gates)."""
    n_rows, layer = len(hidden.z), hidden.layer
    n_in, n_columns = plan.width_in(layer), plan.columns[layer]
    n_weight_rows = n_columns + (plan.spec.gate_rows if layer == 0 else 0)
    columns = n_columns if layer == 0 else hidden.units
    config = configs.GEMM.wgrad(
        precision.name, columns, n_in, a.hidden is not None, isinstance(d, Mixed) and hidden.dropped
    )
    tiles, align = plan.wgrad_tiles(layer, config.block_m, config.block_n)
    split_rows = configs.GEMM.split_rows(n_rows, len(tiles), config.block_k, max(hidden.pitch, a.stride_row))
    n_splits = cdiv(n_rows, split_rows)
    out = torch.empty(n_splits, n_weight_rows, n_in, dtype=torch.float32, device=coef.device)
    launch(
        expert_gate_wgrad_kernel,
        (n_splits * len(tiles),),
        config.warps,
        **a.arguments(hidden.stat),
        D_ptr=hidden.z if isinstance(d, Mixed) else d,
        **(d.arguments(hidden) if isinstance(d, Mixed) else Mixed.no_arguments(coef)),
        Z_ptr=hidden.z,
        Statz_ptr=hidden.stat,
        Coef_ptr=coef,
        Tiles_ptr=tiles,
        Out_ptr=out,
        n_rows=n_rows,
        n_tiles=len(tiles),
        n_weight_rows=n_weight_rows,
        split_rows=split_rows,
        pitch=hidden.pitch,
        DOT=precision.dot,
        ALIGN_TILE=align,
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        BLOCK_K=config.block_k,
    )
    dw = out[0] if n_splits == 1 else out.sum(0)
    return dw[:n_columns], dw[n_columns:]
