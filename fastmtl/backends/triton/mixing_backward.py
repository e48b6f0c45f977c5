"""What follows the last hidden layer, backward: from the gradient of the layer's output to D, that of the BatchNorm's.

expert_gate_tail_kernel: one expert over a run of the batch. Rebuilds its activations h from z; gets their gradient from
the experts' own output (plain), the head's (times its weight) or the gates' (sum over gates of weight times dy), and
for the gates leaves <dy, h> in Dg. Writes D, unless the GEMMs rebuild it, and the run's sums for batch_norm.add_up.
Activations that look at whole rows go through its plain form below the last layer too.
expert_gate_softmax_kernel: one gate over a run: from Dg through the softmax to the gates' part of D, and its sums.

fp32 arithmetic; z, the output's gradient and the saved softmax are only read; deterministic.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...spec import LEARNED_ACTIVATIONS, ExpertGateParams
from . import configs
from .activations import activate, activate_bwd, kept, learned_scalar
from .batch_norm import SUMS
from .common import narrow, normalise
from .hidden import Hidden
from .launch import cdiv, launch, power_of_two
from .layer_plan import LayerPlan
from .losses import TaskLosses, known_labels, loss_parts, no_task_losses
from .mixing import gate_logits
from .rebuilt import Mixed


@triton.jit
def expert_gate_tail_kernel(
    Dy_ptr,  # by expert (gate where MIX), row, unit; [B, E] where HEAD
    Z_ptr,  # [B, pitch]
    Stat_ptr,  # [4, pitch]
    Alpha_ptr,
    Seed_ptr,
    Weight_ptr,  # [E, H]; read where HEAD
    Bias_ptr,  # [E]; read where LOSS, as are those that follow
    Label_ptr,  # [B, E]
    Binary_ptr,  # [E] bool
    Factor_ptr,  # [E]
    Counts_ptr,  # [n_counts, E] int32
    Logit_ptr,  # [B, E] fp32; written where LOSS
    Zg_ptr,  # [B, pitch_g]; read where MIX, as are those that follow
    Statg_ptr,  # [4, pitch_g]
    Members_ptr,  # [E, GATES2] int32
    Soft_ptr,  # [2, GATES2, B]
    Dg_ptr,  # [blocks, B, n_gate_columns] fp32
    Share_ptr,  # [B, n_gate_columns] fp32: the softmax
    D_ptr,  # [B, pitch]; written where WRITES
    Part_ptr,  # [runs, SUMS, pitch] fp32
    n_rows,
    run_rows,
    n_experts,
    n_gates,
    n_units,
    n_gate_columns,
    first_gate_column,
    pitch,
    pitch_g,
    stride_de,
    stride_db,
    stride_lb,
    stride_le,
    n_counts,
    drop,
    ACT: tl.constexpr,
    DROPOUT: tl.constexpr,
    LAYER: tl.constexpr,
    HEAD: tl.constexpr,
    LOSS: tl.constexpr,  # whether Dy is made here, from labels: a block holds all units then
    MIX: tl.constexpr,
    WRITES: tl.constexpr,
    LEARNED: tl.constexpr,
    SUMS: tl.constexpr,
    GATES2: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    e = tl.program_id(0) % n_experts  # neighbours share the rows of dy
    n_blocks = tl.cdiv(n_units, BLOCK_H)
    block = (tl.program_id(0) // n_experts) % n_blocks
    run = tl.program_id(0) // n_experts // n_blocks
    m = tl.arange(0, BLOCK_B)
    g = tl.arange(0, GATES2)
    h = block * BLOCK_H + tl.arange(0, BLOCK_H)
    inside = h < n_units
    c = e * n_units + h
    alpha = learned_scalar(Alpha_ptr, e, ACT)
    sum_d = tl.zeros([BLOCK_H], tl.float32)
    sum_dz = tl.zeros([BLOCK_H], tl.float32)
    sum_alpha = tl.zeros([BLOCK_H], tl.float32)
    sum_weight = tl.zeros([BLOCK_H], tl.float32)
    sum_dy = tl.zeros([BLOCK_B], tl.float32)
    sum_loss = tl.zeros([BLOCK_B], tl.float32)
    if HEAD:
        head = tl.load(Weight_ptr + c, mask=inside, other=0.0)
    if LOSS:
        bias = tl.load(Bias_ptr + e)
        binary = tl.load(Binary_ptr + e) != 0
        per_row = 1.0 / known_labels(Counts_ptr, e, n_experts, n_counts, BLOCK_P)
        factor = tl.load(Factor_ptr + e) * per_row
    run_row = run.to(tl.int64) * run_rows
    for start in range(0, tl.minimum(n_rows - run_row, run_rows).to(tl.int32), BLOCK_B):
        first_row = run_row + start
        row = first_row + m
        live = row < n_rows
        mask = live[:, None] & inside[None, :]
        centred, y = normalise(Z_ptr, Stat_ptr, first_row, m, live, c, inside, pitch)
        if DROPOUT:
            keep = kept(Seed_ptr, row, e, block * BLOCK_H, drop, LAYER, BLOCK_H)
        if HEAD or MIX:
            a = activate(y, alpha, inside[None, :], n_units, ACT)
            if DROPOUT:
                a = tl.where(keep, a * (1.0 / (1.0 - drop)), 0.0)
        if MIX:
            logit, column = gate_logits(Zg_ptr, Statg_ptr, Members_ptr, e, row, live, pitch_g, GATES2)
            at_soft = Soft_ptr + g.to(tl.int64)[:, None] * n_rows + row[None, :]
            top = tl.load(at_soft, mask=live[None, :], other=0.0)
            total = tl.load(at_soft + tl.cast(n_rows, tl.int64) * GATES2, mask=live[None, :], other=1.0)
            weight = tl.exp(logit - top) / total
            at = (
                Dy_ptr + g.to(tl.int64)[:, None, None] * stride_de + (row[:, None] * stride_db + h[None, :])[None, :, :]
            )
            there = (g < n_gates)[:, None, None] & mask[None, :, :]
            dy = tl.load(at, mask=there, other=0.0).to(tl.float32)
            dh = tl.sum(weight[:, :, None] * dy, axis=0)
            dg = tl.sum(tl.where(there, dy * a[None, :, :], 0.0), axis=2)
            at_gate = row[None, :] * n_gate_columns + (column - first_gate_column)[:, None]
            mixes = (column >= 0)[:, None] & live[None, :]
            tl.store(Dg_ptr + block.to(tl.int64) * n_rows * n_gate_columns + at_gate, dg, mask=mixes)
            if block == 0:
                tl.store(Share_ptr + at_gate, weight, mask=mixes)
        elif HEAD:
            if LOSS:
                z = tl.sum(tl.where(inside[None, :], a * head[None, :], 0.0), axis=1) + bias
                tl.store(Logit_ptr + row * n_experts + e, z, mask=live)
                label = tl.load(Label_ptr + row * stride_lb + e * stride_le, mask=live, other=float("nan"))
                loss, dy = loss_parts(z, label, binary)
                sum_loss += loss
                dy = dy * factor
            else:
                dy = tl.load(Dy_ptr + row * stride_db + e * stride_de, mask=live, other=0.0).to(tl.float32)
            sum_dy += dy
            dh = dy[:, None] * head[None, :]
            sum_weight += tl.sum(tl.where(mask, dy[:, None] * a, 0.0), axis=0)
        else:
            at = Dy_ptr + e.to(tl.int64) * stride_de + row[:, None] * stride_db + h[None, :]
            dh = tl.load(at, mask=mask, other=0.0).to(tl.float32)
        if DROPOUT:
            dh = tl.where(keep, dh * (1.0 / (1.0 - drop)), 0.0)
        d, dalpha = activate_bwd(y, dh, alpha, inside[None, :], n_units, ACT)
        if WRITES:
            stored = narrow(d, D_ptr.dtype.element_ty)
            tl.store(D_ptr + row[:, None] * pitch + c[None, :], stored, mask=mask)
            d = stored.to(tl.float32)
        d = tl.where(mask, d, 0.0)
        sum_d += tl.sum(d, axis=0)
        sum_dz += tl.sum(d * centred, axis=0)
        if LEARNED:
            sum_alpha += tl.sum(tl.where(mask, dalpha, 0.0), axis=0)
    part = Part_ptr + run.to(tl.int64) * SUMS * pitch + c
    inv_std = tl.load(Stat_ptr + pitch + c, mask=inside, other=0.0)
    tl.store(part, sum_d, mask=inside)
    tl.store(part + pitch, sum_dz * inv_std, mask=inside)
    if LEARNED:
        tl.store(part + 2 * pitch, sum_alpha, mask=inside)
    if HEAD:
        tl.store(part + 3 * pitch, sum_weight, mask=inside)
        each = tl.zeros([BLOCK_H], tl.float32)
        tl.store(part + 4 * pitch, each + tl.sum(sum_dy, axis=0), mask=inside)
        if LOSS:
            tl.store(part + 5 * pitch, each + tl.sum(sum_loss, axis=0) * per_row, mask=inside)


@triton.jit
def expert_gate_softmax_kernel(
    Zg_ptr,
    Statg_ptr,
    Soft_ptr,
    Spans_ptr,  # [G, 3] int32: LayerPlan.gate_spans
    Dg_ptr,  # [n_blocks, B, n_gate_columns]
    D_ptr,  # [B, pitch_g]
    Part_ptr,  # [runs, SUMS, pitch_g]
    n_rows,
    run_rows,
    n_gates,
    n_blocks,
    n_gate_columns,
    first_gate_column,
    pitch_g,
    SUMS: tl.constexpr,
    GATES2: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    g = tl.program_id(0) % n_gates
    run = tl.program_id(0) // n_gates
    m = tl.arange(0, BLOCK_B)
    p = tl.arange(0, BLOCK_C)
    first_column = tl.load(Spans_ptr + g * 3)
    n_columns = tl.load(Spans_ptr + g * 3 + 1)
    column = first_column + p
    inside = p < n_columns
    pad = tl.arange(0, 16)
    padded = pad < tl.load(Spans_ptr + g * 3 + 2)
    sum_d = tl.zeros([BLOCK_C], tl.float32)
    sum_dz = tl.zeros([BLOCK_C], tl.float32)
    run_row = run.to(tl.int64) * run_rows
    for start in range(0, tl.minimum(n_rows - run_row, run_rows).to(tl.int32), BLOCK_B):
        first_row = run_row + start
        row = first_row + m
        live = row < n_rows
        mask = live[:, None] & inside[None, :]
        centred, y = normalise(Zg_ptr, Statg_ptr, first_row, m, live, column, inside, pitch_g)
        soft = Soft_ptr + g.to(tl.int64) * n_rows + row
        top = tl.load(soft, mask=live, other=0.0)
        total = tl.load(soft + tl.cast(n_rows, tl.int64) * GATES2, mask=live, other=1.0)
        weight = tl.where(mask, tl.exp(y - top[:, None]) / total[:, None], 0.0)
        dg = tl.zeros([BLOCK_B, BLOCK_C], tl.float32)
        for block in range(n_blocks):
            at = (tl.cast(n_rows, tl.int64) * block + row)[:, None] * n_gate_columns + (column - first_gate_column)[
                None, :
            ]
            dg += tl.load(Dg_ptr + at, mask=mask, other=0.0)
        # relative to the heaviest expert, so that a gate that is almost sure of it keeps a gradient
        heaviest = (weight == tl.max(weight, axis=1)[:, None]).to(tl.float32)
        dg = dg - (tl.sum(heaviest * dg, axis=1) / tl.sum(heaviest, axis=1))[:, None]
        d = weight * (dg - tl.sum(weight * dg, axis=1)[:, None])
        stored = narrow(d, D_ptr.dtype.element_ty)
        tl.store(D_ptr + row[:, None] * pitch_g + column[None, :], stored, mask=mask)
        nothing = tl.zeros([BLOCK_B, 16], D_ptr.dtype.element_ty)
        behind = D_ptr + row[:, None] * pitch_g + (first_column + n_columns + pad)[None, :]
        tl.store(behind, nothing, mask=live[:, None] & padded[None, :])
        d = stored.to(tl.float32)
        sum_d += tl.sum(d, axis=0)
        sum_dz += tl.sum(d * centred, axis=0)
    part = Part_ptr + run.to(tl.int64) * SUMS * pitch_g + column
    inv_std = tl.load(Statg_ptr + pitch_g + column, mask=inside, other=0.0)
    tl.store(part, sum_d, mask=inside)
    tl.store(part + pitch_g, sum_dz * inv_std, mask=inside)


def _tail(
    hidden: Hidden,
    grad: Tensor,
    strides: tuple[int, int],
    d: Tensor | None,
    mixed: tuple[Hidden, LayerPlan, Tensor, Tensor, Tensor] | None,
    weight: Tensor | None,
    losses: TaskLosses | None = None,
) -> Tensor:
    """Write ``d [B, pitch]`` where there is one; returns the pieces of its sums ``[runs, SUMS, pitch]``. ``mixed``: the
    first hidden layer, the plan, the saved softmax, and Dg and the gates' shares to write."""
    n_rows, units, n_experts = len(hidden.z), hidden.units, hidden.spec.n_experts
    n_gates2 = 1 if mixed is None else mixed[1].n_gates2
    whole = hidden.row_wise or losses is not None
    config = configs.GEMM.rows(units, whole, hidden.dropped, n_gates2, backward=True)
    n_runs = cdiv(n_rows, config.run)
    part = torch.empty(n_runs, SUMS, hidden.pitch, dtype=torch.float32, device=grad.device)
    first, plan, soft, dg, share = mixed if mixed is not None else (hidden, None, part, part, part)
    launch(
        expert_gate_tail_kernel,
        (n_runs * cdiv(units, config.block_h) * n_experts,),
        config.warps,
        Dy_ptr=grad,
        Z_ptr=hidden.z,
        **hidden.arguments(),
        Weight_ptr=hidden.stat if weight is None else weight,
        **(no_task_losses(hidden.stat) if losses is None else losses.arguments()),
        Zg_ptr=first.z,
        Statg_ptr=first.stat,
        Members_ptr=hidden.stat if plan is None else plan.members,
        Soft_ptr=soft,
        Dg_ptr=dg,
        Share_ptr=share,
        D_ptr=hidden.z if d is None else d,
        Part_ptr=part,
        n_rows=n_rows,
        run_rows=config.run,
        n_experts=n_experts,
        n_gates=len(hidden.spec.gates),
        n_units=units,
        n_gate_columns=dg.shape[2],
        first_gate_column=0 if plan is None else plan.gate_start[0],
        pitch=hidden.pitch,
        pitch_g=first.pitch,
        stride_de=strides[0],
        stride_db=strides[1],
        HEAD=weight is not None,
        LOSS=losses is not None,
        MIX=mixed is not None,
        WRITES=d is not None,
        LEARNED=hidden.spec.activation in LEARNED_ACTIVATIONS,
        SUMS=SUMS,
        GATES2=n_gates2,
        BLOCK_B=config.block_b,
        BLOCK_H=config.block_h,
        BLOCK_P=configs.GEMM.losses(n_rows).pieces,
    )
    return part


