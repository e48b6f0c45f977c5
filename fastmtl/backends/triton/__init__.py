"""The ops as Triton kernels on NVIDIA GPUs from compute capability 8.0 on: what the table of backends needs to know.

Triton itself is imported with the first op that runs, never with this module: a machine without a GPU does not pay for
it. ``TRITON_INTERPRET=1`` runs the kernels on CPU tensors, slowly, to check them (docs/gpu.md).
"""

from __future__ import annotations

import functools
import importlib.util
import os
import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ...spec import EmbeddingSpec, ExpertGateParams, ExpertGateSpec
from ..updates import Update

#: The kernels bring their own backward; autograd lives in fastmtl/ops.
DIFFERENTIABLE = False

_MIN_CAPABILITY = (8, 0)
_TABLE_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_INPUT_DTYPES = (torch.float32, torch.bfloat16)


def interpreting() -> bool:
    """Whether Triton's interpreter stands in for a GPU."""
    return os.environ.get("TRITON_INTERPRET") == "1"


@functools.cache
def _missing() -> str | None:
    return None if importlib.util.find_spec("triton") else "triton is not installed: pip install 'fastmtl[gpu]'"


@functools.cache
def _no_gpu() -> str | None:
    if not torch.cuda.is_available():
        return "torch finds no GPU here"
    if torch.version.cuda is None:
        return "it is made for NVIDIA GPUs, and this torch is not built for them"
    capability = torch.cuda.get_device_capability()
    if capability < _MIN_CAPABILITY:
        return f"it needs compute capability 8.0 or newer, and this GPU has {capability[0]}.{capability[1]}"
    return None


def unavailable() -> str | None:
    """Why this backend can't run on this machine; None: it can."""
    return (None if interpreting() else _no_gpu()) or _missing()


def unsupported(op: str, *tensors: Tensor) -> str | None:
    """Why this backend can't run ``op`` on these tensors; None: it can."""
    device = "cpu" if interpreting() else "cuda"
    for tensor in tensors:
        if tensor.device.type != device:
            return f"it runs on {device.upper()} tensors only, not on {tensor.device}"
    if torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device) is not torch.bfloat16:
        return f"it follows autocast to bfloat16 only, not to {torch.get_autocast_dtype(device)}"
    if op == "embedding_bag":
        dtypes = {tensor.dtype for tensor in tensors}
        if len(dtypes) > 1 or not dtypes <= set(_TABLE_DTYPES):
            return f"it reads tables of one floating dtype of 16 or 32 bits, not {', '.join(sorted(map(str, dtypes)))}"
        return None
    x, *parameters = tensors
    if x.dtype not in _INPUT_DTYPES:
        return f"it computes in torch.float32 or torch.bfloat16, not in {x.dtype}"
    for parameter in parameters:
        if parameter.dtype is not torch.float32:
            return f"it keeps parameters in torch.float32, not in {parameter.dtype}"
    return None


def plans_in_use() -> list[Any]:
    """What holds the tensors that launches read beside their arguments; who replays launches must keep it."""
    # plans are made by modules that need Triton: where these are not loaded, there are none
    modules = (sys.modules.get(f"{__name__}.{name}") for name in ("embedding_plan", "layer_plan"))
    return [plan for module in modules if module is not None for plan in module.kept()]


def embedding_bag_fwd(
    weights: list[Tensor], ids: Tensor, columns: tuple[int, ...], dense: Tensor | None, spec: EmbeddingSpec
) -> Tensor:
    """See :func:`fastmtl.ops.embedding_bag`."""
    from .embedding_bag_forward import embedding_bag_fwd as run

    return run(weights, ids, columns, dense, spec)


def embedding_bag_bwd(
    grad: Tensor,
    ids: Tensor,
    columns: tuple[int, ...],
    spec: EmbeddingSpec,
    shapes: list[torch.Size],
    needs: list[bool],
) -> list[Tensor | None]:
    """The dense gradients of the weights that need one, from the gradient ``[B, W]`` of the output."""
    from .embedding_bag_backward import embedding_bag_bwd as run

    return run(grad, ids, columns, spec, shapes, needs)


def embedding_bag_bwd_sparse(
    grad: Tensor,
    ids: Tensor,
    columns: tuple[int, ...],
    spec: EmbeddingSpec,
    shapes: list[torch.Size],
    needs: list[bool],
) -> list[tuple[Tensor, Tensor] | None]:
    """As :func:`embedding_bag_bwd`, but as ``(rows [M], values [M, D])``: each touched row once.

    M is known without asking the device, so entries may be void: their row is V_total (one behind the last), and
    their value is undefined.
    """
    from .embedding_bag_backward import embedding_bag_bwd_sparse as run

    return run(grad, ids, columns, spec, shapes, needs)


