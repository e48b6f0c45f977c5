"""task_losses: from logits to each task's mean loss and the gradient of their weighted sum.

Labels that are missing (NaN) count for nothing, so that the mean's divisor must be known before any gradient is:
task_counts_kernel counts them, task_losses_kernel (or the towers' last pass, mixing_backward.py) does the work, and
task_losses_sum_kernel adds the pieces of the losses up. A program owns a run of one task's rows.

fp32, from the logit itself: no probability is rounded to 0 or 1 on the way. Deterministic.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import configs
from .common import begin
from .launch import cdiv, launch, starts_early


@triton.jit
def _log1p(t):
    """log(1 + t) for t from 0 to 1, to the last bits: 2 artanh(t / (2 + t)), whose argument is at most a third."""
    s = t / (2.0 + t)
    square = s * s
    series = 1.0 / 15
    for odd in tl.static_range(13, 0, -2):
        series = series * square + 1.0 / odd
    return 2.0 * s * series


@triton.jit
def loss_parts(z, label, binary):
    """What rows add to their task's loss (NaN labels: nothing), and the gradients of their logits, for a factor of one
    and no mean: cross-entropy of the sigmoid, its logarithms no lower than torch's -100, or the squared error."""
    known = label == label
    y = tl.where(known, label, 0.0)
    t = tl.exp(-tl.abs(z))
    tail = _log1p(t)
    positive = z > 0
    up = tl.where(positive, z, 0.0) + tail  # -log(1 - p)
    down = up - z  # -log(p)
    per_one = 1.0 / (1.0 + t)
    p = tl.where(positive, 1.0, t) * per_one
    rest = tl.where(positive, t, 1.0) * per_one
    loss = (1.0 - y) * tl.where(up > 100.0, 100.0, up) + y * tl.where(down > 100.0, 100.0, down)
    grad = (1.0 - y) * p - y * rest
    d = z - y
    loss = tl.where(binary, loss, d * d)
    grad = tl.where(binary, grad, 2.0 * d)
    return tl.where(known, loss, 0.0), tl.where(known, grad, 0.0)


@triton.jit
def known_labels(Counts_ptr, task, n_tasks, n_pieces, BLOCK_P: tl.constexpr):
    """How many labels of a task there are, at least 1, from the pieces of task_counts_kernel."""
    total = tl.zeros([BLOCK_P], tl.int32)
    for start in range(0, n_pieces, BLOCK_P):
        piece = start + tl.arange(0, BLOCK_P)
        total += tl.load(Counts_ptr + piece * n_tasks + task, mask=piece < n_pieces, other=0)
    return tl.maximum(tl.sum(total, axis=0), 1).to(tl.float32)


@triton.jit
def task_counts_kernel(
    Label_ptr,  # [B, T]
    Counts_ptr,  # [n_pieces, T] int32
    n_rows,
    n_tasks,
    run_rows,
    stride_lb,
    stride_lt,
    BLOCK_B: tl.constexpr,
    EARLY: tl.constexpr,
):
    begin(EARLY)
    task = tl.program_id(0) % n_tasks
    piece = tl.program_id(0) // n_tasks
    first_row = piece.to(tl.int64) * run_rows
    found = tl.zeros([BLOCK_B], tl.int32)
    for start in range(0, tl.minimum(n_rows - first_row, run_rows).to(tl.int32), BLOCK_B):
        row = first_row + start + tl.arange(0, BLOCK_B)
        label = tl.load(Label_ptr + row * stride_lb + task * stride_lt, mask=row < n_rows, other=float("nan"))
        found += (label == label).to(tl.int32)
    tl.store(Counts_ptr + piece * n_tasks + task, tl.sum(found, axis=0))


