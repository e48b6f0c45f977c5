"""The library of CUDA C++ (csrc/cuda), for who runs its ops: built only where there is a CUDA compiler and a torch for
CUDA, and loaded only where torch finds a GPU."""

from __future__ import annotations

import functools
import importlib.util

import torch


@functools.cache
def missing() -> str | None:
    """Load the library; returns why it could not be loaded."""
    found = importlib.util.find_spec("fastmtl._cuda")
    if found is None or found.origin is None:
        return "the CUDA library was not built: nvcc or a torch for CUDA was missing when fastmtl was installed"
    try:
        torch.ops.load_library(found.origin)
    except (OSError, RuntimeError) as error:
        return f"the CUDA library {found.origin} does not load into torch {torch.__version__}: {error}"
    return None
