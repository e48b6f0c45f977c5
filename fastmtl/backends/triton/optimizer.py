"""Tables' optimizers: rows with a gradient take their step, all others make up for the steps they missed.

Temporal blocking, as in csrc/core/optimizer.h: a row is read once, replays every step it missed in registers, and is
written once. A program looks at GATHERED rows and moves BLOCK_R whole ones at a time, in the order of the steps they
missed, since those that are moved together wait for each other. No two programs may be given the same row.
Deterministic; nothing waits for the device.
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
from .optimizer_quick import far_second, is_finite, moved, near_second, quick_move, quick_step
from .optimizer_rules import ADAM, ADAMW, NO_RULE, ROWWISE_ADAGRAD, load_rows, load_step, move, store_rows


@triton.jit(do_not_specialize=["start", "first_step", "n_kept", "upto"])
def table_rows_kernel(
    P_ptr,  # [V, DIM]
    First_ptr,  # [V, DIM], [V], or anything where the rule has no such state
    Second_ptr,
    Last_ptr,  # [V] int32: the step up to which each row is current
    Rows_ptr,  # [n], void outside 0 .. V - 1, else unique (where SORTED but for neighbours); read where LISTED
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
    GATHERED: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    now = upto
    first_row = start.to(tl.int64)
    if CLOCKED:
        now += tl.load(Clock_ptr)
        first_row += (now % cdiv_(n_table_rows, n)).to(tl.int64) * n
    until = now - 1 if GIVEN else now  # replayed up to there
    own = tl.program_id(0).to(tl.int64) * GATHERED
    i = own + tl.arange(0, GATHERED)
    live = i < n
    row = tl.load(Rows_ptr + i, mask=live, other=-1).to(tl.int64) if LISTED else first_row + i
    if SORTED:
        live = live & (row != tl.load(Rows_ptr + i - 1, mask=live & (i > 0), other=-1).to(tl.int64))
    live = live & (row >= 0) & (row < n_table_rows)
    missed = tl.zeros([GATHERED], tl.int32)
    if not LAZY:
        last = tl.load(Last_ptr + row, mask=live, other=now)
        reached = (last + 1 >= first_step) & (now - last <= n_kept)
        tl.store(Behind_ptr + tl.zeros([GATHERED], tl.int32), 1, mask=live & ~reached)
        live = live & reached
        if not GIVEN:
            live = live & (last < now)
        missed = tl.maximum(until - last, 0)
        tl.debug_barrier()  # threads that share a row have all read `last`
    tl.store(Last_ptr + row, tl.zeros([GATHERED], tl.int32) + now, mask=live)
    n_live = tl.sum(live.to(tl.int32), axis=0)
    if n_live > 0:  # a list's void end is passed by
        # those that missed the most first: the rows of a block wait for each other
        keys = tl.where(live, missed.to(tl.int64) + 1, 0) * GATHERED + tl.arange(0, GATHERED)
        if GATHERED > BLOCK_R:
            keys = tl.sort(keys, descending=True)
        blocks = tl.reshape(keys, [GATHERED // BLOCK_R, BLOCK_R])
        n_blocks = cdiv_(n_live, BLOCK_R)
        if GATHERED == BLOCK_R:
            n_blocks = tl.minimum(n_live, 1)
        for block in range(n_blocks):
            key = tl.sum(tl.where((tl.arange(0, GATHERED // BLOCK_R) == block)[:, None], blocks, 0), axis=0)
            at = own + key % GATHERED
            wait = (key // GATHERED).to(tl.int32) - 1
            moves = wait >= 0
            which = tl.load(Rows_ptr + at, mask=moves, other=0).to(tl.int64) if LISTED else first_row + at
            for begin in range(0, DIM, BLOCK_D):
                d = begin + tl.arange(0, BLOCK_D)
                p, first, second = load_rows(P_ptr, First_ptr, Second_ptr, which, moves, d, DIM, RULE)
                if not LAZY:
                    p, first, second = replay(
                        P_ptr, First_ptr, Second_ptr, Steps_ptr, which, moves, wait, until, first_step, n_kept, d,
                        p, first, second, DIM, RULE,
                    )  # fmt: skip
                if GIVEN:
                    inside = moves[:, None] & (d < DIM)[None, :]
                    grad = tl.load(Grads_ptr + at[:, None] * DIM + d[None, :], mask=inside, other=0.0)
                    numbers = load_step(Steps_ptr + (now - first_step) % n_kept * 9)
                    p, first, second = moved(numbers, grad, p, first, second, inside, DIM, RULE)
                store_rows(P_ptr, First_ptr, Second_ptr, which, moves, d, p, first, second, DIM, RULE)


@triton.jit
def replay(
    P_ptr,
    First_ptr,
    Second_ptr,
    Steps_ptr,
    row,
    live,
    wait,
    until,
    first_step,
    n_kept,
    d,
    p,
    first,
    second,
    DIM: tl.constexpr,
    RULE: tl.constexpr,
):
    """The ``wait`` steps up to ``until`` of a block that :func:`load_rows` has read."""
    most = tl.max(wait, axis=0)
    slot = (until - most + 1 - first_step) % n_kept
    if RULE >= ADAM and RULE <= ADAMW:
        far = far_second(second)
        for left in range(most):
            step = quick_step(load_step(Steps_ptr + slot * 9))
            q, one, two = quick_move(step, 0.0, p, first, far, RULE == ADAMW)
            due = (wait >= most - left)[:, None]
            p = tl.where(due, q, p)
            first = tl.where(due, one, first)
            far = tl.where(due, two, far)
            slot = tl.where(slot + 1 == n_kept, 0, slot + 1)
        second = near_second(far)
        failed = live[:, None] & (d < DIM)[None, :] & ~is_finite(p)
        if tl.max(tl.max(failed.to(tl.int32), axis=1), axis=0) != 0:
            p, first, second = load_rows(P_ptr, First_ptr, Second_ptr, row, live, d, DIM, RULE)
            slot = (until - most + 1 - first_step) % n_kept
            p, first, second = replay_exactly(Steps_ptr, slot, n_kept, wait, most, p, first, second, DIM, RULE)
    else:
        p, first, second = replay_exactly(Steps_ptr, slot, n_kept, wait, most, p, first, second, DIM, RULE)
    return p, first, second


@triton.jit
def replay_exactly(Steps_ptr, slot, n_kept, wait, most, p, first, second, DIM: tl.constexpr, RULE: tl.constexpr):
    for left in range(most):
        q, one, two = move(load_step(Steps_ptr + slot * 9), tl.zeros_like(p), p, first, second, DIM, RULE)
        due = wait >= most - left
        p = tl.where(due[:, None], q, p)
        first = tl.where(due if RULE == ROWWISE_ADAGRAD else due[:, None], one, first)
        second = tl.where(due[:, None], two, second)
        slot = tl.where(slot + 1 == n_kept, 0, slot + 1)
    return p, first, second


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
    config = configs.EMBEDDING.update(n, dim, rule == ROWWISE_ADAGRAD.value)
    launch(
        table_rows_kernel,
        (cdiv(n, config.gathered),),
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
        GATHERED=config.gathered,
        BLOCK_R=config.block_r,
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
    rows = index.rows
    _run(p, states, last, rule, steps, first_step, rows, None, len(rows), 0, upto, clock=clock, is_sorted=True)


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
