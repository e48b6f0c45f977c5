"""What of a lookup's backward depends on the ids alone: the rows that a batch reads of each weight, in order.

It is made once a batch, before the lookup: an optimizer makes these rows current, and the backward sums their gradients
by it. Where the next batch is known it may be made while this one computes.

1. Every lookup becomes a row of its weight (embedding_rows_kernel), written column by column: neighbours of the batch
   are neighbours in memory. The rows of all but tiny tables are sorted, in torch, stably.
2. The sorted lookups are cut into pieces: a piece is a row's lookups, or, where these are many, CHUNK of them (its
   first piece holds up to 2 CHUNK - 1). Where one begins can be seen from the keys around it, so that pieces are
   counted (embedding_count_kernel) and listed (embedding_pieces_kernel) by programs that do not wait for each other.
   The backward has a walker for each piece then, and none for a lookup that begins none.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...spec import EmbeddingSpec
from . import configs
from .embedding_bag_forward import load_slot, resolve
from .embedding_plan import TablePlan, plans
from .launch import cdiv, launch, power_of_two, round_up


@triton.jit
def embedding_rows_kernel(
    Ids_ptr,  # [B, n_ids]
    Bags_ptr,  # [n_bags, 12]
    Found_ptr,  # [n_sorted, B]: row in the weight, or void
    Tiny_ptr,  # [n_tiny, B] int32: row among all tiny rows, or -1
    Count_ptr,  # [n_bags, B] fp32: what the bag's gradient is divided by; written where there is a MEAN
    n_rows,
    n_bags,
    n_groups,
    void,
    stride_ib,
    stride_ic,
    MEAN: tl.constexpr,
    BAGS: tl.constexpr,
    BLOCK_B: tl.constexpr,
):
    # neighbouring columns of the ids share their sectors, which the program's next bag finds in its cache
    group = tl.program_id(0) % n_groups
    b = (tl.program_id(0) // n_groups).to(tl.int64) * BLOCK_B + tl.arange(0, BLOCK_B)
    live = b < n_rows
    for bag in range(group * BAGS, tl.minimum(group * BAGS + BAGS, n_bags)):
        first, length, vocab, offset, mean, n_pads, pad0, pad1, oov, _out = load_slot(Bags_ptr, bag, 12)
        tiny = tl.load(Bags_ptr + bag * 12 + 10)
        column = tl.load(Bags_ptr + bag * 12 + 11)
        counted = tl.zeros([BLOCK_B], tl.float32)
        for i in range(length):
            ids = tl.load(Ids_ptr + b * stride_ib + (first + i) * stride_ic, mask=live, other=0).to(tl.int64)
            row, _refused = resolve(ids, vocab, n_pads, pad0, pad1, oov)
            target = (column + i) * n_rows + b
            if tiny != 0:
                tl.store(Tiny_ptr + target, tl.where(row >= 0, tiny - 1 + row, -1).to(tl.int32), mask=live)
            else:
                found = tl.where(row >= 0, offset + row, void)
                tl.store(Found_ptr + target, found.to(Found_ptr.dtype.element_ty), mask=live)
            counted += tl.where(row >= 0, 1.0, 0.0)
        if MEAN:
            divisor = tl.where(mean != 0, tl.maximum(counted, 1.0), 1.0)
            tl.store(Count_ptr + tl.cast(bag, tl.int64) * n_rows + b, divisor, mask=live)


@triton.jit
def beginnings(Keys_ptr, i, n, void, CHUNK: tl.constexpr):
    """Of the sorted lookups ``i``: the key; whether it counts; whether a piece begins there; whether a row of several
    pieces does.

    Beyond a row's beginning a piece begins at a multiple of CHUNK if the CHUNK lookups before it are the row's too.
    """
    key = tl.load(Keys_ptr + i, mask=i < n, other=-1).to(tl.int64)
    before = tl.load(Keys_ptr + i - 1, mask=(i > 0) & (i < n), other=-1).to(tl.int64)
    live = (i < n) & (key != void)
    starts = live & (key != before)
    inner = live & (i % CHUNK == 0) & (i >= CHUNK)
    back = tl.load(Keys_ptr + i - CHUNK, mask=inner, other=-1).to(tl.int64)
    second = (i + CHUNK - 1) // CHUNK * CHUNK + CHUNK
    ahead = tl.load(Keys_ptr + second, mask=starts & (second < n), other=-1).to(tl.int64)
    return key, live, starts | (inner & (back == key)), starts & (ahead == key)


@triton.jit
def embedding_count_kernel(
    Keys_ptr,  # [n] rows, ascending; void ones last
    Counts_ptr,  # [2, n_runs] int32: pieces that begin in each run, rows of several pieces
    n,
    void,
    n_runs,
    run,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    own = tl.program_id(0).to(tl.int64) * run
    pieces = tl.zeros([BLOCK], tl.int32)
    longs = tl.zeros([BLOCK], tl.int32)
    for at in range(0, run, BLOCK):
        _key, _live, piece, long = beginnings(Keys_ptr, own + at + tl.arange(0, BLOCK), n, void, CHUNK)
        pieces += piece.to(tl.int32)
        longs += long.to(tl.int32)
    tl.store(Counts_ptr + tl.program_id(0), tl.sum(pieces, axis=0))
    tl.store(Counts_ptr + n_runs + tl.program_id(0), tl.sum(longs, axis=0))


@triton.jit
def embedding_pieces_kernel(
    Keys_ptr,  # [n]
    Order_ptr,  # [n] int64: where each stood in [n_sorted, B]
    Counts_ptr,  # [2, n_runs]
    Columns_ptr,  # [n_sorted, 2] int32: output column, bag
    Places_ptr,  # [n]: row of the batch * pitch + output column
    Rows_ptr,  # [n ...]: of each piece; void behind them
    Begins_ptr,  # [n + 1]: twice the first lookup of each piece, 1 more where it is not all of a row; the last's end
    Longs_ptr,  # [n // CHUNK + 1]: the first lookup of each row of several pieces
    Sizes_ptr,  # [2] int64: how many pieces, how many such rows
    n,
    n_rows,
    pitch,
    void,
    n_runs,
    run,
    CHUNK: tl.constexpr,
    MOST_RUNS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    own = tl.program_id(0)
    runs = tl.arange(0, MOST_RUNS)
    pieces = tl.load(Counts_ptr + runs, mask=runs < n_runs, other=0).to(tl.int64)
    longs = tl.load(Counts_ptr + n_runs + runs, mask=runs < n_runs, other=0).to(tl.int64)
    n_pieces = tl.sum(pieces, axis=0)
    rank = tl.sum(tl.where(runs < own, pieces, 0), axis=0)
    long_rank = tl.sum(tl.where(runs < own, longs, 0), axis=0)
    if own == 0:
        tl.store(Sizes_ptr, n_pieces)
        tl.store(Sizes_ptr + 1, tl.sum(longs, axis=0))
    for at in range(0, run, BLOCK):
        i = own.to(tl.int64) * run + at + tl.arange(0, BLOCK)
        key, live, piece, long = beginnings(Keys_ptr, i, n, void, CHUNK)
        order = tl.load(Order_ptr + i, mask=i < n, other=0)
        column = order // n_rows
        place = (order - column * n_rows) * pitch + tl.load(Columns_ptr + column * 2, mask=i < n, other=0)
        tl.store(Places_ptr + i, place.to(Places_ptr.dtype.element_ty), mask=i < n)
        up_to = tl.cumsum(piece.to(tl.int32), axis=0)
        mine = rank + up_to - 1
        tl.store(Rows_ptr + mine, key.to(Rows_ptr.dtype.element_ty), mask=piece)
        is_part = long | (tl.load(Keys_ptr + i - 1, mask=piece & (i > 0), other=-1).to(tl.int64) == key)
        begin = i * 2 + is_part.to(tl.int64)
        tl.store(Begins_ptr + mine, begin.to(Begins_ptr.dtype.element_ty), mask=piece)
        # a lookup that begins no piece has a place behind the pieces
        none = tl.zeros([BLOCK], tl.int64) + void
        tl.store(Rows_ptr + n_pieces + i - (rank + up_to), none.to(Rows_ptr.dtype.element_ty), mask=(i < n) & ~piece)
        follows = tl.load(Keys_ptr + i + 1, mask=i + 1 < n, other=-1).to(tl.int64)
        is_last = live & ((i + 1 == n) | (follows == void))
        tl.store(Begins_ptr + n_pieces + tl.zeros_like(i), (i * 2 + 2).to(Begins_ptr.dtype.element_ty), mask=is_last)
        long_up_to = tl.cumsum(long.to(tl.int32), axis=0)
        tl.store(Longs_ptr + long_rank + long_up_to - 1, i.to(Longs_ptr.dtype.element_ty), mask=long)
        rank += tl.sum(piece.to(tl.int32), axis=0)
        long_rank += tl.sum(long.to(tl.int32), axis=0)


class Rows(NamedTuple):
    """The rows a batch reads of one weight.

    Args:
        keys: ``[n]`` rows of the sorted lookups, ascending; ``V_total`` (void) where a lookup counts as nothing.
        order: ``[n]`` int64, where each stood in ``[n_sorted, B]``.
        places: ``[n]``, the same as ``row of the batch * pitch + output column``, see :func:`pitch_of`.
        rows: ``[n + n_tiny_rows]``, of the pieces; void behind them; and all rows of tiny tables, looked up or not.
        begins: ``[n + 1]``, twice the first lookup of each piece, one more where it is not all of a row; and the end of
            the last, twice.
        longs: the first lookup of each row that has several pieces.
        sizes: ``[2]`` int64, the number of pieces, and that of rows with several.
        tiny: ``[n_tiny_columns, B]`` int32, rows among all those of tiny tables; -1 where a lookup counts as nothing.
        counted: ``[n_bags, B]``, what each bag's gradient is divided by: 1, or the lookups that a mean counts; empty
            where there is no mean.
    """

    keys: Tensor
    order: Tensor
    places: Tensor
    rows: Tensor
    begins: Tensor
    longs: Tensor
    sizes: Tensor
    tiny: Tensor
    counted: Tensor


def pitch_of(table: TablePlan) -> int:
    """What a place's row is multiplied by: a power of two, so that it is taken apart by a shift."""
    return power_of_two(table.width)


