"""Every build of the kernels computes the same bits, and so does every way through them, whatever the numbers."""

import os
import random
import subprocess
import sys

import pytest
import torch

from fastmtl.optim.rules import FIELDS, RULES

from .test_closed_form import close, steps_of

SETS = ["baseline", "avx2", "avx512"]


def wild(shape, generator):
    """Numbers of every kind: ordinary ones mostly, rows of tiny ones, and single zeros, infinities and the like."""
    rows = shape[0]
    numbers = torch.randn(shape, generator=generator) * 10 ** (-6 * torch.rand(rows, 1, generator=generator))
    numbers[: rows // 8] *= 10 ** (-35 * torch.rand(rows // 8, 1, generator=generator))
    rare = torch.tensor([0.0, -0.0, 1e-45, 1.2e-38, 1e-30, 1e-19, 1e19, 3e38, float("inf"), float("nan")])
    chosen = torch.randint(0, len(rare), shape, generator=generator)
    return torch.where(torch.rand(shape, generator=generator) < 1e-3, rare[chosen], numbers)


def replayed(rule, seed, rows, dim, steps):
    """Weight and states after rows of unequal lags were made current."""
    generator = torch.Generator().manual_seed(seed)
    p, first, second = (wild((rows, dim), generator) for _ in range(3))
    return taken(rule, generator, p, first, second.square(), steps)


def taken(rule, generator, p, first, second, steps):
    """Replayed from random steps on."""
    rows = len(p)
    last = torch.randint(0, steps, (rows,), generator=generator).int()
    numbers = []
    for number in range(1, steps + 1):
        step = dict.fromkeys(FIELDS, 0.0) | {"shrink": 1.0, "keep": 0.999, "fresh": 1 - 0.9, "fresh_square": 1 - 0.999}
        step |= {"eps": 1e-8, "root": (1 - 0.999**number) ** 0.5, "neg_lr": -1e-3 / (1 - 0.9**number)}
        step |= {"l2": 1e-5 if number % 5 or steps % 2 else 0.0} if rule == "adam" else {"shrink": 1 - 1e-5}
        numbers.append([step[field] for field in FIELDS])
    torch.ops.fastmtl.table_replay(
        p, [first, second], last, RULES.index(rule), torch.tensor(numbers), 1, None, 0, rows, steps
    )
    assert (last == steps).all()
    return torch.stack([p, first, second]).nan_to_num(nan=7.0)  # the bits of NaNs are nobody's


def faded(rule, seed, rows, dim, steps):
    """The same of rows that had no gradient for hundreds of steps: from 1e-15 down to what is taken for nothing."""
    generator = torch.Generator().manual_seed(seed)
    size = 10 ** (-15 - 20 * torch.rand(rows, 1, generator=generator))
    single = torch.rand(rows, dim, generator=generator) < 0.02 * torch.rand(rows, 1, generator=generator)
    p, first = (torch.randn(rows, dim, generator=generator) * size for _ in range(2))
    first = torch.where(torch.rand(rows, 1, generator=generator) < 0.5, p * 1e-5, first * 1e-5)
    p[single], first[single.flip(0)] = wild((rows, dim), generator)[single], 0.0
    second = (first * 30).square() + 10 ** (-20 - 30 * torch.rand(rows, 1, generator=generator))
    return taken(rule, generator, p, first, second, steps)


def summed(rule, seed, rows, dim, steps):
    """The same, the missed steps summed up."""
    generator = torch.Generator().manual_seed(seed)
    p, first, second = (wild((rows, dim), generator) for _ in range(3))
    second = second.square()
    last = torch.randint(0, steps, (rows,), generator=generator).int()
    close(rule, p, first, second, last, steps_of(random.Random(seed), rule, steps))
    return torch.stack([p, first, second]).nan_to_num(nan=7.0)


def digests(seed):
    """One line for each rule and width; the signs of zeros count."""
    lines = []
    for rule in ("adam", "adamw"):
        for rows, dim in ((30_000, 16), (5000, 5), (500, 100)):
            for way, steps in ((replayed, 12), (faded, 12), (faded, 13), (summed, 50)):
                found = way(rule, seed, rows, dim, steps).view(torch.int32).long()
                weights = torch.arange(1, found.numel() + 1).view(found.shape) * 0x9E3779B1
                lines.append(f"{way.__name__} {rule} {rows} {dim} {int((found * weights).sum())}")
    return "\n".join(lines)


def test_every_build_computes_the_same_bits(seed):
    """The quick steps of AVX-512, for slow dividers, divide by multiplications; elsewhere the processor does."""
    mine = digests(seed)
    code = f"import fastmtl; from tests.optim.test_instruction_sets import digests; print(digests({seed}))"
    best = torch.ops.fastmtl.isa.default()
    others = [{"FASTMTL_ISA": isa} for isa in SETS if isa != best]
    for way in [*others, {"FASTMTL_DIVIDER": "slow"}, {"FASTMTL_DIVIDER": "fast"}]:
        done = subprocess.run([sys.executable, "-c", code], env=os.environ | way, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert done.stdout.strip() == mine, way


@pytest.mark.parametrize("rule", ["adam", "adamw"])
def test_the_quick_steps_are_those_of_the_single_operations(rule, seed):
    """Against numpy, one operation after the other, each rounded: ordinary numbers, so that no flush is involved."""
    generator = torch.Generator().manual_seed(seed)
    rows, dim, steps = 2000, 16, 20
    p, m = (torch.randn(rows, dim, generator=generator) for _ in range(2))
    v = torch.randn(rows, dim, generator=generator).square()
    weights = [x.clone() for x in (p, m, v)]
    numbers = torch.zeros(steps, len(FIELDS))
    for number in range(1, steps + 1):
        step = {"l2": 1e-2 if rule == "adam" else 0.0, "shrink": 1.0 if rule == "adam" else 1 - 1e-3, "keep": 0.99}
        step |= {"fresh": 0.1, "fresh_square": 0.01, "ahead": 0.0, "root": (1 - 0.99**number) ** 0.5, "eps": 1e-3}
        step |= {"neg_lr": -0.1 / number}
        numbers[number - 1] = torch.tensor([step[field] for field in FIELDS])
    last = torch.zeros(rows, dtype=torch.int32)
    torch.ops.fastmtl.table_replay(p, [m, v], last, RULES.index(rule), numbers, 1, None, 0, rows, steps)

    def fma(a, b, c):  # a product of two floats is a double without rounding, and so, nearly, is the sum
        return (a.double() * b.double() + c.double()).float()

    q, first, second = weights
    for l2, shrink, keep, fresh, fresh_square, _, root, eps, neg_lr in numbers:
        g = q * l2
        if rule == "adamw":
            q = q * shrink
        first = fma(fresh, g - first, first)
        second = fma(fresh_square * g, g, second * keep)
        sizes = second.double().sqrt().float()
        q = q + neg_lr * first / (sizes / root + eps)
    for mine, right in ((p, q), (m, first), (v, second)):
        # rounded twice where the double lies half-way between two floats: once in 2^29
        assert int((mine != right).sum()) <= 3
        torch.testing.assert_close(mine, right, rtol=1e-5, atol=1e-6)
