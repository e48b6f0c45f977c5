"""embedding_bag, backward: the gradient of each touched row, from the gradient of the output.

1. Every lookup becomes a row of its weight, and the rows of all but tiny tables are sorted (embedding_index.py).
2. Tiny tables are summed as one-hot products over runs of the batch (tiny_tables.py).
3. CHUNK neighbours of the sorted rows at a time are walked in order, and a row whose lookups lie in
   one chunk is finished there. What reaches over a chunk's end is left in Head and Tail (embedding_segments_kernel),
4. and added up where the row began, STITCHED chunks at a time (embedding_stitch_kernel).

A row's finished gradient is written out, or an optimizer takes its step with it there and then (``Update``).

Nothing is added atomically and the sort is stable, so that a run can be repeated to the last bit. Step 1 depends on the
ids alone: what it makes (``Rows``) may be made ahead of the gradient, and is where an ``Update`` brings it along.
"""

from __future__ import annotations

from dataclasses import replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...spec import EmbeddingSpec
from ..updates import Update
from . import configs
from .common import aligned
from .embedding_index import Rows, sort_rows
from .embedding_plan import TablePlan, plans
from .launch import alignment, cdiv, launch
from .optimizer import update_arguments
from .optimizer_quick import moved, take_step
from .optimizer_rules import NO_RULE, load_rows, load_step, store_rows
from .tiny_tables import add_tiny_tables


