"""The two reductions over the batch that BatchNorm asks for, from the pieces that the GEMMs' row tiles leave.

expert_gate_statistics_kernel (forward): means and M2 of tiles, merged (Chan et al., 1979) without the cancellation of
E[z^2] - E[z]^2, into what the consumers of z read; the running statistics are updated.
expert_gate_sums_kernel (backward): sums of the gradient D of the BatchNorm's output and of D times the normalised z,
which are the gradients of beta and gamma, and what dz = scale * (D - shift - slope * (z - mean)) needs.

One program owns BLOCK_C columns and reads their pieces in order: deterministic. fp32.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ...spec import BN_EPSILON, BN_MOMENTUM, LEARNED_ACTIVATIONS, ExpertGateParams
from . import configs
from .hidden import Hidden
from .launch import cdiv, launch
from .layer_plan import LayerPlan

#: Rows of a piece that the backward's tiles leave, and of their sums: D, D * normalised z, alpha's, the head's weight,
#: and for each unit the same: the gradient of its expert's logit, and the loss.
SUMS = 6


@triton.jit
def _column_statistics(
    Part_ptr, Stat_ptr, Bias_ptr, Gamma_ptr, Beta_ptr, Mean_ptr, Var_ptr, column, z_column, inside, n_rows, tile_rows,
    pitch, MOMENTUM: tl.constexpr, EPSILON: tl.constexpr, BATCH: tl.constexpr, BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):  # fmt: skip
    bias = tl.load(Bias_ptr + column, mask=inside, other=0.0)
    gamma = tl.load(Gamma_ptr + column, mask=inside, other=0.0)
    old_mean = tl.load(Mean_ptr + column, mask=inside, other=0.0)
    old_var = tl.load(Var_ptr + column, mask=inside, other=1.0)
    if BATCH:
        n_tiles = tl.cdiv(n_rows, tile_rows)
        total = tl.zeros([BLOCK_C], tl.float32)
        for start in range(0, n_tiles, BLOCK_R):
            r = start + tl.arange(0, BLOCK_R)
            count = tl.maximum(tl.minimum(n_rows - r * tile_rows, tile_rows), 0).to(tl.float32)
            at = Part_ptr + r.to(tl.int64)[:, None] * 2 * pitch + z_column[None, :]
            there = (r < n_tiles)[:, None] & inside[None, :]
            total += tl.sum(tl.load(at, mask=there, other=0.0) * count[:, None], axis=0)
        mean = total / n_rows
        m2 = tl.zeros([BLOCK_C], tl.float32)
        for start in range(0, n_tiles, BLOCK_R):
            r = start + tl.arange(0, BLOCK_R)
            count = tl.maximum(tl.minimum(n_rows - r * tile_rows, tile_rows), 0).to(tl.float32)
            at = Part_ptr + r.to(tl.int64)[:, None] * 2 * pitch + z_column[None, :]
            there = (r < n_tiles)[:, None] & inside[None, :]
            apart = tl.where(there, tl.load(at, mask=there, other=0.0) - mean[None, :], 0.0)
            m2 += tl.sum(tl.load(at + pitch, mask=there, other=0.0) + apart * apart * count[:, None], axis=0)
        var = m2 / n_rows
        unbiased = m2 / (n_rows - 1)
        tl.store(Mean_ptr + column, MOMENTUM * (mean + bias) + (1.0 - MOMENTUM) * old_mean, mask=inside)
        tl.store(Var_ptr + column, MOMENTUM * unbiased + (1.0 - MOMENTUM) * old_var, mask=inside)
    else:
        mean = old_mean - bias
        var = old_var
    inv_std = 1.0 / tl.sqrt_rn(var + EPSILON)
    tl.store(Stat_ptr + z_column, mean, mask=inside)
    tl.store(Stat_ptr + pitch + z_column, inv_std, mask=inside)
    tl.store(Stat_ptr + 2 * pitch + z_column, gamma * inv_std, mask=inside)
    tl.store(Stat_ptr + 3 * pitch + z_column, tl.load(Beta_ptr + column, mask=inside, other=0.0), mask=inside)


@triton.jit
def expert_gate_statistics_kernel(
    Part_ptr,  # [row tiles, 2, pitch]: mean and M2; read where BATCH
    Stat_ptr,  # [4, pitch]: mean without the bias, 1 / sigma, gamma / sigma, beta
    Bias_ptr,
    Gamma_ptr,
    Beta_ptr,
    Mean_ptr,  # running; updated where BATCH
    Var_ptr,
    Biasg_ptr,  # of the gates; read where GATES, as are those that follow
    Gammag_ptr,
    Betag_ptr,
    Meang_ptr,
    Varg_ptr,
    Places_ptr,  # [C] int32: the column of each of the gates' rows
    n_rows,
    n_columns,
    n_gate_columns,
    pitch,
    MOMENTUM: tl.constexpr,
    EPSILON: tl.constexpr,
    BATCH: tl.constexpr,
    GATES: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    n_blocks = tl.cdiv(n_columns, BLOCK_C)
    block = tl.program_id(0)
    c = tl.arange(0, BLOCK_C)
    if block < n_blocks:
        column = block * BLOCK_C + c
        _column_statistics(
            Part_ptr, Stat_ptr, Bias_ptr, Gamma_ptr, Beta_ptr, Mean_ptr, Var_ptr, column, column, column < n_columns,
            n_rows, TILE_ROWS, pitch, MOMENTUM, EPSILON, BATCH, BLOCK_R, BLOCK_C,
        )  # fmt: skip
    elif GATES:
        column = (block - n_blocks) * BLOCK_C + c
        z_column = tl.load(Places_ptr + column, mask=column < n_gate_columns, other=0)
        _column_statistics(
            Part_ptr, Stat_ptr, Biasg_ptr, Gammag_ptr, Betag_ptr, Meang_ptr, Varg_ptr, column, z_column,
            column < n_gate_columns, n_rows, TILE_ROWS, pitch, MOMENTUM, EPSILON, BATCH, BLOCK_R, BLOCK_C,
        )  # fmt: skip


def statistics(
    part: Tensor | None, n_rows: int, tile_rows: int, params: ExpertGateParams, plan: LayerPlan, layer: int
) -> Tensor:
    """What turns a layer's z into its BatchNorm's output: ``[4, pitch]``; from the running statistics where ``part`` is
    None, else from the batch's."""
    pitch = plan.pitch[layer]
    fields = (params.bias, params.gamma, params.beta, params.running_mean, params.running_var)
    own = [field[layer] for field in fields]
    gate = params.gate if layer == 0 else None
    gates = own if gate is None else list(gate[1:])
    stat = plan.per_column(layer, 4)
    config = configs.EXPERT_GATE.reduction()
    n_gate_columns = 0 if gate is None else plan.spec.gate_rows
    names = ("Bias", "Gamma", "Beta", "Mean", "Var")
    launch(
        expert_gate_statistics_kernel,
        (cdiv(plan.columns[layer], config.block_c) + cdiv(n_gate_columns, config.block_c),),
        config.warps,
        Part_ptr=stat if part is None else part,
        Stat_ptr=stat,
        **{f"{name}_ptr": tensor for name, tensor in zip(names, own, strict=True)},
        **{f"{name}g_ptr": tensor for name, tensor in zip(names, gates, strict=True)},
        n_rows=n_rows,
        n_columns=plan.columns[layer],
        n_gate_columns=n_gate_columns,
        Places_ptr=plan.gate_places if gate is not None else own[0],
        pitch=pitch,
        MOMENTUM=BN_MOMENTUM,
        EPSILON=BN_EPSILON,
        BATCH=part is not None,
        GATES=gate is not None,
        TILE_ROWS=tile_rows,
        BLOCK_R=config.block_r,
        BLOCK_C=config.block_c,
    )
    return stat


