"""The ops in C++ on the CPU (fp32): finds and loads the native library, and hands it flat arguments.

What depends only on a spec is turned into a tensor of integers once (a "plan") and kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..spec import ACTIVATIONS, EmbeddingSpec, ExpertGateParams, ExpertGateSpec, Ragged
from . import eager, libraries

#: The library's ops bring their own backward; autograd lives in fastmtl/ops.
DIFFERENTIABLE = False

# ------------------------------------------------------------------------------------------------ the library

_WHY_NOT = libraries.load("_native", "native", "no working C++20 compiler was found")
_ops = torch.ops.fastmtl


def unavailable() -> str | None:
    """Why this backend can't run on this machine; None: it can."""
    return _WHY_NOT


_TABLES_OF_16_BITS = (torch.bfloat16, torch.float16)


def unsupported(op: str, *tensors: Tensor) -> str | None:
    """Why this backend can't run ``op`` on these tensors; None: it can."""
    for tensor in tensors:
        if tensor.dtype is not torch.float32 and not (op == "embedding_bag" and tensor.dtype in _TABLES_OF_16_BITS):
            return f"it computes in torch.float32 only, not in {tensor.dtype}"
        if not tensor.is_cpu:
            return f"it runs on the CPU only, not on {tensor.device}"
    return None


#: (id of a spec, ...) -> (the spec, its plan). Found by identity, because hashing a spec costs more than a small op.
_plans: dict[tuple, tuple[object, Tensor]] = {}


def _kept_plan(key: tuple, spec: object) -> Tensor | None:
    kept = _plans.get(key)
    return kept[1] if kept is not None and kept[0] is spec else None


def _keep_plan(key: tuple, spec: object, plan: Any) -> Tensor:
    if len(_plans) >= 256:  # sequence lengths may differ from batch to batch
        _plans.clear()
    tensor = torch.as_tensor(plan, dtype=torch.int64)
    _plans[key] = (spec, tensor)
    return tensor


# --------------------------------------------------------------------------------------------- embedding_bag

_POOLINGS = {"sum": 0, "mean": 1, "concat": 2, "max": 3}
_OOV: dict[str | int, str | int] = {"raise": -2, "zero": -1}
_BAG_FIELDS = 12
#: Fields of a bag in a plan: its table's width, its first id column and how many, its first output column.
BAG_DIM, BAG_COLUMN, BAG_LENGTH, BAG_OUT = 3, 5, 6, 7


def bag_plan(spec: EmbeddingSpec, columns: tuple[int, ...]) -> Tensor:
    """The lookup as the library reads it: ``[F, 12]``, the fields of ``Bag`` in csrc/core/embedding_bag.h."""
    key = (id(spec), columns)
    plan = _kept_plan(key, spec)
    if plan is None:
        rows, out = [], 0
        for f, (bag, width) in enumerate(zip(spec.bags, spec.bag_widths(columns), strict=True)):
            pads = (*bag.padding, 0, 0)[:2]
            length = columns[f + 1] - columns[f]
            where = (bag.table, bag.offset, bag.vocab, bag.dim, _POOLINGS[bag.pooling], columns[f], length, out)
            rows.append((*where, len(bag.padding), *pads, _OOV.get(bag.oov, bag.oov)))
            out += width
        plan = _keep_plan(key, spec, rows or torch.empty(0, _BAG_FIELDS))
    return plan


class RowIndex(NamedTuple):
    """The rows of one weight that a batch looks up.

    Args:
        rows: ``[n]`` int64, ascending and unique.
        starts: ``[n + 1]`` int64; the lookups of ``rows[i]`` are ``entries[starts[i]:starts[i + 1]]``.
        entries: int32, positions in the ids ``[B, S]`` counted row by row, ascending for each row.
    """

    rows: Tensor
    starts: Tensor
    entries: Tensor


def embedding_bag_fwd(
    weights: list[Tensor], ids: Tensor, columns: tuple[int, ...], dense: Tensor | None, spec: EmbeddingSpec
) -> Tensor:
    """See :func:`fastmtl.ops.embedding_bag`."""
    try:
        return _ops.embedding_bag_fwd.default(weights, ids, dense, bag_plan(spec, columns), spec.width(columns))
    except RuntimeError:
        eager.raise_bad_id(ids, columns, spec)
        raise


