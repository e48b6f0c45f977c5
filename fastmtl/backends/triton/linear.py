"""The forward GEMM of a hidden layer.

z = h W^T without a bias, one program a tile; h is the input as it stands (first layer), or rebuilt from the layer below
as it is read: BatchNorm, activation and dropout in the prologue. Experts and gates of the first layer share the launch.
The epilogue leaves the mean and M2 (sum of squared distances from it) of each column of the tile's rows, taken from z
as it is stored (batch_norm.py merges them).

The bias in front of a BatchNorm never enters a product: the batch mean cancels it, and with running statistics it is
taken off the mean. Accumulation in fp32; deterministic.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...spec import ExpertGateParams
from . import configs
from .activations import activate, kept, learned_scalar
from .batch_norm import statistics
from .common import aligned, narrow, operand
from .hidden import Operand
from .launch import alignment, cdiv, launch
from .layer_plan import LayerPlan
from .precision import Precision


@triton.jit
def expert_gate_linear_kernel(
    A_ptr,  # N matrices [B, n_in]: the input, or a z of the layer below
    W_ptr,  # [E * H, n_in], zeros behind its rows where PADDED
    Wg_ptr,  # [C, n_in], likewise; read where GATES
    Tiles_ptr,  # [n_tiles, 6] int32: LayerPlan.linear_tiles
    Z_ptr,  # [B, pitch_z]
    Part_ptr,  # [row tiles, 2, pitch_z] fp32: mean and M2; written where STATS
    Stat_ptr,  # [4, pitch_a]; read where NORM, as are those that follow
    Alpha_ptr,  # [N]
    Seed_ptr,  # [] int64; read where DROPOUT
    n_rows,
    n_tiles,
    n_in,
    n_read,
    stride_as,
    stride_ab,
    stride_w,
    stride_wg,
    pitch_a,
    pitch_z,
    drop,
    NORM: tl.constexpr,
    ACT: tl.constexpr,
    DROPOUT: tl.constexpr,
    LAYER: tl.constexpr,
    GATES: tl.constexpr,
    STATS: tl.constexpr,
    DOT: tl.constexpr,
    ALIGN_A: tl.constexpr,
    ALIGN_W: tl.constexpr,
    ALIGN_Z: tl.constexpr,
    ALIGN_READ: tl.constexpr,
    PADDED: tl.constexpr,  # whether n_read, up to which rows are read, lies behind n_in
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    tile = Tiles_ptr + (tl.program_id(0) % n_tiles) * 6  # neighbours share the rows of A, and the weights stay in L2
    row_tile = tl.program_id(0) // n_tiles
    source = tl.load(tile)
    w_row = tl.load(tile + 1)
    column = aligned(tl.load(tile + 2), ALIGN_Z)
    width = tl.load(tile + 3)
    stored_width = tl.load(tile + 5)
    last = aligned(n_read, ALIGN_READ)
    w = W_ptr
    stride = stride_w
    if GATES:  # noqa: SIM102 (a constant and a value: in one condition both would be values)
        if tl.load(tile + 4) != 0:
            w = Wg_ptr
            stride = stride_wg
    m = tl.arange(0, BLOCK_M)
    n = tl.arange(0, BLOCK_N)
    first_row = row_tile.to(tl.int64) * BLOCK_M
    n_live = n_rows - first_row
    live = m < n_live
    inside = n < width
    written = n < aligned(stored_width, ALIGN_Z)
    pitch = aligned(stride_ab, ALIGN_A)
    a_rows = A_ptr + source.to(tl.int64) * aligned(stride_as, ALIGN_A) + first_row * pitch + m[:, None] * pitch
    w_rows = w + (w_row + n)[:, None] * aligned(stride, ALIGN_W)
    alpha = learned_scalar(Alpha_ptr, source, ACT)
    dtype: tl.constexpr = Z_ptr.dtype.element_ty
    z = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in range(0, last, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        known = k < last
        a = tl.load(a_rows + k[None, :], mask=live[:, None] & known[None, :], other=0.0)
        if NORM:
            c = source * last + k
            mean = tl.load(Stat_ptr + c, mask=known, other=0.0)
            scale = tl.load(Stat_ptr + 2 * pitch_a + c, mask=known, other=0.0)
            beta = tl.load(Stat_ptr + 3 * pitch_a + c, mask=known, other=0.0)
            y = (a.to(tl.float32) - mean[None, :]) * scale[None, :] + beta[None, :]
            a = activate(y, alpha, known[None, :], n_in, ACT)
            if DROPOUT:
                a = tl.where(
                    kept(Seed_ptr, first_row + m, source, start, drop, LAYER, BLOCK_K), a * (1.0 / (1.0 - drop)), 0.0
                )
        if PADDED:  # nobody said what lies behind a row
            a = tl.where((k < n_in)[None, :], a, 0.0)
        weight = tl.load(w_rows + k[None, :], mask=inside[:, None] & known[None, :], other=0.0)
        z = tl.dot(operand(a, dtype), operand(weight, dtype).T, z, input_precision=DOT)
    stored = narrow(z, dtype)
    target = Z_ptr + first_row * pitch_z + m[:, None] * pitch_z + column + n[None, :]
    tl.store(target, stored, mask=live[:, None] & written[None, :])
    if STATS:
        z = tl.where(live[:, None], stored.to(tl.float32), 0.0)
        mean = tl.sum(z, axis=0) / tl.minimum(n_live, BLOCK_M).to(tl.float32)
        apart = tl.where(live[:, None], z - mean[None, :], 0.0)
        part = Part_ptr + row_tile.to(tl.int64) * 2 * pitch_z + column + n
        tl.store(part, mean, mask=written)
        tl.store(part + pitch_z, tl.sum(apart * apart, axis=0), mask=written)


def linear(
    a: Operand,
    n_rows: int,
    weight: Tensor,
    gate_weight: Tensor | None,
    params: ExpertGateParams,
    plan: LayerPlan,
    layer: int,
    precision: Precision,
    batch_statistics: bool,
) -> tuple[Tensor, Tensor]:
    """One layer's z ``[B, pitch]`` and its statistics ``[3, pitch]``."""
    pitch = plan.pitch[layer]
    config = configs.GEMM.linear(
        precision.name, n_rows, plan.spec.dims[layer] if layer else plan.columns[0], a.hidden is not None
    )
    tiles, align = plan.linear_tiles(layer, config.block_n)
    n_row_tiles = cdiv(n_rows, config.block_m)
    z = torch.empty(n_rows, pitch, dtype=precision.dtype, device=weight.device)
    part = None
    if batch_statistics:
        part = torch.empty(n_row_tiles, 2, pitch, dtype=torch.float32, device=weight.device)
    stride_wg = 0 if gate_weight is None else gate_weight.stride(0)
    launch(
        expert_gate_linear_kernel,
        (n_row_tiles * len(tiles),),
        config.warps,
        **a.arguments(params.beta[0]),
        W_ptr=weight,
        Wg_ptr=weight if gate_weight is None else gate_weight,
        Tiles_ptr=tiles,
        Z_ptr=z,
        Part_ptr=params.beta[0] if part is None else part,
        n_rows=n_rows,
        n_tiles=len(tiles),
        stride_w=weight.stride(0),
        stride_wg=stride_wg,
        pitch_z=pitch,
        GATES=gate_weight is not None,
        STATS=batch_statistics,
        DOT=precision.dot,
        ALIGN_W=alignment(weight.stride(0), stride_wg),
        ALIGN_Z=align,
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        BLOCK_K=config.block_k,
    )
    return z, statistics(part, n_rows, config.block_m, params, plan, layer)
