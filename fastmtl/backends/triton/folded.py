"""A layer of experts and gates in evaluation, its BatchNorms folded into the weights: a tile of rows at a time, in one
kernel from the layer's input to its gates' mixtures, or on through the towers to the predictions.

First the experts: a program keeps its rows of the input where the products read them, makes CHUNK units of the first
hidden layer at a time and multiplies them into the second at once, so that no first layer is ever written. What an
expert makes of the tile is left in a scratch of the program's own, small enough to stay in the L2 cache (registers can
not hold every gate's mixture beside a running product: ptxas spills). Then the gates: softmax, mixture, and where
towers follow one to one, their layers and the sigmoid, gate by gate.

Where the batch has too few tiles to fill the machine, programs share a tile's experts, and a second launch mixes.

Weights are padded with zeros to blocks (packing.py), so that only rows are masked. Accumulation in fp32; deterministic.
A row's result does not depend on its neighbours, but for the last bits of the gates' products, which add in another
order where there are two launches.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import configs
from .activations import activate, learned_scalar, sigmoid
from .common import aligned, narrow, operand
from .hidden import Operand
from .launch import alignment, cdiv, generation, launch, round_up
from .packing import PackedLayer, PackedTowers, pieces
from .precision import Precision


@triton.jit
def _piece(
    X_ptr, at, live, n_in, n_read, FIRST: tl.constexpr, SIZE: tl.constexpr, ALIGN: tl.constexpr, PADDED: tl.constexpr,
    HELD: tl.constexpr = False,
):  # fmt: skip
    k = FIRST + tl.arange(0, SIZE)
    x = tl.load(
        X_ptr + (at[:, None] + k[None, :]), mask=live[:, None] & (k < aligned(n_read, ALIGN))[None, :], other=0.0
    )
    if PADDED:  # nobody said what lies behind a row
        x = tl.where((k < n_in)[None, :], x, 0.0)
    if HELD:  # what was computed stays in registers, where products read it too: shared memory has room for weights
        x = tl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [x], dtype=x.dtype, is_pure=True, pack=2)
    return x


@triton.jit
def _inputs(
    X_ptr, at, live, n_in, n_read, K0: tl.constexpr, K1: tl.constexpr, K2: tl.constexpr, ALIGN: tl.constexpr,
    PADDED: tl.constexpr, HELD: tl.constexpr,
):  # fmt: skip
    """A tile of one input in up to three pieces, whose widths are powers of two; nothing where they are read later."""
    x0 = at
    x1 = at
    x2 = at
    if K0 > 0:
        x0 = _piece(X_ptr, at, live, n_in, n_read, 0, K0, ALIGN, PADDED, HELD)
    if K1 > 0:
        x1 = _piece(X_ptr, at, live, n_in, n_read, K0, K1, ALIGN, PADDED, HELD)
    if K2 > 0:
        x2 = _piece(X_ptr, at, live, n_in, n_read, K0 + K1, K2, ALIGN, PADDED, HELD)
    return x0, x1, x2


@triton.jit
def _times(
    x0, x1, x2, X_ptr, at, live, W_ptr, row, n_in, n_read, K0: tl.constexpr, K1: tl.constexpr, K2: tl.constexpr,
    PITCH: tl.constexpr, BLOCK_M: tl.constexpr, ROWS: tl.constexpr, BLOCK_K: tl.constexpr, ALIGN: tl.constexpr,
    PADDED: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """A tile of the input times rows ``row`` of a weight ``[*, PITCH]``, transposed."""
    dtype: tl.constexpr = X_ptr.dtype.element_ty
    from_w = row[:, None] * PITCH
    if K0 > 0:
        w = tl.load(W_ptr + (from_w + tl.arange(0, K0)[None, :]))
        z = tl.dot(operand(x0, dtype), operand(w, dtype).T, input_precision=DOT)
        if K1 > 0:
            w = tl.load(W_ptr + (from_w + K0 + tl.arange(0, K1)[None, :]))
            z = tl.dot(operand(x1, dtype), operand(w, dtype).T, z, input_precision=DOT)
        if K2 > 0:
            w = tl.load(W_ptr + (from_w + K0 + K1 + tl.arange(0, K2)[None, :]))
            z = tl.dot(operand(x2, dtype), operand(w, dtype).T, z, input_precision=DOT)
    else:
        z = tl.zeros([BLOCK_M, ROWS], tl.float32)
        for start in range(0, PITCH, BLOCK_K):
            x = _piece(X_ptr, at + start, live, n_in - start, n_read - start, 0, BLOCK_K, ALIGN, PADDED)
            w = tl.load(W_ptr + (from_w + start + tl.arange(0, BLOCK_K)[None, :]))
            z = tl.dot(operand(x, dtype), operand(w, dtype).T, z, input_precision=DOT)
    return z


@triton.jit
def _activated(y, alpha, inside, n_units, ACT: tl.constexpr):
    """As activations.activate; ReLU by a comparison, since with a maximum these kernels spill (fp32, sm_90)."""
    return tl.where(y < 0, 0.0, y) if ACT == "relu" else activate(y, alpha, inside, n_units, ACT)


@triton.jit
def _dense(
    h, W_ptr, Bias_ptr, alpha, block, N: tl.constexpr, K: tl.constexpr, ACT: tl.constexpr, DOT: tl.constexpr,
    dtype: tl.constexpr,
):  # fmt: skip
    """A tower's hidden layer of activations ``[rows, K]`` that are in registers; the tower is number ``block``."""
    n = tl.arange(0, N)
    w = tl.load(W_ptr + (block * N + n)[:, None] * K + tl.arange(0, K)[None, :])
    z = tl.dot(operand(h, dtype), operand(w, dtype).T, input_precision=DOT)
    return _activated(z + tl.load(Bias_ptr + block * N + n)[None, :], alpha, True, N, ACT)