def embedding_bag_bwd(
    grad: Tensor,
    ids: Tensor,
    columns: tuple[int, ...],
    spec: EmbeddingSpec,
    shapes: list[torch.Size],
    needs: list[bool],
) -> list[Tensor | None]:
    """The dense gradients of the weights that need one, from the gradient ``[B, W]`` of the output."""
    return dense_gradients(grad, ids, bag_plan(spec, columns), shapes, needs)


def dense_gradients(
    grad: Tensor, ids: Tensor, plan: Tensor, shapes: list[torch.Size], needs: list[bool]
) -> list[Tensor | None]:
    """:func:`embedding_bag_bwd` of the bags of a plan."""
    grads = iter(_ops.embedding_bag_bwd.default(grad, ids, plan, _wanted(shapes, needs)))
    return [next(grads) if need else None for need in needs]


def embedding_bag_general_fwd(
    weights: list[Tensor],
    ids: Tensor,
    columns: tuple[int, ...],
    dense: Tensor | None,
    spec: EmbeddingSpec,
    scales: Tensor | None,
    ragged: Ragged | None,
) -> Tensor:
    """See :func:`fastmtl.ops.embedding_bag`: all that it can do."""
    flat = _ragged_arguments(ids, spec, scales, ragged)
    dense = None if dense is None else dense.float()
    try:
        return _ops.embedding_bag_general_fwd.default(
            weights, ids, dense, bag_plan(spec, columns), spec.width(columns), *flat
        )
    except RuntimeError:
        eager.raise_bad_id(ids, columns, spec, ragged)
        raise


def embedding_bag_general_bwd(
    grad: Tensor,
    weights: list[Tensor],
    ids: Tensor,
    columns: tuple[int, ...],
    spec: EmbeddingSpec,
    scales: Tensor | None,
    ragged: Ragged | None,
) -> tuple[list[tuple[Tensor, Tensor]], Tensor | None, Tensor | None]:
    """Backward of :func:`embedding_bag_general_fwd`.

    Returns:
        For each weight ``(rows [n] ascending and unique, their gradients [n, D] float32)``; the gradients of
        ``scales`` and of ``ragged.scales``, where there are such.
    """
    flat = _ragged_arguments(ids, spec, scales, ragged)
    found = _ops.embedding_bag_general_bwd.default(grad, weights, ids, bag_plan(spec, columns), *flat)
    pairs = [(found[2 * t], found[2 * t + 1]) for t in range(len(weights))]
    rest = iter(found[2 * len(weights) :])
    d_scales = None if scales is None else next(rest)
    return pairs, d_scales, None if ragged is None or ragged.scales is None else next(rest)


def _ragged_arguments(ids: Tensor, spec: EmbeddingSpec, scales: Tensor | None, ragged: Ragged | None) -> tuple:
    numbers, at = [], 0
    for bag in spec.bags:
        numbers.append(at if bag.is_ragged else -1)
        at += bag.is_ragged
    if ragged is None:
        return numbers, scales, None, None, None
    given = None if ragged.scales is None else ragged.scales.contiguous()
    return numbers, scales, ragged.ids.contiguous(), ragged.offsets.contiguous(), given


def _wanted(shapes: list[torch.Size], needs: list[bool]) -> list[int]:
    """Rows and width of each weight, the rows negative where no gradient is wanted."""
    flat: list[int] = []
    for (rows, dim), need in zip(shapes, needs, strict=True):
        flat += (rows if need else -1 - rows, dim)
    return flat


def embedding_bag_index(
    ids: Tensor,
    columns: tuple[int, ...],
    spec: EmbeddingSpec,
    shapes: list[torch.Size],
    needs: list[bool],
    alone: bool = False,
) -> list[RowIndex | None]:
    """For each weight that needs a gradient: the rows that a batch looks up, and where.

    It depends on the ids alone: it can be made before the lookup and serves every backward after it. ``alone``: on the
    calling thread only, because the others are at work.
    """
    flat = iter(_ops.embedding_bag_index.default(ids, bag_plan(spec, columns), _wanted(shapes, needs), alone))
    return [RowIndex(next(flat), next(flat), next(flat)) if need else None for need in needs]


