"""What a training step writes down about its losses, in one launch between forward and backward."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from . import configs
from .launch import launch, power_of_two


@triton.jit
def note_losses_kernel(
    Losses_ptr,  # [T]
    Last_ptr,  # [T] fp32
    Total_ptr,  # [T] fp32
    Count_ptr,  # [1] int64
    First_ptr,  # [T] int64
    Lost_ptr,  # [1] fp32
    Clock_ptr,  # [1] int32; read where VETO
    Now_ptr,  # [1] int32; written where VETO
    n_tasks,
    VETO: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    t = tl.arange(0, BLOCK_T)
    live = t < n_tasks
    loss = tl.load(Losses_ptr + t, mask=live, other=0.0).to(tl.float32)
    bad = live & (loss != loss)
    count = tl.load(Count_ptr) + 1
    tl.store(Count_ptr, count)
    tl.store(Last_ptr + t, loss, mask=live)
    tl.store(Total_ptr + t, tl.load(Total_ptr + t, mask=live, other=0.0) + loss, mask=live)
    unseen = tl.load(First_ptr + t, mask=live, other=0) < 0
    tl.store(First_ptr + t, tl.zeros([BLOCK_T], tl.int64) + count, mask=bad & unseen)
    lost = tl.max(bad.to(tl.int32), axis=0)
    tl.store(Lost_ptr, lost.to(tl.float32))
    if VETO:
        tl.store(Now_ptr, tl.where(lost != 0, -1, tl.load(Clock_ptr)))


def note_losses(
    losses: Tensor,
    last: Tensor,
    total: Tensor,
    count: Tensor,
    first: Tensor,
    lost: Tensor,
    clock: Tensor | None,
    now: Tensor | None,
) -> None:
    """Take note of a step's losses.

    Args:
        losses: ``[T]``.
        last: ``[T]`` float32, becomes them.
        total: ``[T]`` float32, they are added to it.
        count: one int64, of steps; one is added.
        first: ``[T]`` int64; where it is negative and the loss NaN, it becomes the count.
        lost: one float32, becomes whether a loss is NaN.
        clock, now: ``[1]`` int32 or None: ``now`` becomes the clock, or -1 where a loss is NaN.
    """
    launch(
        note_losses_kernel,
        (1,),
        configs.Warps(1),
        Losses_ptr=losses,
        Last_ptr=last,
        Total_ptr=total,
        Count_ptr=count,
        First_ptr=first,
        Lost_ptr=lost,
        Clock_ptr=count if clock is None else clock,
        Now_ptr=count if now is None else now,
        n_tasks=len(losses),
        VETO=now is not None,
        BLOCK_T=power_of_two(len(losses)),
    )
