"""What follows the last hidden layer, forward: the gates' softmax and mix, the towers' last Linear(H, 1), or nothing.

expert_gate_mix_kernel: gate BatchNorm and softmax, expert BatchNorm, activation and dropout, and the mix for all gates,
in one pass over z. A program owns rows of the batch and units; it writes the softmax (which the backward reads) and
takes it back as it goes through the experts, every gate's sum in registers, so that z is read once.
expert_gate_rows_kernel: activations of one expert, written or multiplied with the head's weight.

fp32 arithmetic whatever the storage; deterministic.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...spec import ExpertGateParams
from . import configs
from .activations import activate, kept, learned_scalar
from .common import begin, narrow, normalise
from .hidden import Hidden
from .launch import cdiv, launch, power_of_two, starts_early
from .layer_plan import LayerPlan


@triton.jit
def expert_gate_mix_kernel(
    Z_ptr,  # [B, pitch], last hidden layer
    Stat_ptr,  # [4, pitch]
    Alpha_ptr,
    Seed_ptr,
    Zg_ptr,  # [B, pitch_g], first hidden layer, which holds the gates
    Statg_ptr,  # [4, pitch_g]
    Spans_ptr,  # [G, 3] int32: LayerPlan.gate_spans
    Members_ptr,  # [E, GATES2] int32: LayerPlan.members
    Share_ptr,  # [B, n_gate_columns] fp32: the softmax, written
    Y_ptr,  # [G, B, H]
    n_rows,
    n_experts,
    n_units,
    n_gate_columns,
    first_gate_column,
    pitch,
    pitch_g,
    stride_yg,
    drop,
    ACT: tl.constexpr,
    DROPOUT: tl.constexpr,
    LAYER: tl.constexpr,
    GATES: tl.constexpr,
    GATES2: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_C: tl.constexpr,
    AHEAD: tl.constexpr,
    EARLY: tl.constexpr,
):
    begin(EARLY)
    n_blocks = tl.cdiv(n_units, BLOCK_H)
    block = tl.program_id(0) % n_blocks
    first_row = (tl.program_id(0) // n_blocks).to(tl.int64) * BLOCK_B
    m = tl.arange(0, BLOCK_B)
    p = tl.arange(0, BLOCK_C)
    live = m < n_rows - first_row
    h = block * BLOCK_H + tl.arange(0, BLOCK_H)
    inside = h < n_units
    mask = live[:, None] & inside[None, :]
    z_rows = Z_ptr + first_row * pitch
    at_z = m[:, None] * pitch + h[None, :]
    coming: tl.tuple = ()  # so many experts' are on their way all the time, from here on
    for i in tl.static_range(AHEAD):
        coming += (tl.load(z_rows + (at_z + i * n_units), mask=mask & (i < n_experts), other=0.0),)
    of_rows = Share_ptr + first_row * n_gate_columns
    for g in tl.static_range(GATES):
        column = tl.load(Spans_ptr + g * 3) + p
        mixes = p < tl.load(Spans_ptr + g * 3 + 1)
        there = live[:, None] & mixes[None, :]
        _from_mean, logit = normalise(Zg_ptr, Statg_ptr, first_row, m, live, column, mixes, pitch_g)
        logit = tl.where(mixes[None, :], logit, float("-inf"))
        part = tl.exp(logit - tl.max(logit, axis=1)[:, None])
        share = part / tl.sum(part, axis=1)[:, None]
        at_share = m[:, None] * n_gate_columns + (column - first_gate_column)[None, :]
        tl.store(of_rows + at_share, share, mask=there)
    tl.debug_barrier()  # what other threads of the program have written of the softmax
    sums: tl.tuple = ()
    for _g in tl.static_range(GATES):
        sums += (tl.zeros([BLOCK_B, BLOCK_H], tl.float32),)
    for e in range(n_experts):
        z = coming[0]
        rest: tl.tuple = ()
        for i in tl.static_range(1, AHEAD):
            rest += (coming[i],)
        later = at_z + (e + AHEAD) * n_units
        rest += (tl.load(z_rows + later, mask=mask & (e + AHEAD < n_experts), other=0.0),)
        coming = rest
        c = e * n_units + h
        mean = tl.load(Stat_ptr + c, mask=inside, other=0.0)[None, :]
        scale = tl.load(Stat_ptr + 2 * pitch + c, mask=inside, other=0.0)[None, :]
        beta = tl.load(Stat_ptr + 3 * pitch + c, mask=inside, other=0.0)[None, :]
        y = (z.to(tl.float32) - mean) * scale + beta
        a = activate(y, learned_scalar(Alpha_ptr, e, ACT), inside[None, :], n_units, ACT)
        if DROPOUT:
            keep = kept(Seed_ptr, first_row + m, e, block * BLOCK_H, drop, LAYER, BLOCK_H)
            a = tl.where(keep, a * (1.0 / (1.0 - drop)), 0.0)
        mixed: tl.tuple = ()
        for g in tl.static_range(GATES):
            member = tl.load(Members_ptr + e * GATES2 + g)
            at = m * n_gate_columns + (member - first_gate_column)
            weight = tl.load(of_rows + at, mask=live & (member >= 0), other=0.0)
            mixed += (sums[g] + weight[:, None] * a,)
        sums = mixed
    at_y = m[:, None] * n_units + h[None, :]
    for g in tl.static_range(GATES):
        out = Y_ptr + g * tl.cast(stride_yg, tl.int64) + first_row * n_units
        tl.store(out + at_y, narrow(sums[g], Y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def expert_gate_rows_kernel(
    Z_ptr,
    Stat_ptr,
    Alpha_ptr,
    Seed_ptr,
    Weight_ptr,  # [E, H]; read where HEAD, as is Bias
    Bias_ptr,  # [E]
    Y_ptr,  # by expert, row, unit; [B, E] where HEAD
    n_rows,
    n_experts,
    n_units,
    pitch,
    stride_ye,
    stride_yb,
    drop,
    ACT: tl.constexpr,
    DROPOUT: tl.constexpr,
    LAYER: tl.constexpr,
    HEAD: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_H: tl.constexpr,
    EARLY: tl.constexpr,
):
    begin(EARLY)
    e = tl.program_id(0) % n_experts
    first_row = (tl.program_id(0) // n_experts).to(tl.int64) * BLOCK_B
    m = tl.arange(0, BLOCK_B)
    row = first_row + m
    live = row < n_rows
    alpha = learned_scalar(Alpha_ptr, e, ACT)
    out = Y_ptr + e.to(tl.int64) * stride_ye + row * stride_yb
    total = tl.zeros([BLOCK_B], tl.float32)
    for start in range(0, n_units, BLOCK_H):
        h = start + tl.arange(0, BLOCK_H)
        inside = h < n_units
        c = e * n_units + h
        _centred, normal = normalise(Z_ptr, Stat_ptr, first_row, m, live, c, inside, pitch)
        a = activate(normal, alpha, inside[None, :], n_units, ACT)
        if DROPOUT:
            a = tl.where(kept(Seed_ptr, row, e, start, drop, LAYER, BLOCK_H), a * (1.0 / (1.0 - drop)), 0.0)
        if HEAD:
            weight = tl.load(Weight_ptr + c, mask=inside, other=0.0)
            total += tl.sum(tl.where(inside[None, :], a * weight[None, :], 0.0), axis=1)
        else:
            mask = live[:, None] & inside[None, :]
            tl.store(out[:, None] + h[None, :], narrow(a, Y_ptr.dtype.element_ty), mask=mask)
    if HEAD:
        tl.store(out, total + tl.load(Bias_ptr + e), mask=live)


def mix(hidden: Hidden, first: Hidden, plan: LayerPlan) -> tuple[Tensor, Tensor]:
    """The mixed experts ``[G, B, H]``, and the gates' softmax ``[B, columns of the gates]`` fp32, in the order of the
    first layer's columns; those that pad are not written."""
    spec, n_rows, units, device = plan.spec, len(hidden.z), hidden.units, hidden.z.device
    y = torch.empty(len(spec.gates), n_rows, units, dtype=hidden.z.dtype, device=device)
    share = torch.empty(n_rows, first.pitch - plan.gate_start[0], dtype=torch.float32, device=device)
    config = configs.EXPERT_GATE.mix(n_rows, units, hidden.row_wise, hidden.dropped, len(spec.gates))
    launch(
        expert_gate_mix_kernel,
        (cdiv(n_rows, config.block_b) * cdiv(units, config.block_h),),
        config.warps,
        Z_ptr=hidden.z,
        **hidden.arguments(),
        Zg_ptr=first.z,
        Statg_ptr=first.stat,
        Spans_ptr=plan.gate_spans,
        Members_ptr=plan.members,
        Share_ptr=share,
        Y_ptr=y,
        n_rows=n_rows,
        n_experts=spec.n_experts,
        n_units=units,
        n_gate_columns=share.shape[1],
        first_gate_column=plan.gate_start[0],
        pitch=hidden.pitch,
        pitch_g=first.pitch,
        stride_yg=n_rows * units,
        GATES=len(spec.gates),
        GATES2=plan.n_gates2,
        BLOCK_B=config.block_b,
        BLOCK_H=config.block_h,
        BLOCK_C=power_of_two(plan.widest_gate),
        AHEAD=config.blocks,
        EARLY=starts_early(device),
    )
    return y, share


