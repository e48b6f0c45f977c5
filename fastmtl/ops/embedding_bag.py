"""embedding_bag: every feature of a model looked up, pooled and laid side by side in one op."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from .. import backend
from ..backends import native
from ..backends.updates import Update
from ..spec import EmbeddingSpec


class _EmbeddingBag(torch.autograd.Function):
    """Autograd around a backend that brings its own backward."""

    @staticmethod
    def forward(
        ctx: Any,
        module: ModuleType,
        ids: Tensor,
        columns: tuple[int, ...],
        dense: Tensor | None,
        spec: EmbeddingSpec,
        index: list[Any] | None,
        *weights: Tensor,
    ) -> Tensor:
        ctx.module, ctx.columns, ctx.spec, ctx.index = module, columns, spec, index
        ctx.shapes = [weight.shape for weight in weights]
        ctx.save_for_backward(ids)
        return module.embedding_bag_fwd(list(weights), ids, columns, dense, spec)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (ids,) = ctx.saved_tensors
        needs = ctx.needs_input_grad
        grads = table_gradients(ctx.module, grad, ids, ctx.columns, ctx.spec, ctx.shapes, list(needs[6:]), ctx.index)
        dense = grad[:, grad.shape[1] - ctx.spec.n_dense :] if needs[3] else None
        return None, None, None, dense, None, None, *grads


def table_gradients(
    module: ModuleType,
    grad: Tensor,
    ids: Tensor,
    columns: tuple[int, ...],
    spec: EmbeddingSpec,
    shapes: list[torch.Size],
    needs: list[bool],
    index: list[Any] | None,
) -> list[Tensor | None]:
    """From the gradient ``[B, W]`` of the output those of the weights that need one: dense, or sparse where there is
    an index; none where an optimizer's step took their place."""
    if index is None:
        return module.embedding_bag_bwd(grad, ids, columns, spec, shapes, needs)
    if _holds_updates(index):
        module.embedding_bag_bwd_step(grad, ids, columns, spec, index)
        return [None] * len(shapes)
    pairs = module.embedding_bag_bwd_sparse(grad, ids, columns, spec, shapes, index)
    return [
        None if pair is None else _sparse(pair[0], pair[1], shape) for pair, shape in zip(pairs, shapes, strict=True)
    ]


def _holds_updates(index: list[Any] | None) -> bool:
    return index is not None and any(isinstance(found, Update) for found in index)


def _sparse(rows: Tensor, values: Tensor, shape: torch.Size) -> Tensor:
    # rows come from the backend, which has compared each with its table
    return torch.sparse_coo_tensor(rows.unsqueeze(0), values, shape, check_invariants=False, is_coalesced=True)


def embedding_bag(
    weights: list[Tensor],
    ids: Tensor,
    columns: tuple[int, ...],
    dense: Tensor | None,
    spec: EmbeddingSpec,
    index: list[Any] | None = None,
) -> Tensor:
    """Look up all features at once.

    Args:
        weights: one ``[V_total, D]`` tensor for each distinct width; the tables it holds lie one below the other.
        ids: ``[B, S]`` int64, the id columns of all bags side by side.
        columns: F + 1 entries; bag f owns the id columns ``columns[f]:columns[f + 1]``.
        dense: ``[B, spec.n_dense]`` floats copied behind the bags, or None where there are none.
        spec: how each bag is looked up.
        index: for each weight the native backend's index of these ids, or None where it needs no gradient: the
            gradients then are sparse tensors of the rows that were looked up. Backends for GPUs take
            :class:`fastmtl.backends.updates.Update` instead, steps of an optimizer that their backward is to take.

    Returns:
        ``[B, spec.width(columns)]``: the pooled bags in the spec's order, then the dense columns.

    Raises:
        BadIdError: an id outside its vocabulary whose bag says ``oov="raise"``.
    """
    module = backend.resolve("embedding_bag", *weights, *(() if dense is None else (dense,)))
    if module.DIFFERENTIABLE:
        return module.embedding_bag(weights, ids, columns, dense, spec)
    if torch.is_grad_enabled() and (
        any(w.requires_grad for w in weights) or (dense is not None and dense.requires_grad)
    ):
        known = index if module is native or _holds_updates(index) else None
        return _EmbeddingBag.apply(module, ids, columns, dense, spec, known, *weights)
    return module.embedding_bag_fwd(weights, ids, columns, dense, spec)