def embedding_bag_bwd_sparse(
    grad: Tensor,
    ids: Tensor,
    columns: tuple[int, ...],
    spec: EmbeddingSpec,
    shapes: list[torch.Size],
    index: list[RowIndex | None],
) -> list[tuple[Tensor, Tensor] | None]:
    """For each weight with an index: ``(rows [n] ascending and unique, their gradients [n, D])``.

    Bit for bit the rows of :func:`embedding_bag_bwd`'s result; the others' gradient is zero.
    """
    return sparse_gradients(grad, ids, bag_plan(spec, columns), shapes, index)


def sparse_gradients(
    grad: Tensor, ids: Tensor, plan: Tensor, shapes: list[torch.Size], index: list[RowIndex | None]
) -> list[tuple[Tensor, Tensor] | None]:
    """:func:`embedding_bag_bwd_sparse` of the bags of a plan; what other bags look up adds nothing to their rows."""
    needs = [found is not None for found in index]
    parts = [part for found in index if found is not None for part in found]
    values = iter(_ops.embedding_bag_bwd_sparse.default(grad, ids, plan, _wanted(shapes, needs), parts))
    return [None if found is None else (found.rows, next(values)) for found in index]


# ----------------------------------------------------------------------------------------------- expert_gate


def layer_numbers(spec: ExpertGateSpec) -> list[int]:
    """The layer as csrc/cpu/expert_gate_args.h reads it."""
    flat = [spec.in_features, spec.n_inputs, spec.n_experts, len(spec.dims), ACTIVATIONS.index(spec.activation)]
    flat += [len(spec.gates), spec.output_layer, spec.gate_rows, *spec.dims]
    for spans in (spec.expert_spans, spec.gate_input_spans):
        for span in spans:
            flat += span
    for gate, span in zip(spec.gates, spec.gate_spans, strict=True):
        flat += (span.start, len(gate.experts), *gate.experts)
    return flat


def layer_plan(spec: ExpertGateSpec) -> Tensor:
    """:func:`layer_numbers` as a tensor, which is kept."""
    key = (id(spec),)
    plan = _kept_plan(key, spec)
    return _keep_plan(key, spec, layer_numbers(spec)) if plan is None else plan


def computes_in_bf16() -> bool:
    """Whether autocast asks for products of bf16 operands: sums, statistics and weights stay in float32."""
    return torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu") is torch.bfloat16


class Folded(NamedTuple):
    """Small tables as the layer takes them that they are folded into.

    Args:
        places: ``[n, 3]`` int64: the first column of the weights that reads each table, its first row in ``table`` and
            its rows.
        table: ``[V_total, D]`` float32.
        picks: ``[B, n]`` int32: of the n tables' rows counted through, the one that each row of the batch reads; their
            number where it reads none.
    """

    places: Tensor
    table: Tensor
    picks: Tensor


