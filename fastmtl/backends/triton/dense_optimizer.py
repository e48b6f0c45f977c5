"""An optimizer's step of parameters with dense gradients, many tensors a launch.

dense_numbers_kernel counts the step of each parameter and makes the numbers of it, from the learning rate and the
count on the device, in double precision as fastmtl.optim.rules does on the host; dense_step_kernel moves them, by the
rules of optimizer_rules.py: the native backend's bits.

Addresses are arguments of the launch, tuples of pointers, so that no table of them has to be kept or sent: a captured
launch holds them, a plain one has those of its own gradients.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import configs
from .launch import cdiv, launch
from .optimizer_rules import ADAGRAD, ADAM, ADAMW, SGD, load_step, move

#: Tensors of a launch: each is asked by every program whether it is the one. Their addresses take 1.5 of the 4 KiB
#: that a kernel's arguments may have.
MOST_TENSORS = 48


@triton.jit
def dense_numbers_kernel(
    Counts,  # one number each, fp32: steps taken; read where the rule counts
    Base,  # l2, keep, fresh, fresh_square, ahead, eps: what neither rate nor count decides
    Rate_ptr,  # the learning rate, fp32
    Lost_ptr,  # fp32, 1: the step is not to be taken; read where VETO
    Numbers_ptr,  # [tensors, or 1 where the rule does not count; 9]
    DECAY: tl.constexpr,
    LOG_BETA1: tl.constexpr,  # to the base of 2
    LOG_BETA2: tl.constexpr,
    RATE_DECAY: tl.constexpr,
    VETO: tl.constexpr,
    RULE: tl.constexpr,
):
    which = tl.program_id(0)
    rate = tl.load(Rate_ptr).to(tl.float64)
    shrink = tl.full((), 1.0, tl.float64)
    root = shrink
    neg_lr = -rate
    if RULE >= ADAM and RULE <= ADAGRAD:
        place = Counts[0]
        for i in tl.static_range(len(Counts)):
            place = tl.where(which == i, Counts[i], place)
        taken = 1.0
        if VETO:
            taken = 1.0 - tl.load(Lost_ptr)
        count = tl.load(place) + taken
        tl.store(place, count)
        number = count.to(tl.float64)
        if RULE == ADAGRAD:
            neg_lr = -(rate / (1.0 + (number - 1.0) * tl.full((), RATE_DECAY, tl.float64)))
        else:
            one = tl.exp2(number * tl.full((), LOG_BETA1, tl.float64))
            two = tl.exp2(number * tl.full((), LOG_BETA2, tl.float64))
            root = tl.sqrt(1.0 - two)
            neg_lr = -(rate / (1.0 - one))
        if RULE == ADAMW:
            shrink = 1.0 - rate * tl.full((), DECAY, tl.float64)
    numbers = Numbers_ptr + which * 9
    tl.store(numbers, Base[0])
    tl.store(numbers + 1, shrink.to(tl.float32))
    tl.store(numbers + 2, Base[1])
    tl.store(numbers + 3, Base[2])
    tl.store(numbers + 4, Base[3])
    tl.store(numbers + 5, Base[4])
    tl.store(numbers + 6, root.to(tl.float32))
    tl.store(numbers + 7, Base[5])
    tl.store(numbers + 8, neg_lr.to(tl.float32))


@triton.jit
def dense_step_kernel(
    P,  # the parameters, their gradients and states, fp32; states that the rule does not have are not read
    Grad,
    First,
    Second,
    Sizes,  # the numbers of elements
    Numbers_ptr,  # [tensors, or 1 where the rule does not count; 9]
    Lost_ptr,
    VETO: tl.constexpr,
    RULE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    program = tl.program_id(0)
    p_at, grad_at, first_at, second_at, size = P[0], Grad[0], First[0], Second[0], Sizes[0]
    which = 0
    begin = 0
    next_begin = 0
    for i in tl.static_range(len(P)):
        here = program >= next_begin
        p_at = tl.where(here, P[i], p_at)
        grad_at = tl.where(here, Grad[i], grad_at)
        first_at = tl.where(here, First[i], first_at)
        second_at = tl.where(here, Second[i], second_at)
        size = tl.where(here, Sizes[i], size)
        which = tl.where(here, i, which)
        begin = tl.where(here, next_begin, begin)
        next_begin += tl.cdiv(Sizes[i], BLOCK)
    first = (program - begin).to(tl.int64) * BLOCK  # a parameter may have more than 2^31 elements
    at = first + tl.arange(0, BLOCK)
    if VETO:
        size = tl.where(tl.load(Lost_ptr) == 1.0, 0, size)
    if not (RULE >= ADAM and RULE <= ADAGRAD):
        which = 0
    step = load_step(Numbers_ptr + which * 9)
    if first + BLOCK <= size:  # without a mask, which would keep lanes from loading 16 bytes at a time
        _move_block(step, p_at + at, grad_at + at, first_at + at, second_at + at, None, RULE)
    else:
        _move_block(step, p_at + at, grad_at + at, first_at + at, second_at + at, at < size, RULE)


@triton.jit
def _move_block(step, p_at, grad_at, first_at, second_at, live, RULE: tl.constexpr):
    grad = _load(grad_at, live)
    p = _load(p_at, live)
    first, second = p, p  # where the rule has no such state
    if RULE != SGD:
        first = _load(first_at, live)
    if RULE >= ADAM and RULE <= ADAMW:
        second = _load(second_at, live)
    p, first, second = move(step, grad, p, first, second, 1, RULE)
    tl.store(p_at, p, mask=live)
    if RULE != SGD:
        tl.store(first_at, first, mask=live)
    if RULE >= ADAM and RULE <= ADAMW:
        tl.store(second_at, second, mask=live)


@triton.jit
def _load(place, live):
    return tl.load(place) if live is None else tl.load(place, mask=live, other=0.0)


def dense_step(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    states: Sequence[Sequence[Tensor]],
    counts: Sequence[Tensor],
    rule: int,
    numbers: dict[str, float],
    settings: dict[str, float],
    rate: Tensor,
    lost: Tensor | None,
) -> None:
    """Take a step of the parameters of one group.

    Args:
        params, grads: float32, contiguous, on one device.
        states: of each the rule's states, likewise.
        counts: of each the number of steps taken, one float32; empty where the rule does not count.
        rule: place in :data:`fastmtl.backends.updates.RULES`; none that is row-wise.
        numbers: of any step by ``fastmtl.optim.rules.FIELDS``; those that the learning rate or the number of the step
            decide are not read.
        settings: ``weight_decay``, ``lr_decay``, and ``betas`` as ``beta1`` and ``beta2``; what the rule does not have
            may be left out.
        rate: one float32, the learning rate.
        lost: one float32: where it is 1 nothing moves and nothing is counted; None: it is taken.
    """
    if len(params) > MOST_TENSORS:
        for start in range(0, len(params), MOST_TENSORS):
            part = slice(start, start + MOST_TENSORS)
            of_part = params[part], grads[part], states[part], counts[part]
            dense_step(*of_part, rule, numbers, settings, rate, lost)
        return
    made = torch.empty(len(counts) or 1, 9, dtype=torch.float32, device=rate.device)
    veto = {"Lost_ptr": rate if lost is None else lost, "VETO": lost is not None, "RULE": rule}
    launch(
        dense_numbers_kernel,
        (len(made),),
        configs.Warps(1, contract=False),
        Counts=tuple(counts) or (rate,),
        Base=tuple(numbers[name] for name in ("l2", "keep", "fresh", "fresh_square", "ahead", "eps")),
        Rate_ptr=rate,
        Numbers_ptr=made,
        DECAY=settings.get("weight_decay", 0.0),
        LOG_BETA1=_log2(settings.get("beta1", 0.0)),
        LOG_BETA2=_log2(settings.get("beta2", 0.0)),
        RATE_DECAY=settings.get("lr_decay", 0.0),
        **veto,
    )
    config = configs.DENSE_STEP
    first, second = ([state[min(i, len(state) - 1)] if state else p for p, state in zip(params, states, strict=True)]
                     for i in range(2))  # fmt: skip
    launch(
        dense_step_kernel,
        (sum(cdiv(p.numel(), config.block) for p in params),),
        config.warps,
        P=tuple(params),
        Grad=tuple(grads),
        First=tuple(first),
        Second=tuple(second),
        Sizes=tuple(p.numel() for p in params),
        Numbers_ptr=made,
        BLOCK=config.block,
        **veto,
    )


def _log2(beta: float) -> float:
    return math.log2(beta) if beta > 0 else -math.inf