def mix_bwd(
    grad: Tensor, hidden: Hidden, d: Tensor | None, first: Hidden, first_d: Tensor, plan: LayerPlan, soft: Tensor
) -> tuple[Mixed, Tensor, Tensor]:
    """From the gradient ``[G, B, H]`` of the mixed experts to D of the last hidden layer (written where there is a
    ``d``) and of the gates (in ``first_d``, the first layer's); returns what rebuilds the former, and the pieces of the
    sums of both."""
    n_rows = len(hidden.z)
    rows = configs.GEMM.rows(hidden.units, hidden.row_wise, hidden.dropped, plan.n_gates2, backward=True)
    n_blocks = cdiv(hidden.units, rows.block_h)
    n_gate_columns = first.pitch - plan.gate_start[0]
    dg = torch.empty(n_blocks, n_rows, n_gate_columns, dtype=torch.float32, device=grad.device)
    share = torch.empty(n_rows, n_gate_columns, dtype=torch.float32, device=grad.device)
    part = _tail(hidden, grad, (grad.stride(0), grad.stride(1)), d, (first, plan, soft, dg, share), None)
    block_c = power_of_two(plan.widest_gate)
    config = configs.GEMM.softmax(block_c)
    n_runs = cdiv(n_rows, config.run)
    gate_part = torch.empty(n_runs, SUMS, first.pitch, dtype=torch.float32, device=grad.device)
    launch(
        expert_gate_softmax_kernel,
        (n_runs * len(plan.spec.gates),),
        config.warps,
        Zg_ptr=first.z,
        Statg_ptr=first.stat,
        Soft_ptr=soft,
        Spans_ptr=plan.gate_spans,
        Dg_ptr=dg,
        D_ptr=first_d,
        Part_ptr=gate_part,
        n_rows=n_rows,
        run_rows=config.run,
        n_gates=len(plan.spec.gates),
        n_blocks=n_blocks,
        n_gate_columns=n_gate_columns,
        first_gate_column=plan.gate_start[0],
        pitch_g=first.pitch,
        SUMS=SUMS,
        GATES2=plan.n_gates2,
        BLOCK_B=config.block_b,
        BLOCK_C=block_c,
    )
    return Mixed(grad, share, plan), part, gate_part


def head_bwd(grad: Tensor, hidden: Hidden, d: Tensor, params: ExpertGateParams) -> Tensor:
    """From the gradient ``[B, E]`` of the heads to D; returns the pieces of its sums."""
    return _tail(hidden, grad, (grad.stride(1), grad.stride(0)), d, None, params.out_weight)


def losses_bwd(losses: TaskLosses, hidden: Hidden, d: Tensor, params: ExpertGateParams) -> Tensor:
    """The heads' forward, the losses and the way back to D in one pass; returns the pieces of its sums."""
    return _tail(hidden, losses.logits, (0, 0), d, None, params.out_weight, losses)


def experts_bwd(grad: Tensor, hidden: Hidden, d: Tensor) -> Tensor:
    """From the gradient ``[E, B, H]`` of the experts' output to D; returns the pieces of its sums."""
    return _tail(hidden, grad, (grad.stride(0), grad.stride(1)), d, None, None)


def activations_bwd(grad: Tensor, hidden: Hidden, d: Tensor | None) -> Tensor:
    """From the gradient ``[B, pitch]`` of the activations to D, written where there is a ``d``; returns the pieces of
    its sums."""
    return _tail(hidden, grad, (hidden.units, hidden.pitch), d, None, None)