def _empty(n_rows: int, table: TablePlan, n_weight_rows: int, device: torch.device) -> Rows:
    """For a batch of ``n_rows``."""

    def made(n: int, largest: int) -> Tensor:
        return torch.empty(n, dtype=torch.int32 if largest < 2**31 - 2**20 else torch.int64, device=device)

    n = n_rows * table.n_sorted
    rows = made(n + table.n_tiny_rows, n_weight_rows)
    rows[n:].copy_(table.tiny_rows)
    return Rows(
        made(n, n_weight_rows),
        torch.empty(n, dtype=torch.int64, device=device),
        made(n, n_rows * pitch_of(table)),
        rows,
        made(n + 1, 2 * n),
        made(n // configs.EMBEDDING.chunk(n) + 1, n),
        (torch.empty if n else torch.zeros)(2, dtype=torch.int64, device=device),
        torch.empty(table.n_tiny_columns, n_rows, dtype=torch.int32, device=device),
        torch.empty(table.n_bags if table.has_mean else 0, n_rows, dtype=torch.float32, device=device),
    )


def sort_rows(ids: Tensor, table: TablePlan, n_weight_rows: int, out: Rows | None = None) -> Rows:
    """The rows of one weight in order.

    Args:
        ids: ``[B, S]`` int64 or int32.
        table: the weight's share of the lookup.
        n_weight_rows: V_total.
        out: of another batch of this shape, to be overwritten.
    """
    n_rows = len(ids)
    made = _empty(n_rows, table, n_weight_rows, ids.device) if out is None else out
    found = torch.empty_like(made.keys)
    config = configs.EMBEDDING.index(len(found))
    n_groups = cdiv(table.n_bags, config.bags)
    launch(
        embedding_rows_kernel,
        (cdiv(n_rows, config.block_b) * n_groups,),
        configs.Warps(4),
        Ids_ptr=ids,
        Bags_ptr=table.bags,
        Found_ptr=found,
        Tiny_ptr=made.tiny,
        Count_ptr=made.counted,
        n_rows=n_rows,
        n_bags=table.n_bags,
        n_groups=n_groups,
        void=n_weight_rows,
        stride_ib=ids.stride(0),
        stride_ic=ids.stride(1),
        MEAN=table.has_mean,
        BAGS=config.bags,
        BLOCK_B=config.block_b,
    )
    if len(found):
        torch.sort(found, stable=True, out=(made.keys, made.order))
        _cut(made, n_rows, table, n_weight_rows, config)
    return made


def _cut(rows: Rows, n_rows: int, table: TablePlan, n_weight_rows: int, config: configs.Index) -> None:
    n, chunk = len(rows.keys), configs.EMBEDDING.chunk(len(rows.keys))
    run = round_up(cdiv(n, config.most_runs), config.block)
    n_runs = cdiv(n, run)
    counts = torch.empty(2, n_runs, dtype=torch.int32, device=rows.keys.device)
    shared = {
        "Keys_ptr": rows.keys,
        "Counts_ptr": counts,
        "n": n,
        "void": n_weight_rows,
        "n_runs": n_runs,
        "run": run,
        "CHUNK": chunk,
        "BLOCK": config.block,
    }
    launch(embedding_count_kernel, (n_runs,), config.warps, **shared)
    launch(
        embedding_pieces_kernel,
        (n_runs,),
        config.warps,
        Order_ptr=rows.order,
        Columns_ptr=table.sorted_columns,
        Places_ptr=rows.places,
        Rows_ptr=rows.rows,
        Begins_ptr=rows.begins,
        Longs_ptr=rows.longs,
        Sizes_ptr=rows.sizes,
        n_rows=n_rows,
        pitch=pitch_of(table),
        MOST_RUNS=power_of_two(n_runs),
        **shared,
    )


def embedding_bag_index(
    ids: Tensor,
    columns: tuple[int, ...],
    spec: EmbeddingSpec,
    shapes: list[torch.Size],
    needs: list[bool],
    out: Sequence[Rows | None] | None = None,
) -> list[Rows | None]:
    """The rows of each weight that needs them.

    Args:
        ids, columns, spec: the lookup's, see :func:`fastmtl.ops.embedding_bag`.
        shapes: of the weights.
        needs: whose rows are wanted.
        out: what was returned for another batch of this shape, to be overwritten.
    """
    tables = plans(spec, columns, configs.EMBEDDING.tiny_vocab, ids.device) if spec.bags else ()
    into: Sequence[Rows | None] = [None] * len(tables) if out is None else out
    return [
        sort_rows(ids, table, shape[0], kept) if need else None
        for table, shape, need, kept in zip(tables, shapes, needs, into, strict=True)
    ]