@triton.jit
def task_losses_kernel(
    Logit_ptr,  # [B, T]
    Label_ptr,  # [B, T]
    Binary_ptr,  # [T] bool
    Factor_ptr,  # [T]
    Counts_ptr,  # [n_pieces, T] int32
    Grad_ptr,  # [B, T] fp32
    Part_ptr,  # [n_pieces, T] fp32
    n_rows,
    n_tasks,
    n_pieces,
    run_rows,
    stride_zb,
    stride_zt,
    stride_lb,
    stride_lt,
    BLOCK_B: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    task = tl.program_id(0) % n_tasks
    piece = tl.program_id(0) // n_tasks
    first_row = piece.to(tl.int64) * run_rows
    binary = tl.load(Binary_ptr + task) != 0
    per_row = 1.0 / known_labels(Counts_ptr, task, n_tasks, n_pieces, BLOCK_P)
    factor = tl.load(Factor_ptr + task) * per_row
    total = tl.zeros([BLOCK_B], tl.float32)
    for start in range(0, tl.minimum(n_rows - first_row, run_rows).to(tl.int32), BLOCK_B):
        row = first_row + start + tl.arange(0, BLOCK_B)
        live = row < n_rows
        z = tl.load(Logit_ptr + row * stride_zb + task * stride_zt, mask=live, other=0.0).to(tl.float32)
        label = tl.load(Label_ptr + row * stride_lb + task * stride_lt, mask=live, other=float("nan"))
        loss, grad = loss_parts(z, label, binary)
        tl.store(Grad_ptr + row * n_tasks + task, grad * factor, mask=live)
        total += loss
    tl.store(Part_ptr + piece * n_tasks + task, tl.sum(total, axis=0) * per_row)


@triton.jit
def task_losses_sum_kernel(Part_ptr, Loss_ptr, n_tasks, n_pieces, BLOCK_P: tl.constexpr):
    task = tl.program_id(0)
    total = tl.zeros([BLOCK_P], tl.float32)
    for start in range(0, n_pieces, BLOCK_P):
        piece = start + tl.arange(0, BLOCK_P)
        total += tl.load(Part_ptr + piece * n_tasks + task, mask=piece < n_pieces, other=0.0)
    tl.store(Loss_ptr + task, tl.sum(total, axis=0))


def empty_counts(labels: Tensor) -> Tensor:
    """For the numbers of labels that are there, ``[n_pieces, T]`` int32, by runs of the batch."""
    n_rows, n_tasks = labels.shape
    n_pieces = cdiv(n_rows, configs.EXPERT_GATE.losses(n_rows).run)
    return torch.empty(n_pieces, n_tasks, dtype=torch.int32, device=labels.device)


def count_labels(labels: Tensor, counts: Tensor) -> None:
    """Write them to ``counts``, see :func:`empty_counts`."""
    n_rows, n_tasks = labels.shape
    config = configs.EXPERT_GATE.losses(n_rows)
    launch(
        task_counts_kernel,
        (len(counts) * n_tasks,),
        config.warps,
        Label_ptr=labels,
        Counts_ptr=counts,
        n_rows=n_rows,
        n_tasks=n_tasks,
        run_rows=config.run,
        stride_lb=labels.stride(0),
        stride_lt=labels.stride(1),
        BLOCK_B=config.block_b,
        EARLY=starts_early(labels.device),
    )


@dataclass(frozen=True)
class TaskLosses:
    """What the towers' last pass needs to make the losses of their logits and go on from the gradient.

    Args:
        labels: ``[B, T]``; NaN where a label is missing.
        is_classification: ``[T]`` bool.
        factors: ``[T]`` fp32, of each loss in the sum.
        bias: ``[T]``, the heads'.
        counts: the labels that are there, see :func:`empty_counts`.
        logits: ``[B, T]`` fp32, written.
    """

    labels: Tensor
    is_classification: Tensor
    factors: Tensor
    bias: Tensor
    counts: Tensor
    logits: Tensor

    def arguments(self) -> dict[str, Any]:
        """What the kernel takes by these names."""
        return {
            "Bias_ptr": self.bias,
            "Label_ptr": self.labels,
            "Binary_ptr": self.is_classification,
            "Factor_ptr": self.factors,
            "Counts_ptr": self.counts,
            "Logit_ptr": self.logits,
            "stride_lb": self.labels.stride(0),
            "stride_le": self.labels.stride(1),
            "n_counts": len(self.counts),
        }


def no_task_losses(any_float: Tensor) -> dict[str, Any]:
    """The same where the logits' gradient is given; ``any_float`` stands in for pointers that are not read."""
    names = ("Bias_ptr", "Label_ptr", "Binary_ptr", "Factor_ptr", "Counts_ptr", "Logit_ptr")
    return {**dict.fromkeys(names, any_float), "stride_lb": 0, "stride_le": 0, "n_counts": 0}


def task_losses(logits: Tensor, labels: Tensor, is_classification: Tensor, factors: Tensor) -> tuple[Tensor, Tensor]:
    """See :func:`fastmtl.backends.native.task_losses`; cross-entropy from the logits, where a probability of fp32
    would have been rounded to 0 or 1."""
    n_rows, n_tasks = logits.shape
    losses = torch.zeros(n_tasks, dtype=torch.float32, device=logits.device)
    grad = torch.empty(n_rows, n_tasks, dtype=torch.float32, device=logits.device)
    if n_rows == 0:
        return losses, grad
    config = configs.EXPERT_GATE.losses(n_rows)
    counts = empty_counts(labels)
    count_labels(labels, counts)
    part = torch.empty(counts.shape, dtype=torch.float32, device=logits.device)
    launch(
        task_losses_kernel,
        (len(counts) * n_tasks,),
        config.warps,
        Logit_ptr=logits,
        Label_ptr=labels,
        Binary_ptr=is_classification,
        Factor_ptr=factors,
        Counts_ptr=counts,
        Grad_ptr=grad,
        Part_ptr=part,
        n_rows=n_rows,
        n_tasks=n_tasks,
        n_pieces=len(counts),
        run_rows=config.run,
        stride_zb=logits.stride(0),
        stride_zt=logits.stride(1),
        stride_lb=labels.stride(0),
        stride_lt=labels.stride(1),
        BLOCK_B=config.block_b,
        BLOCK_P=config.pieces,
    )
    launch(
        task_losses_sum_kernel,
        (n_tasks,),
        config.warps,
        Part_ptr=part,
        Loss_ptr=losses,
        n_tasks=n_tasks,
        n_pieces=len(counts),
        BLOCK_P=config.pieces,
    )
    return losses, grad
