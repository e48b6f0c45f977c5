"""The gradient of z of the layer under the gates, from that of the mixtures: D is made anew where it is read.

The first pass back (mixing_backward.py) has left D's sums and the gates' gradients, not D itself, which would be as
many bytes as z. fp32 arithmetic; deterministic.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from . import configs
from .activations import activate_bwd, kept, learned_scalar
from .common import begin, narrow
from .hidden import Hidden
from .launch import cdiv, launch, starts_early
from .layer_plan import LayerPlan
from .mixing_backward import block_rows


@triton.jit
def expert_gate_mixed_dz_kernel(
    Dy_ptr,  # by gate, row, unit
    Z_ptr,  # [B, pitch]
    Stat_ptr,  # [4, pitch]
    Coef_ptr,  # [2, pitch]
    Alpha_ptr,
    Seed_ptr,
    Members_ptr,  # [E, GATES2] int32
    Share_ptr,  # [B, n_gate_columns] fp32: the softmax
    Out_ptr,  # [B, pitch]
    n_rows,
    run_rows,
    n_experts,
    n_units,
    n_gate_columns,
    first_gate_column,
    pitch,
    stride_de,
    stride_db,
    drop,
    ACT: tl.constexpr,
    DROPOUT: tl.constexpr,
    LAYER: tl.constexpr,
    GATES: tl.constexpr,
    GATES2: tl.constexpr,
    TOGETHER: tl.constexpr,  # experts of a block, a divisor of their number, which read the same rows of dy
    BLOCK_B: tl.constexpr,
    BLOCK_H: tl.constexpr,
    EARLY: tl.constexpr,
):
    begin(EARLY)
    n_groups = n_experts // TOGETHER
    n_blocks = tl.cdiv(n_units, BLOCK_H)
    block = (tl.program_id(0) // n_groups) % n_blocks
    run = tl.program_id(0) // n_groups // n_blocks
    m = tl.arange(0, BLOCK_B)
    row = m // TOGETHER
    e = (tl.program_id(0) % n_groups) * TOGETHER + m % TOGETHER
    h = block * BLOCK_H + tl.arange(0, BLOCK_H)
    inside = h < n_units
    c = e[:, None] * n_units + h[None, :]
    ROWS: tl.constexpr = BLOCK_B // TOGETHER
    alpha = learned_scalar(Alpha_ptr, e[:, None], ACT)
    mean = tl.load(Stat_ptr + c, mask=inside[None, :], other=0.0)
    scale = tl.load(Stat_ptr + 2 * pitch + c, mask=inside[None, :], other=0.0)
    beta = tl.load(Stat_ptr + 3 * pitch + c, mask=inside[None, :], other=0.0)
    slope = tl.load(Coef_ptr + c, mask=inside[None, :], other=0.0)
    shift = tl.load(Coef_ptr + pitch + c, mask=inside[None, :], other=0.0)
    run_row = run.to(tl.int64) * run_rows
    n_here = tl.minimum(n_rows - run_row, run_rows).to(tl.int32)
    # offsets within the run fit 32 bits
    at_z = row[:, None] * pitch + c
    at_dy = row[:, None] * stride_db + h[None, :]
    z_run = Z_ptr + run_row * pitch
    out_run = Out_ptr + run_row * pitch
    share_run = Share_ptr + run_row * n_gate_columns - first_gate_column
    members: tl.tuple = ()
    dy_runs: tl.tuple = ()
    for g in tl.static_range(GATES):
        members += (tl.load(Members_ptr + e * GATES2 + g),)
        dy_runs += (Dy_ptr + run_row * stride_db + g * tl.cast(stride_de, tl.int64),)
    following = block_rows(
        z_run, dy_runs, share_run, members, at_z, at_dy, row, inside, 0, n_here, pitch, stride_db, n_gate_columns,
        GATES, GATES,
    )  # fmt: skip
    for start in range(0, n_here, ROWS):
        z, dys, shares = following
        following = block_rows(
            z_run, dy_runs, share_run, members, at_z, at_dy, row, inside, start + ROWS, n_here, pitch, stride_db,
            n_gate_columns, GATES, GATES,
        )  # fmt: skip  # on their way while these are worked on
        centred = z.to(tl.float32) - mean
        dh = tl.zeros([BLOCK_B, BLOCK_H], tl.float32)
        for g in tl.static_range(GATES):
            dh += shares[g][:, None] * dys[g].to(tl.float32)
        if DROPOUT:
            keep = kept(Seed_ptr, run_row + start + row, e[:, None], block * BLOCK_H, drop, LAYER, BLOCK_H)
            dh = tl.where(keep, dh * (1.0 / (1.0 - drop)), 0.0)
        d, _dalpha = activate_bwd(centred * scale + beta, dh, alpha, inside[None, :], n_units, ACT)
        # in this order: the two differences cancel where B is small
        dz = ((d - shift) - centred * slope) * scale
        mask = (row < n_here - start)[:, None] & inside[None, :]
        tl.store(out_run + (start * pitch + at_z), narrow(dz, Out_ptr.dtype.element_ty), mask=mask)


def takes(hidden: Hidden) -> bool:
    """Whether dz of the last layer is made so. (The first layer's columns are the gates', too, which have a D.)"""
    return hidden.layer > 0 and not hidden.row_wise


def mixed_gradient(grad: Tensor, share: Tensor, hidden: Hidden, plan: LayerPlan, coef: Tensor, out: Tensor) -> None:
    """dz of the experts, written to ``out [B, pitch]``, from the gradient ``[G, B, H]`` of the mixtures and the gates'
    softmax ``share [B, columns of the gates]``; ``coef``: see batch_norm.add_up."""
    spec, n_rows, units = plan.spec, len(hidden.z), hidden.units
    config, together = configs.EXPERT_GATE.mixed_dz(units, n_rows, spec.n_experts)
    launch(
        expert_gate_mixed_dz_kernel,
        (cdiv(n_rows, config.run) * cdiv(units, config.block_h) * (spec.n_experts // together),),
        config.warps,
        Dy_ptr=grad,
        Z_ptr=hidden.z,
        **hidden.arguments(),
        Coef_ptr=coef,
        Members_ptr=plan.members,
        Share_ptr=share,
        Out_ptr=out,
        n_rows=n_rows,
        run_rows=config.run,
        n_experts=spec.n_experts,
        n_units=units,
        n_gate_columns=share.shape[1],
        first_gate_column=plan.gate_start[0],
        pitch=hidden.pitch,
        stride_de=grad.stride(0),
        stride_db=grad.stride(1),
        GATES=len(spec.gates),
        GATES2=plan.n_gates2,
        TOGETHER=together,
        BLOCK_B=config.block_b,
        BLOCK_H=config.block_h,
        EARLY=starts_early(grad.device),
    )