@triton.jit
def _total(
    Part_ptr, which, column, inside, n_pieces, pitch, SUMS: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr
):
    total = tl.zeros([BLOCK_C], tl.float32)
    for start in range(0, n_pieces, BLOCK_R):
        r = start + tl.arange(0, BLOCK_R)
        at = Part_ptr + (r.to(tl.int64)[:, None] * SUMS + which) * pitch + column[None, :]
        total += tl.sum(tl.load(at, mask=(r < n_pieces)[:, None] & inside[None, :], other=0.0), axis=0)
    return total


@triton.jit
def expert_gate_sums_kernel(
    Part_ptr,  # [n_pieces, SUMS, pitch]
    Stat_ptr,  # [4, pitch]
    Grad_ptr,  # [SUMS + 1, pitch]: of beta, gamma, alpha (by unit), the head's weight, the bias
    Coef_ptr,  # [2, pitch]: slope and shift
    Places_ptr,  # [n_columns] int32: which columns; read where LISTED, else the first ones
    Head_ptr,  # [2, E]: the gradient of the head's bias, the loss; written where HEAD
    n_pieces,
    n_columns,
    n_units,
    pitch,
    per_row,  # 1 / B with batch statistics, 0 with running ones, which do not depend on z
    LEARNED: tl.constexpr,
    HEAD: tl.constexpr,
    LOSS: tl.constexpr,
    LISTED: tl.constexpr,
    SUMS: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = c < n_columns
    column = c
    if LISTED:
        column = tl.load(Places_ptr + c, mask=inside, other=0)
    d = _total(Part_ptr, 0, column, inside, n_pieces, pitch, SUMS, BLOCK_R, BLOCK_C)
    dz = _total(Part_ptr, 1, column, inside, n_pieces, pitch, SUMS, BLOCK_R, BLOCK_C)
    tl.store(Grad_ptr + column, d, mask=inside)
    tl.store(Grad_ptr + pitch + column, dz, mask=inside)
    if LEARNED:
        alpha = _total(Part_ptr, 2, column, inside, n_pieces, pitch, SUMS, BLOCK_R, BLOCK_C)
        tl.store(Grad_ptr + 2 * pitch + column, alpha, mask=inside)
    if HEAD:
        weight = _total(Part_ptr, 3, column, inside, n_pieces, pitch, SUMS, BLOCK_R, BLOCK_C)
        tl.store(Grad_ptr + 3 * pitch + column, weight, mask=inside)
        first = inside & (column % n_units == 0)
        bias = _total(Part_ptr, 4, column, first, n_pieces, pitch, SUMS, BLOCK_R, BLOCK_C)
        tl.store(Head_ptr + column // n_units, bias, mask=first)
        if LOSS:
            loss = _total(Part_ptr, 5, column, first, n_pieces, pitch, SUMS, BLOCK_R, BLOCK_C)
            tl.store(Head_ptr + n_columns // n_units + column // n_units, loss, mask=first)
    inv_std = tl.load(Stat_ptr + pitch + column, mask=inside, other=0.0)
    scale = tl.load(Stat_ptr + 2 * pitch + column, mask=inside, other=0.0)
    tl.store(Grad_ptr + SUMS * pitch + column, tl.where(per_row > 0, 0.0, scale * d), mask=inside)
    tl.store(Coef_ptr + column, inv_std * dz * per_row, mask=inside)
    tl.store(Coef_ptr + pitch + column, d * per_row, mask=inside)


def add_up(
    part: Tensor, hidden: Hidden, grads: Tensor, coef: Tensor, columns: int | Tensor, batch_statistics: bool,
    head: Tensor | None = None, losses: bool = False,
) -> None:  # fmt: skip
    """Add the pieces ``part [n, SUMS, pitch]`` of some columns (the first ones, or those listed) up.

    Into ``grads [SUMS + 1, pitch]``, the gradients of beta, gamma, alpha by unit, the head's weight, two rows that are
    not written, and the bias; ``coef [2, pitch]``; and where there are heads ``head [2, E]``, their biases' gradients
    and, with ``losses``, these.
    """
    config = configs.EXPERT_GATE.reduction()
    listed = isinstance(columns, Tensor)
    n_columns = len(columns) if isinstance(columns, Tensor) else columns
    launch(
        expert_gate_sums_kernel,
        (cdiv(n_columns, config.block_c),),
        config.warps,
        Part_ptr=part,
        Stat_ptr=hidden.stat,
        Grad_ptr=grads,
        Coef_ptr=coef,
        Places_ptr=columns if listed else part,
        Head_ptr=part if head is None else head,
        n_pieces=len(part),
        n_columns=n_columns,
        n_units=hidden.units,
        pitch=hidden.pitch,
        per_row=1.0 / len(hidden.z) if batch_statistics else 0.0,
        LEARNED=hidden.spec.activation in LEARNED_ACTIVATIONS,
        HEAD=head is not None,
        LOSS=losses,
        LISTED=listed,
        SUMS=SUMS,
        BLOCK_R=config.block_r,
        BLOCK_C=config.block_c,
    )