@triton.jit
def embedding_segments_kernel(
    Keys_ptr,  # [n] rows, ascending; void ones last
    Order_ptr,  # [n] int64: where each stood in [B, n_columns]
    Grad_ptr,  # [B, W]
    Columns_ptr,  # [n_columns, 2] int32: output column, bag
    Count_ptr,  # [B, n_bags]
    Rank_ptr,  # [n] int64: which distinct row it is; read where RANKED
    Out_ptr,  # [V_total, DIM], or [M, DIM] by rank
    Rows_ptr,  # [M] int64; written where RANKED
    Head_ptr,  # [n_chunks, DIM] fp32: of the row that began in an earlier chunk
    Tail_ptr,  # [n_chunks, DIM] fp32: of the row that goes on in the next chunk
    Open_ptr,  # [n_chunks] int32: whether Tail is to be stitched
    P_ptr,  # [V_total, DIM] and its optimizer's states, read and written where there is a RULE
    First_ptr,
    Second_ptr,
    Last_ptr,  # [V_total] int32
    Step_ptr,  # [9]
    Now_ptr,  # [1] int32: the step's number
    n,
    n_columns,
    n_bags,
    void,
    stride_gb,
    DIM: tl.constexpr,
    MEAN: tl.constexpr,
    RANKED: tl.constexpr,
    RULE: tl.constexpr,
    ALIGN: tl.constexpr,
    CHUNK: tl.constexpr,
    WALKERS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    chunk = tl.program_id(0).to(tl.int64) * WALKERS + tl.arange(0, WALKERS)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    inside = (d < DIM)[None, :]
    at = chunk * CHUNK
    step = (0.0,)
    now = 0
    if RULE != NO_RULE:
        step = load_step(Step_ptr)
        now = tl.load(Now_ptr)
        n = tl.where(now < 0, 0, n)  # vetoed: there is nothing to walk over
    key0 = tl.load(Keys_ptr + at, mask=at < n, other=void).to(tl.int64)
    before = tl.load(Keys_ptr + at - 1, mask=(at > 0) & (at <= n), other=-1).to(tl.int64)
    head = Head_ptr + chunk[:, None] * DIM + d[None, :]
    total = tl.zeros([WALKERS, BLOCK_D], tl.float32)
    for _ in range(CHUNK // 4):
        # four at a time, stage by stage: a load that waits for another keeps what follows it from starting
        key1 = tl.load(Keys_ptr + at + 1, mask=at + 1 < n, other=-1).to(tl.int64)
        key2 = tl.load(Keys_ptr + at + 2, mask=at + 2 < n, other=-1).to(tl.int64)
        key3 = tl.load(Keys_ptr + at + 3, mask=at + 3 < n, other=-1).to(tl.int64)
        key4 = tl.load(Keys_ptr + at + 4, mask=at + 4 < n, other=-1).to(tl.int64)
        live0 = (at < n) & (key0 != void)
        live1 = (at + 1 < n) & (key1 != void)
        live2 = (at + 2 < n) & (key2 != void)
        live3 = (at + 3 < n) & (key3 != void)
        place0 = tl.load(Order_ptr + at, mask=live0, other=0)
        place1 = tl.load(Order_ptr + at + 1, mask=live1, other=0)
        place2 = tl.load(Order_ptr + at + 2, mask=live2, other=0)
        place3 = tl.load(Order_ptr + at + 3, mask=live3, other=0)
        ends0 = live0 & (key1 != key0)
        ends1 = live1 & (key2 != key1)
        ends2 = live2 & (key3 != key2)
        ends3 = live3 & (key4 != key3)
        whole0 = ends0 & (key0 != before)
        whole1 = ends1 & (key1 != before)
        whole2 = ends2 & (key2 != before)
        whole3 = ends3 & (key3 != before)
        value0 = gradient_of(
            Grad_ptr, Columns_ptr, Count_ptr, place0, live0, d, n_columns, n_bags, stride_gb, DIM, MEAN, ALIGN
        )
        value1 = gradient_of(
            Grad_ptr, Columns_ptr, Count_ptr, place1, live1, d, n_columns, n_bags, stride_gb, DIM, MEAN, ALIGN
        )
        value2 = gradient_of(
            Grad_ptr, Columns_ptr, Count_ptr, place2, live2, d, n_columns, n_bags, stride_gb, DIM, MEAN, ALIGN
        )
        value3 = gradient_of(
            Grad_ptr, Columns_ptr, Count_ptr, place3, live3, d, n_columns, n_bags, stride_gb, DIM, MEAN, ALIGN
        )
        total0 = total + value0
        total1 = tl.where(ends0[:, None], 0.0, total0) + value1
        total2 = tl.where(ends1[:, None], 0.0, total1) + value2
        total3 = tl.where(ends2[:, None], 0.0, total2) + value3
        total = tl.where(ends3[:, None], 0.0, total3)
        if RULE == NO_RULE:
            write_out(Out_ptr, Rank_ptr, Rows_ptr, at, key0, whole0, d, total0, DIM, RANKED)
            write_out(Out_ptr, Rank_ptr, Rows_ptr, at + 1, key1, whole1, d, total1, DIM, RANKED)
            write_out(Out_ptr, Rank_ptr, Rows_ptr, at + 2, key2, whole2, d, total2, DIM, RANKED)
            write_out(Out_ptr, Rank_ptr, Rows_ptr, at + 3, key3, whole3, d, total3, DIM, RANKED)
        else:
            p0, first0, second0 = load_rows(P_ptr, First_ptr, Second_ptr, key0, whole0, d, DIM, RULE)
            p1, first1, second1 = load_rows(P_ptr, First_ptr, Second_ptr, key1, whole1, d, DIM, RULE)
            p2, first2, second2 = load_rows(P_ptr, First_ptr, Second_ptr, key2, whole2, d, DIM, RULE)
            p3, first3, second3 = load_rows(P_ptr, First_ptr, Second_ptr, key3, whole3, d, DIM, RULE)
            p0, first0, second0 = moved(step, total0, p0, first0, second0, whole0[:, None] & inside, DIM, RULE)
            p1, first1, second1 = moved(step, total1, p1, first1, second1, whole1[:, None] & inside, DIM, RULE)
            p2, first2, second2 = moved(step, total2, p2, first2, second2, whole2[:, None] & inside, DIM, RULE)
            p3, first3, second3 = moved(step, total3, p3, first3, second3, whole3[:, None] & inside, DIM, RULE)
            store_rows(P_ptr, First_ptr, Second_ptr, key0, whole0, d, p0, first0, second0, DIM, RULE)
            store_rows(P_ptr, First_ptr, Second_ptr, key1, whole1, d, p1, first1, second1, DIM, RULE)
            store_rows(P_ptr, First_ptr, Second_ptr, key2, whole2, d, p2, first2, second2, DIM, RULE)
            store_rows(P_ptr, First_ptr, Second_ptr, key3, whole3, d, p3, first3, second3, DIM, RULE)
            if tl.program_id(1) == 0:
                tl.store(Last_ptr + key0, now, mask=whole0)
                tl.store(Last_ptr + key1, now, mask=whole1)
                tl.store(Last_ptr + key2, now, mask=whole2)
                tl.store(Last_ptr + key3, now, mask=whole3)
        tl.store(head, total0, mask=(ends0 & ~whole0)[:, None] & inside)
        tl.store(head, total1, mask=(ends1 & ~whole1)[:, None] & inside)
        tl.store(head, total2, mask=(ends2 & ~whole2)[:, None] & inside)
        tl.store(head, total3, mask=(ends3 & ~whole3)[:, None] & inside)
        key0 = key4
        at += 4
    last = tl.load(Keys_ptr + at - 1, mask=at < n, other=void).to(tl.int64)
    goes_on = (key0 == last) & (last != void)
    own = last != before
    tl.store(Tail_ptr + chunk[:, None] * DIM + d[None, :], total, mask=(goes_on & own)[:, None] & inside)
    tl.store(head, total, mask=(goes_on & ~own)[:, None] & inside)
    if tl.program_id(1) == 0:
        tl.store(Open_ptr + chunk, (goes_on & own).to(tl.int32), mask=chunk * CHUNK < n)


@triton.jit
def gradient_of(
    Grad_ptr,
    Columns_ptr,
    Count_ptr,
    place,
    live,
    d,
    n_columns,
    n_bags,
    stride_gb,
    DIM: tl.constexpr,
    MEAN: tl.constexpr,
    ALIGN: tl.constexpr,
):
    """A block of lookups' gradients, from the places in ``[B, n_columns]``."""
    b = place // n_columns
    column = Columns_ptr + (place - b * n_columns) * 2
    start = aligned(tl.load(column, mask=live, other=0), ALIGN)
    source = b[:, None] * aligned(stride_gb, ALIGN) + start[:, None] + d[None, :]
    value = tl.load(Grad_ptr + source, mask=live[:, None] & (d < DIM)[None, :], other=0.0).to(tl.float32)
    if MEAN:
        bag = tl.load(column + 1, mask=live, other=0)
        value = value / tl.load(Count_ptr + b * n_bags + bag, mask=live, other=1.0)[:, None]
    return value


@triton.jit
def write_out(Out_ptr, Rank_ptr, Rows_ptr, at, key, whole, d, total, DIM: tl.constexpr, RANKED: tl.constexpr):
    """The finished gradients of rows, into their places."""
    target = key
    if RANKED:
        target = tl.load(Rank_ptr + at, mask=whole, other=0)
        tl.store(Rows_ptr + target, key, mask=whole & (tl.program_id(1) == 0))
    tl.store(Out_ptr + target[:, None] * DIM + d[None, :], total, mask=whole[:, None] & (d < DIM)[None, :])


@triton.jit
def embedding_stitch_kernel(
    Keys_ptr,
    Rank_ptr,
    Out_ptr,
    Rows_ptr,
    Head_ptr,
    Tail_ptr,
    Open_ptr,
    P_ptr,
    First_ptr,
    Second_ptr,
    Last_ptr,
    Step_ptr,
    Now_ptr,
    n,
    DIM: tl.constexpr,
    RANKED: tl.constexpr,
    RULE: tl.constexpr,
    CHUNK: tl.constexpr,
    STITCHED: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    chunk = tl.program_id(0).to(tl.int64)
    opened = tl.load(Open_ptr + chunk)
    now = 0
    if RULE != NO_RULE:
        now = tl.load(Now_ptr)
        opened = tl.where(now < 0, 0, opened)  # vetoed: nothing was walked over
    if opened != 0:
        d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
        last = chunk * CHUNK + CHUNK - 1
        key = tl.load(Keys_ptr + last)
        total = tl.load(Tail_ptr + chunk * DIM + d, mask=d < DIM, other=0.0)
        following = chunk + 1 + tl.arange(0, STITCHED)
        more = 1
        while more != 0:
            first = following * CHUNK
            same = (tl.load(Keys_ptr + first, mask=first < n, other=-1) == key) & (first < n)
            mask = same[:, None] & (d < DIM)[None, :]
            total += tl.sum(tl.load(Head_ptr + following[:, None] * DIM + d[None, :], mask=mask, other=0.0), axis=0)
            more = tl.min(same.to(tl.int32), axis=0)
            following += STITCHED
        if RANKED:
            target = tl.load(Rank_ptr + last)
            if tl.program_id(1) == 0:
                tl.store(Rows_ptr + target, key.to(tl.int64))
        else:
            target = key.to(tl.int64)
        if RULE == NO_RULE:
            tl.store(Out_ptr + target * DIM + d, total, mask=d < DIM)
        else:
            row = key.to(tl.int64) + tl.zeros([1], tl.int64)
            step = load_step(Step_ptr)
            take_step(P_ptr, First_ptr, Second_ptr, step, row, row >= 0, d, total[None, :], DIM, RULE)
            if tl.program_id(1) == 0:
                tl.store(Last_ptr + key, now)


def _add_segments(
    grad: Tensor,
    rows: Rows,
    table: TablePlan,
    out: Tensor,
    void: int,
    rank: Tensor | None = None,
    out_rows: Tensor | None = None,
    update: Update | None = None,
) -> None:
    n, dim = len(rows.keys), out.shape[1]
    if n == 0:
        return
    config = configs.EMBEDDING.segments(n, dim, update is not None and update.whole_rows)
    warps = config.warps if update is None else replace(config.warps, contract=False)
    n_chunks = cdiv(n, config.chunk)
    head, tail = torch.empty(2, n_chunks, dim, dtype=torch.float32, device=grad.device)
    is_open = torch.empty(n_chunks, dtype=torch.int32, device=grad.device)
    shared = {
        "Keys_ptr": rows.keys,
        "Rank_ptr": rows.order if rank is None else rank,
        "Out_ptr": out,
        "Rows_ptr": rows.order if out_rows is None else out_rows,
        "Head_ptr": head,
        "Tail_ptr": tail,
        "Open_ptr": is_open,
        **update_arguments(update, out),
        "n": n,
        "DIM": dim,
        "RANKED": rank is not None,
        "CHUNK": config.chunk,
        "BLOCK_D": config.block_d,
    }
    n_blocks = cdiv(dim, config.block_d)
    launch(
        embedding_segments_kernel,
        (cdiv(n_chunks, config.walkers), n_blocks),
        warps,
        Order_ptr=rows.order,
        Grad_ptr=grad,
        Columns_ptr=table.sorted_columns,
        Count_ptr=rows.counted,
        n_columns=table.n_sorted,
        n_bags=table.n_bags,
        void=void,
        stride_gb=grad.stride(0),
        MEAN=table.has_mean,
        ALIGN=alignment(table.align, grad.stride(0)),
        WALKERS=config.walkers,
        **shared,
    )
    launch(
        embedding_stitch_kernel,
        (n_chunks, n_blocks),
        configs.Warps(1, contract=update is None),
        STITCHED=configs.EMBEDDING.stitched,
        **shared,
    )


def _prepare(grad: Tensor, ids: Tensor, columns: tuple[int, ...], spec: EmbeddingSpec) -> tuple[Tensor, tuple]:
    grad = grad if grad.stride(1) == 1 else grad.contiguous()
    return grad, plans(spec, columns, configs.EMBEDDING.tiny_vocab, ids.device) if spec.bags else ()


def embedding_bag_bwd(
    grad: Tensor,
    ids: Tensor,
    columns: tuple[int, ...],
    spec: EmbeddingSpec,
    shapes: list[torch.Size],
    needs: list[bool],
) -> list[Tensor | None]:
    """Dense fp32 gradients: zero but for the touched rows."""
    grad, tables = _prepare(grad, ids, columns, spec)
    grads: list[Tensor | None] = []
    for (n_weight_rows, dim), need, table in zip(shapes, needs, tables, strict=True):
        if not need:
            grads.append(None)
            continue
        out = torch.zeros(n_weight_rows, dim, dtype=torch.float32, device=grad.device)
        rows = sort_rows(ids, table, n_weight_rows)
        _add_segments(grad, rows, table, out, n_weight_rows)
        add_tiny_tables(grad, rows.tiny, rows.counted, table, out, None, n_weight_rows)
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
    grad, tables = _prepare(grad, ids, columns, spec)
    grads: list[tuple[Tensor, Tensor] | None] = []
    for (n_weight_rows, dim), need, table in zip(shapes, needs, tables, strict=True):
        if not need:
            grads.append(None)
            continue
        rows = sort_rows(ids, table, n_weight_rows)
        n_sorted = min(len(rows.keys), n_weight_rows)
        found = torch.full((n_sorted + table.n_tiny_rows,), n_weight_rows, dtype=torch.int64, device=grad.device)
        values = torch.empty(len(found), dim, dtype=torch.float32, device=grad.device)
        if len(rows.keys):
            begins = torch.ones_like(rows.keys, dtype=torch.int64)
            torch.ne(rows.keys[1:], rows.keys[:-1], out=begins[1:])
            rank = torch.cumsum(begins, 0) - 1
            _add_segments(grad, rows, table, values, n_weight_rows, rank, found)
        add_tiny_tables(grad, rows.tiny, rows.counted, table, values[n_sorted:], found[n_sorted:], n_weight_rows)
        grads.append((found, values))
    return grads


def embedding_bag_bwd_step(
    grad: Tensor, ids: Tensor, columns: tuple[int, ...], spec: EmbeddingSpec, updates: list[Update | None]
) -> None:
    """The tables' optimizer step in the backward: no gradient is written, only what it does to the touched rows.

    Args:
        grad: ``[B, W]``, of the output.
        ids, columns, spec: the lookup's, see :func:`fastmtl.ops.embedding_bag`.
        updates: of each weight, or None where it is not trained. Its rows must be current at the step before.

    Raises:
        BackendError: an update's tensors don't fit.
    """
    grad, tables = _prepare(grad, ids, columns, spec)
    for update, table in zip(updates, tables, strict=True):
        if update is not None:
            update.check()
            void = len(update.p)
            rows = update.index or sort_rows(ids, table, void)
            _add_segments(grad, rows, table, update.p, void, update=update)
            add_tiny_tables(grad, rows.tiny, rows.counted, table, update.p, None, void, update)
