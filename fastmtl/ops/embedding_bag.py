"""embedding_bag: every feature of a model looked up, pooled and laid side by side in one op."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from .. import backend
from ..backends import eager, native
from ..backends.updates import Update
from ..errors import BackendError, BadDataError, ConfigError
from ..spec import EmbeddingSpec, Ragged


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
        None if pair is None else sparse_gradient(pair[0], pair[1], shape)
        for pair, shape in zip(pairs, shapes, strict=True)
    ]


def _holds_updates(index: list[Any] | None) -> bool:
    return index is not None and any(isinstance(found, Update) for found in index)


def sparse_gradient(rows: Tensor, values: Tensor, shape: torch.Size) -> Tensor:
    """Of a weight of that shape, from the rows ``[n]``, ascending and unique, and their gradients ``[n, D]``."""
    # rows come from the backend, which has compared each with its table
    checks = torch.sparse.check_sparse_tensor_invariants
    if not checks.is_enabled():
        checks.disable()  # said aloud: torch 2.11 warns of what is off by default, even where check_invariants=False
    return torch.sparse_coo_tensor(rows.unsqueeze(0), values, shape, check_invariants=False, is_coalesced=True)


class _General(torch.autograd.Function):
    """Autograd around the native backend's general form."""

    @staticmethod
    def forward(
        ctx: Any,
        ids: Tensor,
        columns: tuple[int, ...],
        dense: Tensor | None,
        spec: EmbeddingSpec,
        is_sparse: bool,
        scales: Tensor | None,
        list_ids: Tensor | None,
        offsets: Tensor | None,
        list_scales: Tensor | None,
        *weights: Tensor,
    ) -> Tensor:
        ctx.columns, ctx.spec, ctx.is_sparse = columns, spec, is_sparse
        ctx.dense_dtype = None if dense is None else dense.dtype
        ctx.save_for_backward(ids, scales, list_ids, offsets, list_scales, *weights)
        ragged = _ragged(list_ids, offsets, list_scales)
        return native.embedding_bag_general_fwd(list(weights), ids, columns, dense, spec, scales, ragged)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        ids, scales, list_ids, offsets, list_scales, *weights = ctx.saved_tensors
        needs = ctx.needs_input_grad
        ragged = _ragged(list_ids, offsets, list_scales)
        grads, d_scales, d_list_scales = general_gradients(
            grad, weights, ids, ctx.columns, ctx.spec, list(needs[9:]), ctx.is_sparse, scales, ragged
        )
        dense = grad[:, grad.shape[1] - ctx.spec.n_dense :].to(ctx.dense_dtype) if needs[2] else None
        d_scales, d_list_scales = (d if need else None for d, need in ((d_scales, needs[5]), (d_list_scales, needs[8])))
        return None, None, dense, None, None, d_scales, None, None, d_list_scales, *grads


def general_gradients(
    grad: Tensor,
    weights: list[Tensor],
    ids: Tensor,
    columns: tuple[int, ...],
    spec: EmbeddingSpec,
    needs: list[bool],
    is_sparse: bool,
    scales: Tensor | None = None,
    ragged: Ragged | None = None,
) -> tuple[list[Tensor | None], Tensor | None, Tensor | None]:
    """What :func:`table_gradients` gives, of a lookup that only the native backend's general form can do; then the
    gradients of ``scales`` and of ``ragged.scales``."""
    pairs, *rest = native.embedding_bag_general_bwd(grad, weights, ids, columns, spec, scales, ragged)
    grads: list[Tensor | None] = []
    for weight, (rows, values), need in zip(weights, pairs, needs, strict=True):
        values = values.to(weight.dtype)
        if not need:
            grads.append(None)
        elif is_sparse:
            grads.append(sparse_gradient(rows, values, weight.shape))
        else:
            grads.append(torch.zeros_like(weight).index_copy_(0, rows, values))
    return grads, rest[0], rest[1]


def _ragged(ids: Tensor | None, offsets: Tensor | None, scales: Tensor | None) -> Ragged | None:
    return None if ids is None or offsets is None else Ragged(ids, offsets, scales)


