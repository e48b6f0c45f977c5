"""embedding_bag, forward: every lookup of one width in one launch, pooled straight into the output's columns.

A program owns BLOCK_B rows of the batch and one slot (a bag, or one id of a concatenated bag), so that what differs
between features is a scalar to it, and neighbouring programs, which share the batch rows, share their ids in cache.
Accumulation in fp32. Ids are compared as int64 and never used unchecked: a refused id reads nothing and leaves its
position in the batch in Bad. Deterministic.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...spec import EmbeddingSpec
from .. import deferred
from ..deferred import NO_POSITION, Watch
from . import configs
from .common import aligned, narrow
from .embedding_plan import TablePlan, plans
from .launch import alignment, cdiv, launch, round_up
from .precision import autocast_dtype


@triton.jit
def resolve(ids, vocab, n_pads, pad0, pad1, oov):
    """The table row of each id (-1: counts as nothing), and whether the id is refused."""
    padding = ((n_pads > 0) & (ids == pad0)) | ((n_pads > 1) & (ids == pad1))
    known = (ids >= 0) & (ids < vocab)
    row = tl.where(known, ids, tl.where(oov >= 0, oov, -1))
    return tl.where(padding, -1, row), (oov == -2) & ~known & ~padding


@triton.jit
def load_slot(Slots_ptr, slot, WIDTH: tl.constexpr):
    """The fields of a slot or bag, in the order of ``embedding_plan.SLOT_FIELDS``."""
    at = Slots_ptr + slot * WIDTH
    where = tl.load(at), tl.load(at + 1), tl.load(at + 2), tl.load(at + 3), tl.load(at + 4)
    rules = tl.load(at + 5), tl.load(at + 6), tl.load(at + 7), tl.load(at + 8), tl.load(at + 9)
    return where[0], where[1], where[2], where[3], where[4], rules[0], rules[1], rules[2], rules[3], rules[4]


@triton.jit
def embedding_bag_fwd_kernel(
    Weight_ptr,  # [V_total, DIM]
    Ids_ptr,  # [B, n_ids]
    Slots_ptr,  # [n_slots, 10]
    Dense_ptr,  # [B, n_dense]
    Out_ptr,  # [B, W]
    Bad_ptr,  # [1] int64: the smallest b * n_ids + column of a refused id
    n_rows,
    n_slots,
    n_ids,
    n_dense,
    dense_out,
    stride_ib,
    stride_ic,
    stride_db,
    stride_dc,
    stride_ob,
    DIM: tl.constexpr,
    CHECK: tl.constexpr,
    DENSE: tl.constexpr,
    ALIGN_OUT: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DENSE: tl.constexpr,
):
    n_pieces = n_slots + DENSE
    slot = tl.program_id(0) % n_pieces
    b = (tl.program_id(0) // n_pieces).to(tl.int64) * BLOCK_B + tl.arange(0, BLOCK_B)
    live = b < n_rows
    out = Out_ptr + b[:, None] * aligned(stride_ob, ALIGN_OUT)
    if slot == n_slots:  # the dense columns, behind the bags
        if tl.program_id(1) == 0:
            c = tl.arange(0, BLOCK_DENSE)
            for start in range(0, n_dense, BLOCK_DENSE):
                inside = live[:, None] & (start + c < n_dense)[None, :]
                values = tl.load(Dense_ptr + b[:, None] * stride_db + (start + c)[None, :] * stride_dc, mask=inside)
                tl.store(out + (dense_out + start + c)[None, :], narrow(values, Out_ptr.dtype.element_ty), mask=inside)
    else:
        first, length, vocab, offset, mean, n_pads, pad0, pad1, oov, column = load_slot(Slots_ptr, slot, 10)
        d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
        total = tl.zeros([BLOCK_B, BLOCK_D], tl.float32)
        counted = tl.zeros([BLOCK_B], tl.float32)
        position = tl.full([BLOCK_B], 0x7FFFFFFFFFFFFFFF, tl.int64)
        for i in range(length):
            ids = tl.load(Ids_ptr + b * stride_ib + (first + i) * stride_ic, mask=live, other=0).to(tl.int64)
            row, refused = resolve(ids, vocab, n_pads, pad0, pad1, oov)
            found = live & (row >= 0)
            if CHECK:
                position = tl.minimum(position, tl.where(live & refused, b * n_ids + first + i, 0x7FFFFFFFFFFFFFFF))
            at = (offset + row)[:, None] * DIM + d[None, :]
            total += tl.load(Weight_ptr + at, mask=found[:, None] & (d < DIM)[None, :], other=0.0).to(tl.float32)
            counted += tl.where(found, 1.0, 0.0)
        if CHECK:
            smallest = tl.min(position, axis=0)
            if smallest != 0x7FFFFFFFFFFFFFFF:
                tl.atomic_min(Bad_ptr, smallest)
        if mean != 0:
            total = total / tl.maximum(counted, 1.0)[:, None]
        target = out + aligned(column, ALIGN_OUT) + d[None, :]
        tl.store(target, narrow(total, Out_ptr.dtype.element_ty), mask=live[:, None] & (d < DIM)[None, :])


def embedding_bag_fwd(
    weights: list[Tensor],
    ids: Tensor,
    columns: tuple[int, ...],
    dense: Tensor | None,
    spec: EmbeddingSpec,
    dtype: torch.dtype | None = None,
    bad: Tensor | None = None,
) -> Tensor:
    """See :func:`fastmtl.ops.embedding_bag`. The rows of the output begin at multiples of 16 bytes.

    ``dtype``: the output's, where it is not the one that autocast says. ``bad``: ``[1]`` int64 where refused ids are
    noted, for the caller to :func:`check`; None: they raise here, or are told to who is watching.
    """
    width, n_rows = spec.width(columns), len(ids)
    sample = weights[0] if dense is None else dense
    dtype = autocast_dtype(sample) if dtype is None else dtype
    out = torch.empty(n_rows, round_up(width, 16 // dtype.itemsize), dtype=dtype, device=sample.device)[:, :width]
    if not spec.bags:
        return out if dense is None else out.copy_(dense)
    given, watch = bad, deferred.active() if bad is None else None
    if bad is None and any(bag.oov == "raise" for bag in spec.bags):
        bad = torch.full((1,), NO_POSITION, dtype=torch.int64, device=ids.device) if watch is None else watch.bad
    tables = plans(spec, columns, configs.EMBEDDING.tiny_vocab, ids.device)
    for t, (weight, table) in enumerate(zip(weights, tables, strict=True)):
        _look_up(weight.contiguous(), ids, dense if t == 0 else None, out, width - spec.n_dense, bad, table)
    if bad is not None and watch is not None:
        _note(watch, ids, columns, spec)
    elif bad is not None and given is None:
        check(bad, ids, columns, spec)
    return out


def _look_up(
    weight: Tensor, ids: Tensor, dense: Tensor | None, out: Tensor, dense_out: int, bad: Tensor | None, table: TablePlan
) -> None:
    dim = weight.shape[1]
    config = configs.EMBEDDING.lookup(dim)
    n_pieces = table.n_slots + (dense is not None)
    launch(
        embedding_bag_fwd_kernel,
        (cdiv(len(ids), config.block_b) * n_pieces, cdiv(dim, config.block_d)),
        config.warps,
        Weight_ptr=weight,
        Ids_ptr=ids,
        Slots_ptr=table.slots,
        Dense_ptr=out if dense is None else dense,
        Out_ptr=out,
        Bad_ptr=table.slots if bad is None else bad,
        n_rows=len(ids),
        n_slots=table.n_slots,
        n_ids=ids.shape[1],
        n_dense=0 if dense is None else dense.shape[1],
        dense_out=dense_out,
        stride_ib=ids.stride(0),
        stride_ic=ids.stride(1),
        stride_db=0 if dense is None else dense.stride(0),
        stride_dc=0 if dense is None else dense.stride(1),
        stride_ob=out.stride(0),
        DIM=dim,
        CHECK=bad is not None,
        DENSE=int(dense is not None),
        ALIGN_OUT=alignment(table.align, out.stride(0)),
        BLOCK_B=config.block_b,
        BLOCK_D=config.block_d,
        BLOCK_DENSE=config.block_d,
    )


@triton.jit(do_not_specialize=["context"])
def embedding_bad_kernel(
    Bad_ptr,  # [1] int64; made ready for the next lookup
    Ids_ptr,  # [B, n_ids]
    Found_ptr,  # [4] int64: context (-1: nothing was found yet), row, column, id
    context,
    n_ids,
    stride_ib,
    stride_ic,
):
    position = tl.load(Bad_ptr)
    if position != 0x7FFFFFFFFFFFFFFF:
        if tl.load(Found_ptr) < 0:
            row = position // n_ids
            column = position - row * n_ids
            tl.store(Found_ptr + 1, row)
            tl.store(Found_ptr + 2, column)
            tl.store(Found_ptr + 3, tl.load(Ids_ptr + row * stride_ib + column * stride_ic).to(tl.int64))
            tl.store(Found_ptr, context.to(tl.int64))
        tl.store(Bad_ptr, 0x7FFFFFFFFFFFFFFF)


def _note(watch: Watch, ids: Tensor, columns: tuple[int, ...], spec: EmbeddingSpec) -> None:
    """Write down the refused id, if there is one and it is the first; the ids may be overwritten then."""
    launch(
        embedding_bad_kernel,
        (1,),
        configs.Warps(1),
        Bad_ptr=watch.bad,
        Ids_ptr=ids,
        Found_ptr=watch.found,
        context=watch.context(spec, columns),
        n_ids=ids.shape[1],
        stride_ib=ids.stride(0),
        stride_ic=ids.stride(1),
    )


def check(bad: Tensor, ids: Tensor, columns: tuple[int, ...], spec: EmbeddingSpec) -> None:
    """Raise :class:`BadIdError` for the position in ``bad``, if there is one. Waits for the device."""
    if bad.is_meta:  # a launch that is only recorded
        return
    position = int(bad)
    if position != NO_POSITION:
        row, column = divmod(position, ids.shape[1])
        raise deferred.bad_id(row, column, int(ids[row, column]), columns, spec)
