"""What of a lookup's backward depends on the ids alone: the rows that a batch reads of each weight, in order.

It is made once a batch, before the lookup: an optimizer makes these rows current, and the backward sums their gradients
by it. Where the next batch is known it may be made while this one computes.
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
from .launch import cdiv, launch


@triton.jit
def embedding_rows_kernel(
    Ids_ptr,  # [B, n_ids]
    Bags_ptr,  # [n_bags, 12]
    Sorted_ptr,  # [B, n_sorted]: row in the weight, or void
    Tiny_ptr,  # [B, n_tiny] int32: row in the table, or -1
    Count_ptr,  # [B, n_bags] fp32: what the bag's gradient is divided by
    n_rows,
    n_bags,
    n_sorted,
    n_tiny,
    void,
    stride_ib,
    stride_ic,
    BLOCK_B: tl.constexpr,
):
    bag = tl.program_id(0) % n_bags
    b = (tl.program_id(0) // n_bags).to(tl.int64) * BLOCK_B + tl.arange(0, BLOCK_B)
    live = b < n_rows
    first, length, vocab, offset, mean, n_pads, pad0, pad1, oov, _out = load_slot(Bags_ptr, bag, 12)
    tiny = tl.load(Bags_ptr + bag * 12 + 10)
    column = tl.load(Bags_ptr + bag * 12 + 11)
    counted = tl.zeros([BLOCK_B], tl.float32)
    for i in range(length):
        ids = tl.load(Ids_ptr + b * stride_ib + (first + i) * stride_ic, mask=live, other=0).to(tl.int64)
        row, _refused = resolve(ids, vocab, n_pads, pad0, pad1, oov)
        if tiny != 0:
            tl.store(Tiny_ptr + b * n_tiny + column + i, row.to(tl.int32), mask=live)
        else:
            found = tl.where(row >= 0, offset + row, void)
            tl.store(Sorted_ptr + b * n_sorted + column + i, found.to(Sorted_ptr.dtype.element_ty), mask=live)
        counted += tl.where(row >= 0, 1.0, 0.0)
    divisor = tl.where(mean != 0, tl.maximum(counted, 1.0), 1.0)
    tl.store(Count_ptr + b * n_bags + bag, divisor, mask=live)


class Rows(NamedTuple):
    """The rows a batch reads of one weight.

    Args:
        keys: ``[n]`` ascending; ``V_total`` (void) where a lookup counts as nothing.
        order: ``[n]``, where each stood in ``[B, n_sorted]``.
        tiny: ``[B, n_tiny_columns]``, rows of the tiny tables.
        counted: ``[B, n_bags]``, what each bag's gradient is divided by: 1, or the lookups that a mean counts.
        tiny_rows: ``[n]`` int64, all rows of the tiny tables, looked up or not.
    """

    keys: Tensor
    order: Tensor
    tiny: Tensor
    counted: Tensor
    tiny_rows: Tensor


def sort_rows(ids: Tensor, table: TablePlan, n_weight_rows: int, out: Rows | None = None) -> Rows:
    """The rows of one weight in order.

    Args:
        ids: ``[B, S]`` int64 or int32.
        table: the weight's share of the lookup.
        n_weight_rows: V_total.
        out: of another batch of this shape, to be overwritten.
    """
    n_rows = len(ids)
    small = n_weight_rows < 2**31 - 1
    found = torch.empty(n_rows, table.n_sorted, dtype=torch.int32 if small else torch.int64, device=ids.device)
    if out is None:
        tiny = torch.empty(n_rows, table.n_tiny_columns, dtype=torch.int32, device=ids.device)
        count = torch.empty(n_rows, table.n_bags, dtype=torch.float32, device=ids.device)
    else:
        tiny, count = out.tiny, out.counted
    block_b = 256
    launch(
        embedding_rows_kernel,
        (cdiv(n_rows, block_b) * table.n_bags,),
        configs.Warps(4),
        Ids_ptr=ids,
        Bags_ptr=table.bags,
        Sorted_ptr=found,
        Tiny_ptr=tiny,
        Count_ptr=count,
        n_rows=n_rows,
        n_bags=table.n_bags,
        n_sorted=table.n_sorted,
        n_tiny=table.n_tiny_columns,
        void=n_weight_rows,
        stride_ib=ids.stride(0),
        stride_ic=ids.stride(1),
        BLOCK_B=block_b,
    )
    if out is not None:
        torch.sort(found.flatten(), stable=True, out=(out.keys, out.order))
        return out
    keys, order = torch.sort(found.flatten(), stable=True)
    return Rows(keys, order, tiny, count, table.tiny_rows)


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
