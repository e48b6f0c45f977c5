"""What follows the last hidden layer, forward: the gates' softmax and mix, the towers' last Linear(H, 1), or nothing.

expert_gate_mix_kernel: gate BatchNorm and softmax, expert BatchNorm, activation and dropout, and the mix for all gates,
in one pass over z. A program owns rows of the batch and units; it keeps every gate's sum in registers while it goes
through the experts, so that z is read once.
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
from .common import narrow, normalise
from .hidden import Hidden
from .launch import cdiv, launch
from .layer_plan import LayerPlan


@triton.jit
def gate_logits(Zg_ptr, Statg_ptr, Members_ptr, expert, row, live, pitch, GATES2: tl.constexpr):
    """What each gate's BatchNorm says of one expert, ``[GATES2, rows]`` (-inf where it does not mix it), and the
    columns in which it does (-1)."""
    column = tl.load(Members_ptr + expert * GATES2 + tl.arange(0, GATES2))
    mixes = column >= 0
    c = tl.where(mixes, column, 0)
    at = Zg_ptr + row[None, :] * pitch + c[:, None]
    z = tl.load(at, mask=mixes[:, None] & live[None, :], other=0.0).to(tl.float32)
    mean = tl.load(Statg_ptr + c, mask=mixes, other=0.0)
    scale = tl.load(Statg_ptr + 2 * pitch + c, mask=mixes, other=0.0)
    beta = tl.load(Statg_ptr + 3 * pitch + c, mask=mixes, other=0.0)
    y = (z - mean[:, None]) * scale[:, None] + beta[:, None]
    return tl.where(mixes[:, None], y, float("-inf")), column


@triton.jit
def expert_gate_mix_kernel(
    Z_ptr,  # [B, pitch], last hidden layer
    Stat_ptr,  # [4, pitch]
    Alpha_ptr,
    Seed_ptr,
    Zg_ptr,  # [B, pitch_g], first hidden layer, which holds the gates
    Statg_ptr,  # [4, pitch_g]
    Members_ptr,  # [E, GATES2] int32: LayerPlan.members
    Soft_ptr,  # [2, GATES2, B] fp32: largest logit and sum of exponentials of each gate
    Y_ptr,  # [G, B, H]
    n_rows,
    n_experts,
    n_gates,
    n_units,
    pitch,
    pitch_g,
    stride_yg,
    drop,
    ACT: tl.constexpr,
    DROPOUT: tl.constexpr,
    LAYER: tl.constexpr,
    GATES2: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    n_blocks = tl.cdiv(n_units, BLOCK_H)
    block = tl.program_id(0) % n_blocks
    first_row = (tl.program_id(0) // n_blocks).to(tl.int64) * BLOCK_B
    m = tl.arange(0, BLOCK_B)
    row = first_row + m
    live = row < n_rows
    g = tl.arange(0, GATES2)
    h = block * BLOCK_H + tl.arange(0, BLOCK_H)
    inside = h < n_units
    top = tl.full([GATES2, BLOCK_B], float("-inf"), tl.float32)
    total = tl.zeros([GATES2, BLOCK_B], tl.float32)
    for e in range(n_experts):
        logit, _member = gate_logits(Zg_ptr, Statg_ptr, Members_ptr, e, row, live, pitch_g, GATES2)
        higher = tl.maximum(top, logit)
        shift = tl.where(higher == float("-inf"), 0.0, higher)  # no expert of the gate yet
        total = total * tl.exp(top - shift) + tl.exp(logit - shift)
        top = higher
    top = tl.where(g[:, None] < n_gates, top, 0.0)
    total = tl.where(g[:, None] < n_gates, total, 1.0)
    if block == 0:
        soft = Soft_ptr + g.to(tl.int64)[:, None] * n_rows + row[None, :]
        tl.store(soft, top, mask=live[None, :])
        tl.store(soft + tl.cast(n_rows, tl.int64) * GATES2, total, mask=live[None, :])
    y = tl.zeros([GATES2, BLOCK_B, BLOCK_H], tl.float32)
    for e in range(n_experts):
        logit, _member = gate_logits(Zg_ptr, Statg_ptr, Members_ptr, e, row, live, pitch_g, GATES2)
        weight = tl.exp(logit - top) / total
        c = e * n_units + h
        _centred, normal = normalise(Z_ptr, Stat_ptr, first_row, m, live, c, inside, pitch)
        a = activate(normal, learned_scalar(Alpha_ptr, e, ACT), inside[None, :], n_units, ACT)
        if DROPOUT:
            keep = kept(Seed_ptr, row, e, block * BLOCK_H, drop, LAYER, BLOCK_H)
            a = tl.where(keep, a * (1.0 / (1.0 - drop)), 0.0)
        y += weight[:, :, None] * a[None, :, :]
    at = Y_ptr + g.to(tl.int64)[:, None, None] * stride_yg + (row[:, None] * n_units + h[None, :])[None, :, :]
    mask = (g < n_gates)[:, None, None] & (live[:, None] & inside[None, :])[None, :, :]
    tl.store(at, narrow(y, Y_ptr.dtype.element_ty), mask=mask)


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
):
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
    """The mixed experts ``[G, B, H]``, and each gate's largest logit and sum of exponentials ``[2, n_gates2, B]``."""
    spec, n_rows, units = plan.spec, len(hidden.z), hidden.units
    y = torch.empty(len(spec.gates), n_rows, units, dtype=hidden.z.dtype, device=hidden.z.device)
    soft = torch.empty(2, plan.n_gates2, n_rows, dtype=torch.float32, device=hidden.z.device)
    config = configs.GEMM.rows(units, hidden.row_wise, hidden.dropped, plan.n_gates2)
    launch(
        expert_gate_mix_kernel,
        (cdiv(n_rows, config.block_b) * cdiv(units, config.block_h),),
        config.warps,
        Z_ptr=hidden.z,
        **hidden.arguments(),
        Zg_ptr=first.z,
        Statg_ptr=first.stat,
        Members_ptr=plan.members,
        Soft_ptr=soft,
        Y_ptr=y,
        n_rows=n_rows,
        n_experts=spec.n_experts,
        n_gates=len(spec.gates),
        n_units=units,
        pitch=hidden.pitch,
        pitch_g=first.pitch,
        stride_yg=n_rows * units,
        GATES2=plan.n_gates2,
        BLOCK_B=config.block_b,
        BLOCK_H=config.block_h,
    )
    return y, soft


def _rows(hidden: Hidden, y: Tensor, stride_ye: int, stride_yb: int, weight: Tensor, bias: Tensor, head: bool) -> None:
    n_rows, n_experts, units = len(hidden.z), hidden.spec.n_experts, hidden.units
    config = configs.GEMM.rows(units, hidden.row_wise, hidden.dropped, 1)
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
    """The activations where the next GEMM reads them: ``[B, pitch]`` like z."""
    y = torch.empty_like(hidden.z)
    _rows(hidden, y, hidden.units, hidden.pitch, hidden.stat, hidden.stat, False)
    return y
