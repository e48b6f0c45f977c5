"""Small device functions that several kernel files use."""

from __future__ import annotations

import triton
import triton.language as tl

from .launch import INTERPRET


@triton.jit
def begin(EARLY: tl.constexpr):
    """The first thing that a kernel does whose launches may come early (launch.starts_early): wait until all is done
    that was launched before, then let the next launch come. A launch's way to the machine, a microsecond or two, is
    behind it then when its turn comes. (A launch that does not come early finds nothing to wait for.)"""
    if EARLY:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()


@triton.jit
def aligned(value, ALIGN: tl.constexpr):
    """``value``, which the caller knows to be a multiple of ALIGN, in a form that lets the compiler know it too: loads
    of 16 bytes depend on it, and only arguments that are multiples of 16 are seen to be aligned without help."""
    return value // ALIGN * ALIGN


@triton.jit
def narrow(value, dtype: tl.constexpr):
    """``value``, rounded to ``dtype`` to nearest, ties to even. (The interpreter cuts digits off instead, and makes
    something of numbers below 1.2e-38.)"""
    if INTERPRET and dtype == tl.bfloat16:
        value = value.to(tl.float32)
        bits = value.to(tl.int32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & -0x10000
        value = tl.where(value == value, bits.to(tl.float32, bitcast=True), value)
    return value.to(dtype)


@triton.jit
def operand(value, dtype: tl.constexpr):
    """A block as ``tl.dot`` takes it: rounded to ``dtype``."""
    rounded = narrow(value, dtype)
    if INTERPRET:
        rounded = rounded.to(tl.float32)
    return rounded


@triton.jit
def normalise(Z_ptr, Stat_ptr, first_row, m, live, column, inside, pitch):
    """A block of z minus its mean, and the BatchNorm's output, ``[rows, columns]`` in fp32."""
    at = Z_ptr + first_row * pitch + m[:, None] * pitch + column[None, :]
    z = tl.load(at, mask=live[:, None] & inside[None, :], other=0.0).to(tl.float32)
    mean = tl.load(Stat_ptr + column, mask=inside, other=0.0)
    scale = tl.load(Stat_ptr + 2 * pitch + column, mask=inside, other=0.0)
    beta = tl.load(Stat_ptr + 3 * pitch + column, mask=inside, other=0.0)
    centred = z - mean[None, :]
    return centred, centred * scale[None, :] + beta[None, :]
