"""expert_gate on native against eager: as near to float64 as eager is, on any layer, in any layout."""

import math
import os
import random

import pytest
import torch
from torch import Tensor

from fastmtl.backend import use_backend
from fastmtl.ops import expert_gate
from fastmtl.spec import ACTIVATIONS, ExpertGateSpec, Gate

from .accuracy import judge, moved, moved_params
from .layers import Case, new_params, random_case, random_spec, run

CASES = 60 if os.environ.get("FASTMTL_ISA") else 240


def check(case: Case, seed: int) -> list[float]:
    """The rule of accuracy.py for one layer; returns log(native's error / eager's), a number a tensor."""

    def on(backend: str, dtype: torch.dtype, bits: torch.Generator | None) -> tuple[list[Tensor], list[Tensor]]:
        params = moved_params(case.params, case.spec, bits)
        return run(Case(case.spec, params, moved(case.x, bits), case.grad, case.training), backend, dtype).parts()

    return judge(on, f"training {case.training}, {case.x.shape[1]} rows, {case.spec}", seed)[0]


def test_random_layers(base_seed):
    ratios = []
    for i in range(CASES):
        ratios += check(random_case(base_seed + i), base_seed + i)
    assert math.exp(sum(ratios) / len(ratios)) < 1.1, "native is less accurate than eager on average"


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("training", [True, False])
def test_every_activation_through_two_layers(activation, training, base_seed):
    spec = ExpertGateSpec(24, (0, 0, 0), (20, 16), activation=activation, gates=(Gate(0, (0, 1, 2)), Gate(0, (0, 2))))
    case = random_case(base_seed, spec, 150)
    case.training = training
    check(case, base_seed)


def test_large_mean_and_small_spread(base_seed):
    """Statistics about a far mean: E[z^2] - E[z]^2 would lose everything here."""
    case = random_case(base_seed, ExpertGateSpec(6, (0, 0), (16,), activation="linear"), 500)
    case.x = 300 + case.x / case.x.std()
    case.training = True
    check(case, base_seed)


@pytest.mark.parametrize("training", [True, False])
def test_bias_in_front_of_batch_norm(training, base_seed):
    """In training its true gradient is zero, and is given as exactly that; the running mean still contains it."""
    spec = ExpertGateSpec(9, (0, 0), (8, 4), gates=(Gate(0, (0, 1)),))
    case = random_case(base_seed, spec, 60)
    case.training = training
    result = run(case, "native")
    biases = [*result.gradients[2:4], result.gradients[-3]]
    assert all(bool((g == 0).all()) is training for g in biases)


def test_one_row_uses_and_keeps_the_running_statistics(base_seed):
    case = random_case(base_seed, ExpertGateSpec(9, (0, 0), (8,), gates=(Gate(0, (0, 1)),)), 1)
    case.training = True
    result = run(case, "native")
    for now, before in zip(result.running, case.params.running(), strict=True):
        assert torch.equal(now, before)
    check(case, base_seed)


@pytest.mark.parametrize("training", [True, False])
def test_no_rows(training, base_seed):
    for i in range(20):
        spec = random_spec(random.Random(base_seed + i))
        case = random_case(base_seed + i, spec, 0)
        case.training = training
        result, reference = run(case, "native"), run(case, "eager")
        assert result.out.shape == reference.out.shape
        assert result.dx.shape == case.x.shape
        assert all(bool((g == 0).all()) for g in result.gradients)
        for now, before in zip(result.running, case.params.running(), strict=True):
            assert torch.equal(now, before)


def test_several_backwards_over_one_graph(base_seed):
    for i in range(10):
        case = random_case(base_seed + i)
        params = case.copy_params()
        x = case.x.detach().requires_grad_()
        with use_backend("native"):
            out = expert_gate(x, params, case.spec, case.training)
        kept = out.detach().clone()
        leaves = [x, *params.learned()]
        first = torch.autograd.grad(out, leaves, case.grad, retain_graph=True, allow_unused=True)
        other = torch.autograd.grad(out, leaves, 2 * case.grad, retain_graph=True, allow_unused=True)
        again = torch.autograd.grad(out, leaves, case.grad, allow_unused=True)
        assert torch.equal(out, kept)
        for a, b, c in zip(first, again, other, strict=True):
            assert torch.equal(a, b)
            # doubling is exact, but numbers below the smallest normal one are rounded at places of their own
            torch.testing.assert_close(2 * a, c, rtol=0, atol=1e-37)


def test_forward_leaves_its_arguments_alone(base_seed):
    for i in range(10):
        case = random_case(base_seed + i)
        x, grad = case.x.clone(), case.grad.clone()
        params = case.copy_params()
        before = [p.detach().clone() for p in params.learned()]
        with use_backend("native"):
            xs = x.requires_grad_()
            expert_gate(xs, params, case.spec, case.training).backward(grad)
        assert torch.equal(x, case.x)
        assert torch.equal(grad, case.grad)
        assert all(torch.equal(a, b) for a, b in zip(before, params.learned(), strict=True))


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("training", [True, False])
def test_equal_rows_give_equal_results(training, bf16, base_seed):
    """Wherever in the batch they lie: what is the same in all rows has a variance of 0, and the next normalisation
    blows a difference in the last bit up three hundred times."""
    rng = random.Random(base_seed)
    for i in range(20):
        case = random_case(base_seed + i, batch=rng.randint(2, 700))
        with use_backend("native"), torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            x = case.x[:, :1].expand_as(case.x).contiguous()
            out = expert_gate(x, case.params, case.spec, training)
        rows = out if out.ndim == 2 else out.transpose(0, 1)  # [B, E] with an output layer, else [G or E, B, H]
        assert torch.equal(rows, rows[:1].expand_as(rows)), f"{case.spec}, {case.x.shape[1]} rows"


def test_gradient_that_autograd_expands(base_seed):
    """out.sum() sends back a gradient of stride 0."""
    case = random_case(base_seed, ExpertGateSpec(9, (0, 0), (8,), gates=(Gate(0, (0, 1)),)), 40)
    case.grad = torch.ones(()).expand(case.grad.shape)
    check(case, base_seed)


def test_nan_stays_visible(base_seed):
    for activation in ACTIVATIONS:
        spec = ExpertGateSpec(4, (0,), (5,), activation=activation)
        params = new_params(spec, torch.Generator().manual_seed(base_seed))
        x = torch.ones(1, 3, 4)
        x[0, 1, 2] = float("nan")
        with use_backend("native"), torch.no_grad():
            out = expert_gate(x, params, spec, False)
        assert out[0, 1].isnan().all(), activation
        assert not out[0, [0, 2]].isnan().any(), activation
