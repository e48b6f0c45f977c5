"""Training runs of tables by made-up gradients: rows touched every step, rarely, once, never."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastmtl import optim

#: name -> (class in torch.optim and fastmtl.optim, settings)
RULES: dict[str, tuple[str, dict[str, Any]]] = {
    "adam with decay": ("Adam", {"lr": 1e-3, "weight_decay": 1e-3}),
    "adam": ("Adam", {"lr": 1e-2, "betas": (0.8, 0.99), "eps": 1e-6}),
    "adamw": ("AdamW", {"lr": 1e-3, "weight_decay": 1e-2}),
    "sgd": ("SGD", {"lr": 0.1}),
    "sgd with decay": ("SGD", {"lr": 0.1, "weight_decay": 1e-3}),
    "momentum": ("SGD", {"lr": 0.05, "momentum": 0.9, "dampening": 0.1, "weight_decay": 1e-3}),
    "nesterov": ("SGD", {"lr": 0.05, "momentum": 0.9, "nesterov": True}),
    "adagrad": ("Adagrad", {"lr": 0.1, "lr_decay": 1e-3}),
    "adagrad with decay": ("Adagrad", {"lr": 0.1, "weight_decay": 1e-3, "initial_accumulator_value": 0.1}),
}
#: Rows of the run's tables by how often they get a gradient.
ALWAYS, ONCE, NEVER = 0, 1, 2


def make_tables(seed: int, shapes: Sequence[tuple[int, int]]) -> list[nn.Parameter]:
    """Tables of rather small numbers; the row NEVER of each has zeros too, as a padding row."""
    generator = torch.Generator().manual_seed(seed)
    tables = [torch.randn(shape, generator=generator) * 0.1 for shape in shapes]
    for table in tables:
        table[NEVER, ::2] = 0
    return [nn.Parameter(table) for table in tables]


class Gradients:
    """The gradients of each step, the same for all who ask."""

    def __init__(self, seed: int, shapes: Sequence[tuple[int, int]]) -> None:
        self.seed, self.shapes = seed, shapes

    def at(self, step: int, table: int) -> tuple[Tensor, Tensor]:
        """``(rows, values)``: ALWAYS in every step, ONCE in step 5, the rest now and then, NEVER never."""
        rows, dim = self.shapes[table]
        generator = torch.Generator().manual_seed(self.seed + 1000 * step + table)
        touched = torch.rand(rows, generator=generator) < 0.03 * torch.linspace(0, 1, rows)
        touched[ALWAYS], touched[ONCE], touched[NEVER] = True, step == 5, False
        at = touched.nonzero()[:, 0]
        return at, torch.randn(len(at), dim, generator=generator) * (0.1 if step % 7 else 1e-4)


def schedule(step: int) -> float:
    """What the learning rate is multiplied by: a warm-up, then a slow fall, with jumps."""
    return min(1.0, (step + 1) / 50) * 0.999**step * (0.5 if step % 300 > 250 else 1.0)


def train_sparsely(
    optimizer: optim.TableOptimizer,
    tables: Sequence[nn.Parameter],
    gradients: Gradients,
    steps: range,
    before_step: Callable[[int], None] | None = None,
) -> None:
    """Steps with sparse gradients; the rows are read, as a forward would, before each."""
    rate = optimizer.defaults["lr"]
    for step in steps:
        for number, table in enumerate(tables):
            rows, values = gradients.at(step, number)
            optimizer.catch_up(table, rows)
            table.grad = torch.sparse_coo_tensor(rows[None], values, table.shape, check_invariants=False)
        for group in optimizer.param_groups:
            group["lr"] = rate * schedule(step)
        if before_step is not None:
            before_step(step)
        optimizer.step()


def train_densely(
    optimizer: torch.optim.Optimizer, tables: Sequence[nn.Parameter], gradients: Gradients, steps: range
) -> list[Tensor]:
    """The same with dense gradients; returns each row's largest number along the way, ``[V, 1]`` a table."""
    rate = optimizer.defaults["lr"]
    peaks = [peak_of(table) for table in tables]
    for step in steps:
        for number, table in enumerate(tables):
            rows, values = gradients.at(step, number)
            table.grad = torch.zeros_like(table)
            table.grad[rows] = values
        for group in optimizer.param_groups:
            group["lr"] = rate * schedule(step)
        optimizer.step()
        peaks = [torch.maximum(peak, peak_of(table)) for peak, table in zip(peaks, tables, strict=True)]
    return peaks


def peak_of(table: Tensor) -> Tensor:
    """``[V, 1]``: the largest size in each row."""
    return table.detach().abs().amax(dim=1, keepdim=True)


def assert_same_bits(one: Sequence[Tensor], other: Sequence[Tensor]) -> None:
    """Equal, number by number."""
    for p, q in zip(one, other, strict=True):
        torch.testing.assert_close(p.detach(), q.detach(), rtol=0, atol=0, equal_nan=True)


def assert_close(one: Sequence[Tensor], other: Sequence[Tensor], peaks: Sequence[Tensor]) -> None:
    """Within 1e-6 of the largest number that the row held along the way: the present one may just cross zero."""
    for p, q, peak in zip(one, other, peaks, strict=True):
        difference = (p.detach() - q.detach()).abs()
        assert (difference <= 1e-6 * peak).all(), f"off by {float((difference / peak).nan_to_num().max()):.1e}"
