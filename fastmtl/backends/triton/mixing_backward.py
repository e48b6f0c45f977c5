"""What follows the last hidden layer, backward: from the gradient of the layer's output to D, that of the BatchNorm's.

expert_gate_tail_kernel: one expert over a run of the batch. Rebuilds its activations h from z; gets their gradient from
the experts' own output (plain), the head's (times its weight) or the gates' (sum over gates of weight times dy), and
for the gates leaves <dy, h> in Dg. Writes D and the run's sums for batch_norm.add_up.
Activations that look at whole rows go through its plain form below the last layer too (passes.py has the others').
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
from .common import begin, narrow
from .hidden import Hidden
from .launch import INTERPRET, cdiv, launch, power_of_two, starts_early
from .layer_plan import LayerPlan
from .losses import TaskLosses, known_labels, loss_parts, no_task_losses


@triton.jit
def block_rows(
    z_run, dy_runs, share_run, members, at_z, at_dy, row, inside, start, n_here, pitch, stride_db, n_gate_columns,
    READ: tl.constexpr, GATES: tl.constexpr,
):  # fmt: skip
    """Rows ``start + row`` of a run: z, the READ blocks of dy, those of gates that mix the expert, and these gates'
    weights of it."""
    live = row < n_here - start
    z = tl.load(z_run + (start * pitch + at_z), mask=live[:, None] & inside[None, :], other=0.0)
    dys: tl.tuple = ()
    shares: tl.tuple = ()
    for g in tl.static_range(READ):
        mixes = live & (members[g] >= 0)
        dys += (tl.load(dy_runs[g] + (start * stride_db + at_dy), mask=mixes[:, None] & inside[None, :], other=0.0),)
        if g < GATES:
            at_gate = (start + row) * n_gate_columns + members[g]
            shares += (tl.load(share_run + at_gate, mask=mixes, other=0.0),)
    return z, dys, shares


@triton.jit
def _given(
    Dy_ptr, Label_ptr, first_row, row, n_live, e, stride_db, stride_de, stride_lb, stride_le, HEAD: tl.constexpr,
    LOSS: tl.constexpr,
):  # fmt: skip
    """What rows ``first_row + row`` of a head are given: their labels, or the gradients of their logits."""
    found = row
    if LOSS:
        at = (first_row + row) * stride_lb + e * stride_le
        found = tl.load(Label_ptr + at, mask=row < n_live, other=float("nan"))
    elif HEAD:
        at = (first_row + row) * stride_db + e * stride_de
        found = tl.load(Dy_ptr + at, mask=row < n_live, other=0.0)
    return found


@triton.jit
def _rounded(value, dtype: tl.constexpr):
    """As common.narrow, but two numbers at a time where they are rounded to bf16 and used in fp32 too: the compiler
    would do it one by one, on a unit that takes eight times as long."""
    if INTERPRET or dtype != tl.bfloat16:
        found = narrow(value, dtype)
    else:
        found = tl.inline_asm_elementwise(
            "cvt.rn.bf16x2.f32 $0, $2, $1;", "=r,r,r", [value], dtype=tl.bfloat16, is_pure=True, pack=2
        )
    return found


@triton.jit
def _by_expert(sums, TOGETHER: tl.constexpr):
    """``[TOGETHER, units]``, added over a block's rows."""
    rows: tl.constexpr = sums.shape[0] // TOGETHER
    return tl.sum(tl.reshape(sums, [rows, TOGETHER, sums.shape[1]]), axis=0)


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
    Members_ptr,  # [E, GATES2] int32; read where MIX, as is Share
    Share_ptr,  # [B, n_gate_columns] fp32: the softmax
    Dg_ptr,  # [blocks, B, n_gate_columns] fp32; written where MIX
    D_ptr,  # [B, pitch]; written where WRITE
    Part_ptr,  # [runs, SUMS, pitch] fp32
    n_rows,
    run_rows,
    n_experts,
    n_units,
    n_gate_columns,
    first_gate_column,
    pitch,
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
    WRITE: tl.constexpr,
    LEARNED: tl.constexpr,
    SUMS: tl.constexpr,
    GATES: tl.constexpr,
    GATES2: tl.constexpr,
    TOGETHER: tl.constexpr,  # experts of a block, a divisor of their number; more than one where MIX alone
    BLOCK_B: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_P: tl.constexpr,
    EARLY: tl.constexpr,
):
    begin(EARLY)
    n_groups = n_experts // TOGETHER
    of_group = (tl.program_id(0) % n_groups) * TOGETHER  # neighbours share the rows of dy
    n_blocks = tl.cdiv(n_units, BLOCK_H)
    block = (tl.program_id(0) // n_groups) % n_blocks
    run = tl.program_id(0) // n_groups // n_blocks
    m = tl.arange(0, BLOCK_B)
    h = block * BLOCK_H + tl.arange(0, BLOCK_H)
    inside = h < n_units
    if TOGETHER > 1:  # a block's rows are those of the batch for each of so many experts, which read the same dy
        row = m // TOGETHER
        e = of_group + m % TOGETHER
        c = e[:, None] * n_units + h[None, :]
    else:
        row = m
        e = of_group
        c = e * n_units + h[None, :]
    ROWS: tl.constexpr = BLOCK_B // TOGETHER
    VECTOR: tl.constexpr = 8 if BLOCK_H > 8 else BLOCK_H
    lane = tl.arange(0, BLOCK_H // VECTOR)[None, :]
    alpha = learned_scalar(Alpha_ptr, e, ACT)
    if TOGETHER > 1 and LEARNED:
        alpha = alpha[:, None]
    # sums over rows are kept by rows of a block, and added up once: in the loop nothing crosses a warp
    sum_d = tl.zeros([BLOCK_B, BLOCK_H], tl.float32)
    sum_dz = tl.zeros([BLOCK_B, BLOCK_H], tl.float32)
    sum_alpha = tl.zeros([BLOCK_B, BLOCK_H], tl.float32)
    sum_weight = tl.zeros([BLOCK_B, BLOCK_H], tl.float32)
    sum_dy = tl.zeros([BLOCK_B], tl.float32)
    sum_loss = tl.zeros([BLOCK_B], tl.float32)
    mean = tl.load(Stat_ptr + c, mask=inside[None, :], other=0.0)
    scale = tl.load(Stat_ptr + 2 * pitch + c, mask=inside[None, :], other=0.0)
    beta = tl.load(Stat_ptr + 3 * pitch + c, mask=inside[None, :], other=0.0)
    if HEAD:
        head = tl.load(Weight_ptr + c, mask=inside[None, :], other=0.0)
    run_row = run.to(tl.int64) * run_rows
    n_here = tl.minimum(n_rows - run_row, run_rows).to(tl.int32)
    # offsets within the run fit 32 bits
    at_z = row[:, None] * pitch + c
    at_dy = row[:, None] * stride_db + h[None, :]
    z_run = Z_ptr + run_row * pitch
    d_run = D_ptr + run_row * pitch
    dy_run = Dy_ptr + run_row * stride_db
    share_run = Share_ptr + run_row * n_gate_columns - first_gate_column
    dg_run = Dg_ptr + (tl.cast(n_rows, tl.int64) * block + run_row) * n_gate_columns - first_gate_column
    READ: tl.constexpr = GATES if MIX else (0 if HEAD else 1)
    members: tl.tuple = ()
    dy_runs: tl.tuple = ()
    for g in tl.static_range(READ):
        members += (tl.load(Members_ptr + e * GATES2 + g) if MIX else e,)
        dy_runs += (dy_run + (g if MIX else e) * tl.cast(stride_de, tl.int64),)
    following = block_rows(
        z_run, dy_runs, share_run, members, at_z, at_dy, row, inside, 0, n_here, pitch, stride_db, n_gate_columns,
        READ, GATES,
    )  # fmt: skip
    given = _given(
        Dy_ptr, Label_ptr, run_row, row, n_here, e, stride_db, stride_de, stride_lb, stride_le, HEAD, LOSS
    )  # fmt: skip
    if LOSS:
        bias = tl.load(Bias_ptr + e)
        binary = tl.load(Binary_ptr + e) != 0
        per_row = 1.0 / known_labels(Counts_ptr, e, n_experts, n_counts, BLOCK_P)
        factor = tl.load(Factor_ptr + e) * per_row
    for start in range(0, n_here, ROWS):
        live = row < n_here - start
        mask = live[:, None] & inside[None, :]
        z, dys, shares = following
        following = block_rows(
            z_run, dy_runs, share_run, members, at_z, at_dy, row, inside, start + ROWS, n_here, pitch, stride_db,
            n_gate_columns, READ, GATES,
        )  # fmt: skip  # on their way while these are worked on
        here = given
        given = _given(
            Dy_ptr, Label_ptr, run_row + start + ROWS, row, n_here - start - ROWS, e, stride_db, stride_de, stride_lb,
            stride_le, HEAD, LOSS,
        )  # fmt: skip
        centred = z.to(tl.float32) - mean
        y = centred * scale + beta
        if DROPOUT:
            expert = e[:, None] if TOGETHER > 1 else e
            keep = kept(Seed_ptr, run_row + start + row, expert, block * BLOCK_H, drop, LAYER, BLOCK_H)
        if HEAD or MIX:
            a = activate(y, alpha, inside[None, :], n_units, ACT)
            if DROPOUT:
                a = tl.where(keep, a * (1.0 / (1.0 - drop)), 0.0)
        if MIX:
            dh = tl.zeros([BLOCK_B, BLOCK_H], tl.float32)
            for g in tl.static_range(GATES):
                dy = dys[g].to(tl.float32)
                dh += shares[g][:, None] * dy
                at_gate = (start + row) * n_gate_columns + members[g]
                # each lane has the sum, and the first stores it: a block of one number a row would change hands
                lanes = tl.sum(tl.reshape(dy * a, [BLOCK_B, BLOCK_H // VECTOR, VECTOR]), axis=2)
                dg = tl.sum(lanes, axis=1)[:, None] + tl.zeros_like(lanes)
                mixes = (live & (members[g] >= 0))[:, None] & (lane == 0)
                tl.store(dg_run + (at_gate[:, None] + lane), dg, mask=mixes)
        elif HEAD:
            if LOSS:
                of_batch = run_row + start + row
                logit = tl.sum(a * head, axis=1) + bias
                tl.store(Logit_ptr + of_batch * n_experts + e, logit, mask=live)
                loss, dy = loss_parts(logit, here, binary)
                sum_loss += loss
                dy = dy * factor
            else:
                dy = here.to(tl.float32)
            sum_dy += dy
            dh = dy[:, None] * head
            sum_weight += dy[:, None] * a
        else:
            dh = dys[0].to(tl.float32)
        if DROPOUT:
            dh = tl.where(keep, dh * (1.0 / (1.0 - drop)), 0.0)
        d, dalpha = activate_bwd(y, dh, alpha, inside[None, :], n_units, ACT)
        if WRITE:
            stored = _rounded(d, D_ptr.dtype.element_ty)
            tl.store(d_run + (start * pitch + at_z), stored, mask=mask)
            d = stored.to(tl.float32)
        sum_d += d  # 0 in rows that are not there, as is their dh
        sum_dz += d * centred
        if LEARNED:
            sum_alpha += dalpha
    c_sum = (of_group + tl.arange(0, TOGETHER))[:, None] * n_units + h[None, :]
    written = inside[None, :]
    part = Part_ptr + run.to(tl.int64) * SUMS * pitch + c_sum
    inv_std = tl.load(Stat_ptr + pitch + c_sum, mask=written, other=0.0)
    tl.store(part, _by_expert(sum_d, TOGETHER), mask=written)
    tl.store(part + pitch, _by_expert(sum_dz, TOGETHER) * inv_std, mask=written)
    if LEARNED:
        tl.store(part + 2 * pitch, _by_expert(sum_alpha, TOGETHER), mask=written)
    if HEAD:
        tl.store(part + 3 * pitch, _by_expert(sum_weight, TOGETHER), mask=written)
        each = tl.zeros([1, BLOCK_H], tl.float32)
        tl.store(part + 4 * pitch, each + tl.sum(sum_dy, axis=0), mask=written)
        if LOSS:
            tl.store(part + 5 * pitch, each + tl.sum(sum_loss, axis=0) * per_row, mask=written)


@triton.jit
def expert_gate_softmax_kernel(
    Zg_ptr,  # [B, pitch_g]
    Statg_ptr,  # [4, pitch_g]
    Share_ptr,  # [B, n_gate_columns] fp32
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
    BLOCK_B: tl.constexpr,
    BLOCK_C: tl.constexpr,
    EARLY: tl.constexpr,
):
    begin(EARLY)
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
    mean = tl.load(Statg_ptr + column, mask=inside, other=0.0)[None, :]
    sum_d = tl.zeros([BLOCK_B, BLOCK_C], tl.float32)
    sum_dz = tl.zeros([BLOCK_B, BLOCK_C], tl.float32)
    run_row = run.to(tl.int64) * run_rows
    n_here = tl.minimum(n_rows - run_row, run_rows).to(tl.int32)
    at_z = m[:, None] * pitch_g + column[None, :]
    at_gate = m[:, None] * n_gate_columns + (column - first_gate_column)[None, :]
    for start in range(0, n_here, BLOCK_B):
        first_row = run_row + start
        live = m < n_here - start
        mask = live[:, None] & inside[None, :]
        z = tl.load(Zg_ptr + first_row * pitch_g + at_z, mask=mask, other=0.0)
        weight = tl.load(Share_ptr + first_row * n_gate_columns + at_gate, mask=mask, other=0.0)
        dg = tl.zeros([BLOCK_B, BLOCK_C], tl.float32)
        for block in range(n_blocks):
            of_block = Dg_ptr + (tl.cast(n_rows, tl.int64) * block + first_row) * n_gate_columns
            dg += tl.load(of_block + at_gate, mask=mask, other=0.0)
        # relative to the heaviest expert, so that a gate that is almost sure of it keeps a gradient
        heaviest = (weight == tl.max(weight, axis=1)[:, None]).to(tl.float32)
        dg = dg - (tl.sum(heaviest * dg, axis=1) / tl.sum(heaviest, axis=1))[:, None]
        d = weight * (dg - tl.sum(weight * dg, axis=1)[:, None])
        stored = narrow(d, D_ptr.dtype.element_ty)
        tl.store(D_ptr + first_row * pitch_g + at_z, stored, mask=mask)
        nothing = tl.zeros([BLOCK_B, 16], D_ptr.dtype.element_ty)
        behind = m[:, None] * pitch_g + (first_column + n_columns + pad)[None, :]
        tl.store(D_ptr + first_row * pitch_g + behind, nothing, mask=live[:, None] & padded[None, :])
        d = tl.where(mask, stored.to(tl.float32), 0.0)
        sum_d += d
        sum_dz += d * (z.to(tl.float32) - mean)
    part = Part_ptr + run.to(tl.int64) * SUMS * pitch_g + column
    inv_std = tl.load(Statg_ptr + pitch_g + column, mask=inside, other=0.0)
    tl.store(part, tl.sum(sum_d, axis=0), mask=inside)
    tl.store(part + pitch_g, tl.sum(sum_dz, axis=0) * inv_std, mask=inside)


def _tail(
    hidden: Hidden,
    grad: Tensor,
    strides: tuple[int, int],
    d: Tensor,
    mixed: tuple[LayerPlan, Tensor, Tensor] | None,
    weight: Tensor | None,
    losses: TaskLosses | None = None,
    writes: bool = True,
) -> Tensor:
    """Write ``d [B, pitch]``, where that is wanted; returns the pieces of its sums ``[runs, SUMS, pitch]``. ``mixed``:
    the plan, the softmax, and Dg to write."""
    n_rows, units, n_experts = len(hidden.z), hidden.units, hidden.spec.n_experts
    whole = hidden.row_wise or losses is not None
    config, together = configs.EXPERT_GATE.tail(units, whole, n_rows, n_experts, mixed is not None)
    n_runs = cdiv(n_rows, config.run)
    part = torch.empty(n_runs, SUMS, hidden.pitch, dtype=torch.float32, device=grad.device)
    plan, share, dg = mixed if mixed is not None else (None, part, part)
    launch(
        expert_gate_tail_kernel,
        (n_runs * cdiv(units, config.block_h) * n_experts // together,),
        config.warps,
        Dy_ptr=grad,
        Z_ptr=hidden.z,
        **hidden.arguments(),
        Weight_ptr=hidden.stat if weight is None else weight,
        **(no_task_losses(hidden.stat) if losses is None else losses.arguments()),
        Members_ptr=hidden.stat if plan is None else plan.members,
        Share_ptr=share,
        Dg_ptr=dg,
        D_ptr=d if writes else hidden.z,
        Part_ptr=part,
        n_rows=n_rows,
        run_rows=config.run,
        n_experts=n_experts,
        n_units=units,
        n_gate_columns=share.shape[-1],
        first_gate_column=0 if plan is None else plan.gate_start[0],
        pitch=hidden.pitch,
        stride_de=strides[0],
        stride_db=strides[1],
        HEAD=weight is not None,
        LOSS=losses is not None,
        MIX=plan is not None,
        WRITE=writes,
        LEARNED=hidden.spec.activation in LEARNED_ACTIVATIONS,
        SUMS=SUMS,
        GATES=0 if plan is None else len(plan.spec.gates),
        GATES2=1 if plan is None else plan.n_gates2,
        TOGETHER=together,
        BLOCK_B=config.block_b,
        BLOCK_H=config.block_h,
        BLOCK_P=configs.EXPERT_GATE.losses(n_rows).pieces,
        EARLY=starts_early(grad.device),
    )
    return part


def mix_bwd(
    grad: Tensor, hidden: Hidden, d: Tensor, first: Hidden, first_d: Tensor, plan: LayerPlan, share: Tensor,
    writes: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """From the gradient ``[G, B, H]`` of the mixed experts and the gates' softmax ``share [B, columns of the gates]``
    to D of the last hidden layer (``d [B, pitch]``, where that is wanted) and of the gates (in ``first_d``, the first
    layer's); returns the pieces of the sums of both."""
    n_rows, device = len(hidden.z), grad.device
    tail, _ = configs.EXPERT_GATE.tail(hidden.units, hidden.row_wise, n_rows, plan.spec.n_experts, True)
    n_blocks = cdiv(hidden.units, tail.block_h)
    dg = torch.empty(n_blocks, *share.shape, dtype=torch.float32, device=device)
    part = _tail(hidden, grad, (grad.stride(0), grad.stride(1)), d, (plan, share, dg), None, writes=writes)
    block_c = power_of_two(plan.widest_gate)
    config = configs.EXPERT_GATE.softmax(block_c, n_rows)
    n_runs = cdiv(n_rows, config.run)
    gate_part = torch.empty(n_runs, SUMS, first.pitch, dtype=torch.float32, device=device)
    launch(
        expert_gate_softmax_kernel,
        (n_runs * len(plan.spec.gates),),
        config.warps,
        Zg_ptr=first.z,
        Statg_ptr=first.stat,
        Share_ptr=share,
        Spans_ptr=plan.gate_spans,
        Dg_ptr=dg,
        D_ptr=first_d,
        Part_ptr=gate_part,
        n_rows=n_rows,
        run_rows=config.run,
        n_gates=len(plan.spec.gates),
        n_blocks=n_blocks,
        n_gate_columns=share.shape[1],
        first_gate_column=plan.gate_start[0],
        pitch_g=first.pitch,
        SUMS=SUMS,
        BLOCK_B=config.block_b,
        BLOCK_C=block_c,
        EARLY=starts_early(device),
    )
    return part, gate_part


def head_bwd(grad: Tensor, hidden: Hidden, d: Tensor, params: ExpertGateParams) -> Tensor:
    """From the gradient ``[B, E]`` of the heads to D; returns the pieces of its sums."""
    return _tail(hidden, grad, (grad.stride(1), grad.stride(0)), d, None, params.out_weight)


def losses_bwd(losses: TaskLosses, hidden: Hidden, d: Tensor, params: ExpertGateParams) -> Tensor:
    """The heads' forward, the losses and the way back to D in one pass; returns the pieces of its sums."""
    return _tail(hidden, losses.logits, (0, 0), d, None, params.out_weight, losses)


def experts_bwd(grad: Tensor, hidden: Hidden, d: Tensor) -> Tensor:
    """From the gradient ``[E, B, H]`` of the experts' output to D; returns the pieces of its sums."""
    return _tail(hidden, grad, (grad.stride(0), grad.stride(1)), d, None, None)


def activations_bwd(grad: Tensor, hidden: Hidden, d: Tensor) -> Tensor:
    """From the gradient ``[B, pitch]`` of activations that look at whole rows to D; returns the pieces of its sums."""
    return _tail(hidden, grad, (hidden.units, hidden.pitch), d, None, None)
