"""The ops in C++ on the CPU (fp32)."""

from __future__ import annotations

from torch import Tensor

DIFFERENTIABLE = False


def unavailable() -> str | None:
    """Why this backend can't run on this machine; None: it can."""
    return "the native library is not built"


def unsupported(op: str, *tensors: Tensor) -> str | None:
    """Why this backend can't run ``op`` on these tensors; None: it can."""
    return None
