"""The dense parameters' step against torch's optimizers: in float64, and bit for bit against single tensors in fp32."""

import copy

import numpy as np
import pytest
import torch

from fastmtl import backend as backends
from fastmtl import optim
from fastmtl.backends.triton import configs
from fastmtl.trainers import dense_steps, device_optimizer

#: torch's class, ours, the CPU's, and settings; rates are numbers of fp32, as the device has them.
RATE = float(np.float32(0.013))
CASES = {
    "adam": ("Adam", {"betas": (0.85, 0.97)}),
    "adam with decay": ("Adam", {"weight_decay": 0.02, "eps": 1e-6}),
    "adamw": ("AdamW", {"weight_decay": 0.3}),
    "sgd": ("SGD", {"weight_decay": 0.05}),
    "momentum": ("SGD", {"momentum": 0.9, "dampening": 0.3}),
    "nesterov": ("SGD", {"momentum": 0.8, "nesterov": True, "weight_decay": 0.01}),
    "adagrad": ("Adagrad", {"lr_decay": 0.01, "weight_decay": 0.02, "initial_accumulator_value": 0.1}),
}


@pytest.fixture(autouse=True)
def smaller_blocks(small_blocks, device, monkeypatch):
    """On the interpreter: the few tensors here have blocks of fewer elements than a model's many."""
    if device.type == "cpu":
        monkeypatch.setattr(configs, "DENSE_STEP", configs.Elements(16, configs.DENSE_STEP.warps))


def random_params(rng, n=None):
    """Matrices, vectors and single numbers, some of many blocks, some of less than one."""
    shapes = [(), (1,), (16,), (17, 5), (3, 4, 2)]
    shapes += [tuple(rng.integers(1, 9, rng.integers(1, 3))) for _ in range(rng.integers(1, 4) if n is None else n)]
    return [torch.tensor(rng.standard_normal(shape), dtype=torch.float32) for shape in shapes]


def parameters(values, device, dtype=torch.float32):
    return [torch.nn.Parameter(value.to(device, dtype, copy=True)) for value in values]


def give(params, grads):
    for p, grad in zip(params, grads, strict=True):
        p.grad = None if grad is None else grad.to(p.device, p.dtype)


def watched(monkeypatch):
    """Whether steps were ours."""
    taken, take = [], dense_steps.take

    def noting(*arguments):
        taken.append(take(*arguments))
        return taken[-1]

    monkeypatch.setattr(dense_steps, "take", noting)
    return taken


@pytest.mark.parametrize("case", CASES)
def test_many_steps_are_torchs(case, seed, device, triton_backend, monkeypatch):
    """The rate changes on the way; some parameters have no gradient in some steps; two groups."""
    name, settings = CASES[case]
    rng = np.random.default_rng(seed)
    values = random_params(rng)
    taken = watched(monkeypatch)
    made = []
    for cls, where, dtype in (
        (getattr(device_optimizer, name), device, torch.float32),
        (getattr(optim, name), "cpu", torch.float32),
        (getattr(torch.optim, name), "cpu", torch.float64),
    ):
        params = parameters(values, where, dtype)
        groups = [{"params": params[:3]}, {"params": params[3:], "weight_decay": 0.04}]
        made.append((cls(groups, lr=RATE, **settings), params))
    sizes = np.exp(rng.normal(-2, 2, 12))
    for number in range(12):
        grads = [torch.tensor(rng.standard_normal(v.shape) * sizes[number], dtype=torch.float32) for v in values]
        if number > 1 and number % 3 == 0:
            grads[rng.integers(len(grads))] = None
        for optimizer, params in made:
            if number == 7:
                optimizer.param_groups[1]["lr"] = float(np.float32(RATE / 3))
            give(params, grads)
            optimizer.step()
    assert taken == [name == "Adagrad" or case == "sgd"] + [True] * 11
    (ours, mine), (native, theirs), (_, right) = made
    for p, q, r in zip(mine, theirs, right, strict=True):
        assert p.isfinite().all()
        torch.testing.assert_close(p.detach().cpu().double(), r.detach(), rtol=2e-5, atol=2e-6)
        torch.testing.assert_close(p.detach().cpu(), q.detach(), rtol=1e-6, atol=1e-7)
        for key, value in ours.state[p].items():
            wanted = native.state[q][
                key
            ]  # sums of gradients and decay that cancel round otherwise in torch's first step
            atol = 1e-6 * float(wanted.abs().max())
            torch.testing.assert_close(value.cpu(), wanted, rtol=1e-6, atol=atol, msg=key)


