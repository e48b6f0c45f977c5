"""Passes over a hidden layer's buffers between its products: the pieces of z's statistics and of D's sums, and dz.

expert_gate_pieces_kernel: mean and M2 (sum of squared distances from it) of each column over a run of rows;
batch_norm.py merges the runs.
expert_gate_back_kernel: the sums of D, that of the BatchNorm's output, over a run of rows, from z and the gradient of
the activations, where these look at each unit alone; batch_norm.py adds the runs up.
expert_gate_dz_kernel: the gradient of z from z and D, that of the BatchNorm's output, or from the gradient of the
activations, which is turned into D on the way.

Each reads every number once, in vectors of 16 bytes a thread, many of which are on their way together: a machine's
bandwidth times its latency is some 26 KB a multiprocessor. Those that leave sums behind are programs of one warp in
long loops, which ask for several blocks before they work on the first, and with STAGES of two and more for those of the
next turns, through shared memory; dz does one block after the other, many programs side by side. fp32 arithmetic
whatever the storage; deterministic.
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
from .common import aligned, begin, narrow
from .hidden import Hidden
from .launch import alignment, cdiv, launch, starts_early


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
    BLOCKS: tl.constexpr,
    STAGES: tl.constexpr,
    EARLY: tl.constexpr,
):
    begin(EARLY)
    n_blocks = tl.cdiv(pitch, BLOCK_H)
    c = (tl.program_id(0) % n_blocks) * BLOCK_H + tl.arange(0, BLOCK_H)
    run = tl.program_id(0) // n_blocks
    m = tl.arange(0, BLOCK_B)
    inside = c < aligned(pitch, ALIGN)
    first_row = run.to(tl.int64) * run_rows
    n_live = tl.minimum(n_rows - first_row, run_rows).to(tl.int32)
    stride = aligned(pitch, ALIGN)
    rows = Z_ptr + first_row * stride
    at = m[:, None] * stride + c[None, :]
    # about each block row's first number, which is one of those that are added: at most as much cancels as there are
    about = tl.load(rows + at, mask=(m < n_live)[:, None] & inside[None, :], other=0.0).to(tl.float32)
    total = tl.zeros([BLOCK_B, BLOCK_H], tl.float32)
    square = tl.zeros([BLOCK_B, BLOCK_H], tl.float32)
    n_whole = n_live // (BLOCKS * BLOCK_B) * (BLOCKS * BLOCK_B)
    for start in tl.range(0, n_whole, BLOCKS * BLOCK_B, num_stages=STAGES):
        blocks: tl.tuple = ()
        for i in tl.static_range(BLOCKS):
            blocks += (tl.load(rows + ((start + i * BLOCK_B) * stride + at), mask=inside[None, :], other=0.0),)
        for i in tl.static_range(BLOCKS):
            apart = blocks[i].to(tl.float32) - about
            total += apart
            square += apart * apart
    for start in tl.range(n_whole, n_live, BLOCK_B, num_stages=1):
        left = (start + m < n_live)[:, None]
        z = tl.load(rows + (start * stride + at), mask=left & inside[None, :], other=0.0).to(tl.float32)
        apart = tl.where(left, z - about, 0.0)
        total += apart
        square += apart * apart
    count = tl.maximum((n_live - m + BLOCK_B - 1) // BLOCK_B, 0).to(tl.float32)[:, None]
    mean = about + total / tl.maximum(count, 1.0)
    m2 = square - total * (total / tl.maximum(count, 1.0))
    whole = tl.sum(mean * count, axis=0) / n_live.to(tl.float32)
    apart = tl.where(count > 0, mean - whole[None, :], 0.0)
    part = Part_ptr + run.to(tl.int64) * 2 * pitch + c
    tl.store(part, whole, mask=inside)
    tl.store(part + pitch, tl.sum(m2 + apart * apart * count, axis=0), mask=inside)


@triton.jit
def expert_gate_back_kernel(
    Dh_ptr,  # [B, pitch]: the gradient of the activations
    Z_ptr,  # [B, pitch]
    Stat_ptr,  # [4, pitch]
    Alpha_ptr,
    Seed_ptr,
    Part_ptr,  # [runs, SUMS, pitch] fp32: of D, of D times the normalised z, of alpha's gradient where LEARNED
    n_rows,
    run_rows,
    n_experts,
    n_units,
    pitch,
    drop,
    ACT: tl.constexpr,
    DROPOUT: tl.constexpr,
    LAYER: tl.constexpr,
    LEARNED: tl.constexpr,
    SUMS: tl.constexpr,
    ALIGN: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCKS: tl.constexpr,
    STAGES: tl.constexpr,
    EARLY: tl.constexpr,
):
    begin(EARLY)
    per_expert = tl.cdiv(n_units, BLOCK_H)
    block = tl.program_id(0) % (n_experts * per_expert)
    run = tl.program_id(0) // (n_experts * per_expert)
    e = block // per_expert
    unit = (block % per_expert) * BLOCK_H
    c = aligned(e * n_units + unit, ALIGN) + tl.arange(0, BLOCK_H)
    inside = c < aligned((e + 1) * n_units, ALIGN)
    m = tl.arange(0, BLOCK_B)
    mean = tl.load(Stat_ptr + c, mask=inside, other=0.0)[None, :]
    scale = tl.load(Stat_ptr + 2 * pitch + c, mask=inside, other=0.0)[None, :]
    beta = tl.load(Stat_ptr + 3 * pitch + c, mask=inside, other=0.0)[None, :]
    alpha = learned_scalar(Alpha_ptr, e, ACT)
    first_row = run.to(tl.int64) * run_rows
    n_live = tl.minimum(n_rows - first_row, run_rows).to(tl.int32)
    sum_d = tl.zeros([BLOCK_B, BLOCK_H], tl.float32)
    sum_dz = tl.zeros([BLOCK_B, BLOCK_H], tl.float32)
    sum_alpha = tl.zeros([BLOCK_B, BLOCK_H], tl.float32)
    stride = aligned(pitch, ALIGN)
    z_rows = Z_ptr + first_row * stride
    dh_rows = Dh_ptr + first_row * stride
    at = m[:, None] * stride + c[None, :]
    for start in tl.range(0, n_live, BLOCKS * BLOCK_B, num_stages=STAGES):
        zs: tl.tuple = ()
        dhs: tl.tuple = ()
        for i in tl.static_range(BLOCKS):
            mask = (start + i * BLOCK_B + m < n_live)[:, None] & inside[None, :]
            zs += (tl.load(z_rows + ((start + i * BLOCK_B) * stride + at), mask=mask, other=0.0),)
            dhs += (tl.load(dh_rows + ((start + i * BLOCK_B) * stride + at), mask=mask, other=0.0),)
        for i in tl.static_range(BLOCKS):
            dh = dhs[i].to(tl.float32)
            if DROPOUT:
                keep = kept(Seed_ptr, first_row + start + i * BLOCK_B + m, e, unit, drop, LAYER, BLOCK_H)
                dh = tl.where(keep, dh * (1.0 / (1.0 - drop)), 0.0)
            centred = zs[i].to(tl.float32) - mean
            d, dalpha = activate_bwd(centred * scale + beta, dh, alpha, inside[None, :], n_units, ACT)
            sum_d += d  # 0 in rows that are not there, as is their dh
            sum_dz += d * centred
            if LEARNED:
                sum_alpha += dalpha
    part = Part_ptr + run.to(tl.int64) * SUMS * pitch + c
    inv_std = tl.load(Stat_ptr + pitch + c, mask=inside, other=0.0)
    tl.store(part, tl.sum(sum_d, axis=0), mask=inside)
    tl.store(part + pitch, tl.sum(sum_dz, axis=0) * inv_std, mask=inside)
    if LEARNED:
        tl.store(part + 2 * pitch, tl.sum(sum_alpha, axis=0), mask=inside)


@triton.jit
def expert_gate_dz_kernel(
    D_ptr,  # [B, pitch]: D, or under an activation its gradient
    Z_ptr,  # [B, pitch]
    Stat_ptr,  # [4, pitch]
    Coef_ptr,  # [2, pitch]
    Alpha_ptr,
    Seed_ptr,
    Out_ptr,  # [B, pitch]; may be D
    n_rows,
    run_rows,
    first_block,  # the experts', or those behind alone
    n_experts,
    n_units,
    pitch,
    drop,
    ACT: tl.constexpr,
    DROPOUT: tl.constexpr,
    LAYER: tl.constexpr,
    ALIGN: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_H: tl.constexpr,
    EARLY: tl.constexpr,
):
    begin(EARLY)
    per_expert = tl.cdiv(n_units, BLOCK_H)
    n_columns = n_experts * n_units
    n_blocks = n_experts * per_expert + tl.cdiv(pitch - n_columns, BLOCK_H) - first_block
    block = first_block + tl.program_id(0) % n_blocks
    run = tl.program_id(0) // n_blocks
    e = block // per_expert
    behind = e >= n_experts  # the gates' columns, which hold D, and what pads them
    unit = (block % per_expert) * BLOCK_H
    c = aligned(e * n_units + unit, ALIGN) + tl.arange(0, BLOCK_H)
    end = tl.minimum((e + 1) * n_units, n_columns)
    if behind:
        c = aligned(n_columns + (block - n_experts * per_expert) * BLOCK_H, ALIGN) + tl.arange(0, BLOCK_H)
        end = pitch
    inside = c < aligned(end, ALIGN)
    m = tl.arange(0, BLOCK_B)
    mean = tl.load(Stat_ptr + c, mask=inside, other=0.0)[None, :]
    scale = tl.load(Stat_ptr + 2 * pitch + c, mask=inside, other=0.0)[None, :]
    beta = tl.load(Stat_ptr + 3 * pitch + c, mask=inside, other=0.0)[None, :]
    slope = tl.load(Coef_ptr + c, mask=inside, other=0.0)[None, :]
    shift = tl.load(Coef_ptr + pitch + c, mask=inside, other=0.0)[None, :]
    alpha = learned_scalar(Alpha_ptr, tl.minimum(e, n_experts - 1), ACT)
    first_row = run.to(tl.int64) * run_rows
    n_live = tl.minimum(n_rows - first_row, run_rows).to(tl.int32)
    rows = first_row * aligned(pitch, ALIGN)
    for start in range(0, n_live, BLOCK_B):
        mask = (start + m < n_live)[:, None] & inside[None, :]
        at = rows + (start + m)[:, None] * aligned(pitch, ALIGN) + c[None, :]
        d = tl.load(D_ptr + at, mask=mask, other=0.0).to(tl.float32)
        centred = tl.load(Z_ptr + at, mask=mask, other=0.0).to(tl.float32) - mean
        if ACT != "linear" or DROPOUT:
            dh = d
            if DROPOUT:
                keep = kept(Seed_ptr, first_row + start + m, e, unit, drop, LAYER, BLOCK_H)
                dh = tl.where(keep, dh * (1.0 / (1.0 - drop)), 0.0)
            dy, _dalpha = activate_bwd(centred * scale + beta, dh, alpha, inside[None, :], n_units, ACT)
            d = tl.where(behind, d, dy)
        # in this order: the two differences cancel where B is small
        dz = ((d - shift) - centred * slope) * scale
        tl.store(Out_ptr + at, narrow(dz, Out_ptr.dtype.element_ty), mask=mask)


def pieces(z: Tensor) -> tuple[Tensor, int]:
    """Mean and M2 of each column over runs of the batch, ``[runs, 2, pitch]``, and the rows of a run."""
    n_rows, pitch = z.shape
    config = configs.EXPERT_GATE.pieces(n_rows, pitch)
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
        BLOCKS=config.blocks,
        STAGES=config.warps.num_stages,
        EARLY=starts_early(z.device),
    )
    return part, config.run


def sums(dh: Tensor, hidden: Hidden) -> Tensor:
    """From the gradient ``dh [B, pitch]`` of activations that look at each unit alone: ``[runs, SUMS, pitch]``, pieces
    of the sums of D."""
    n_rows, pitch = dh.shape
    n_experts, units = hidden.spec.n_experts, hidden.units
    config = configs.EXPERT_GATE.back(n_rows, units, n_experts)
    n_runs = cdiv(n_rows, config.run)
    part = torch.empty(n_runs, SUMS, pitch, dtype=torch.float32, device=dh.device)
    launch(
        expert_gate_back_kernel,
        (n_runs * n_experts * cdiv(units, config.block_h),),
        config.warps,
        Dh_ptr=dh,
        Z_ptr=hidden.z,
        **hidden.arguments(),
        Part_ptr=part,
        n_rows=n_rows,
        run_rows=config.run,
        n_experts=n_experts,
        n_units=units,
        pitch=pitch,
        LEARNED=hidden.spec.activation in LEARNED_ACTIVATIONS,
        SUMS=SUMS,
        ALIGN=alignment(pitch, units, most=16),
        BLOCK_B=config.block_b,
        BLOCK_H=config.block_h,
        BLOCKS=config.blocks,
        STAGES=config.warps.num_stages,
        EARLY=starts_early(dh.device),
    )
    return part


def gradient(d: Tensor, hidden: Hidden, coef: Tensor, activated: bool) -> Tensor:
    """dz ``[B, pitch]`` of a layer.

    Args:
        d: ``[B, pitch]``, D; or, where ``activated``, of the experts the gradient of the activations (which look at
            each unit alone).
        coef: ``[2, pitch]``, see batch_norm.add_up.
    """
    out = torch.empty_like(d)
    _gradient(d, hidden, coef, activated, out, 0)
    return out


def gates_gradient(d: Tensor, hidden: Hidden, coef: Tensor) -> None:
    """The same of the columns behind the experts' alone, which hold D, in their place."""
    _gradient(d, hidden, coef, False, d, hidden.spec.n_experts)


def _gradient(d: Tensor, hidden: Hidden, coef: Tensor, activated: bool, out: Tensor, first_expert: int) -> None:
    n_rows, pitch = d.shape
    n_experts, units = hidden.spec.n_experts, hidden.units
    config = configs.EXPERT_GATE.columns(n_rows, pitch, units, 4096)
    per_expert = cdiv(units, config.block_h)
    n_blocks = (n_experts - first_expert) * per_expert + cdiv(pitch - n_experts * units, config.block_h)
    nothing = {"ACT": "linear", "DROPOUT": False}
    launch(
        expert_gate_dz_kernel,
        (cdiv(n_rows, config.run) * n_blocks,),
        config.warps,
        D_ptr=d,
        Z_ptr=hidden.z,
        **hidden.arguments() | ({} if activated else nothing),
        Coef_ptr=coef,
        Out_ptr=out,
        n_rows=n_rows,
        run_rows=config.run,
        first_block=first_expert * per_expert,
        n_experts=n_experts,
        n_units=units,
        pitch=pitch,
        ALIGN=alignment(pitch, units, most=16),
        BLOCK_B=config.block_b,
        BLOCK_H=config.block_h,
        EARLY=starts_early(d.device),
    )
