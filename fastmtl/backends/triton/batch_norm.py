"""The two reductions over the batch that BatchNorm asks for, from the pieces that passes over it leave.

expert_gate_statistics_kernel (forward): means and M2 of runs, merged (Chan et al., 1979) without the cancellation of
E[z^2] - E[z]^2, into what the consumers of z read; the running statistics are updated.
expert_gate_sums_kernel (backward): sums of the gradient D of the BatchNorm's output and of D times the normalised z,
which are the gradients of beta and gamma, and what dz = scale * (D - shift - slope * (z - mean)) needs.

One program owns BLOCK_C columns and holds all their pieces (at most configs.PIECES) in registers: all its loads are on
their way at once, where a loop would wait for each block's before it asks for the next. Deterministic. fp32.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from ...spec import BN_EPSILON, BN_MOMENTUM, LEARNED_ACTIVATIONS, ExpertGateParams
from . import configs
from .common import begin
from .hidden import Hidden
from .launch import cdiv, launch, starts_early
from .layer_plan import LayerPlan

#: Rows of a piece that the backward's tiles leave, and of their sums: D, D * normalised z, alpha's, the head's weight,
#: and for each unit the same: the gradient of its expert's logit, and the loss.
SUMS = 6


@triton.jit
def _column_statistics(
    Part_ptr, Stat_ptr, Bias_ptr, Gamma_ptr, Beta_ptr, Mean_ptr, Var_ptr, column, z_column, inside, n_rows, run_rows,
    pitch, MOMENTUM: tl.constexpr, EPSILON: tl.constexpr, BATCH: tl.constexpr, BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):  # fmt: skip
    bias = tl.load(Bias_ptr + column, mask=inside, other=0.0)
    gamma = tl.load(Gamma_ptr + column, mask=inside, other=0.0)
    old_mean = tl.load(Mean_ptr + column, mask=inside, other=0.0)
    old_var = tl.load(Var_ptr + column, mask=inside, other=1.0)
    beta = tl.load(Beta_ptr + column, mask=inside, other=0.0)
    if BATCH:
        r = tl.arange(0, BLOCK_R)
        there = (r * run_rows < n_rows)[:, None] & inside[None, :]
        count = tl.maximum(tl.minimum(n_rows - r * run_rows, run_rows), 0).to(tl.float32)[:, None]
        at = Part_ptr + r[:, None] * (2 * pitch) + z_column[None, :]
        means = tl.load(at, mask=there, other=0.0)
        squares = tl.load(at + pitch, mask=there, other=0.0)
        mean = tl.sum(means * count, axis=0) / n_rows
        apart = means - mean[None, :]
        m2 = tl.sum(squares + apart * apart * count, axis=0)
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
    tl.store(Stat_ptr + 3 * pitch + z_column, beta, mask=inside)


@triton.jit
def expert_gate_statistics_kernel(
    Part_ptr,  # [runs, 2, pitch]: mean and M2; read where BATCH
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
    run_rows,
    n_columns,
    n_gate_columns,
    pitch,
    MOMENTUM: tl.constexpr,
    EPSILON: tl.constexpr,
    BATCH: tl.constexpr,
    GATES: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
    EARLY: tl.constexpr,
):
    begin(EARLY)
    n_blocks = tl.cdiv(n_columns, BLOCK_C)
    block = tl.program_id(0)
    c = tl.arange(0, BLOCK_C)
    if block < n_blocks:
        column = block * BLOCK_C + c
        _column_statistics(
            Part_ptr, Stat_ptr, Bias_ptr, Gamma_ptr, Beta_ptr, Mean_ptr, Var_ptr, column, column, column < n_columns,
            n_rows, run_rows, pitch, MOMENTUM, EPSILON, BATCH, BLOCK_R, BLOCK_C,
        )  # fmt: skip
    elif GATES:
        column = (block - n_blocks) * BLOCK_C + c
        z_column = tl.load(Places_ptr + column, mask=column < n_gate_columns, other=0)
        _column_statistics(
            Part_ptr, Stat_ptr, Biasg_ptr, Gammag_ptr, Betag_ptr, Meang_ptr, Varg_ptr, column, z_column,
            column < n_gate_columns, n_rows, run_rows, pitch, MOMENTUM, EPSILON, BATCH, BLOCK_R, BLOCK_C,
        )  # fmt: skip


def statistics(
    part: Tensor | None, n_rows: int, run_rows: int, params: ExpertGateParams, plan: LayerPlan, layer: int
) -> Tensor:
    """What turns a layer's z into its BatchNorm's output: ``[4, pitch]``; from the running statistics where ``part`` is
    None, else from the batch's, ``part [runs, 2, pitch]`` being the mean and M2 of runs of ``run_rows``."""
    pitch = plan.pitch[layer]
    fields = (params.bias, params.gamma, params.beta, params.running_mean, params.running_var)
    own = [field[layer] for field in fields]
    gate = params.gate if layer == 0 else None
    gates = own if gate is None else list(gate[1:])
    stat = plan.per_column(layer, 4)
    config = configs.EXPERT_GATE.reduction(1 if part is None else len(part))
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
        run_rows=run_rows,
        n_columns=plan.columns[layer],
        n_gate_columns=n_gate_columns,
        Places_ptr=plan.gate_places if gate is not None else own[0],
        pitch=pitch,
        MOMENTUM=BN_MOMENTUM,
        EPSILON=BN_EPSILON,
        BATCH=part is not None,
        GATES=gate is not None,
        BLOCK_R=config.block_r,
        BLOCK_C=config.block_c,
        EARLY=starts_early(stat.device),
    )
    return stat