def expert_gate_fwd(
    x: Tensor, params: ExpertGateParams, spec: ExpertGateSpec, training: bool, folded: Folded | None = None
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """See :func:`fastmtl.ops.expert_gate`; returns what the backward needs beside the output. ``folded``: small tables
    whose columns x lacks."""
    dropped = training and spec.dropout > 0
    seed = torch.empty((), dtype=torch.int64).random_() if dropped else None
    out, *saved = _ops.expert_gate_fwd.default(
        x, params.learned(), params.running(), layer_plan(spec), training,
        spec.dropout if dropped else 0.0, 0 if seed is None else int(seed), computes_in_bf16(), *(folded or ()),
    )  # fmt: skip
    return out, tuple(saved) if seed is None else (*saved, seed)


def task_losses(logits: Tensor, labels: Tensor, is_classification: Tensor, factors: Tensor) -> tuple[Tensor, Tensor]:
    """Cross-entropy or squared error of each task and the gradient of their weighted sum.

    Args:
        logits: ``[B, T]`` float32.
        labels: ``[B, T]`` float32; NaN where a label is missing.
        is_classification: ``[T]`` bool; otherwise the logit is the value itself.
        factors: ``[T]`` float32, of each loss in the sum.

    Returns:
        Losses ``[T]``, the means over the rows that have the label (0 where none has), and ``[B, T]``. Equal to
        :func:`fastmtl.basic.loss_func.multi_task_loss` of the sigmoid, to rounding.
    """
    losses, grad = _ops.task_losses.default(logits, labels, is_classification, factors)
    return losses, grad


def expert_gate_bwd(
    grad: Tensor,
    x: Tensor,
    params: ExpertGateParams,
    spec: ExpertGateSpec,
    training: bool,
    saved: list[Tensor],
    needs_x: bool,
    folded: Folded | None = None,
    x_columns: int | None = None,
) -> tuple[Tensor | None, list[Tensor]]:
    """The gradients of x (None where it needs none; with ``x_columns`` of its first columns only) and of
    ``params.learned()``; behind these, with ``folded`` tables and where x needs one, that of their rows counted through
    ``[R, D]``."""
    seed = 0
    dropped = training and spec.dropout > 0
    if dropped:
        *saved, drawn = saved
        seed = int(drawn)
    wanted = x.shape[-1] if x_columns is None else x_columns
    grads = _ops.expert_gate_bwd.default(
        grad, x, params.learned(), saved, layer_plan(spec), training,
        spec.dropout if dropped else 0.0, seed, wanted if needs_x else -1, *(folded or ()),
    )  # fmt: skip
    return (grads.pop(len(params.learned())) if needs_x else None), grads


def dropout_seeds(dropouts: Sequence[float]) -> list[int]:
    """A seed from torch's generator for each layer that drops out, 0 for the others."""
    return [int(torch.empty((), dtype=torch.int64).random_()) if dropout > 0 else 0 for dropout in dropouts]


def chain_gradients(
    x: Tensor,
    layers: Sequence[tuple[ExpertGateParams, ExpertGateSpec]],
    labels: Tensor,
    is_classification: Tensor,
    factors: Tensor,
    folded: Folded | None,
    x_columns: int,
) -> tuple[Tensor, Tensor, list[list[Tensor]], Tensor | None, Tensor | None]:
    """Forward in training, losses and backward of layers that each read what the one before made, as one call: its
    threads are woken once.

    Args:
        x: ``[1, B, I]``, what the first layer reads.
        layers: the last of them makes the tasks' logits.
        labels, is_classification, factors: as for :func:`task_losses`.
        folded: tables folded into the first layer.
        x_columns: of so many of x's first columns a gradient is wanted; -1: not even of the folded tables.

    Returns:
        Losses ``[T]``, logits ``[B, T]``, of each layer the gradients of ``params.learned()``, that of x and that of
        the folded tables' rows, as :func:`expert_gate_bwd` gives them (None where they are not wanted).
    """
    learned = [params.learned() for params, _ in layers]
    dropouts = [spec.dropout for _, spec in layers]
    losses, logits, *grads = _ops.chain_gradients.default(
        x, [p for one in learned for p in one], [p for params, _ in layers for p in params.running()],
        [layer_plan(spec) for _, spec in layers], dropouts, dropout_seeds(dropouts), computes_in_bf16(),
        labels, is_classification, factors, x_columns, *(folded or ()),
    )  # fmt: skip
    given = iter(grads)
    of_layers = [[next(given) for _ in one] for one in learned]
    return losses, logits, of_layers, next(given, None), next(given, None)


def shuffle_ahead(order: Tensor, begin: int, draws: Tensor) -> None:
    """Take some steps of a shuffle; entries before the last of them do not change any more.

    Args:
        order: ``[n]`` int32 or int64, 0 to n - 1 before the first step.
        begin: steps taken so far.
        draws: ``[steps]`` int64, 32 random bits each.
    """
    _ops.shuffle_ahead.default(order, begin, draws)


def take_rows(blocks: list[Tensor], rows: Tensor) -> list[Tensor]:
    """``block[rows]`` of each block.

    Args:
        blocks: ``[N, ...]`` each, of any dtype, contiguous, on the CPU.
        rows: ``[B]`` int64.
    """
    return _ops.take_rows.default(blocks, rows)
