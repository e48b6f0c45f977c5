"""Who watches a computation: what is watched must be plain torch, written so that the watcher understands it."""

from __future__ import annotations

import torch


def exporting() -> bool:
    """Whether a graph is being made for another runtime (``torch.export``, ``torch.onnx``, ``torch.jit.trace``).

    torch.compile is no such thing. The flag itself is read, because the compiler of torch 2.11 takes
    ``torch.compiler.is_exporting()`` for true in whatever it compiles. Source: pytorch/pytorch#176347.
    """
    return torch.compiler._is_exporting_flag or torch.jit.is_tracing()


def watched() -> bool:
    """Whether a graph is being made of what runs, for this runtime or another."""
    return torch.compiler.is_compiling() or torch.jit.is_tracing()
