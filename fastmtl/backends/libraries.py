"""The compiled libraries, where they could be built: _native (csrc/cpu) and _cuda (csrc/cuda)."""

from __future__ import annotations

import functools
import importlib.util

import torch


def load(name: str, what: str, why_absent: str) -> str | None:
    """Load a library, whose ops torch knows from then on.

    Args:
        name: of the module that it is found as, in fastmtl.
        what: of a message.
        why_absent: why it was not built, if it was not.

    Returns:
        Why it can't be used; None: it can.
    """
    # found as a module is: that holds for a wheel and for an editable install, whose library lies elsewhere
    found = importlib.util.find_spec(f"fastmtl.{name}")
    if found is None or found.origin is None:
        return f"the {what} library was not built: {why_absent} when fastmtl was installed"
    try:
        torch.ops.load_library(found.origin)
    except (OSError, RuntimeError) as error:
        return f"the {what} library {found.origin} does not load into torch {torch.__version__}: {error}"
    return None


@functools.cache
def why_no_cuda() -> str | None:
    """Load the library of CUDA C++, which is done where torch finds a GPU; why its ops can't be used, or None."""
    return load("_cuda", "CUDA", "nvcc or a torch for CUDA was missing")
