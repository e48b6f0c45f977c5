"""What one optimizer step does to a block of table rows: the rules of csrc/core/optimizer.h, operation by operation.

The order of operations, the roundings and which products are fused are torch's single-tensor implementation's, so that
the numbers are the native backend's to the last bit, except that numbers below 1.2e-38 are not taken for zero here.
Kernels that call these functions must be launched with ``Warps(contract=False)``: a product that the compiler fuses on
its own would change the last bit.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .launch import INTERPRET

#: In place of a rule: there is no step to take, the gradient is written out.
NO_RULE = tl.constexpr(-1)
SGD = tl.constexpr(0)
_NESTEROV = tl.constexpr(2)
ADAM = tl.constexpr(3)
ADAMW = tl.constexpr(4)
ADAGRAD = tl.constexpr(5)
ROWWISE_ADAGRAD = tl.constexpr(6)


@triton.jit
def fused(a, b, c):
    """a * b + c, rounded once. (The interpreter would round twice; in float64 the product is exact.)"""
    found = tl.fma(a, b, c)
    if INTERPRET:
        zero = tl.zeros_like(found).to(tl.float64)  # some of them may be constants
        found = ((zero + a) * (zero + b) + (zero + c)).to(tl.float32)
    return found


@triton.jit
def load_step(Step_ptr):
    """A step's numbers: l2, shrink, keep, fresh, fresh_square, ahead, root, eps, neg_lr."""
    how = tl.load(Step_ptr), tl.load(Step_ptr + 1), tl.load(Step_ptr + 2), tl.load(Step_ptr + 3), tl.load(Step_ptr + 4)
    much = tl.load(Step_ptr + 5), tl.load(Step_ptr + 6), tl.load(Step_ptr + 7), tl.load(Step_ptr + 8)
    return how[0], how[1], how[2], how[3], how[4], much[0], much[1], much[2], much[3]


@triton.jit
def move(step, grad, p, first, second, DIM: tl.constexpr, RULE: tl.constexpr):
    """One step of a block ``[rows, columns]``: the new p and states.

    ``first`` is ``[rows]`` where the rule is row-wise; the block must hold whole rows then, zero beyond them.
    """
    l2, shrink, keep, fresh, fresh_square, ahead, root, eps, neg_lr = step
    g = fused(p, l2, grad)
    if RULE == SGD:
        p = fused(g, neg_lr, p)
    elif RULE == ADAGRAD:
        first = fused(g, g, first)
        p = p + tl.div_rn(neg_lr * g, tl.sqrt_rn(first) + eps)
    elif RULE == ROWWISE_ADAGRAD:
        first = first + tl.div_rn(tl.sum(g * g, axis=1), DIM * 1.0)
        p = p + tl.div_rn(neg_lr * g, (tl.sqrt_rn(first) + eps)[:, None])
    elif RULE >= ADAM and RULE <= ADAMW:
        if RULE == ADAMW:
            p = p * shrink
        first = fused(fresh, g - first, first)
        second = fused(fresh_square * g, g, second * keep)
        p = p + tl.div_rn(neg_lr * first, tl.div_rn(tl.sqrt_rn(second), root) + eps)
    else:
        first = fused(g, fresh, first * keep)
        p = fused(fused(first, ahead, g) if RULE == _NESTEROV else first, neg_lr, p)
    return p, first, second


@triton.jit
def load_rows(P_ptr, First_ptr, Second_ptr, row, live, d, DIM: tl.constexpr, RULE: tl.constexpr):
    """p and the states of a block: columns ``d`` of ``row``."""
    at = row[:, None] * DIM + d[None, :]
    inside = live[:, None] & (d < DIM)[None, :]
    p = tl.load(P_ptr + at, mask=inside, other=0.0)
    first, second = p, p  # where the rule has no such state
    if RULE == ROWWISE_ADAGRAD:
        first = tl.load(First_ptr + row, mask=live, other=0.0)
    elif RULE != SGD:
        first = tl.load(First_ptr + at, mask=inside, other=0.0)
    if RULE >= ADAM and RULE <= ADAMW:
        second = tl.load(Second_ptr + at, mask=inside, other=0.0)
    return p, first, second


@triton.jit
def store_rows(P_ptr, First_ptr, Second_ptr, row, live, d, p, first, second, DIM: tl.constexpr, RULE: tl.constexpr):
    """What :func:`load_rows` read, back to its place."""
    at = row[:, None] * DIM + d[None, :]
    inside = live[:, None] & (d < DIM)[None, :]
    tl.store(P_ptr + at, p, mask=inside)
    if RULE == ROWWISE_ADAGRAD:
        tl.store(First_ptr + row, first, mask=live)
    elif RULE != SGD:
        tl.store(First_ptr + at, first, mask=inside)
    if RULE >= ADAM and RULE <= ADAMW:
        tl.store(Second_ptr + at, second, mask=inside)
