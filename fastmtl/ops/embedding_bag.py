"""embedding_bag: every feature of a model looked up, pooled and laid side by side in one op."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from .. import backend
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
        *weights: Tensor,
    ) -> Tensor:
        ctx.module, ctx.columns, ctx.spec = module, columns, spec
        ctx.shapes = [weight.shape for weight in weights]
        ctx.save_for_backward(ids)
        return module.embedding_bag_fwd(list(weights), ids, columns, dense, spec)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (ids,) = ctx.saved_tensors
        needs = ctx.needs_input_grad
        grads = ctx.module.embedding_bag_bwd(grad, ids, ctx.columns, ctx.spec, ctx.shapes, list(needs[5:]))
        dense = grad[:, grad.shape[1] - ctx.spec.n_dense :] if needs[3] else None
        return None, None, None, dense, None, *grads


def embedding_bag(
    weights: list[Tensor], ids: Tensor, columns: tuple[int, ...], dense: Tensor | None, spec: EmbeddingSpec
) -> Tensor:
    """Look up all features at once.

    Args:
        weights: one ``[V_total, D]`` tensor for each distinct width; the tables it holds lie one below the other.
        ids: ``[B, S]`` int64, the id columns of all bags side by side.
        columns: F + 1 entries; bag f owns the id columns ``columns[f]:columns[f + 1]``.
        dense: ``[B, spec.n_dense]`` floats copied behind the bags, or None where there are none.
        spec: how each bag is looked up.

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
        return _EmbeddingBag.apply(module, ids, columns, dense, spec, *weights)
    return module.embedding_bag_fwd(weights, ids, columns, dense, spec)
