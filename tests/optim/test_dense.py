"""Parameters with dense gradients, in one native pass: torch's numbers, whatever has gradients when."""

import copy
import random

import pytest
import torch
from torch import nn

from fastmtl import optim

from .runs import RULES, assert_same_bits, schedule

STEPS = 60


def make_params(seed, last=100):
    rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    shapes = [(), (1,), (17,), (3, 5), (64, 33), (0, 4), (rng.randint(1, 70), rng.randint(1, 70)), (2, 3, 5), (last,)]
    return [nn.Parameter(torch.randn(shape, generator=generator) * 0.1) for shape in shapes]


def train(optimizer, params, seed, steps):
    """Steps in which a parameter has a gradient or not; the first ones do without the last parameters."""
    rates = [group["lr"] for group in optimizer.param_groups]
    for step in steps:
        generator = torch.Generator().manual_seed(seed + step)
        for i, p in enumerate(params):
            drawn = torch.randn(p.shape, generator=generator) * (0.1 if step % 7 else 1e-4)
            absent = (step < 3 and i > 4) or (step % 11 == 0 and i % 3 == 0)
            p.grad = None if absent else drawn.t().contiguous().t() if p.ndim == 2 else drawn
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * schedule(step)
        optimizer.step()
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate


def groups(params, settings):
    """Two groups with rates of their own."""
    return [{"params": params[:4]}, {"params": params[4:], "lr": settings["lr"] / 3}]


def trained(where, name, seed, steps=STEPS, last=100, **more):
    cls, settings = RULES[name]
    params = make_params(seed, last)
    optimizer = getattr(where, cls)(groups(params, settings), **settings, **more)
    train(optimizer, params, seed, range(steps))
    return params, optimizer


def forbid_torchs_step(monkeypatch, optimizer):
    def refuse(*_):
        raise AssertionError("torch's step was taken")

    for cls in type(optimizer).__mro__:
        if cls.__module__.startswith("torch.optim") and "step" in vars(cls):
            monkeypatch.setattr(cls, "step", refuse)


@pytest.mark.usefixtures("correct_roots")
@pytest.mark.parametrize("name", RULES)
def test_the_bits_are_torchs(name, seed):
    params, ours = trained(optim, name, seed)
    right, theirs = trained(torch.optim, name, seed, foreach=False)
    assert_same_bits(params, right)
    for p, q in zip(params, right, strict=True):
        for key, value in theirs.state[q].items():
            assert value is None or torch.equal(ours.state[p][key], value), key


@pytest.mark.parametrize("name", RULES)
def test_torchs_own_step_is_not_taken(name, seed, monkeypatch):
    cls, settings = RULES[name]
    params = make_params(seed)
    ours = getattr(optim, cls)(params, **settings)
    before = [p.detach().clone() for p in params]
    forbid_torchs_step(monkeypatch, ours)
    for p in params:
        p.grad = torch.ones_like(p)
    versions = [p._version for p in params]
    ours.step()
    for p, was, version in zip(params, before, versions, strict=True):
        assert p.numel() == 0 or not torch.equal(p, was)
        assert p._version > version  # a graph that saved it notices


@pytest.mark.usefixtures("correct_roots")
@pytest.mark.parametrize("name", RULES)
def test_checkpoints_go_both_ways(name, seed):
    cls, settings = RULES[name]
    straight, _ = trained(torch.optim, name, seed, 2 * STEPS, foreach=False)
    for one, other in ((optim, torch.optim), (torch.optim, optim)):
        params, first = trained(one, name, seed)
        continued = [nn.Parameter(p.detach().clone()) for p in params]
        second = getattr(other, cls)(groups(continued, settings), **settings, foreach=None)
        second.load_state_dict(copy.deepcopy(first.state_dict()))
        train(second, continued, seed, range(STEPS, 2 * STEPS))
        assert_same_bits(continued, straight)


def test_the_number_of_threads_changes_nothing(seed, threads):
    results = []
    for n in (1, 2, 3):
        threads(n)
        results.append(trained(optim, "adam with decay", seed, 10, last=200_000)[0])
    for other in results[1:]:
        assert_same_bits(results[0], other)


@pytest.mark.usefixtures("correct_roots")
def test_states_and_counters_that_others_change_are_followed(seed):
    params, ours = trained(optim, "adam", seed, 10)
    right, theirs = trained(torch.optim, "adam", seed, 10, foreach=False)
    for optimizer, mine in ((ours, params), (theirs, right)):
        optimizer.state[mine[0]]["step"].fill_(3)
        optimizer.state[mine[4]]["exp_avg"] = torch.zeros(33, 64).t()
        del optimizer.state[mine[6]]
        train(optimizer, mine, seed, range(10, 20))
    assert_same_bits(params, right)
    assert float(ours.state[params[0]]["step"]) == float(theirs.state[right[0]]["step"])


@pytest.mark.parametrize("more", [{"fused": True}, {"foreach": True}])
def test_who_asks_for_torchs_fused_step_gets_it(more, seed, monkeypatch):
    params = make_params(seed)
    ours = optim.Adam(params, **more)
    forbid_torchs_step(monkeypatch, ours)
    params[2].grad = torch.ones(17)
    with pytest.raises(AssertionError, match="torch's step was taken"):
        ours.step()


def test_other_parameters_take_torchs_step(seed):
    """Doubles, sparse gradients of parameters that are no tables, other memory formats."""
    results = []
    for where, more in ((optim, {}), (torch.optim, {"foreach": False})):
        generator = torch.Generator().manual_seed(seed)
        double = nn.Parameter(torch.randn(5, generator=generator).double())
        strided = nn.Parameter(torch.randn(2, 3, 4, 5, generator=generator).to(memory_format=torch.channels_last))
        rows = nn.Parameter(torch.randn(6, 2, generator=generator))
        optimizer = where.SGD([double, strided, rows], lr=0.1, momentum=0.9, **more)
        for _ in range(3):
            double.grad, strided.grad = double.detach() * 2, strided.detach() * 2
            rows.grad = torch.eye(6, 2).to_sparse()
            optimizer.step()
        results.append([double, strided, rows])
    for p, q in zip(*results, strict=True):
        torch.testing.assert_close(p, q)


def test_a_closure_and_no_gradients(seed):
    p = nn.Parameter(torch.ones(3))
    ours = optim.Adam([p], lr=0.5)
    ours.step()
    assert torch.equal(p, torch.ones(3))

    def closure():
        ours.zero_grad()
        loss = (p**2).sum()
        loss.backward()
        return loss

    assert float(ours.step(closure).detach()) == 3
    torch.testing.assert_close(p.detach(), torch.full((3,), 0.5))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"grads": [torch.zeros(3)]}, "a gradient must be"),
        ({"states": [torch.zeros(4)]}, "each parameter must have"),
        ({"states": [torch.zeros(4), torch.zeros(4).double()]}, "a state must be"),
        ({"counters": [torch.zeros(2)]}, "a counter must be"),
        ({"rule": 17}, "no rule 17"),
        ({"numbers": [0.0]}, "a step has"),
    ],
)
def test_malformed_calls_are_refused(change, message):
    call = {
        "params": [torch.zeros(4)], "grads": [torch.zeros(4)], "states": [torch.zeros(4), torch.zeros(4)],
        "counters": [torch.zeros(())], "rule": 3, "numbers": [0.0] * 9, "number": 1.0,
    }  # fmt: skip
    assert torch.ops.fastmtl.dense_step(**call)
    with pytest.raises(RuntimeError, match=message):
        torch.ops.fastmtl.dense_step(**(call | change))