def embedding_bag(
    weights: list[Tensor],
    ids: Tensor,
    columns: tuple[int, ...],
    dense: Tensor | None,
    spec: EmbeddingSpec,
    index: list[Any] | None = None,
    scales: Tensor | None = None,
    ragged: Ragged | None = None,
) -> Tensor:
    """Look up all features at once.

    Args:
        weights: one ``[V_total, D]`` tensor for each distinct width; the tables it holds lie one below the other.
            Those of 16 bits are summed in float32 on the CPU, and so is the result.
        ids: ``[B, S]`` int64 or int32, the id columns of all bags side by side.
        columns: F + 1 entries; bag f owns the id columns ``columns[f]:columns[f + 1]``; a ragged one owns none.
        dense: ``[B, spec.n_dense]`` floats copied behind the bags, or None where there are none.
        spec: how each bag is looked up.
        index: for each weight the native backend's index of these ids, or None where it needs no gradient: the
            gradients then are sparse tensors of the rows that were looked up. Backends for GPUs take
            :class:`fastmtl.backends.updates.Update` instead, steps of an optimizer that their backward is to take.
        scales: ``[B, S]`` float32, what each id's embedding is multiplied by before it is pooled (a mean still divides
            by the number of ids), or None. Has a gradient. Not for bags that take a maximum, as in torch. Features
            have none; docs/architecture.md shows a call by hand.
        ragged: the ids of the ragged bags; None where there are none.

    Returns:
        ``[B, spec.width(columns)]``: the pooled bags in the spec's order, then the dense columns.

    Raises:
        BadIdError: an id outside its vocabulary whose bag says ``oov="raise"``.
        BackendError: a forced backend that can't take a maximum, scales or ragged bags.
        BadDataError: scales or offsets that do not fit the ids, or do not ascend.
        ConfigError: scales for a bag that takes a maximum; a ragged bag without a list, with columns or concatenated.
    """
    module = backend.resolve("embedding_bag", *weights, *(() if dense is None else (dense,)))
    is_common = spec.is_common and scales is None and ragged is None
    if not is_common:
        module = _for_general(module, ids, columns, spec, scales, ragged)
        if module is eager and _holds_updates(index):
            raise BackendError("embedding_bag: no backend takes a table's step in the backward of 'max' or ragged bags")
    if module.DIFFERENTIABLE:
        return module.embedding_bag(weights, ids, columns, dense, spec, scales, ragged)
    if module is native and not (is_common and all(weight.dtype is torch.float32 for weight in weights)):
        parts = (None, None, None) if ragged is None else ragged
        return _General.apply(ids, columns, dense, spec, index is not None, scales, *parts, *weights)
    if torch.is_grad_enabled() and (
        any(w.requires_grad for w in weights) or (dense is not None and dense.requires_grad)
    ):
        known = index if module is native or _holds_updates(index) else None
        return _EmbeddingBag.apply(module, ids, columns, dense, spec, known, *weights)
    return module.embedding_bag_fwd(weights, ids, columns, dense, spec)


def _for_general(
    module: ModuleType,
    ids: Tensor,
    columns: tuple[int, ...],
    spec: EmbeddingSpec,
    scales: Tensor | None,
    ragged: Ragged | None,
) -> ModuleType:
    """Check what the common lookup does not have, and choose who can do it."""
    if scales is not None and scales.shape != ids.shape:
        raise BadDataError(f"embedding_bag: scales {[*scales.shape]} for ids {[*ids.shape]}; give each id one")
    if ragged is not None:
        wanted = (sum(bag.is_ragged for bag in spec.bags), len(ids) + 1)
        if ragged.offsets.shape != wanted:
            raise BadDataError(f"embedding_bag: offsets {[*ragged.offsets.shape]}; {[*wanted]} is [R, B + 1] here")
        if ragged.scales is not None and ragged.scales.shape != ragged.ids.shape:
            raise BadDataError(f"embedding_bag: {len(ragged.scales)} scales for {len(ragged.ids)} ragged ids")
    for f, bag in enumerate(spec.bags):
        if bag.pooling == "max" and (ragged.scales if bag.is_ragged and ragged else scales) is not None:
            raise ConfigError(f"embedding_bag: bag {bag.name!r} takes a maximum, which has no weights of ids")
        if bag.is_ragged:
            if ragged is None:
                raise ConfigError(f"embedding_bag: bag {bag.name!r} is ragged; give its ids and offsets in ragged=")
            if columns[f] != columns[f + 1] or bag.pooling == "concat":
                raise ConfigError(f"embedding_bag: bag {bag.name!r} is ragged: no id columns, and no 'concat'")
    if module in (native, eager):
        return module
    if backend.forced():
        raise BackendError(
            f"embedding_bag: backend {backend.forced()!r} was forced but knows no 'max', no scales, no ragged bags"
        )
    return eager
