"""The scores of fastmtl.basic.metric where predictions and labels are, without a copy of them to the host."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from .metric import auc, warn_undefined

#: What is summed for each task: twice the number of (positive, negative) pairs in order, a tie counting half;
#: positives, negatives, labels that are neither, predictions that are NaN; cross-entropies, squared errors.
SUMS = ("pairs", "positive", "negative", "other", "lost", "entropy", "square")


class Scores(NamedTuple):
    """Of one task, NaN where undefined."""

    auc: float
    log_loss: float
    mean_squared_error: float


def task_scores(labels: Tensor, predictions: Tensor, kinds: list[str], names: list[str]) -> list[Scores]:
    """The scores of each task over the rows that have its label.

    The AUC is exact: pairs are counted in whole numbers, ties by halves, as scikit-learn's is. Waits for the device
    once.

    Args:
        labels: ``[N, T]``; NaN where unknown.
        predictions: ``[N, T]``.
        kinds: ``"classification"`` or ``"regression"`` of each task; a regression's AUC and log-loss are NaN.
        names: of the tasks, for the warning where an AUC is undefined.
    """
    sums = torch.stack(
        [_sums(y, p, kind == "classification") for y, p, kind in zip(labels.T, predictions.T, kinds, strict=True)]
    ).tolist()
    scores = []
    for task, (kind, name) in enumerate(zip(kinds, names, strict=True)):
        pairs, positive, negative, other, lost, entropy, square = sums[task]
        known = positive + negative + other
        if not known:
            entropy = square = math.nan
        mean_entropy, mean_square = entropy / max(known, 1), square / max(known, 1)
        if kind == "regression":
            area = mean_entropy = math.nan
        elif other:  # not 0 or 1: scikit-learn says what it thinks of that
            area = auc(labels[:, task].cpu().numpy(), predictions[:, task].cpu().numpy(), name)
        else:
            area = _area(pairs, positive, negative, lost, name)
        scores.append(Scores(area, mean_entropy, mean_square))
    return scores


def _area(pairs: float, positive: float, negative: float, lost: float, name: str) -> float:
    if not (positive and negative):
        found = f"only the class {float(positive > 0):g}" if positive or negative else "no labels"
        warn_undefined(name, f"{found} among {int(positive + negative)} rows")
        return math.nan
    if lost:
        warn_undefined(name, "some predictions are NaN")
        return math.nan
    return pairs / (2 * positive * negative)


def _sums(labels: Tensor, predictions: Tensor, is_classification: bool) -> Tensor:
    """``[7]`` float64, :data:`SUMS` of one task."""
    known = ~torch.isnan(labels)
    y, p = torch.where(known, labels, 0).double(), predictions.double()
    square = torch.where(known, (y - p).square(), 0).sum()
    if not is_classification:
        zero = torch.zeros_like(square)
        return torch.stack([zero, known.sum().double(), zero, zero, zero, zero, square])
    clipped = p.clamp(1e-15, 1 - 1e-15)
    entropy = torch.where(known, -(y * clipped.log() + (1 - y) * torch.log1p(-clipped)), 0).sum()
    positive, negative = known & (y == 1), known & (y == 0)
    n_negative = negative.sum()
    # the negatives' predictions in order, in front of as many infinities as there are other rows
    lower = torch.where(negative, predictions, torch.inf).sort().values
    # NaN predictions sort behind all and are told apart below
    below = torch.searchsorted(lower, predictions.contiguous(), right=False).minimum(n_negative)
    up_to = torch.searchsorted(lower, predictions.contiguous(), right=True).minimum(n_negative)
    pairs = torch.where(positive, below + up_to, 0).sum()
    lost = (known & torch.isnan(predictions)).sum()
    counts = [pairs, positive.sum(), n_negative, (known & ~positive & ~negative).sum(), lost]
    return torch.stack([*(count.double() for count in counts), entropy, square])
