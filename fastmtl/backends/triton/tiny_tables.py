"""The gradient of tables of a few rows: no sort, one small matrix product for each run of the batch.

A program owns a slice of a table and a run of batch rows, and sums one-hot(rows)^T times the gradient in registers, in
the order of the batch; a second launch adds the runs' sums. The products are of bf16 with fp32 sums, which tensor cores
do, and exact: a one-hot matrix is, a gradient of bf16 is, and any other (fp32, or divided by a mean's count) is the sum
of three numbers of bf16, to the last of its 24 bits. Deterministic. A gradient that is not finite spreads to all rows
of its slice, since 0 * inf is NaN.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..updates import Update
from . import configs
from .common import aligned, narrow, operand
from .embedding_index import Rows
from .embedding_plan import TablePlan
from .launch import INTERPRET, alignment, cdiv, launch, power_of_two
from .optimizer import update_arguments
from .optimizer_quick import take_step
from .optimizer_rules import NO_RULE, load_step


@triton.jit
def tiny_tables_kernel(
    Tiny_ptr,  # [n_columns, B] int32: row among all tiny rows, or -1
    Grad_ptr,  # [B, W]
    Slices_ptr,  # [n_slices, 4] int32: rows, first tiny row, first and last + 1 lookup
    Lookups_ptr,  # [m, 3] int32: column of Tiny, output column, bag
    Count_ptr,  # [n_bags, B]; read where there is a MEAN
    Sum_ptr,  # [n_runs, n_tiny_rows, DIM] fp32
    Hits_ptr,  # [n_runs, n_tiny_rows] fp32: lookups of each row; written where COUNTED
    n_rows,
    n_slices,
    n_tiny_rows,
    run_rows,
    stride_gb,
    DIM: tl.constexpr,
    MEAN: tl.constexpr,
    EXACT: tl.constexpr,
    COUNTED: tl.constexpr,
    ALIGN: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    piece = Slices_ptr + (tl.program_id(0) % n_slices) * 4
    run = (tl.program_id(0) // n_slices).to(tl.int64)
    n_live = tl.minimum(n_rows - run * run_rows, run_rows).to(tl.int32)
    n_slice_rows = tl.load(piece)
    first_row = tl.load(piece + 1)
    v = tl.arange(0, BLOCK_V)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    operands: tl.constexpr = tl.float32 if INTERPRET else tl.bfloat16
    one = tl.full([1, 1], 1.0, operands)
    total = tl.zeros([BLOCK_V, BLOCK_D], tl.float32)
    hits = tl.zeros([BLOCK_V, 16], tl.float32)
    for lookup in range(tl.load(piece + 2), tl.load(piece + 3)):
        rows = Tiny_ptr + tl.load(Lookups_ptr + lookup * 3).to(tl.int64) * n_rows + run * run_rows
        grad = Grad_ptr + run * run_rows * aligned(stride_gb, ALIGN)
        grad += aligned(tl.load(Lookups_ptr + lookup * 3 + 1), ALIGN)
        count = Count_ptr + tl.load(Lookups_ptr + lookup * 3 + 2).to(tl.int64) * n_rows + run * run_rows
        row, value, divisor = load_block(rows, grad, count, n_live, d, stride_gb, DIM, MEAN, ALIGN, BLOCK_B)
        for step in range(0, n_live, BLOCK_B):
            # the next block is asked for before this one is worked on
            rows += BLOCK_B
            grad += aligned(stride_gb, ALIGN).to(tl.int64) * BLOCK_B
            count += BLOCK_B
            left = n_live - step - BLOCK_B
            next_row, next_value, next_divisor = load_block(
                rows, grad, count, left, d, stride_gb, DIM, MEAN, ALIGN, BLOCK_B
            )
            chosen = tl.where(row[None, :] == first_row + v[:, None], one, tl.zeros_like(one))
            if EXACT:
                total = tl.dot(chosen, operand(value, tl.bfloat16), total, input_precision="ieee")
            else:
                rest = value.to(tl.float32)
                if MEAN:
                    rest = rest / divisor[:, None]
                high = narrow(rest, tl.bfloat16)
                rest -= high.to(tl.float32)
                middle = narrow(rest, tl.bfloat16)
                rest -= middle.to(tl.float32)
                # what a block sums is added in fp32: tensor cores cut off where they add
                part = tl.dot(chosen, operand(rest, tl.bfloat16), input_precision="ieee")
                part = tl.dot(chosen, operand(middle, tl.bfloat16), part, input_precision="ieee")
                total += tl.dot(chosen, operand(high, tl.bfloat16), part, input_precision="ieee")
            if COUNTED:
                hits = tl.dot(chosen, tl.full([BLOCK_B, 16], 1.0, operands), hits, input_precision="ieee")
            row, value, divisor = next_row, next_value, next_divisor
    target = run * n_tiny_rows + first_row + v
    live = v < n_slice_rows
    tl.store(Sum_ptr + target[:, None] * DIM + d[None, :], total, mask=live[:, None] & (d < DIM)[None, :])
    if COUNTED:
        tl.store(Hits_ptr + target, tl.max(hits, axis=1), mask=live & (tl.program_id(1) == 0))


@triton.jit
def load_block(
    Tiny_ptr,
    Grad_ptr,
    Count_ptr,
    left,
    d,
    stride_gb,
    DIM: tl.constexpr,
    MEAN: tl.constexpr,
    ALIGN: tl.constexpr,
    BLOCK_B: tl.constexpr,
):
    """Of a block of the batch of which ``left`` are there: rows, gradients, and what these are divided by."""
    b = tl.arange(0, BLOCK_B)
    live = b < left
    row = tl.load(Tiny_ptr + b, mask=live, other=-1)
    source = b.to(tl.int64)[:, None] * aligned(stride_gb, ALIGN) + d[None, :]
    value = tl.load(Grad_ptr + source, mask=live[:, None] & (d < DIM)[None, :], other=0.0)
    divisor = tl.load(Count_ptr + b, mask=live, other=1.0) if MEAN else row
    return row, value, divisor


@triton.jit
def tiny_tables_sum_kernel(
    Sum_ptr,
    Hits_ptr,  # read where LISTED or where there is a RULE
    Places_ptr,  # [n_tiny_rows] int64: the weight's row of each
    Out_ptr,  # [V_total, DIM], or [n_tiny_rows, DIM] where LISTED
    Found_ptr,  # [n_tiny_rows] int64: the row, or void; written where LISTED
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
    RUNS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    tiny = tl.program_id(0)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    place = tl.load(Places_ptr + tiny + tl.zeros([1], tl.int64))
    total = tl.zeros([BLOCK_D], tl.float32)
    hits = tl.zeros([RUNS], tl.float32)
    for begin in range(0, n_runs, RUNS):
        run = begin + tl.arange(0, RUNS)
        source = run.to(tl.int64) * n_tiny_rows + tiny
        mask = (run < n_runs)[:, None] & (d < DIM)[None, :]
        total += tl.sum(tl.load(Sum_ptr + source[:, None] * DIM + d[None, :], mask=mask, other=0.0), axis=0)
        if LISTED or RULE != NO_RULE:
            hits += tl.load(Hits_ptr + source, mask=run < n_runs, other=0.0)
    touched = tl.zeros([1], tl.float32) + tl.sum(hits, axis=0) > 0
    target = place
    if LISTED:
        target = tl.zeros([1], tl.int64) + tiny
        if tl.program_id(1) == 0:
            tl.store(Found_ptr + target, tl.where(touched, place, void))
    if RULE == NO_RULE:
        tl.store(Out_ptr + target[:, None] * DIM + d[None, :], total[None, :], mask=(d < DIM)[None, :])
    else:
        now = tl.load(Now_ptr)
        touched = touched & (now >= 0)
        take_step(P_ptr, First_ptr, Second_ptr, load_step(Step_ptr), place, touched, d, total[None, :], DIM, RULE)
        moment = tl.zeros([1], tl.int32) + now
        tl.store(Last_ptr + place, moment, mask=touched & (tl.program_id(1) == 0))


def add_tiny_tables(
    grad: Tensor,
    rows: Rows,
    table: TablePlan,
    out: Tensor,
    found: Tensor | None,
    void: int,
    update: Update | None = None,
) -> None:
    """Write the gradient of the tiny tables' rows: into their places in ``out [V_total, D]``, or, where ``found`` is
    given, one below the other into ``out [n_tiny_rows, D]``, their places (``void`` where untouched) into ``found``.
    With an ``update`` nothing is written: the touched rows take their optimizer's step."""
    n_rows, dim = len(grad), out.shape[1]
    exact = grad.dtype is torch.bfloat16 and not table.has_mean
    config = configs.EMBEDDING.tiny(n_rows, dim, exact)
    group = table.tiny_group(config.block_v)
    if group is None:
        return
    slices, lookups = group
    n_runs = cdiv(n_rows, config.rows)
    sums = torch.empty(n_runs, table.n_tiny_rows, dim, dtype=torch.float32, device=grad.device)
    hits = torch.empty(n_runs, table.n_tiny_rows, dtype=torch.float32, device=grad.device)
    launch(
        tiny_tables_kernel,
        (n_runs * len(slices), cdiv(dim, config.block_d)),
        config.warps,
        Tiny_ptr=rows.tiny,
        Grad_ptr=grad,
        Slices_ptr=slices,
        Lookups_ptr=lookups,
        Count_ptr=rows.counted,
        Sum_ptr=sums,
        Hits_ptr=hits,
        n_rows=n_rows,
        n_slices=len(slices),
        n_tiny_rows=table.n_tiny_rows,
        run_rows=config.rows,
        stride_gb=grad.stride(0),
        DIM=dim,
        MEAN=table.has_mean,
        EXACT=exact,
        COUNTED=found is not None or update is not None,
        ALIGN=alignment(table.align, grad.stride(0)),
        BLOCK_V=config.block_v,
        BLOCK_B=config.block_b,
        BLOCK_D=config.block_d,
    )
    block_d = power_of_two(dim) if update is not None and update.whole_rows else config.block_d
    launch(
        tiny_tables_sum_kernel,
        (table.n_tiny_rows, cdiv(dim, block_d)),
        configs.Warps(4, contract=update is None),
        Sum_ptr=sums,
        Hits_ptr=hits,
        Places_ptr=table.tiny_rows,
        Out_ptr=out,
        Found_ptr=table.tiny_rows if found is None else found,
        **update_arguments(update, out),
        n_runs=n_runs,
        n_tiny_rows=table.n_tiny_rows,
        void=void,
        DIM=dim,
        LISTED=found is not None,
        RUNS=max(min(power_of_two(n_runs), configs.EMBEDDING.tiny_runs, 4096 // block_d), 1),
        BLOCK_D=block_d,
    )
