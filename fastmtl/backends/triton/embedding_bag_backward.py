"""embedding_bag, backward: the gradient of each touched row, from the gradient of the output.

1. Every lookup becomes a row of its weight; the rows of all but tiny tables are sorted and cut into pieces
   (embedding_index.py).
2. Tiny tables are summed as one-hot products over runs of the batch (tiny_tables.py).
3. A walker adds the gradients of each piece in order (embedding_segments_kernel). Where that is all of a row's lookups
   the row is finished there; the sums of longer rows are left in Partial,
4. and added up, many pieces at a time (embedding_stitch_kernel).

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
from .embedding_index import Rows, pitch_of, sort_rows
from .embedding_plan import TablePlan, plans
from .launch import alignment, cdiv, launch
from .optimizer import update_arguments
from .optimizer_quick import moved, take_step
from .optimizer_rules import NO_RULE, load_rows, load_step, store_rows
from .tiny_tables import add_tiny_tables


@triton.jit
def embedding_segments_kernel(
    Rows_ptr,  # [n]: of each piece, ascending
    Begins_ptr,  # [n + 1]: twice the first lookup of each piece, 1 more where it is not all of a row
    Sizes_ptr,  # [2] int64: how many pieces, how many rows of several
    Places_ptr,  # [n]: of the lookups in their order: row of the batch << shift | output column
    Grad_ptr,  # [B, W]
    Bags_ptr,  # [W] int32: the bag of an output column; read where there is a MEAN
    Count_ptr,  # [n_bags, B]; read where there is a MEAN
    Rank_ptr,  # [n] int64: which distinct row a lookup's is; read where RANKED
    Out_ptr,  # [V_total, DIM], or [M, DIM] by rank
    Found_ptr,  # [M] int64; written where RANKED
    Partial_ptr,  # [n // CHUNK + 2, DIM] fp32: sums of pieces that are no whole row, see partial_slot
    P_ptr,  # [V_total, DIM] and its optimizer's states, read and written where there is a RULE
    First_ptr,
    Second_ptr,
    Last_ptr,  # [V_total] int32
    Step_ptr,  # [9]
    Now_ptr,  # [1] int32: the step's number
    n_programs,
    n_rows,
    shift,
    stride_gb,
    DIM: tl.constexpr,
    MEAN: tl.constexpr,
    WIDE: tl.constexpr,
    RANKED: tl.constexpr,
    RULE: tl.constexpr,
    ALIGN: tl.constexpr,
    CHUNK: tl.constexpr,
    PIECES: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    inside = (d < DIM)[None, :]
    n_pieces = tl.load(Sizes_ptr)
    step = (0.0,)
    now = 0
    if RULE != NO_RULE:
        step = load_step(Step_ptr)
        now = tl.load(Now_ptr)
        n_pieces = tl.where(now < 0, 0, n_pieces)  # vetoed: there is nothing to add
    n_pieces = n_pieces.to(Begins_ptr.dtype.element_ty)  # how far programs reach is less than 2^20 more
    start = tl.program_id(0).to(Begins_ptr.dtype.element_ty) * PIECES
    # Nothing is carried from block to block: triton 3.6 and 3.7 compute a loop's bound from what another loop carries
    # once, before both (a maximum over rows is taken in another layout, and there they mistake what begins the loop
    # for what it carries).
    for first_piece in range(start, n_pieces, n_programs * PIECES):
        at = first_piece + tl.arange(0, PIECES)
        live = at < n_pieces
        row = tl.load(Rows_ptr + at, mask=live, other=0)
        begin = tl.load(Begins_ptr + at, mask=live, other=0)
        end = tl.load(Begins_ptr + at + 1, mask=live, other=0) >> 1
        parted = begin & 1
        begin = begin >> 1
        whole = live & (parted == 0)
        p, first, second = 0.0, 0.0, 0.0
        if RULE != NO_RULE:
            p, first, second = load_rows(P_ptr, First_ptr, Second_ptr, row.to(tl.int64), whole, d, DIM, RULE)
        total = tl.zeros([PIECES, BLOCK_D], tl.float32)
        for i in range(0, tl.max(end - begin, axis=0).to(tl.int32), 4):
            # four at a time, stage by stage: a load that waits for another keeps what follows it from starting
            one = begin + i
            live0, live1, live2, live3 = one < end, one + 1 < end, one + 2 < end, one + 3 < end
            place0 = tl.load(Places_ptr + one, mask=live0, other=0)
            place1 = tl.load(Places_ptr + one + 1, mask=live1, other=0)
            place2 = tl.load(Places_ptr + one + 2, mask=live2, other=0)
            place3 = tl.load(Places_ptr + one + 3, mask=live3, other=0)
            value0 = gradient_of(
                Grad_ptr, Bags_ptr, Count_ptr, place0, live0, d, n_rows, shift, stride_gb, DIM, MEAN, WIDE, ALIGN
            )
            value1 = gradient_of(
                Grad_ptr, Bags_ptr, Count_ptr, place1, live1, d, n_rows, shift, stride_gb, DIM, MEAN, WIDE, ALIGN
            )
            value2 = gradient_of(
                Grad_ptr, Bags_ptr, Count_ptr, place2, live2, d, n_rows, shift, stride_gb, DIM, MEAN, WIDE, ALIGN
            )
            value3 = gradient_of(
                Grad_ptr, Bags_ptr, Count_ptr, place3, live3, d, n_rows, shift, stride_gb, DIM, MEAN, WIDE, ALIGN
            )
            total = total + value0 + value1 + value2 + value3
        if RULE == NO_RULE:
            write_out(Out_ptr, Rank_ptr, Found_ptr, begin, row.to(tl.int64), whole, d, total, DIM, RANKED)
        else:
            p, first, second = moved(step, total, p, first, second, whole[:, None] & inside, DIM, RULE)
            store_rows(P_ptr, First_ptr, Second_ptr, row.to(tl.int64), whole, d, p, first, second, DIM, RULE)
            if tl.program_id(1) == 0:
                tl.store(Last_ptr + row, tl.zeros([PIECES], tl.int32) + now, mask=whole)
        partial = Partial_ptr + partial_slot(begin, CHUNK).to(tl.int64)[:, None] * DIM + d[None, :]
        tl.store(partial, total, mask=(parted != 0)[:, None] & inside)


@triton.jit
def partial_slot(begin, CHUNK: tl.constexpr):
    """Where the sum of a piece that begins at lookup ``begin`` is left: those of a row lie one behind the other."""
    return (begin + CHUNK - 1) // CHUNK


@triton.jit
def gradient_of(
    Grad_ptr,
    Bags_ptr,
    Count_ptr,
    place,
    live,
    d,
    n_rows,
    shift,
    stride_gb,
    DIM: tl.constexpr,
    MEAN: tl.constexpr,
    WIDE: tl.constexpr,
    ALIGN: tl.constexpr,
):
    """A block of lookups' gradients, from their places; WIDE: the gradient has more elements than 32 bits count."""
    b = place >> shift
    column = place - (b << shift)
    if WIDE:
        b = b.to(tl.int64)
    source = tl.multiple_of(b * aligned(stride_gb, ALIGN) + column, ALIGN)[:, None] + d[None, :]
    value = tl.load(Grad_ptr + source, mask=live[:, None] & (d < DIM)[None, :], other=0.0).to(tl.float32)
    if MEAN:
        bag = tl.load(Bags_ptr + column, mask=live, other=0).to(tl.int64)
        value = value / tl.load(Count_ptr + bag * n_rows + b, mask=live, other=1.0)[:, None]
    return value


