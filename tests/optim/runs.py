"""Training runs of tables by made-up gradients: rows touched every step, rarely, once, never."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastmtl import optim

#: name -> (class in torch.optim and fastmtl.optim, settings). In float32 too ``1 - lr * weight_decay`` and the like are
#: what they are in float64: else AdamW's shrinking alone would be off by 1e-5 after 2,000 steps, in torch as well.
RULES: dict[str, tuple[str, dict[str, Any]]] = {
    "adam with decay": ("Adam", {"lr": 1e-3, "weight_decay": 1e-3}),
    "adam": ("Adam", {"lr": 2**-7, "betas": (0.75, 1 - 2**-7), "eps": 1e-6}),
    "adamw": ("AdamW", {"lr": 2**-10, "betas": (0.875, 1 - 2**-10), "weight_decay": 2**-7}),
    "adamw, slow": ("AdamW", {"lr": 1e-3, "betas": (0.99, 0.999), "weight_decay": 1e-2}),
    "sgd": ("SGD", {"lr": 0.1}),
    "sgd with decay": ("SGD", {"lr": 0.1, "weight_decay": 1e-3}),
    "momentum": ("SGD", {"lr": 0.05, "momentum": 0.9, "dampening": 0.1, "weight_decay": 1e-3}),
    "nesterov": ("SGD", {"lr": 0.05, "momentum": 0.9, "nesterov": True}),
    "adagrad": ("Adagrad", {"lr": 0.1, "lr_decay": 1e-3}),
    "adagrad with decay": ("Adagrad", {"lr": 0.1, "weight_decay": 1e-3, "initial_accumulator_value": 0.1}),
}
#: Those whose missed steps are summed up in closed form; all others have torch's bits.
SUMMED = ("adam", "adamw")
REPLAYED = tuple(name for name in RULES if name not in SUMMED)
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
    """What the learning rate is multiplied by: a warm-up, then a slow fall, with jumps, in 64ths."""
    factor = min(1.0, (step + 1) / 50) * 0.999**step * (0.5 if step % 300 > 250 else 1.0)
    return max(1, round(64 * factor)) / 64


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
            table.grad[rows] = values.to(table.dtype)
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


def distances(one: Sequence[Tensor], other: Sequence[Tensor], peaks: Sequence[Tensor]) -> list[Tensor]:
    """``[V]`` for each table: a row's largest difference, by the largest number that the row held along the way: the
    present one may just cross zero."""
    found = [
        peak_of(p.detach().double() - q.detach().double()) / peak for p, q, peak in zip(one, other, peaks, strict=True)
    ]
    return [row.nan_to_num(posinf=float("inf"))[:, 0] for row in found]


def assert_close(
    one: Sequence[Tensor], other: Sequence[Tensor], peaks: Sequence[Tensor], tolerance: float = 1e-6
) -> None:
    """No row further apart than this, see :func:`distances`."""
    for table in distances(one, other, peaks):
        assert float(table.max()) <= tolerance


def assert_follows(name: str, one: Sequence[Tensor], torchs: Sequence[Tensor], peaks: Sequence[Tensor]) -> None:
    """A rule's bits where it has torch's; else within what 300 steps, each rounded by up to 2^-24, come to."""
    if name in SUMMED:
        assert_close(one, torchs, peaks, 3e-5)
    else:
        assert_same_bits(one, torchs)
