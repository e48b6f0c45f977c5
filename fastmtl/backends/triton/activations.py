"""The activations of spec.ACTIVATIONS, their derivatives, and dropout, on blocks in fp32.

Most act on each element alone and so fit any block. Dice and softmax look at all units of an expert
(:data:`ROW_WISE`): their blocks must hold whole rows, units along axis 1. A NaN goes through every one of them.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ...spec import DICE_EPSILON, LEAKY_SLOPE

#: Activations whose blocks must hold all units of an expert.
ROW_WISE = ("dice", "softmax")

_SLOPE = tl.constexpr(LEAKY_SLOPE)
_DICE_EPSILON = tl.constexpr(DICE_EPSILON)
_ROOT_HALF = tl.constexpr(0.7071067811865476)
_ROOT_HALF_OVER_PI = tl.constexpr(0.3989422804014327)


@triton.jit
def sigmoid(y):
    return 1.0 / (1.0 + tl.exp(-y))


@triton.jit
def tanh(y):
    """Relative accuracy near 0 too, where the quotient of exponentials cancels."""
    t = tl.exp(-2.0 * tl.abs(y))
    far = tl.where(y < 0, -1.0, 1.0) * (1.0 - t) / (1.0 + t)
    s = y * y
    near = y * (1.0 + s * (-0.33333334 + s * (0.13333334 + s * (-0.05396825 + s * 0.021869488))))
    return tl.where(tl.abs(y) < 0.25, near, far)


@triton.jit
def normal_cdf(y):
    return 0.5 * (1.0 + tl.erf(y * _ROOT_HALF))


@triton.jit
def _dice_parts(y, inside, n_units):
    """Centred units, the reciprocal of their norm, and the gate of Dice."""
    mean = tl.sum(tl.where(inside, y, 0.0), axis=1) / n_units
    centred = tl.where(inside, y - mean[:, None], 0.0)
    norm = tl.sqrt_rn(tl.sum(centred * centred, axis=1) + n_units * _DICE_EPSILON)
    per_norm = (1.0 / norm)[:, None]
    return centred, per_norm, sigmoid(centred * per_norm)


@triton.jit
def _softmax(y, inside):
    top = tl.max(tl.where(inside, y, float("-inf")), axis=1)
    p = tl.where(inside, tl.exp(y - top[:, None]), 0.0)
    return p / tl.sum(p, axis=1)[:, None]


@triton.jit
def activate(y, alpha, inside, n_units, ACT: tl.constexpr):
    """The activation of ``y``; ``alpha`` is the learned scalar, ``inside`` and ``n_units`` matter row-wise only."""
    if ACT == "relu":
        h = tl.maximum(y, 0.0, propagate_nan=tl.PropagateNan.ALL)
    elif ACT == "leakyrelu":
        h = tl.where(y > 0, y, _SLOPE * y)
    elif ACT == "prelu":
        h = tl.where(y > 0, y, alpha * y)
    elif ACT == "sigmoid":
        h = sigmoid(y)
    elif ACT == "tanh":
        h = tanh(y)
    elif ACT == "gelu":
        h = y * normal_cdf(y)
    elif ACT == "silu":
        h = y * sigmoid(y)
    elif ACT == "dice":
        _centred, _per_norm, gate = _dice_parts(y, inside, n_units)
        h = y * (alpha + (1.0 - alpha) * gate)
    elif ACT == "softmax":
        h = _softmax(y, inside)
    else:
        h = y
    return h


@triton.jit
def activate_bwd(y, dh, alpha, inside, n_units, ACT: tl.constexpr):
    """The gradient of ``y``, and of ``alpha`` element by element (of no meaning where nothing is learned)."""
    dalpha = y
    if ACT == "relu":
        dy = tl.where(y <= 0, 0.0, dh)
    elif ACT == "leakyrelu":
        dy = tl.where(y > 0, dh, _SLOPE * dh)
    elif ACT == "prelu":
        dy = tl.where(y > 0, dh, alpha * dh)
        dalpha = tl.where(y > 0, 0.0, y * dh)
    elif ACT == "sigmoid":
        s = sigmoid(y)
        dy = dh * s * (1.0 - s)
    elif ACT == "tanh":
        t = tanh(y)
        dy = dh * (1.0 - t * t)
    elif ACT == "gelu":
        dy = dh * (normal_cdf(y) + y * _ROOT_HALF_OVER_PI * tl.exp(-0.5 * y * y))
    elif ACT == "silu":
        s = sigmoid(y)
        dy = dh * s * (1.0 + y * (1.0 - s))
    elif ACT == "dice":
        centred, per_norm, gate = _dice_parts(y, inside, n_units)
        dunit = tl.where(inside, dh * y * (1.0 - alpha) * gate * (1.0 - gate), 0.0)
        along = tl.sum(dunit * centred, axis=1)[:, None]
        dcentred = dunit * per_norm - centred * along * per_norm * per_norm * per_norm
        shared = tl.sum(tl.where(inside, dcentred, 0.0), axis=1)[:, None] / n_units
        dy = dh * (alpha + (1.0 - alpha) * gate) + dcentred - shared
        dalpha = dh * y * (1.0 - gate)
    elif ACT == "softmax":
        h = _softmax(y, inside)
        dy = h * (dh - tl.sum(tl.where(inside, h * dh, 0.0), axis=1)[:, None])
    else:
        dy = dh
    return dy, dalpha


@triton.jit
def kept(Seed_ptr, row, expert, first_unit, drop, LAYER: tl.constexpr, UNITS: tl.constexpr):
    """Which elements dropout leaves, ``[rows, UNITS]``, of an expert's units from ``first_unit`` (a multiple of 4) on:
    the same wherever and however often it is asked.

    A counter-based generator (Philox, SC'11) over (four units, row, layer, expert) under the call's seed: no mask is
    stored. One call of it, ten rounds of products, serves four units.
    """
    four = first_unit // 4 + tl.arange(0, UNITS // 4)
    zero = row.to(tl.int32)[:, None] * 0 + four.to(tl.int32)[None, :] * 0
    units, rows = four.to(tl.int32)[None, :] + zero, row.to(tl.int32)[:, None] + zero
    a, b, c, d = tl.philox(tl.load(Seed_ptr), units, rows, zero + LAYER, zero + expert)
    bits = tl.interleave(tl.interleave(a, c), tl.interleave(b, d))
    return (bits >> 8).to(tl.float32) * (1.0 / 16777216) >= drop


@triton.jit
def learned_scalar(Alpha_ptr, expert, ACT: tl.constexpr):
    """The expert's learned scalar; 0 where the activation has none."""
    alpha = 0.0
    if ACT == "prelu" or ACT == "dice":
        alpha = tl.load(Alpha_ptr + expert)
    return alpha