@triton.jit
def _column_sums(
    Part_ptr, Stat_ptr, Grad_ptr, Coef_ptr, Head_ptr, column, inside, n_pieces, n_columns, n_units, pitch, per_row,
    LEARNED: tl.constexpr, HEAD: tl.constexpr, LOSS: tl.constexpr, SUMS: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    r = tl.arange(0, BLOCK_R)
    at = Part_ptr + r[:, None] * (SUMS * pitch) + column[None, :]
    there = (r < n_pieces)[:, None] & inside[None, :]
    inv_std = tl.load(Stat_ptr + pitch + column, mask=inside, other=0.0)
    scale = tl.load(Stat_ptr + 2 * pitch + column, mask=inside, other=0.0)
    ds = tl.load(at, mask=there, other=0.0)
    dzs = tl.load(at + pitch, mask=there, other=0.0)
    if LEARNED:
        alphas = tl.load(at + 2 * pitch, mask=there, other=0.0)
    if HEAD:
        weights = tl.load(at + 3 * pitch, mask=there, other=0.0)
        first = inside & (column % n_units == 0)
        firsts = (r < n_pieces)[:, None] & first[None, :]
        biases = tl.load(at + 4 * pitch, mask=firsts, other=0.0)
        if LOSS:
            losses = tl.load(at + 5 * pitch, mask=firsts, other=0.0)
    d = tl.sum(ds, axis=0)
    dz = tl.sum(dzs, axis=0)
    tl.store(Grad_ptr + column, d, mask=inside)
    tl.store(Grad_ptr + pitch + column, dz, mask=inside)
    if LEARNED:
        tl.store(Grad_ptr + 2 * pitch + column, tl.sum(alphas, axis=0), mask=inside)
    if HEAD:
        tl.store(Grad_ptr + 3 * pitch + column, tl.sum(weights, axis=0), mask=inside)
        tl.store(Head_ptr + column // n_units, tl.sum(biases, axis=0), mask=first)
        if LOSS:
            tl.store(Head_ptr + n_columns // n_units + column // n_units, tl.sum(losses, axis=0), mask=first)
    tl.store(Grad_ptr + SUMS * pitch + column, tl.where(per_row > 0, 0.0, scale * d), mask=inside)
    tl.store(Coef_ptr + column, inv_std * dz * per_row, mask=inside)
    tl.store(Coef_ptr + pitch + column, d * per_row, mask=inside)


@triton.jit
def expert_gate_sums_kernel(
    Part_ptr,  # [n_pieces, SUMS, pitch]
    Stat_ptr,  # [4, pitch]
    Grad_ptr,  # [SUMS + 1, pitch]: of beta, gamma, alpha (by unit), the head's weight, the bias
    Coef_ptr,  # [2, pitch]: slope and shift
    Head_ptr,  # [2, E]: the gradient of the head's bias, the loss; written where HEAD
    Partg_ptr,  # [n_gate_pieces, SUMS, pitch_g], of the gates; read where GATES, as is what follows
    Statg_ptr,  # of the first layer, whose columns they are, like those behind
    Gradg_ptr,
    Coefg_ptr,
    Places_ptr,  # [C] int32: the column of each of the gates' rows
    n_pieces,
    n_gate_pieces,
    n_columns,
    n_gate_columns,
    n_units,
    pitch,
    pitch_g,
    per_row,  # 1 / B with batch statistics, 0 with running ones, which do not depend on z
    LEARNED: tl.constexpr,
    HEAD: tl.constexpr,
    LOSS: tl.constexpr,
    GATES: tl.constexpr,
    SUMS: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
    EARLY: tl.constexpr,
):
    begin(EARLY)
    n_blocks = tl.cdiv(n_columns, BLOCK_C)
    block = tl.program_id(0)
    c = tl.arange(0, BLOCK_C)
    if block < n_blocks:
        column = block * BLOCK_C + c
        _column_sums(
            Part_ptr, Stat_ptr, Grad_ptr, Coef_ptr, Head_ptr, column, column < n_columns, n_pieces, n_columns, n_units,
            pitch, per_row, LEARNED, HEAD, LOSS, SUMS, BLOCK_R,
        )  # fmt: skip
    elif GATES:
        row = (block - n_blocks) * BLOCK_C + c
        column = tl.load(Places_ptr + row, mask=row < n_gate_columns, other=0)
        _column_sums(
            Partg_ptr, Statg_ptr, Gradg_ptr, Coefg_ptr, Head_ptr, column, row < n_gate_columns, n_gate_pieces,
            n_columns, n_units, pitch_g, per_row, False, False, False, SUMS, BLOCK_R,
        )  # fmt: skip


class GateSums(NamedTuple):
    """Pieces of the sums of the gates' D, to be added up with those of the layer under them.

    Args:
        part: ``[n, SUMS, pitch]`` of the first layer, whose columns the gates are.
        places: ``[C]`` int32, which of them.
        stat, grads, coef: of that layer, as in :func:`add_up`.
    """

    part: Tensor
    places: Tensor
    stat: Tensor
    grads: Tensor
    coef: Tensor


def add_up(
    part: Tensor, hidden: Hidden, grads: Tensor, coef: Tensor, columns: int, batch_statistics: bool,
    head: Tensor | None = None, losses: bool = False, gates: GateSums | None = None,
) -> None:  # fmt: skip
    """Add the pieces ``part [n, SUMS, pitch]`` of the experts' columns up.

    Into ``grads [SUMS + 1, pitch]``, the gradients of beta, gamma, alpha by unit, the head's weight, two rows that are
    not written, and the bias; ``coef [2, pitch]``; and where there are heads ``head [2, E]``, their biases' gradients
    and, with ``losses``, these.
    """
    of_gates = gates or GateSums(part, part, hidden.stat, grads, coef)
    n_gate_columns = 0 if gates is None else len(gates.places)
    config = configs.EXPERT_GATE.reduction(max(len(part), len(of_gates.part)))
    launch(
        expert_gate_sums_kernel,
        (cdiv(columns, config.block_c) + cdiv(n_gate_columns, config.block_c),),
        config.warps,
        Part_ptr=part,
        Stat_ptr=hidden.stat,
        Grad_ptr=grads,
        Coef_ptr=coef,
        Head_ptr=part if head is None else head,
        Partg_ptr=of_gates.part,
        Statg_ptr=of_gates.stat,
        Gradg_ptr=of_gates.grads,
        Coefg_ptr=of_gates.coef,
        Places_ptr=of_gates.places,
        n_pieces=len(part),
        n_gate_pieces=len(of_gates.part),
        n_columns=columns,
        n_gate_columns=n_gate_columns,
        n_units=hidden.units,
        pitch=hidden.pitch,
        pitch_g=of_gates.stat.shape[1],
        per_row=1.0 / len(hidden.z) if batch_statistics else 0.0,
        LEARNED=hidden.spec.activation in LEARNED_ACTIVATIONS,
        HEAD=head is not None,
        LOSS=losses,
        GATES=gates is not None,
        SUMS=SUMS,
        BLOCK_R=config.block_r,
        BLOCK_C=config.block_c,
        EARLY=starts_early(part.device),
    )
