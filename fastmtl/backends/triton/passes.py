"""Passes over a hidden layer's buffers between its products: the pieces of z's statistics, and dz.

expert_gate_pieces_kernel: mean and M2 (sum of squared distances from it) of each column over a run of rows, by
Welford's update in each of a block's rows and one merge at the end; batch_norm.py merges the runs.
expert_gate_dz_kernel: the gradient of z from D, that of the BatchNorm's output, and z.

Each reads every number once; fp32 arithmetic whatever the storage; deterministic.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import configs
from .common import aligned, gradient_of_z, narrow
from .hidden import Hidden
from .launch import alignment, cdiv, launch


@triton.jit
def expert_gate_pieces_kernel(
    Z_ptr,  # [B, pitch]
    Part_ptr,  # [runs, 2, pitch] fp32: mean and M2
    n_rows,
    run_rows,
    pitch,
    ALIGN: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    n_blocks = tl.cdiv(pitch, BLOCK_H)
    c = (tl.program_id(0) % n_blocks) * BLOCK_H + tl.arange(0, BLOCK_H)
    run = tl.program_id(0) // n_blocks
    m = tl.arange(0, BLOCK_B)
    inside = c < aligned(pitch, ALIGN)
    first_row = run.to(tl.int64) * run_rows
    n_live = tl.minimum(n_rows - first_row, run_rows).to(tl.int32)
    z_rows = Z_ptr + first_row * aligned(pitch, ALIGN)
    mean = tl.zeros([BLOCK_B, BLOCK_H], tl.float32)
    m2 = tl.zeros([BLOCK_B, BLOCK_H], tl.float32)
    for start in range(0, n_live, BLOCK_B):
        live = start + m < n_live
        at = z_rows + (start + m)[:, None] * aligned(pitch, ALIGN) + c[None, :]
        z = tl.load(at, mask=live[:, None] & inside[None, :], other=0.0).to(tl.float32)
        apart = tl.where(live[:, None], z - mean, 0.0)
        mean += apart * (1.0 / (start // BLOCK_B + 1))
        m2 += apart * tl.where(live[:, None], z - mean, 0.0)
    count = tl.maximum((n_live - m + BLOCK_B - 1) // BLOCK_B, 0).to(tl.float32)[:, None]
    whole = tl.sum(mean * count, axis=0) / n_live.to(tl.float32)
    apart = tl.where(count > 0, mean - whole[None, :], 0.0)
    part = Part_ptr + run.to(tl.int64) * 2 * pitch + c
    tl.store(part, whole, mask=inside)
    tl.store(part + pitch, tl.sum(m2 + apart * apart * count, axis=0), mask=inside)


@triton.jit
def expert_gate_dz_kernel(
    D_ptr,  # [B, pitch]
    Z_ptr,  # [B, pitch]
    Stat_ptr,  # [4, pitch]
    Coef_ptr,  # [2, pitch]
    Out_ptr,  # [B, pitch]
    n_rows,
    run_rows,
    pitch,
    ALIGN: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    n_blocks = tl.cdiv(pitch, BLOCK_H)
    c = (tl.program_id(0) % n_blocks) * BLOCK_H + tl.arange(0, BLOCK_H)
    run = tl.program_id(0) // n_blocks
    m = tl.arange(0, BLOCK_B)
    inside = c < aligned(pitch, ALIGN)
    first_row = run.to(tl.int64) * run_rows
    n_live = tl.minimum(n_rows - first_row, run_rows).to(tl.int32)
    rows = first_row * aligned(pitch, ALIGN)
    for start in range(0, n_live, BLOCK_B):
        mask = (start + m < n_live)[:, None] & inside[None, :]
        at = (start + m)[:, None] * aligned(pitch, ALIGN) + c[None, :]
        dz = gradient_of_z(
            D_ptr + rows, Z_ptr + rows, Stat_ptr, Coef_ptr, at, c[None, :], pitch, mask, inside[None, :]
        )
        tl.store(Out_ptr + rows + at, narrow(dz, Out_ptr.dtype.element_ty), mask=mask)


def pieces(z: Tensor) -> tuple[Tensor, int]:
    """Mean and M2 of each column over runs of the batch, ``[runs, 2, pitch]``, and the rows of a run."""
    n_rows, pitch = z.shape
    config = configs.GEMM.columns(n_rows, pitch)
    n_runs = cdiv(n_rows, config.run)
    part = torch.empty(n_runs, 2, pitch, dtype=torch.float32, device=z.device)
    launch(
        expert_gate_pieces_kernel,
        (n_runs * cdiv(pitch, config.block_h),),
        config.warps,
        Z_ptr=z,
        Part_ptr=part,
        n_rows=n_rows,
        run_rows=config.run,
        pitch=pitch,
        ALIGN=alignment(pitch),
        BLOCK_B=config.block_b,
        BLOCK_H=config.block_h,
    )
    return part, config.run


def gradient(d: Tensor, hidden: Hidden, coef: Tensor) -> Tensor:
    """dz ``[B, pitch]`` of a layer.

    Args:
        d: ``[B, pitch]``, the gradient of the BatchNorm's output.
        coef: ``[2, pitch]``, see batch_norm.add_up.
    """
    n_rows, pitch = d.shape
    config = configs.GEMM.columns(n_rows, pitch)
    out = torch.empty_like(d)
    launch(
        expert_gate_dz_kernel,
        (cdiv(n_rows, config.run) * cdiv(pitch, config.block_h),),
        config.warps,
        D_ptr=d,
        Z_ptr=hidden.z,
        Stat_ptr=hidden.stat,
        Coef_ptr=coef,
        Out_ptr=out,
        n_rows=n_rows,
        run_rows=config.run,
        pitch=pitch,
        ALIGN=alignment(pitch),
        BLOCK_B=config.block_b,
        BLOCK_H=config.block_h,
    )
    return out
