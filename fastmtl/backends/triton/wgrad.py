"""dW = dz^T h of several experts at once, over many rows.

The library gives one program to a tile of a batched product whatever the rows that it sums over, which leaves most of
the machine idle: 98 us on an H200 for two towers' [65536, 32] and [65536, 64], which take 6 to read. Here the batch is
split over programs so that the machine is full; the splits' products are added in their order afterwards.

Operands of bf16, accumulation in fp32; deterministic.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import configs
from .common import aligned, begin, operand
from .launch import alignment, cdiv, launch, starts_early


@triton.jit
def expert_gate_wgrad_kernel(
    Dz_ptr,  # n matrices [B, width]
    H_ptr,  # n matrices [B, n_in]
    Out_ptr,  # [splits, n, width, n_in] fp32
    n_rows,
    n,
    width,
    n_in,
    split_rows,
    stride_zn,
    stride_zb,
    stride_hn,
    stride_hb,
    ALIGN_Z: tl.constexpr,
    ALIGN_H: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EARLY: tl.constexpr,
):
    begin(EARLY)
    m_tiles = tl.cdiv(width, BLOCK_M)
    n_tiles = tl.cdiv(n_in, BLOCK_N)
    tile = tl.program_id(0) % (n * m_tiles * n_tiles)  # neighbours share rows
    split = (tl.program_id(0) // (n * m_tiles * n_tiles)).to(tl.int64)
    e = tile // (m_tiles * n_tiles)
    column = (tile // n_tiles % m_tiles) * BLOCK_M + tl.arange(0, BLOCK_M)
    unit = (tile % n_tiles) * BLOCK_N + tl.arange(0, BLOCK_N)
    written = column < width
    inside = unit < n_in
    first_row = split * split_rows
    n_live = tl.minimum(n_rows - first_row, split_rows).to(tl.int32)
    pitch_z, pitch_h = aligned(stride_zb, ALIGN_Z), aligned(stride_hb, ALIGN_H)
    z_rows = Dz_ptr + e.to(tl.int64) * aligned(stride_zn, ALIGN_Z) + first_row * pitch_z
    h_rows = H_ptr + e.to(tl.int64) * aligned(stride_hn, ALIGN_H) + first_row * pitch_h
    dtype: tl.constexpr = Dz_ptr.dtype.element_ty
    dw = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in range(0, n_live, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        live = (k < n_live)[:, None]
        read_z = live & (column < aligned(width, ALIGN_Z))[None, :]
        read_h = live & (unit < aligned(n_in, ALIGN_H))[None, :]
        dz = tl.load(z_rows + k[:, None] * pitch_z + column[None, :], mask=read_z, other=0.0)
        h = tl.load(h_rows + k[:, None] * pitch_h + unit[None, :], mask=read_h, other=0.0)
        dw = tl.dot(operand(dz, dtype).T, operand(h, dtype), dw)
    row = (split * n + e) * width + column
    tl.store(Out_ptr + row[:, None] * n_in + unit[None, :], dw, mask=written[:, None] & inside[None, :])


def is_for(dz: Tensor) -> bool:
    """Whether it is worth while for ``dz [n, B, width]``, columns contiguous."""
    return len(dz) > 1 and dz.shape[1] >= 8192 and dz.element_size() == 2


def wgrad(dz: Tensor, h: Tensor, out: Tensor) -> None:
    """Write dz^T h to ``out``.

    Args:
        dz: ``[n, B, width]``, columns contiguous.
        h: ``[n, B, n_in]``, likewise, of its dtype.
        out: ``[n, width, n_in]`` fp32.
    """
    n, n_rows, width = dz.shape
    n_in = h.shape[2]
    config = configs.EXPERT_GATE.wgrad(width, n_in)
    n_tiles = n * cdiv(width, config.block_m) * cdiv(n_in, config.block_n)
    split_rows = configs.EXPERT_GATE.split_rows(n_rows, n_tiles, config.block_k, max(dz.stride(1), h.stride(1)))
    n_splits = cdiv(n_rows, split_rows)
    parts = out.new_empty(n_splits, n, width, n_in)
    launch(
        expert_gate_wgrad_kernel,
        (n_splits * n_tiles,),
        config.warps,
        Dz_ptr=dz,
        H_ptr=h,
        Out_ptr=parts,
        n_rows=n_rows,
        n=n,
        width=width,
        n_in=n_in,
        split_rows=split_rows,
        stride_zn=dz.stride(0),
        stride_zb=dz.stride(1),
        stride_hn=h.stride(0),
        stride_hb=h.stride(1),
        ALIGN_Z=alignment(width, dz.stride(0), dz.stride(1)),
        ALIGN_H=alignment(n_in, h.stride(0), h.stride(1)),
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        BLOCK_K=config.block_k,
        EARLY=starts_early(dz.device),
    )
    torch.sum(parts, 0, out=out)