@triton.jit
def write_out(Out_ptr, Rank_ptr, Found_ptr, begin, row, whole, d, total, DIM: tl.constexpr, RANKED: tl.constexpr):
    """The finished gradients of rows, into their places."""
    target = row
    if RANKED:
        target = tl.load(Rank_ptr + begin, mask=whole, other=0)
        tl.store(Found_ptr + target, row, mask=whole & (tl.program_id(1) == 0))
    tl.store(Out_ptr + target[:, None] * DIM + d[None, :], total, mask=whole[:, None] & (d < DIM)[None, :])


@triton.jit
def embedding_stitch_kernel(
    Keys_ptr,  # [n] rows of the sorted lookups
    Longs_ptr,  # the first lookup of each row of several pieces
    Sizes_ptr,
    Rank_ptr,
    Out_ptr,
    Found_ptr,
    Partial_ptr,
    P_ptr,
    First_ptr,
    Second_ptr,
    Last_ptr,
    Step_ptr,
    Now_ptr,
    n,
    n_programs,
    DIM: tl.constexpr,
    RANKED: tl.constexpr,
    RULE: tl.constexpr,
    CHUNK: tl.constexpr,
    STITCHED: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    n_longs = tl.load(Sizes_ptr + 1)
    step = (0.0,)
    now = 0
    if RULE != NO_RULE:
        step = load_step(Step_ptr)
        now = tl.load(Now_ptr)
        n_longs = tl.where(now < 0, 0, n_longs)  # vetoed
    for long in range(tl.program_id(0).to(tl.int64), n_longs, n_programs):
        begin = tl.load(Longs_ptr + long).to(tl.int64) + tl.zeros([1], tl.int64)
        slot = partial_slot(begin, CHUNK)
        row = tl.load(Keys_ptr + slot * CHUNK).to(tl.int64)
        slots = slot + tl.arange(0, STITCHED)
        total = tl.zeros([BLOCK_D], tl.float32)
        more = 1
        while more != 0:
            first = slots * CHUNK
            key = tl.load(Keys_ptr + first, mask=first < n, other=-1).to(tl.int64)
            mask = (first < n)[:, None] & (d < DIM)[None, :]
            part = tl.load(Partial_ptr + slots[:, None] * DIM + d[None, :], mask=mask, other=0.0)  # no wait for the key
            total += tl.sum(tl.where((key == row)[:, None], part, 0.0), axis=0)
            more = tl.min((key == row).to(tl.int32), axis=0)
            slots += STITCHED
        whole = row >= 0
        if RULE == NO_RULE:
            write_out(Out_ptr, Rank_ptr, Found_ptr, begin, row, whole, d, total[None, :], DIM, RANKED)
        else:
            take_step(P_ptr, First_ptr, Second_ptr, step, row, whole, d, total[None, :], DIM, RULE)
            tl.store(Last_ptr + row, tl.zeros_like(row).to(tl.int32) + now, mask=whole & (tl.program_id(1) == 0))


def _add_segments(
    grad: Tensor,
    rows: Rows,
    table: TablePlan,
    out: Tensor,
    rank: Tensor | None = None,
    found: Tensor | None = None,
    update: Update | None = None,
) -> None:
    n, dim = len(rows.keys), out.shape[1]
    if n == 0:
        return
    whole = update is not None and update.whole_rows
    chunk, config = configs.EMBEDDING.chunk(n), configs.EMBEDDING.segments(n, dim, whole)
    stitch = configs.EMBEDDING.stitch(len(rows.longs), dim, whole)
    shared = {
        "Sizes_ptr": rows.sizes,
        "Rank_ptr": rows.order if rank is None else rank,
        "Out_ptr": out,
        "Found_ptr": rows.order if found is None else found,
        "Partial_ptr": torch.empty(n // chunk + 2, dim, dtype=torch.float32, device=grad.device),
        **update_arguments(update, out),
        "DIM": dim,
        "RANKED": rank is not None,
        "CHUNK": chunk,
        "BLOCK_D": config.block_d,
    }
    n_blocks = cdiv(dim, config.block_d)
    launch(
        embedding_segments_kernel,
        (config.programs, n_blocks),
        replace(config.warps, contract=update is None),
        Rows_ptr=rows.rows,
        Begins_ptr=rows.begins,
        Places_ptr=rows.places,
        Grad_ptr=grad,
        Bags_ptr=table.sorted_bags,
        Count_ptr=rows.counted,
        n_programs=config.programs,
        n_rows=len(grad),
        shift=pitch_of(table).bit_length() - 1,
        stride_gb=grad.stride(0),
        MEAN=table.has_mean,
        WIDE=len(grad) * grad.stride(0) >= 2**31 - 2**20,
        ALIGN=alignment(table.align, grad.stride(0)),
        PIECES=config.pieces,
        **shared,
    )
    launch(
        embedding_stitch_kernel,
        (stitch.programs, n_blocks),
        replace(stitch.warps, contract=update is None),
        Keys_ptr=rows.keys,
        Longs_ptr=rows.longs,
        n=n,
        n_programs=stitch.programs,
        STITCHED=stitch.stitched,
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
        _add_segments(grad, rows, table, out)
        add_tiny_tables(grad, rows, table, out, None, n_weight_rows)
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
            _add_segments(grad, rows, table, values, rank, found)
        add_tiny_tables(grad, rows, table, values[n_sorted:], found[n_sorted:], n_weight_rows)
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
            _add_segments(grad, rows, table, update.p, update=update)
            add_tiny_tables(grad, rows, table, update.p, None, void, update)
