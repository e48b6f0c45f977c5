"""The papers' update rules, written out tensor by tensor on a torch-rechub model: what our strategies must reproduce.

Plain SGD throughout, so that one step's arithmetic is visible in the weights.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from parity.compare import task_losses
from torch import Tensor, nn

Batch = tuple[dict[str, Tensor], Tensor]


def losses(model: nn.Module, batch: Batch, task_types: tuple[str, ...]) -> list[Tensor]:
    """Each task's loss on the batch, in training mode."""
    return task_losses(task_types, model.train()(batch[0]), batch[1])


def _descend(parameters: Iterable[Tensor], gradients: Iterable[Tensor | None], lr: float) -> None:
    with torch.no_grad():
        for parameter, gradient in zip(parameters, gradients, strict=True):
            if gradient is not None:
                parameter -= lr * gradient


def gradnorm(
    model: nn.Module, shared: Tensor, batches: list[Batch], task_types: tuple[str, ...], alpha: float, lr: float
) -> list[Tensor]:
    """GradNorm, ICML'18, algorithm 1: returns the task weights after each step; ``model`` is trained in place.

    Args:
        shared: W, the weights of the last shared layer.
    """
    weights = torch.ones(len(task_types), requires_grad=True)
    parameters = list(model.parameters())
    first, history = None, []
    for batch in batches:
        by_task = losses(model, batch, task_types)
        first = [loss.item() for loss in by_task] if first is None else first
        total = sum(w * loss for w, loss in zip(weights, by_task, strict=True))
        update = torch.autograd.grad(total, parameters, retain_graph=True, allow_unused=True)
        norms = torch.stack(
            [torch.autograd.grad(loss, shared, retain_graph=True)[0].norm() for loss in by_task]
        ).detach()
        ratio = torch.tensor([loss.item() / start for loss, start in zip(by_task, first, strict=True)])
        target = (weights.detach() * norms).mean() * (ratio / ratio.mean()) ** alpha
        (for_weights,) = torch.autograd.grad((weights * norms - target).abs().sum(), weights)
        _descend(parameters, update, lr)
        with torch.no_grad():
            weights -= lr * for_weights
            weights *= len(task_types) / weights.sum()
        history.append(weights.detach().clone())
    return history


def metabalance(
    model: nn.Module,
    shared: list[Tensor],
    batches: list[Batch],
    task_types: tuple[str, ...],
    relax_factor: float,
    beta: float,
    lr: float,
) -> None:
    """MetaBalance, WWW'22, algorithm 1 (task 0 is the target), tensor by tensor; ``model`` is trained in place."""
    parameters = list(model.parameters())
    is_shared = [any(parameter is one for one in shared) for parameter in parameters]
    averages = torch.zeros(len(parameters), len(task_types))
    for batch in batches:
        by_task = [
            torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
            for loss in losses(model, batch, task_types)
        ]
        update: list[Tensor] = []
        for p, parameter in enumerate(parameters):
            total = torch.zeros_like(parameter)
            for task, gradients in enumerate(by_task):
                gradient = torch.zeros_like(parameter) if gradients[p] is None else gradients[p]
                if is_shared[p]:
                    averages[p, task] = beta * averages[p, task] + (1 - beta) * gradient.norm()
                    if task > 0 and averages[p, task] > 0:
                        scaled = gradient * averages[p, 0] / averages[p, task]
                        gradient = relax_factor * scaled + (1 - relax_factor) * gradient
                total += gradient
            update.append(total)
        _descend(parameters, update, lr)


def uwl(model: nn.Module, batches: list[Batch], task_types: tuple[str, ...], lr: float) -> Tensor:
    """Kendall et al., CVPR'18, twice its objective: minimises ``sum c exp(-s) L + s`` over ``s = log sigma^2`` too.

    c is 2 for a cross-entropy (their eq. 10) and 1 for a squared error (eq. 7); returns s.
    """
    log_variance = torch.zeros(len(task_types), requires_grad=True)
    parameters = [*model.parameters(), log_variance]
    factors = [2.0 if task_type == "classification" else 1.0 for task_type in task_types]
    for batch in batches:
        by_task = losses(model, batch, task_types)
        total = sum(c * torch.exp(-s) * loss + s for c, s, loss in zip(factors, log_variance, by_task, strict=True))
        _descend(parameters, torch.autograd.grad(total, parameters, allow_unused=True), lr)
    return log_variance.detach()
