"""Experts without hidden layers: a Linear(I, 1) on an input, forward and backward.

linear_heads_fwd_kernel: rows of the batch by expert.
linear_heads_dx_kernel: rows by units of one input, summed over the experts that read it.
linear_heads_dw_kernel: an expert's weight over a run of the batch; the runs' pieces are added afterwards.

Bound by reading x, once each. fp32 arithmetic whatever the storage; deterministic.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...spec import ExpertGateParams, ExpertGateSpec
from . import configs
from .common import narrow
from .launch import cdiv, launch
from .layer_plan import layer_plan


@triton.jit
def linear_heads_fwd_kernel(
    X_ptr,  # [N, B, I]
    Weight_ptr,  # [E, I]
    Bias_ptr,  # [E]
    Source_ptr,  # [E] int32: the input that an expert reads
    Y_ptr,  # [B, E] fp32
    n_rows,
    n_experts,
    n_in,
    stride_xs,
    stride_xb,
    BLOCK_B: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    e = tl.program_id(0) % n_experts
    row = (tl.program_id(0) // n_experts).to(tl.int64) * BLOCK_B + tl.arange(0, BLOCK_B)
    live = row < n_rows
    x = X_ptr + tl.load(Source_ptr + e).to(tl.int64) * stride_xs + row[:, None] * stride_xb
    total = tl.zeros([BLOCK_B], tl.float32)
    for start in range(0, n_in, BLOCK_H):
        k = start + tl.arange(0, BLOCK_H)
        inside = k < n_in
        weight = tl.load(Weight_ptr + e * n_in + k, mask=inside, other=0.0)
        value = tl.load(x + k[None, :], mask=live[:, None] & inside[None, :], other=0.0).to(tl.float32)
        total += tl.sum(value * weight[None, :], axis=1)
    tl.store(Y_ptr + row * n_experts + e, total + tl.load(Bias_ptr + e), mask=live)


@triton.jit
def linear_heads_dx_kernel(
    Grad_ptr,  # [B, E]
    Weight_ptr,  # [E, I]
    Spans_ptr,  # [N, 2] int32: the experts that read an input
    Dx_ptr,  # [N, B, I]
    n_rows,
    n_inputs,
    n_in,
    stride_gb,
    stride_ge,
    stride_xs,
    stride_xb,
    BLOCK_B: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    n = tl.program_id(0) % n_inputs
    row = (tl.program_id(0) // n_inputs).to(tl.int64) * BLOCK_B + tl.arange(0, BLOCK_B)
    live = row < n_rows
    k = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    inside = k < n_in
    dx = tl.zeros([BLOCK_B, BLOCK_H], tl.float32)
    for e in range(tl.load(Spans_ptr + 2 * n), tl.load(Spans_ptr + 2 * n + 1)):
        grad = tl.load(Grad_ptr + row * stride_gb + e * stride_ge, mask=live, other=0.0).to(tl.float32)
        weight = tl.load(Weight_ptr + e * n_in + k, mask=inside, other=0.0)
        dx += grad[:, None] * weight[None, :]
    out = Dx_ptr + n.to(tl.int64) * stride_xs + row[:, None] * stride_xb + k[None, :]
    tl.store(out, narrow(dx, Dx_ptr.dtype.element_ty), mask=live[:, None] & inside[None, :])


@triton.jit
def linear_heads_dw_kernel(
    Grad_ptr,  # [B, E]
    X_ptr,  # [N, B, I]
    Source_ptr,  # [E] int32
    Part_ptr,  # [runs, E, I + 1] fp32: of the weight, and at last of the bias
    n_rows,
    run_rows,
    n_experts,
    n_in,
    stride_gb,
    stride_ge,
    stride_xs,
    stride_xb,
    BLOCK_B: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    e = tl.program_id(0) % n_experts
    run = tl.program_id(0) // n_experts
    k = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    inside = k < n_in
    x = X_ptr + tl.load(Source_ptr + e).to(tl.int64) * stride_xs
    dw = tl.zeros([BLOCK_H], tl.float32)
    db = tl.zeros([BLOCK_B], tl.float32)
    first_row = run.to(tl.int64) * run_rows
    for start in range(0, tl.minimum(n_rows - first_row, run_rows).to(tl.int32), BLOCK_B):
        row = first_row + start + tl.arange(0, BLOCK_B)
        live = row < n_rows
        grad = tl.load(Grad_ptr + row * stride_gb + e * stride_ge, mask=live, other=0.0).to(tl.float32)
        at = row[:, None] * stride_xb + k[None, :]
        value = tl.load(x + at, mask=live[:, None] & inside[None, :], other=0.0).to(tl.float32)
        dw += tl.sum(grad[:, None] * value, axis=0)
        db += grad
    part = Part_ptr + (run.to(tl.int64) * n_experts + e) * (n_in + 1)
    tl.store(part + k, dw, mask=inside)
    if tl.program_id(1) == 0:
        tl.store(part + n_in, tl.sum(db, axis=0))


def linear_heads(x: Tensor, params: ExpertGateParams, spec: ExpertGateSpec) -> Tensor:
    """``[B, E]`` fp32 from ``x [N, B, I]``, whose units are contiguous."""
    assert params.out_weight is not None
    n_rows, n_experts = x.shape[1], spec.n_experts
    y = torch.empty(n_rows, n_experts, dtype=torch.float32, device=x.device)
    config = configs.EXPERT_GATE.rows(spec.in_features, False, False)
    launch(
        linear_heads_fwd_kernel,
        (cdiv(n_rows, config.block_b) * n_experts,),
        config.warps,
        X_ptr=x,
        Weight_ptr=params.out_weight,
        Bias_ptr=params.out_bias,
        Source_ptr=layer_plan(spec, x.device).sources,
        Y_ptr=y,
        n_rows=n_rows,
        n_experts=n_experts,
        n_in=spec.in_features,
        stride_xs=x.stride(0),
        stride_xb=x.stride(1),
        BLOCK_B=config.block_b,
        BLOCK_H=config.block_h,
    )
    return y


def linear_heads_bwd(
    grad: Tensor, x: Tensor, params: ExpertGateParams, spec: ExpertGateSpec, needs_x: bool
) -> tuple[Tensor | None, list[Tensor]]:
    """The gradients of x (None where it needs none), and of weight and bias, fp32, from ``grad [B, E]``."""
    n_rows, n_experts, n_in = x.shape[1], spec.n_experts, spec.in_features
    config = configs.EXPERT_GATE.rows(n_in, False, False, backward=True)
    run = max(config.run, cdiv(cdiv(n_rows, 2 * configs.PROGRAMS), config.block_b) * config.block_b)
    n_runs, n_blocks = cdiv(n_rows, run), cdiv(n_in, config.block_h)
    strides = {"stride_gb": grad.stride(0), "stride_ge": grad.stride(1)}
    blocks = {"BLOCK_B": config.block_b, "BLOCK_H": config.block_h}
    part = torch.empty(n_runs, n_experts, n_in + 1, dtype=torch.float32, device=x.device)
    launch(
        linear_heads_dw_kernel,
        (n_runs * n_experts, n_blocks),
        config.warps,
        Grad_ptr=grad,
        X_ptr=x,
        Source_ptr=layer_plan(spec, x.device).sources,
        Part_ptr=part,
        n_rows=n_rows,
        run_rows=run,
        n_experts=n_experts,
        n_in=n_in,
        stride_xs=x.stride(0),
        stride_xb=x.stride(1),
        **strides,
        **blocks,
    )
    summed = part[0] if n_runs == 1 else part.sum(0)
    grads = [summed[:, :n_in].contiguous(), summed[:, n_in].contiguous()]
    if not needs_x:
        return None, grads
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    launch(
        linear_heads_dx_kernel,
        (cdiv(n_rows, config.block_b) * spec.n_inputs, n_blocks),
        config.warps,
        Grad_ptr=grad,
        Weight_ptr=params.out_weight,
        Spans_ptr=layer_plan(spec, x.device).readers,
        Dx_ptr=dx,
        n_rows=n_rows,
        n_inputs=spec.n_inputs,
        n_in=n_in,
        stride_xs=dx.stride(0),
        stride_xb=dx.stride(1),
        **strides,
        **blocks,
    )
    return dx, grads
