"""Steps of Adam and AdamW, as many as a GPU can take: the bits of ``move``, without branches.

csrc/cuda/quick_adam.h is the same, and says why each operation is there: the device's own quotient and square root come
with a branch each, which keeps a thread's columns from being computed side by side. What the quick form can't do leaves
a weight that is not finite, which is looked at once, after all steps. Launch with ``Warps(contract=False)``.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .launch import INTERPRET
from .optimizer_rules import ADAM, ADAMW, fused, load_rows, move, store_rows

#: Powers of two: what v and lr * m are multiplied by, and the way back; 0 is taken for _LEAST.
_FAR = tl.constexpr(2.0**48)
_NEAR = tl.constexpr(2.0**-48)
_NEAR_ROOT = tl.constexpr(2.0**-24)
_LEAST = tl.constexpr(2.0**-110)
_FINITE = tl.constexpr(3.4028234663852886e38)


@triton.jit
def near_reciprocal(x):
    """1 / x, a unit off in its last place at most."""
    if INTERPRET:
        found = tl.div_rn(1.0, x)
    else:
        found = tl.inline_asm_elementwise(
            "rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )
    return found


@triton.jit
def near_inverse_root(x):
    """1 / sqrt(x), a unit off in its last place at most."""
    if INTERPRET:
        found = tl.div_rn(1.0, tl.sqrt_rn(x))
    else:
        found = tl.inline_asm_elementwise(
            "rsqrt.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )
    return found


@triton.jit
def together(a, b, c):
    """:func:`fused`, as an instruction that LLVM does not look into: triton 3.7.1's fails to pair these products."""
    if INTERPRET:
        found = fused(a, b, c)
    else:
        found = tl.inline_asm_elementwise(
            "fma.rn.f32 $0, $1, $2, $3;", "=f,f,f,f", [a, b, c], dtype=tl.float32, is_pure=True, pack=1
        )
    return found


@triton.jit
def quick_step(step):
    """A step's numbers as :func:`quick_move` wants them; its learning rate is NaN where they are not ordinary."""
    l2, shrink, keep, fresh, fresh_square, _ahead, root, eps, neg_lr = step
    ordinary = (eps >= 2.0**-34) & (eps <= 2.0**40) & (root >= 2.0**-10) & (root <= 1.0) & (tl.abs(neg_lr) <= 2.0**40)
    return (
        l2,
        shrink,
        keep,
        fresh,
        fresh_square * _FAR,
        root,
        tl.div_rn(1.0, root),
        eps,
        tl.where(ordinary, neg_lr, float("nan")),
    )


@triton.jit
def far_second(second):
    """v, 2^48 times as large; not a number where it is below zero."""
    far = second * _FAR
    return tl.where(far >= _LEAST, far, tl.where(second >= 0.0, _LEAST, float("nan")))


@triton.jit
def near_second(far):
    """:func:`far_second`'s way back."""
    return far * _NEAR


@triton.jit
def is_finite(p):
    """Where the quick steps were exact."""
    return tl.abs(p) <= _FINITE


@triton.jit
def quick_move(step, grad, p, first, far, DECOUPLED: tl.constexpr):
    """One step of a block: the new p, first, and second's :func:`far_second`; ``step`` is :func:`quick_step`'s."""
    l2, shrink, keep, fresh, far_square, root, inverse, eps, neg_lr = step
    g = together(p, l2, grad)
    if DECOUPLED:
        p = p * shrink
    first = together(fresh, g - first, first)
    far = together(far_square * g, g, far * keep)
    y = near_inverse_root(far)
    about = far * y
    b = together(together(-about, about, far), y * 0.5, about)  # 2^24 sqrt(v)
    q = b * inverse
    q = together(together(-root, q, b), inverse, q)
    divisor = together(q, _NEAR_ROOT, eps)
    a = (neg_lr * first) * _FAR
    r = near_reciprocal(divisor)
    r = together(r, together(-divisor, r, 1.0), r)
    q = a * r
    q = together(r, together(-divisor, q, a), q)
    q = together(r, together(-divisor, q, a), q)
    return together(q, _NEAR, p), first, far


@triton.jit
def moved(step, grad, p, first, second, inside, DIM: tl.constexpr, RULE: tl.constexpr):
    """One step of a block: the new p and states, right where ``inside`` [rows, columns] is."""
    if RULE >= ADAM and RULE <= ADAMW:
        q, one, far = quick_move(quick_step(step), grad, p, first, far_second(second), RULE == ADAMW)
        two = near_second(far)
        if tl.max(tl.max((inside & ~is_finite(q)).to(tl.int32), axis=1), axis=0) != 0:
            q, one, two = move(step, grad, p, first, second, DIM, RULE)
    else:
        q, one, two = move(step, grad, p, first, second, DIM, RULE)
    return q, one, two


@triton.jit
def take_step(P_ptr, First_ptr, Second_ptr, step, row, live, d, grad, DIM: tl.constexpr, RULE: tl.constexpr):
    """One step of rows that are current and whose gradient is at hand, in place; ``step`` is :func:`load_step`'s."""
    p, first, second = load_rows(P_ptr, First_ptr, Second_ptr, row, live, d, DIM, RULE)
    p, first, second = moved(step, grad, p, first, second, live[:, None] & (d < DIM)[None, :], DIM, RULE)
    store_rows(P_ptr, First_ptr, Second_ptr, row, live, d, p, first, second, DIM, RULE)
