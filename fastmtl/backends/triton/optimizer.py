"""Tables' optimizers: rows with a gradient take their step, all others make up for the steps they missed.

Temporal blocking, as in csrc/core/optimizer.h: a row is read once, replays every step it missed in registers, and is
written once. A program owns BLOCK_R whole rows. No two programs may be given the same row. Deterministic; nothing
waits for the device.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from ..updates import Update, behind_on, check_gradients, check_range, check_update
from . import configs
from .embedding_index import Rows
from .launch import cdiv, launch
from .optimizer_rules import NO_RULE, ROWWISE_ADAGRAD, load_rows, load_step, move, store_rows


@triton.jit(do_not_specialize=["start", "first_step", "n_kept", "upto"])
def table_rows_kernel(
    P_ptr,  # [V, DIM]
    First_ptr,  # [V, DIM], [V], or anything where the rule has no such state
    Second_ptr,
    Last_ptr,  # [V] int32: the step up to which each row is current
    Rows_ptr,  # [n], void outside 0 .. V - 1, else unique (ascending where SORTED); read where LISTED
    Grads_ptr,  # [n, DIM]; read where GIVEN
    Steps_ptr,  # [n_kept, 9]: step s is row (s - first_step) % n_kept
    Clock_ptr,  # [1] int32; read where CLOCKED
    Behind_ptr,  # [1] int32: set where a row lags further than the kept steps reach; such a row is left alone
    n,
    n_table_rows,
    start,
    first_step,
    n_kept,
    upto,
    DIM: tl.constexpr,
    RULE: tl.constexpr,
    LISTED: tl.constexpr,
    SORTED: tl.constexpr,
    GIVEN: tl.constexpr,
    LAZY: tl.constexpr,
    CLOCKED: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    now = upto
    first_row = start.to(tl.int64)
    if CLOCKED:
        now += tl.load(Clock_ptr)
        first_row += (now % cdiv_(n_table_rows, n)).to(tl.int64) * n
    i = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    live = i < n
    row = tl.load(Rows_ptr + i, mask=live, other=-1).to(tl.int64) if LISTED else first_row + i
    if SORTED:
        live = live & (row != tl.load(Rows_ptr + i - 1, mask=live & (i > 0), other=-1).to(tl.int64))
    live = live & (row >= 0) & (row < n_table_rows)
    last = tl.load(Last_ptr + row, mask=live, other=now)
    if not LAZY:
        reached = (last + 1 >= first_step) & (now - last <= n_kept)
        tl.store(Behind_ptr + tl.zeros([BLOCK_R], tl.int32), 1, mask=live & ~reached)
        live = live & reached
        if not GIVEN:
            live = live & (last < now)
        last = tl.where(live, last, now)
        oldest = tl.min(last, axis=0)
    for begin in range(0, DIM, BLOCK_D):
        d = begin + tl.arange(0, BLOCK_D)
        p, first, second = load_rows(P_ptr, First_ptr, Second_ptr, row, live, d, DIM, RULE)
        if not LAZY:
            for step in range(oldest + 1, now if GIVEN else now + 1):
                numbers = load_step(Steps_ptr + (step - first_step) % n_kept * 9)
                q, one, two = move(numbers, tl.zeros_like(p), p, first, second, DIM, RULE)
                due = last < step
                p = tl.where(due[:, None], q, p)
                first = tl.where(due if RULE == ROWWISE_ADAGRAD else due[:, None], one, first)
                second = tl.where(due[:, None], two, second)
        if GIVEN:
            inside = live[:, None] & (d < DIM)[None, :]
            grad = tl.load(Grads_ptr + i[:, None] * DIM + d[None, :], mask=inside, other=0.0)
            numbers = load_step(Steps_ptr + (now - first_step) % n_kept * 9)
            p, first, second = move(numbers, grad, p, first, second, DIM, RULE)
        store_rows(P_ptr, First_ptr, Second_ptr, row, live, d, p, first, second, DIM, RULE)
    tl.debug_barrier()  # threads that share a row have all read `last`
    tl.store(Last_ptr + row, tl.zeros_like(last) + now, mask=live)


@triton.jit
def advance_kernel(Ring_ptr, Step_ptr, Clock_ptr, Taken_ptr, n_kept):
    """One program: the step that begins is the clock's next."""
    now = tl.load(Clock_ptr) + 1
    field = tl.arange(0, 16)
    numbers = tl.load(Ring_ptr + (now - 1) % n_kept * 9 + field, mask=field < 9, other=0.0)
    tl.debug_barrier()  # all threads have read the clock
    tl.store(Step_ptr + field, numbers, mask=field < 9)
    tl.store(Clock_ptr, now)
    tl.store(Taken_ptr, now)


@triton.jit
def cdiv_(a, b):
    """a / b rounded up; tl.cdiv does not take an argument that is a constant 1."""
    return (a + b - 1) // b