@pytest.mark.parametrize("case", CASES)
def test_bits_are_the_native_backend_s(case, seed, device, triton_backend):
    """From equal states on: the kernel rounds where torch's single-tensor step does."""
    name, settings = CASES[case]
    rng = np.random.default_rng(seed)
    values = random_params(rng)
    mine, theirs = parameters(values, device), parameters(values, "cpu")
    ours = getattr(device_optimizer, name)(mine, lr=RATE, **settings)
    native = getattr(optim, name)(theirs, lr=RATE, **settings)
    for number in range(4):
        grads = [torch.tensor(rng.standard_normal(v.shape), dtype=torch.float32) for v in values]
        if number:
            ours.load_state_dict(copy.deepcopy(native.state_dict()))
            for p, q in zip(mine, theirs, strict=True):
                p.data.copy_(q.detach())
        for optimizer, params in ((ours, mine), (native, theirs)):
            give(params, grads)
            optimizer.step()
        if number:
            for p, q in zip(mine, theirs, strict=True):
                assert torch.equal(p.detach().cpu(), q.detach())
                for key, value in ours.state[p].items():
                    assert torch.equal(value.cpu(), native.state[q][key]), key


@pytest.mark.parametrize("case", CASES)
def test_a_vetoed_step_moves_and_counts_nothing(case, seed, device, triton_backend, monkeypatch):
    name, settings = CASES[case]
    rng = np.random.default_rng(seed)
    mine = parameters(random_params(rng), device)
    ours = getattr(device_optimizer, name)(mine, lr=RATE, **settings)
    taken = watched(monkeypatch)
    give(mine, [torch.randn(p.shape) for p in mine])
    ours.step()
    for lost in (1, 0):
        before = [p.detach().clone() for p in mine]
        state = copy.deepcopy(ours.state_dict()["state"])
        give(mine, [torch.full(p.shape, torch.nan if lost else 0.5) for p in mine])
        ours.begin()
        ours.veto_places()[0].fill_(lost)
        ours.step()
        same = all(torch.equal(p, q) for p, q in zip(mine, before, strict=True))
        assert same == bool(lost)
        for number, held in ours.state_dict()["state"].items():
            for key, value in held.items():
                assert torch.equal(value, state[number][key]) == bool(lost), key
    give(mine, [torch.ones(p.shape) for p in mine])
    ours.step()  # and nobody vetoes this one
    assert taken[1:] == [True] * 3


def test_many_tensors_take_several_launches(seed, device, triton_backend):
    rng = np.random.default_rng(seed)
    values = random_params(rng, 46)
    mine, theirs = parameters(values, device), parameters(values, "cpu")
    ours, native = device_optimizer.Adam(mine, lr=RATE), optim.Adam(theirs, lr=RATE)
    for _ in range(2):
        grads = [torch.tensor(rng.standard_normal(v.shape), dtype=torch.float32) for v in values]
        for optimizer, params in ((ours, mine), (native, theirs)):
            give(params, grads)
            optimizer.step()
    for p, q in zip(mine, theirs, strict=True):
        torch.testing.assert_close(p.detach().cpu(), q.detach(), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("more", [{"amsgrad": True}, {"maximize": True}, {"betas": (0.4, 0.9)}, {"fused": True}])
def test_what_is_not_ours_is_torchs(more, seed, device, triton_backend, monkeypatch):
    rng = np.random.default_rng(seed)
    values = random_params(rng)
    taken = watched(monkeypatch)
    mine, theirs = parameters(values, device), parameters(values, "cpu", torch.float64)
    ours, right = device_optimizer.Adam(mine, lr=RATE, **more), torch.optim.Adam(theirs, lr=RATE, **more)
    for _ in range(4):
        grads = [torch.tensor(rng.standard_normal(v.shape), dtype=torch.float32) for v in values]
        for optimizer, params in ((ours, mine), (right, theirs)):
            give(params, grads)
            optimizer.step()
    assert taken == [False] * 4
    for p, q in zip(mine, theirs, strict=True):
        torch.testing.assert_close(p.detach().cpu().double(), q.detach(), rtol=2e-5, atol=2e-6)


def test_gradients_in_parts_of_other_tensors(seed, device, triton_backend, monkeypatch):
    """As the layers' backward gives them: views at any offset; and with strides of their own."""
    taken = watched(monkeypatch)
    values = [torch.randn(7, 5), torch.randn(3)]
    mine, theirs = parameters(values, device), parameters(values, "cpu")
    ours, native = device_optimizer.Adam(mine, lr=RATE), optim.Adam(theirs, lr=RATE)
    for number in range(4):
        store = torch.randn(100, device=device)
        whole = [store[1:36].view(7, 5), store[37:40]]
        give(theirs, [grad.clone() for grad in whole])
        give(mine, whole)
        if number == 3:
            mine[0].grad = whole[0].t().contiguous().t()
        ours.step()
        native.step()
    assert taken == [False, True, True, True]
    for p, q in zip(mine, theirs, strict=True):
        torch.testing.assert_close(p.detach().cpu(), q.detach(), rtol=1e-6, atol=1e-7)


def test_predictions_see_that_weights_have_moved(device, triton_backend):
    """Packed weights go by the versions of what they were made of."""
    p = torch.nn.Parameter(torch.ones(3, device=device))
    ours = device_optimizer.SGD([p], lr=RATE)
    p.grad = torch.ones_like(p)
    before = p._version
    ours.step()
    assert p._version > before
    assert backends.forced() == "triton"
