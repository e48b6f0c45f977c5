"""The gradient of tables of a few rows: no sort, one small matrix product for each run of the batch.

A program owns one table and a run of batch rows, and sums one-hot(rows)^T times the gradient in registers, in the order
of the batch; a second launch adds the runs' sums in their order. fp32 throughout, never tf32. Deterministic. A gradient
that is not finite spreads to all rows of its table, since 0 * inf is NaN.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..updates import Update
from . import configs
from .common import aligned
from .embedding_plan import TablePlan
from .launch import alignment, cdiv, launch, power_of_two
from .optimizer import update_arguments
from .optimizer_quick import take_step
from .optimizer_rules import NO_RULE, load_step


@triton.jit
def tiny_tables_kernel(
    Tiny_ptr,  # [B, n_columns] int32: row in the table, or -1
    Grad_ptr,  # [B, W]
    Tables_ptr,  # [n_tables, 4] int32: vocabulary, first tiny row, first and last + 1 lookup
    Lookups_ptr,  # [m, 3] int32: column of Tiny, output column, bag
    Count_ptr,  # [B, n_bags]
    Sum_ptr,  # [n_runs, n_tiny_rows, DIM] fp32
    Hits_ptr,  # [n_runs, n_tiny_rows] fp32: lookups of each row
    n_rows,
    n_tables,
    n_columns,
    n_bags,
    n_tiny_rows,
    run_rows,
    stride_gb,
    DIM: tl.constexpr,
    MEAN: tl.constexpr,
    ALIGN: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    table = Tables_ptr + (tl.program_id(0) % n_tables) * 4
    run = (tl.program_id(0) // n_tables).to(tl.int64)
    n_live = tl.minimum(n_rows - run * run_rows, run_rows).to(tl.int32)
    vocab = tl.load(table)
    first_row = tl.load(table + 1)
    v = tl.arange(0, BLOCK_V)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    total = tl.zeros([BLOCK_V, BLOCK_D], tl.float32)
    hits = tl.zeros([BLOCK_V], tl.float32)
    for lookup in range(tl.load(table + 2), tl.load(table + 3)):
        column = tl.load(Lookups_ptr + lookup * 3)
        start = aligned(tl.load(Lookups_ptr + lookup * 3 + 1), ALIGN)
        bag = tl.load(Lookups_ptr + lookup * 3 + 2)
        for step in range(0, n_live, BLOCK_B):
            b = run * run_rows + step + tl.arange(0, BLOCK_B)
            live = step + tl.arange(0, BLOCK_B) < n_live
            row = tl.load(Tiny_ptr + b * n_columns + column, mask=live, other=-1)
            source = b[:, None] * aligned(stride_gb, ALIGN) + start + d[None, :]
            value = tl.load(Grad_ptr + source, mask=live[:, None] & (d < DIM)[None, :], other=0.0).to(tl.float32)
            if MEAN:
                value = value / tl.load(Count_ptr + b * n_bags + bag, mask=live, other=1.0)[:, None]
            chosen = (row[None, :] == v[:, None]).to(tl.float32)
            total += tl.dot(chosen, value, input_precision="ieee")
            hits += tl.sum(chosen, axis=1)
    target = run * n_tiny_rows + first_row + v
    tl.store(Sum_ptr + target[:, None] * DIM + d[None, :], total, mask=(v < vocab)[:, None] & (d < DIM)[None, :])
    if tl.program_id(1) == 0:
        tl.store(Hits_ptr + target, hits, mask=v < vocab)


@triton.jit
def tiny_tables_sum_kernel(
    Sum_ptr,
    Hits_ptr,
    Places_ptr,  # [n_tiny_rows] int64: the weight's row of each
    Out_ptr,  # [V_total, DIM], or [n_tiny_rows, DIM] where LISTED
    Rows_ptr,  # [n_tiny_rows] int64: the row, or void; written where LISTED
    P_ptr,  # the weight and its optimizer's states, as in embedding_segments_kernel; touched where there is a RULE
    First_ptr,
    Second_ptr,
    Last_ptr,
    Step_ptr,
    Now_ptr,
    n_runs,
    n_tiny_rows,
    void,
    DIM: tl.constexpr,
    LISTED: tl.constexpr,
    RULE: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    r = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    live = r < n_tiny_rows
    inside = live[:, None] & (d < DIM)[None, :]
    total = tl.zeros([BLOCK_R, BLOCK_D], tl.float32)
    hits = tl.zeros([BLOCK_R], tl.float32)
    for run in range(n_runs):
        source = run * n_tiny_rows + r
        total += tl.load(Sum_ptr + source[:, None] * DIM + d[None, :], mask=inside, other=0.0)
        hits += tl.load(Hits_ptr + source, mask=live, other=0.0)
    place = tl.load(Places_ptr + r, mask=live, other=0)
    target = place
    if LISTED:
        target = r.to(tl.int64)
        if tl.program_id(1) == 0:
            tl.store(Rows_ptr + r, tl.where(hits > 0, place, void), mask=live)
    if RULE == NO_RULE:
        tl.store(Out_ptr + target[:, None] * DIM + d[None, :], total, mask=inside)
    else:
        now = tl.load(Now_ptr)
        touched = live & (hits > 0) & (now >= 0)
        take_step(P_ptr, First_ptr, Second_ptr, load_step(Step_ptr), place, touched, d, total, DIM, RULE)
        tl.store(Last_ptr + place, now, mask=touched & (tl.program_id(1) == 0))


def add_tiny_tables(
    grad: Tensor,
    tiny: Tensor,
    count: Tensor,
    table: TablePlan,
    out: Tensor,
    rows: Tensor | None,
    void: int,
    update: Update | None = None,
) -> None:
    """Write the gradient of the tiny tables' rows: into their places in ``out [V_total, D]``, or, where ``rows`` is
    given, one below the other into ``out [n_tiny_rows, D]``, their places (``void`` where untouched) into ``rows``.
    With an ``update`` nothing is written: the touched rows take their optimizer's step."""
    if not table.tiny:
        return
    n_rows, dim = len(tiny), out.shape[1]
    config = configs.EMBEDDING.tiny(n_rows, dim)
    n_runs = cdiv(n_rows, config.rows)
    sums = torch.empty(n_runs, table.n_tiny_rows, dim, dtype=torch.float32, device=grad.device)
    hits = torch.empty(n_runs, table.n_tiny_rows, dtype=torch.float32, device=grad.device)
    n_blocks = cdiv(dim, config.block_d)
    least = 0
    for block_v, warps in configs.EMBEDDING.tiny_classes:
        group = table.tiny_group(least, block_v)
        least = block_v
        if group is None:
            continue
        launch(
            tiny_tables_kernel,
            (n_runs * len(group[0]), n_blocks),
            warps,
            Tiny_ptr=tiny,
            Grad_ptr=grad,
            Tables_ptr=group[0],
            Lookups_ptr=group[1],
            Count_ptr=count,
            Sum_ptr=sums,
            Hits_ptr=hits,
            n_rows=n_rows,
            n_tables=len(group[0]),
            n_columns=table.n_tiny_columns,
            n_bags=table.n_bags,
            n_tiny_rows=table.n_tiny_rows,
            run_rows=config.rows,
            stride_gb=grad.stride(0),
            DIM=dim,
            MEAN=table.has_mean,
            ALIGN=alignment(table.align, grad.stride(0)),
            BLOCK_V=block_v,
            BLOCK_B=config.block_b,
            BLOCK_D=config.block_d,
        )
    block_r = 16
    block_d = power_of_two(dim) if update is not None and update.whole_rows else config.block_d
    launch(
        tiny_tables_sum_kernel,
        (cdiv(table.n_tiny_rows, block_r), cdiv(dim, block_d)),
        configs.Warps(4, contract=update is None),
        Sum_ptr=sums,
        Hits_ptr=hits,
        Places_ptr=table.tiny_rows,
        Out_ptr=out,
        Rows_ptr=table.tiny_rows if rows is None else rows,
        **update_arguments(update, out),
        n_runs=n_runs,
        n_tiny_rows=table.n_tiny_rows,
        void=void,
        DIM=dim,
        LISTED=rows is not None,
        BLOCK_R=block_r,
        BLOCK_D=block_d,
    )