def _rows(hidden: Hidden, y: Tensor, stride_ye: int, stride_yb: int, weight: Tensor, bias: Tensor, head: bool) -> None:
    n_rows, n_experts, units = len(hidden.z), hidden.spec.n_experts, hidden.units
    config = configs.EXPERT_GATE.rows(units, hidden.row_wise, hidden.dropped)
    launch(
        expert_gate_rows_kernel,
        (cdiv(n_rows, config.block_b) * n_experts,),
        config.warps,
        Z_ptr=hidden.z,
        **hidden.arguments(),
        Weight_ptr=weight,
        Bias_ptr=bias,
        Y_ptr=y,
        n_rows=n_rows,
        n_experts=n_experts,
        n_units=units,
        pitch=hidden.pitch,
        stride_ye=stride_ye,
        stride_yb=stride_yb,
        HEAD=head,
        BLOCK_B=config.block_b,
        BLOCK_H=config.block_h,
        EARLY=starts_early(y.device),
    )


def head(hidden: Hidden, params: ExpertGateParams) -> Tensor:
    """The experts' last Linear(H, 1): ``[B, E]`` fp32."""
    assert params.out_weight is not None
    assert params.out_bias is not None
    n_experts = hidden.spec.n_experts
    y = torch.empty(len(hidden.z), n_experts, dtype=torch.float32, device=hidden.z.device)
    _rows(hidden, y, 1, n_experts, params.out_weight, params.out_bias, True)
    return y


def experts(hidden: Hidden) -> Tensor:
    """The activations as they leave a layer without gates: ``[E, B, H]``."""
    n_rows, n_experts, units = len(hidden.z), hidden.spec.n_experts, hidden.units
    y = torch.empty(n_experts, n_rows, units, dtype=hidden.z.dtype, device=hidden.z.device)
    _rows(hidden, y, n_rows * units, units, hidden.stat, hidden.stat, False)
    return y


def activations(hidden: Hidden) -> Tensor:
    """The activations where the next product reads them: ``[B, pitch]`` like z."""
    # torch's bf16 product on the CPU, which stands in for a GPU's, multiplies what lies behind a row by 0
    y = (torch.empty_like if hidden.z.is_cuda else torch.zeros_like)(hidden.z)
    _rows(hidden, y, hidden.units, hidden.pitch, hidden.stat, hidden.stat, False)
    return y