@triton.jit
def _predict(
    h, Weight_ptr, Bias_ptr, Binary_ptr, Out_ptr, block, row, live, n_outputs, N: tl.constexpr, SIGMOID: tl.constexpr
):
    """Logits of tower ``block`` from its last activations ``[rows, N]``, written as logits or as predictions."""
    w = tl.load(Weight_ptr + block * N + tl.arange(0, N))
    z = tl.sum(h * w[None, :], axis=1) + tl.load(Bias_ptr + block)
    if SIGMOID:
        z = tl.where(tl.load(Binary_ptr + block) != 0, sigmoid(z), z)
    tl.store(Out_ptr + row * n_outputs + block, z, mask=live)


@triton.jit
def expert_gate_folded_kernel(
    X_ptr,  # N matrices [B, n_in]
    W1_ptr,  # [E, H1, PITCH]; read where DEPTH is 2, as is B1
    B1_ptr,  # [E, H1]
    A1_ptr,  # [E] learned scalars of the activation
    W2_ptr,  # [E, H2, H1], where DEPTH is 1 [E, H2, PITCH]
    B2_ptr,  # [E, H2]
    A2_ptr,
    Source_ptr,  # [E] int32: the input that an expert reads; not read where ONE
    Wg_ptr,  # [N, C2, PITCH]; read where MIX, as are those that follow
    Bg_ptr,  # [C2]
    Gate_ptr,  # [C2] int32: whose column it is, or -1
    Members_ptr,  # [E, n_gates] int32: the column in which gate g weighs expert e, or -1
    H_ptr,  # what the experts leave: the scratch where there are gates, else the result
    Y_ptr,  # [G, B, pitch_y]; written where MIX and no TOWERS
    T1_ptr,  # [T, D1, H2] of the towers; read where TOWERS is 2, as are the next two
    Tb1_ptr,  # [T, D1]
    Ta1_ptr,  # [T]
    T2_ptr,  # [T, D2, D1], where TOWERS is 1 [T, D2, H2]
    Tb2_ptr,
    Ta2_ptr,
    Head_ptr,  # [T, D2], or the experts' own [E, H2] where HEAD
    Headb_ptr,  # [T]
    Binary_ptr,  # [T] bool: whether a prediction is a probability
    Out_ptr,  # [B, T] fp32
    n_rows,
    n_tiles,
    n_walkers,  # programs that go through the tiles; each has a slot of the scratch
    n_groups,  # into which the experts are shared out
    n_experts,
    n_inputs,
    n_gates,
    n_outputs,
    n_in,
    n_read,
    stride_xs,
    stride_xb,
    stride_he,
    stride_hb,
    stride_yg,
    pitch_y,
    DEPTH: tl.constexpr,  # hidden layers; 0: the experts are in H already
    MIX: tl.constexpr,
    HEAD: tl.constexpr,
    TOWERS: tl.constexpr,  # hidden layers of the towers that follow the gates, or 0
    SCRATCH: tl.constexpr,
    ONE: tl.constexpr,  # whether all experts read the first input
    SIGMOID: tl.constexpr,
    ACT: tl.constexpr,
    TOWER_ACT: tl.constexpr,
    H1: tl.constexpr,
    H2: tl.constexpr,
    D1: tl.constexpr,
    D2: tl.constexpr,
    C2: tl.constexpr,
    K0: tl.constexpr,
    K1: tl.constexpr,
    K2: tl.constexpr,
    PITCH: tl.constexpr,
    DOT: tl.constexpr,
    ALIGN_X: tl.constexpr,
    ALIGN_READ: tl.constexpr,
    ALIGN_H: tl.constexpr,
    PADDED: tl.constexpr,
    HELD: tl.constexpr,
    BLOCK_M: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    dtype: tl.constexpr = X_ptr.dtype.element_ty
    slot = tl.program_id(0) // n_groups
    group = tl.program_id(0) % n_groups
    per_group = tl.cdiv(n_experts, n_groups)
    m = tl.arange(0, BLOCK_M)
    h2 = tl.arange(0, H2)
    for tile in range(slot, n_tiles, n_walkers):
        first_row = tl.full((), BLOCK_M, tl.int64) * tile
        row = first_row + m
        live = m < n_rows - first_row
        x_tile = X_ptr + first_row * aligned(stride_xb, ALIGN_X)
        at = m * aligned(stride_xb, ALIGN_X)
        # one pointer and offsets of 32 bits: a block of pointers would take twice the registers of its values
        mine = H_ptr + first_row * aligned(stride_hb, ALIGN_H)
        if SCRATCH:
            mine = H_ptr + tl.full((), BLOCK_M, tl.int64) * slot * aligned(stride_hb, ALIGN_H)
        own_rows = m * aligned(stride_hb, ALIGN_H)
        if ONE:
            x0, x1, x2 = _inputs(x_tile, at, live, n_in, n_read, K0, K1, K2, ALIGN_READ, PADDED, HELD)
        if DEPTH > 0:
            for e in range(group * per_group, tl.minimum((group + 1) * per_group, n_experts)):
                from_x = x_tile
                if not ONE:
                    from_x = x_tile + tl.load(Source_ptr + e).to(tl.int64) * aligned(stride_xs, ALIGN_X)
                    x0, x1, x2 = _inputs(from_x, at, live, n_in, n_read, K0, K1, K2, ALIGN_READ, PADDED, HELD)
                if DEPTH == 2:
                    z = tl.zeros([BLOCK_M, H2], tl.float32)
                    alpha = learned_scalar(A1_ptr, e, ACT)
                    for start in range(0, H1, CHUNK):
                        h1 = start + tl.arange(0, CHUNK)
                        first = _times(
                            x0, x1, x2, from_x, at, live, W1_ptr, e * H1 + h1, n_in, n_read, K0, K1, K2, PITCH,
                            BLOCK_M, CHUNK, BLOCK_K, ALIGN_READ, PADDED, DOT,
                        )  # fmt: skip
                        first = _activated(first + tl.load(B1_ptr + e * H1 + h1)[None, :], alpha, True, H1, ACT)
                        w = tl.load(W2_ptr + (e * H2 + h2)[:, None] * H1 + h1[None, :])
                        z = tl.dot(operand(first, dtype), operand(w, dtype).T, z, input_precision=DOT)
                else:
                    z = _times(
                        x0, x1, x2, from_x, at, live, W2_ptr, e * H2 + h2, n_in, n_read, K0, K1, K2, PITCH,
                        BLOCK_M, H2, BLOCK_K, ALIGN_READ, PADDED, DOT,
                    )  # fmt: skip
                z += tl.load(B2_ptr + e * H2 + h2)[None, :]
                h = _activated(z, learned_scalar(A2_ptr, e, ACT), True, H2, ACT)
                if HEAD:
                    _predict(h, Head_ptr, Headb_ptr, Binary_ptr, Out_ptr, e, row, live, n_outputs, H2, SIGMOID)
                elif SCRATCH:
                    there = mine + e * aligned(stride_he, ALIGN_H)
                    tl.store(there + (own_rows[:, None] + h2[None, :]), narrow(h, dtype))
                else:
                    inside = live[:, None] & (h2 < aligned(stride_hb, ALIGN_H))[None, :]
                    there = mine + tl.cast(aligned(stride_he, ALIGN_H), tl.int64) * e
                    tl.store(there + (own_rows[:, None] + h2[None, :]), narrow(h, dtype), mask=inside)
        if MIX:
            c = tl.arange(0, C2)
            logit = tl.zeros([BLOCK_M, C2], tl.float32)
            for n in range(n_inputs):
                from_x = x_tile
                if not ONE:
                    from_x = x_tile + tl.cast(aligned(stride_xs, ALIGN_X), tl.int64) * n
                    x0, x1, x2 = _inputs(from_x, at, live, n_in, n_read, K0, K1, K2, ALIGN_READ, PADDED, HELD)
                logit += _times(
                    x0, x1, x2, from_x, at, live, Wg_ptr, n * C2 + c, n_in, n_read, K0, K1, K2, PITCH, BLOCK_M, C2,
                    BLOCK_K, ALIGN_READ, PADDED, DOT,
                )  # fmt: skip
            logit += tl.load(Bg_ptr + c)[None, :]
            gate_of = tl.load(Gate_ptr + c)
            if DEPTH > 0:
                tl.debug_barrier()  # what other threads of the program have left in the scratch
            for g in range(n_gates):
                own = tl.where((gate_of == g)[None, :], logit, float("-inf"))
                share = tl.exp(own - tl.max(own, axis=1)[:, None])
                share = share / tl.sum(share, axis=1)[:, None]
                y = tl.zeros([BLOCK_M, H2], tl.float32)
                for e in range(n_experts):
                    column = tl.load(Members_ptr + e * n_gates + g)
                    weight = tl.sum(tl.where((c == column)[None, :], share, 0.0), axis=1)
                    there = mine + e * aligned(stride_he, ALIGN_H)
                    mixed = (m >= tl.where(column < 0, BLOCK_M, 0))[
                        :, None
                    ]  # an expert that it does not mix may be NaN
                    h = tl.load(there + (own_rows[:, None] + h2[None, :]), mask=mixed, other=0.0)
                    y += weight[:, None] * h.to(tl.float32)
                if TOWERS > 0:
                    t = y
                    if TOWERS == 2:
                        alpha = learned_scalar(Ta1_ptr, g, TOWER_ACT)
                        t = _dense(y, T1_ptr, Tb1_ptr, alpha, g, D1, H2, TOWER_ACT, DOT, dtype)
                    alpha = learned_scalar(Ta2_ptr, g, TOWER_ACT)
                    t = _dense(t, T2_ptr, Tb2_ptr, alpha, g, D2, D1, TOWER_ACT, DOT, dtype)
                    _predict(t, Head_ptr, Headb_ptr, Binary_ptr, Out_ptr, g, row, live, n_outputs, D2, SIGMOID)
                else:
                    out = Y_ptr + tl.cast(stride_yg, tl.int64) * g + first_row * aligned(pitch_y, ALIGN_H)
                    inside = live[:, None] & (h2 < aligned(pitch_y, ALIGN_H))[None, :]
                    tl.store(
                        out + (m[:, None] * aligned(pitch_y, ALIGN_H) + h2[None, :]), narrow(y, dtype), mask=inside
                    )
            if DEPTH > 0:
                tl.debug_barrier()  # before the next tile's experts take the scratch


def run_folded(
    x: Tensor, layer: PackedLayer, precision: Precision, out: Tensor | None, towers: PackedTowers | None
) -> Tensor:
    """Run a packed layer.

    Args:
        x: ``[N, B, I]`` in the precision's dtype, units contiguous.
        layer: its weights.
        precision: of the products.
        out: ``[B, T]`` fp32 for predictions, where the layer has heads or towers follow.
        towers: those that read the gates' mixtures one by one.

    Returns:
        ``out``, else ``[G, B, H]`` (``[E, B, H]`` without gates).
    """
    spec, n_rows = layer.spec, x.shape[1]
    n_gates, units = len(spec.gates), spec.dims[-1]
    result = out
    if out is None:
        pitch = round_up(units, 16 // x.element_size())
        result = torch.empty(n_gates or spec.n_experts, n_rows, pitch, dtype=x.dtype, device=x.device)
    assert result is not None
    choose, shape = configs.EXPERT_GATE, (layer.pitch, layer.h1, layer.h2)
    config = choose.folded(precision.name, generation(x.device), *shape)
    n_tiles = cdiv(n_rows, config.block_m)
    depth, follow = len(spec.dims), 0 if towers is None else len(towers.spec.dims)
    call = _Call(x, layer, towers, precision, result)
    if not n_gates:
        n_groups = 1 if spec.output_layer else _groups(n_tiles, spec.n_experts)
        call.start(config, n_tiles, n_groups, result, depth, 0, False)
    elif config.fused and 2 * n_tiles > configs.PROGRAMS:
        n_walkers = min(n_tiles, configs.PROGRAMS)
        call.start(config, n_walkers, 1, call.scratch(n_walkers * config.block_m), depth, follow, True)
    else:
        mixing = choose.folded_mix(precision.name, generation(x.device), layer.h2)
        # whole tiles of both: neither masks the rows of the scratch
        scratch = call.scratch(round_up(n_rows, max(config.block_m, mixing.block_m)))
        call.start(config, n_tiles, _groups(n_tiles, spec.n_experts), scratch, depth, 0, False)
        call.start(mixing, cdiv(n_rows, mixing.block_m), 1, scratch, 0, follow, True)
    return result if out is not None else result[..., :units]


def _groups(n_tiles: int, n_experts: int) -> int:
    """Programs that share a tile's experts, so that few tiles fill the machine."""
    return max(min(n_experts, configs.PROGRAMS // n_tiles), 1)


class _Call:
    """What the launches of one call have in common."""

    def __init__(
        self, x: Tensor, layer: PackedLayer, towers: PackedTowers | None, precision: Precision, result: Tensor
    ) -> None:
        self.x, self.layer, self.operand = x, layer, Operand.of_input(x)
        writes_out = towers is not None or layer.spec.output_layer
        self.mixture = (0, 0) if writes_out else (result.stride(0), result.stride(1))
        self.arguments: dict[str, Any] = {
            "X_ptr": x,
            **layer.arguments(),
            **(towers or layer).tower_arguments(),
            "Y_ptr": result,
            "Out_ptr": result,
            "n_rows": x.shape[1],
            "n_experts": layer.spec.n_experts,
            "n_inputs": layer.spec.n_inputs,
            "n_gates": len(layer.spec.gates),
            "n_outputs": result.shape[1],
            "n_in": self.operand.units,
            "n_read": self.operand.readable,
            "stride_xs": self.operand.stride_source,
            "stride_xb": self.operand.stride_row,
            "stride_yg": self.mixture[0],
            "pitch_y": self.mixture[1],
            "HEAD": layer.spec.output_layer,
            "SCRATCH": bool(layer.spec.gates),
            "DOT": precision.dot,
            "ALIGN_X": alignment(self.operand.stride_source, self.operand.stride_row),
            "ALIGN_READ": alignment(self.operand.readable),
            "PADDED": self.operand.readable != self.operand.units,
        }

    def scratch(self, n_rows: int) -> Tensor:
        """Room for what the experts make of ``n_rows``."""
        width = self.layer.spec.n_experts * self.layer.h2
        return torch.empty(n_rows, width, dtype=self.x.dtype, device=self.x.device)

    def start(
        self, config: configs.Folded, n_walkers: int, n_groups: int, kept: Tensor, depth: int, towers: int, mixes: bool
    ) -> None:
        """Launch the experts, the mixture or both; ``kept``: where the experts' output is left."""
        strides = (self.layer.h2, kept.stride(0)) if kept.ndim == 2 else (kept.stride(0), kept.stride(1))
        parts = pieces(self.layer.pitch) if config.resident else (0, 0, 0)
        launch(
            expert_gate_folded_kernel,
            (n_walkers * n_groups,),
            config.warps,
            **self.arguments,
            H_ptr=kept,
            n_tiles=cdiv(self.x.shape[1], config.block_m),
            n_walkers=n_walkers,
            n_groups=n_groups,
            stride_he=strides[0],
            stride_hb=strides[1],
            DEPTH=depth,
            MIX=mixes,
            TOWERS=towers,
            K0=parts[0],
            K1=parts[1],
            K2=parts[2],
            ALIGN_H=alignment(*strides, self.mixture[1]),
            HELD=config.held,
            BLOCK_M=config.block_m,
            CHUNK=config.chunk,
            BLOCK_K=alignment(self.layer.pitch, most=config.block_k),
        )
