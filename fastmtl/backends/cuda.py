"""embedding_bag's backward and the tables' optimizers in CUDA C++ (csrc/cuda), for NVIDIA GPUs.

A library of its own, which is built only where there is a CUDA compiler and a torch for CUDA, and is loaded only where
torch finds a GPU. All else, the forward and the layers, is the triton backend's.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from ..errors import BackendError
from ..spec import EmbeddingSpec
from . import libraries, triton
from .updates import ROWWISE_ADAGRAD, Update, behind_on, check_gradients, check_range, check_update

if TYPE_CHECKING:
    from .triton.embedding_plan import TablePlan

#: The library's ops bring their own backward; autograd lives in fastmtl/ops.
DIFFERENTIABLE = False

_ops: Any = torch.ops.fastmtl_cuda
#: Tables of at most so many rows are summed in shared memory, without a sort.
TINY_VOCAB = 128


class Rows(NamedTuple):
    """The rows a batch reads of one weight, in order.

    Args:
        keys: ``[n]`` int32, the bits of unsigned numbers, ascending; ``V_total`` where a lookup counts as nothing.
        order: ``[n]`` int32, where each stood in ``[B, n_sorted]``.
        tiny: ``[B, n_tiny_columns]`` int32, rows of the tiny tables, -1 where a lookup counts as nothing.
        counted: ``[B, n_bags]``, what each bag's gradient is divided by: 1, or the lookups that a mean counts.
        tiny_rows: ``[n]`` int64, all rows of the tiny tables, looked up or not.
    """

    keys: Tensor
    order: Tensor
    tiny: Tensor
    counted: Tensor
    tiny_rows: Tensor


def unavailable() -> str | None:
    """Why this backend can't run on this machine; None: it can."""
    if triton.interpreting():
        return "it can't run on Triton's interpreter"
    return triton.unavailable() or libraries.why_no_cuda()


def unsupported(op: str, *tensors: Tensor) -> str | None:
    """Why this backend can't run ``op`` on these tensors; None: it can."""
    if op == "embedding_bag":
        for tensor in tensors:
            if tensor.dtype is not torch.float32:
                return f"it keeps tables in torch.float32 only, not in {tensor.dtype}"
    return triton.unsupported(op, *tensors)


# products gain nothing from C++: the layers are the triton backend's
weights_ahead = triton.weights_ahead
expert_gate_fwd = triton.expert_gate_fwd
expert_gate_bwd = triton.expert_gate_bwd
task_losses = triton.task_losses
tower_losses = triton.tower_losses
advance = triton.advance
note_losses = triton.note_losses
cut_rows = triton.cut_rows
dense_step = triton.dense_step


def embedding_bag_fwd(
    weights: list[Tensor], ids: Tensor, columns: tuple[int, ...], dense: Tensor | None, spec: EmbeddingSpec
) -> Tensor:
    """See :func:`fastmtl.ops.embedding_bag`; the triton backend's."""
    return triton.embedding_bag_fwd(weights, ids, columns, dense, spec)


def _plans(
    grad: Tensor, ids: Tensor, columns: tuple[int, ...], spec: EmbeddingSpec
) -> tuple[Tensor, Sequence[TablePlan]]:
    from .triton.embedding_plan import plans

    if grad.shape != (len(ids), spec.width(columns)) or ids.shape[1] < columns[-1]:
        raise BackendError(
            f"embedding_bag: a gradient {list(grad.shape)} does not fit ids {list(ids.shape)} of {len(spec.bags)} bags"
        )
    grad = grad if grad.stride(1) == 1 else grad.contiguous()
    return grad, plans(spec, columns, TINY_VOCAB, ids.device) if spec.bags else ()


def _plan_arguments(plan: TablePlan) -> tuple[list[Tensor], int, int, int, bool]:
    """How the library takes a plan: its tensors, the columns of tiny ids, the largest tiny vocabulary, what divides
    every output column, and whether there is a mean."""
    group = plan.tiny_group(TINY_VOCAB)
    if group is None:
        nothing = torch.empty(0, dtype=torch.int32, device=plan.device)
        group = nothing.view(0, 4), nothing.view(0, 3)
    widest = max((tiny.vocab for tiny in plan.tiny), default=1)
    tensors = [plan.bags, plan.sorted_columns, *group, plan.tiny_rows]
    return tensors, plan.n_tiny_columns, widest, plan.align, plan.has_mean


def embedding_bag_bwd(
    grad: Tensor,
    ids: Tensor,
    columns: tuple[int, ...],
    spec: EmbeddingSpec,
    shapes: list[torch.Size],
    needs: list[bool],
) -> list[Tensor | None]:
    """The dense gradients of the weights that need one, from the gradient ``[B, W]`` of the output."""
    grad, tables = _plans(grad, ids, columns, spec)
    grads: list[Tensor | None] = []
    for (rows, dim), need, plan in zip(shapes, needs, tables, strict=True):
        out = torch.zeros(rows, dim, dtype=torch.float32, device=grad.device) if need else None
        if out is not None:
            _ops.embedding_bag_bwd(grad, ids, *_plan_arguments(plan), rows, out, None)
        grads.append(out)
    return grads


