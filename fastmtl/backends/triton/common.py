"""Small device functions that every kernel file uses."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def aligned(value, ALIGN: tl.constexpr):
    """``value``, which the caller knows to be a multiple of ALIGN, in a form that lets the compiler know it too: loads
    of 16 bytes depend on it, and only arguments that are multiples of 16 are seen to be aligned without help."""
    return value // ALIGN * ALIGN