def _run(
    p: Tensor,
    states: Sequence[Tensor],
    last: Tensor,
    rule: int,
    steps: Tensor,
    first_step: int,
    rows: Tensor | None,
    grads: Tensor | None,
    n: int,
    start: int,
    upto: int,
    lazily: bool = False,
    clock: Tensor | None = None,
    is_sorted: bool = False,
) -> None:
    dim = p.shape[1]
    config = configs.EMBEDDING.update(dim, rule == ROWWISE_ADAGRAD.value)
    launch(
        table_rows_kernel,
        (cdiv(n, config.block_b),),
        config.warps,
        P_ptr=p,
        First_ptr=states[0] if states else p,
        Second_ptr=states[1] if len(states) > 1 else p,
        Last_ptr=last,
        Rows_ptr=last if rows is None else rows,
        Grads_ptr=p if grads is None else grads,
        Steps_ptr=steps,
        Clock_ptr=last if clock is None else clock,
        Behind_ptr=behind_on(p.device),
        n=n,
        n_table_rows=len(p),
        start=start,
        first_step=first_step,
        n_kept=len(steps),
        upto=upto,
        DIM=dim,
        RULE=rule,
        LISTED=rows is not None,
        SORTED=is_sorted,
        GIVEN=grads is not None,
        LAZY=lazily,
        CLOCKED=clock is not None,
        BLOCK_R=config.block_b,
        BLOCK_D=config.block_d,
    )


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
    """Bring rows to step ``upto`` with gradients of zero, in place.

    Args:
        p: ``[V, D]`` float32.
        states: as many as the rule has, of p's shape (``[V]`` for a row-wise rule).
        last: ``[V]`` int32, for each row the step up to which it is current.
        rule: place in :data:`fastmtl.backends.updates.RULES`.
        steps: ``[n, 9]`` float32; step s is in row ``(s - first_step) % n``.
        first_step: see there.
        rows: ``[n]`` int64, unique; those outside ``0 .. V - 1`` are void. None: rows ``begin .. end - 1``.
        begin, end: the rows where there is no list.
        upto: the step, or what is added to the clock.
        clock: ``[1]`` int32 on the device: the step is read there when the kernel runs (for CUDA graphs). Without a
            list, ``end - begin`` rows are then taken from the place in the table that the step says, round and round.

    Raises:
        BackendError: shapes, dtypes or the number of states do not fit.
    """
    check_update(p, states, last, rule, steps)
    if rows is None:
        check_range(p, begin, end)
    n = end - begin if rows is None else len(rows)
    start = 0 if rows is not None or clock is not None else begin
    _run(p, states, last, rule, steps, first_step, rows, None, n, start, upto, clock=clock)


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
    """:func:`table_replay` of the rows that a batch looks up.

    Args:
        p, states, last, rule, steps, first_step, upto, clock: as there.
        index: the table's part of ``embedding_bag_index``.

    Raises:
        BackendError: as for :func:`table_replay`.
    """
    check_update(p, states, last, rule, steps)
    for rows, is_sorted in ((index.keys, True), (index.tiny_rows, False)):
        _run(
            p, states, last, rule, steps, first_step, rows, None, len(rows), 0, upto, clock=clock, is_sorted=is_sorted
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
    """Take the last of ``steps`` with the gradients of ``rows``, then bring the rows ``begin .. end - 1`` to it.

    Args:
        p, states, last, rule, steps, first_step, rows, begin, end, clock: as for :func:`table_replay`; with a clock
            the step to take is the clock's.
        grads: ``[n, D]`` float32, of ``rows``.
        lazily: the rows are not brought to the step before, and no others are.

    Raises:
        BackendError: as for :func:`table_replay`.
    """
    check_update(p, states, last, rule, steps)
    check_gradients(p, rows, grads)
    upto = first_step + len(steps) - 1 if clock is None else 0
    _run(p, states, last, rule, steps, first_step, rows, grads, len(rows), 0, upto, lazily, clock)
    if not lazily:
        table_replay(p, states, last, rule, steps, first_step, None, begin, end, upto, clock)


def update_arguments(update: Update | None, other: Tensor) -> dict[str, Any]:
    """A kernel's arguments of an update; ``other`` stands where there is none."""
    if update is None:
        names = ("P_ptr", "First_ptr", "Second_ptr", "Last_ptr", "Step_ptr", "Now_ptr")
        return {**dict.fromkeys(names, other), "RULE": NO_RULE.value}
    states = [*update.states, update.p, update.p]
    return {
        "P_ptr": update.p,
        "First_ptr": states[0],
        "Second_ptr": states[1],
        "Last_ptr": update.last,
        "Step_ptr": update.step,
        "Now_ptr": update.now,
        "RULE": update.rule,
    }


def advance(ring: Tensor, step: Tensor, clock: Tensor, taken: Tensor | None = None) -> None:
    """Begin the step behind the clock's: its number into the clock, its numbers into ``step``. Which it is is read
    on the device, so that this can be part of a CUDA graph.

    Args:
        ring: ``[n_kept, 9]`` float32, contiguous; step s, from 1, is in row ``(s - 1) % n_kept``.
        step: ``[9]`` float32.
        clock: ``[1]`` int32.
        taken: ``[1]`` int32, becomes the number too: that of the step which the backward takes.
    """
    launch(
        advance_kernel,
        (1,),
        configs.Warps(1),
        Ring_ptr=ring,
        Step_ptr=step,
        Clock_ptr=clock,
        Taken_ptr=clock if taken is None else taken,
        n_kept=len(ring),
    )