def embedding_bag_bwd_step(
    grad: Tensor, ids: Tensor, columns: tuple[int, ...], spec: EmbeddingSpec, updates: list[Update | None]
) -> None:
    """As :func:`embedding_bag_bwd`, but the optimizer's step takes the place of a gradient that is written out."""
    from .embedding_bag_backward import embedding_bag_bwd_step as run

    run(grad, ids, columns, spec, updates)


def embedding_bag_index(
    ids: Tensor,
    columns: tuple[int, ...],
    spec: EmbeddingSpec,
    shapes: list[torch.Size],
    needs: list[bool],
    out: Sequence[Any] | None = None,
) -> list[Any]:
    """See :func:`fastmtl.backends.triton.embedding_index.embedding_bag_index`."""
    from .embedding_index import embedding_bag_index as run

    return run(ids, columns, spec, shapes, needs, out)


def table_step(*arguments: Any) -> None:
    """See :func:`fastmtl.backends.triton.optimizer.table_step`."""
    from .optimizer import table_step as run

    run(*arguments)


def table_catch_up(*arguments: Any) -> None:
    """See :func:`fastmtl.backends.triton.optimizer.table_catch_up`."""
    from .optimizer import table_catch_up as run

    run(*arguments)


def table_replay(*arguments: Any) -> None:
    """See :func:`fastmtl.backends.triton.optimizer.table_replay`."""
    from .optimizer import table_replay as run

    run(*arguments)


def advance(ring: Tensor, step: Tensor, clock: Tensor, taken: Tensor | None = None) -> None:
    """See :func:`fastmtl.backends.triton.optimizer.advance`."""
    from .optimizer import advance as run

    run(ring, step, clock, taken)


def dense_step(*arguments: Any) -> None:
    """See :func:`fastmtl.backends.triton.dense_optimizer.dense_step`."""
    from .dense_optimizer import dense_step as run

    run(*arguments)


def note_losses(*arguments: Any) -> None:
    """See :func:`fastmtl.backends.triton.notes.note_losses`."""
    from .notes import note_losses as run

    run(*arguments)


def weights_ahead(layers: Sequence[tuple[ExpertGateParams, ExpertGateSpec]]) -> list[tuple[Tensor, ...]]:
    """See :func:`fastmtl.backends.triton.operands.weights_ahead`."""
    from .operands import weights_ahead as run

    return run(layers)


def cut_rows(tensors: Sequence[Tensor], rows: Tensor, out: Sequence[Tensor]) -> None:
    """See :func:`fastmtl.backends.triton.cut.cut_rows`."""
    from .cut import cut_rows as run

    run(tensors, rows, out)


def expert_gate_fwd(
    x: Tensor,
    params: ExpertGateParams,
    spec: ExpertGateSpec,
    training: bool,
    weights: tuple[Tensor, ...] | None = None,
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """See :func:`fastmtl.ops.expert_gate`; returns what the backward needs beside the output. ``weights``: one of
    :func:`weights_ahead`'s."""
    from .expert_gate_forward import expert_gate_fwd as run

    return run(x, params, spec, training, weights)


def expert_gate_bwd(
    grad: Tensor,
    x: Tensor,
    params: ExpertGateParams,
    spec: ExpertGateSpec,
    training: bool,
    saved: list[Tensor],
    needs_x: bool,
) -> tuple[Tensor | None, list[Tensor]]:
    """The gradients of x (None where it needs none) and of ``params.learned()``."""
    from .expert_gate_backward import expert_gate_bwd as run

    return run(grad, x, params, spec, training, saved, needs_x)


def tower_losses(
    x: Tensor,
    params: ExpertGateParams,
    spec: ExpertGateSpec,
    labels: Tensor,
    is_classification: Tensor,
    factors: Tensor,
    needs_x: bool,
    weights: tuple[Tensor, ...] | None = None,
) -> tuple[Tensor, Tensor, Tensor | None, list[Tensor]] | None:
    """See :func:`fastmtl.backends.triton.expert_gate_backward.tower_losses`."""
    from .expert_gate_backward import tower_losses as run

    return run(x, params, spec, labels, is_classification, factors, needs_x, weights)


def task_losses(logits: Tensor, labels: Tensor, is_classification: Tensor, factors: Tensor) -> tuple[Tensor, Tensor]:
    """See :func:`fastmtl.backends.native.task_losses`."""
    from .losses import task_losses as run

    return run(logits, labels, is_classification, factors)