def embedding_bag_bwd_sparse(
    grad: Tensor,
    ids: Tensor,
    columns: tuple[int, ...],
    spec: EmbeddingSpec,
    shapes: list[torch.Size],
    needs: list[bool],
) -> list[tuple[Tensor, Tensor] | None]:
    """``(rows [M], values [M, D])`` of each weight that needs a gradient; a row of V_total marks a void entry."""
    grad, tables = _plans(grad, ids, columns, spec)
    grads: list[tuple[Tensor, Tensor] | None] = []
    for (rows, dim), need, plan in zip(shapes, needs, tables, strict=True):
        if not need:
            grads.append(None)
            continue
        n = min(len(ids) * plan.n_sorted, rows) + plan.n_tiny_rows
        found = torch.full((n,), rows, dtype=torch.int64, device=grad.device)
        values = torch.empty(n, dim, dtype=torch.float32, device=grad.device)
        _ops.embedding_bag_bwd(grad, ids, *_plan_arguments(plan), rows, values, found)
        grads.append((found, values))
    return grads


def embedding_bag_bwd_step(
    grad: Tensor, ids: Tensor, columns: tuple[int, ...], spec: EmbeddingSpec, updates: list[Update | None]
) -> None:
    """As :func:`embedding_bag_bwd`, but the optimizer's step takes the place of a gradient that is written out."""
    grad, tables = _plans(grad, ids, columns, spec)
    for update, plan in zip(updates, tables, strict=True):
        if update is not None:
            update.check()
            p, states, last, rule, step, now, index = update
            made = [] if index is None else list(index[:4])
            _ops.embedding_bag_bwd_step(grad, ids, *_plan_arguments(plan), p, list(states), last, rule, step, now, made)


def takes(rule: int, dim: int) -> bool:
    """Whether rows ``dim`` wide can be moved by this rule: row-wise, they must fit the lanes of a warp."""
    return rule != ROWWISE_ADAGRAD or dim <= (128 if dim % 4 == 0 else 32)


def table_replay(
    p: Tensor,
    states: Sequence[Tensor],
    last: Tensor,
    rule: int,
    steps: Tensor,
    first_step: int,
    rows: Tensor | None,
    begin: int,
    end: int,
    upto: int,
    clock: Tensor | None = None,
) -> None:
    """As the triton backend's :func:`fastmtl.backends.triton.optimizer.table_replay`."""
    check_update(p, states, last, rule, steps)
    if rows is None:
        check_range(p, begin, end)
    n = end - begin if rows is None else len(rows)
    start = 0 if rows is not None or clock is not None else begin
    _ops.table_rows(
        p, list(states), last, rule, steps, first_step, rows, None, n, start, upto, False, clock, behind_on(p.device)
    )


def embedding_bag_index(
    ids: Tensor,
    columns: tuple[int, ...],
    spec: EmbeddingSpec,
    shapes: list[torch.Size],
    needs: list[bool],
    out: Sequence[Rows | None] | None = None,
) -> list[Rows | None]:
    """As the triton backend's :func:`fastmtl.backends.triton.embedding_index.embedding_bag_index`, but what comes of it
    is this backend's."""
    from .triton.embedding_plan import plans

    found: list[Rows | None] = []
    tables = plans(spec, columns, TINY_VOCAB, ids.device) if spec.bags else ()
    for number, (plan, shape, need) in enumerate(zip(tables, shapes, needs, strict=True)):
        rows = out[number] if out is not None else None
        if need and rows is None:
            n = len(ids) * plan.n_sorted
            keys, order = torch.empty(2, n, dtype=torch.int32, device=ids.device)
            tiny = torch.empty(len(ids), plan.n_tiny_columns, dtype=torch.int32, device=ids.device)
            counted = torch.empty(len(ids), plan.n_bags, dtype=torch.float32, device=ids.device)
            rows = Rows(keys, order, tiny, counted, plan.tiny_rows)
        if rows is not None:
            _ops.embedding_bag_index(ids, _plan_arguments(plan)[0], plan.n_tiny_columns, shape[0], list(rows[:4]))
        found.append(rows)
    return found


def table_catch_up(
    p: Tensor,
    states: Sequence[Tensor],
    last: Tensor,
    rule: int,
    steps: Tensor,
    first_step: int,
    index: Rows,
    upto: int,
    clock: Tensor,
) -> None:
    """As the triton backend's :func:`fastmtl.backends.triton.optimizer.table_catch_up`."""
    check_update(p, states, last, rule, steps)
    for rows in (index.keys, index.tiny_rows):
        _ops.table_rows(
            p, list(states), last, rule, steps, first_step, rows, None, len(rows), 0, upto, False, clock,
            behind_on(p.device),
        )  # fmt: skip


def table_step(
    p: Tensor,
    states: Sequence[Tensor],
    last: Tensor,
    rule: int,
    steps: Tensor,
    first_step: int,
    rows: Tensor,
    grads: Tensor,
    lazily: bool,
    begin: int,
    end: int,
    clock: Tensor | None = None,
) -> None:
    """As the triton backend's :func:`fastmtl.backends.triton.optimizer.table_step`."""
    check_update(p, states, last, rule, steps)
    check_gradients(p, rows, grads)
    upto = first_step + len(steps) - 1 if clock is None else 0
    _ops.table_rows(
        p, list(states), last, rule, steps, first_step, rows, grads, len(rows), 0, upto, lazily, clock,
        behind_on(p.device),
    )  # fmt: skip
    if not lazily:
        table_replay(p, states, last, rule, steps, first_step, None, begin, end, upto, clock)
