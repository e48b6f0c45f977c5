"""Parts of a step that run beside each other: whenever a branch's work is done, the numbers are the same.

On the interpreter branches are done as late as may be, when they are joined: what reads their results before, or
overwrites what they read, shows as other numbers. On a GPU they are streams, too.
"""

from functools import partialmethod
from typing import Any

import pytest
import torch
from trainer_cases import make_loader, make_model, train

from fastmtl import backend as backends
from fastmtl.backends import branches
from fastmtl.basic.features import DenseFeature, SparseFeature
from fastmtl.models import MMOE, PLE
from fastmtl.trainers import device_epoch
from fastmtl.trainers.device_epoch import DeviceEpochs
from fastmtl.trainers.native_gradients import ChainGradients
from fastmtl.weighting import Mean


class AtOnce:
    """Branches that are none."""

    def queue(self, name, work, arguments):
        work(*arguments)

    def join(self, name):
        pass


class Late:
    """Branches whose work is done when they are joined."""

    def __init__(self):
        self.waiting, self.done = {}, []

    def queue(self, name, work, arguments):
        self.waiting.setdefault(name, []).append((work, arguments))

    def join(self, name):
        for work, arguments in self.waiting.pop(name, ()):
            work(*arguments)
            self.done.append(name)


def put(monkeypatch, beside):
    monkeypatch.setattr(DeviceEpochs, "__init__", partialmethod(DeviceEpochs.__init__, beside=beside))


@pytest.mark.parametrize("update", ["exact", "dense"])
def test_epochs_are_the_same_whenever_branches_are_done(update, seed, device, tmp_path, monkeypatch):
    """Bit for bit; plain and recorded steps among them."""
    found = {}
    for name, beside in {"the device's": None, "at once": AtOnce(), "late": Late()}.items():
        if name == "the device's" and device.type == "cpu":
            continue  # which has none
        with monkeypatch.context() as patch:
            put(patch, beside)
            found[name] = train(seed, "triton", device, tmp_path, update)
        assert found[name][2]._epochs._graphs.n_recorded == 3
    right, weights, _ = found.pop("at once")
    for name, (losses, same, _) in found.items():
        assert torch.equal(losses, right), name
        for key, value in weights.items():
            assert torch.equal(value, same[key]), (name, key)
    n_in_python = 3 + 3 * (device.type == "cuda")  # on a GPU those that were recorded, and those before them
    assert beside.waiting == {}
    kinds = {name: beside.done.count(name) for name in branches.NAMES}
    n_steps = kinds[branches.LABELS]
    assert n_steps >= n_in_python
    # three layers with weights: of the experts, of the towers; an update, and a sweep where rows are left behind
    assert kinds[branches.WEIGHTS] == 2 * n_steps
    assert kinds[branches.TABLES] == (2 if update == "exact" else 0) * n_steps


def test_only_the_trainer_s_own_steps_branch(seed, device, tmp_path, monkeypatch):
    """Autograd joins nothing: there, and in calls by hand, work is done where it is called for."""
    late = Late()
    put(monkeypatch, late)
    with monkeypatch.context() as patch:
        patch.setattr(ChainGradients, "of", classmethod(lambda cls, *_: None))
        losses, _, _ = train(seed, "triton", device, tmp_path, "exact", epochs=1)
    assert not late.done
    assert not late.waiting
    chain, _, _ = train(seed, "triton", device, tmp_path, "exact", epochs=1)
    assert late.done
    torch.testing.assert_close(losses, chain, rtol=1e-5, atol=1e-6)


def chain_of(model, device):
    torch.manual_seed(3)
    features = [SparseFeature("user", 30, 4), SparseFeature("item", 9, 4), DenseFeature("age")]
    types, dims, towers = ["classification"] * 3, {"dims": [6, 5]}, [{"dims": [4]}] * 3
    made: Any = MMOE(features, types, 3, dims, towers)
    if model == "ple":  # of two levels: gates that read other inputs lie apart
        made = PLE(features, types, 2, 1, 2, dims, towers)
    return made.to(device).train()


@pytest.mark.parametrize("kind", ["mmoe", "ple"])
def test_gradients_are_the_same_whenever_branches_are_done(kind, seed, device, triton_backend):
    model = chain_of(kind, device)
    rng = torch.Generator().manual_seed(seed)
    x = {
        "user": torch.randint(0, 30, (19,), generator=rng).to(device),
        "item": torch.randint(0, 9, (19,), generator=rng).to(device),
        "age": torch.rand(19, generator=rng).to(device),
    }
    labels = (torch.rand(19, 3, generator=rng) < 0.5).float().to(device)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    strategy = Mean()
    strategy.attach(model, model.task_types)
    chain = ChainGradients.of(model, strategy)
    found = []
    for beside in (None, Late(), *([branches.CudaBranches(device)] * 3 if device.type == "cuda" else [])):
        model.load_state_dict(state)
        with branches.allowed(beside):
            losses, _ = chain(x, labels)
        found.append([losses, *(p.grad for p in model.parameters())])
    for other in found[1:]:
        assert all(torch.equal(mine, theirs) for mine, theirs in zip(other, found[0], strict=True))


def test_branches_end_with_an_error(device):
    late = Late()

    def fail():
        branches.beside(branches.TABLES, list, ())
        branches.beside(branches.WEIGHTS, dict)
        raise ZeroDivisionError

    with branches.allowed(late), pytest.raises(ZeroDivisionError):
        fail()
    assert late.done == [branches.WEIGHTS, branches.TABLES]
    late.done.clear()
    with pytest.raises(ZeroDivisionError), branches.allowed(late):
        fail()
    assert late.done == [branches.WEIGHTS, branches.TABLES]
    done = []
    branches.beside(branches.TABLES, done.append, 1)
    assert done == [1], "there are no branches any more"


def test_a_device_without_streams_has_no_branches(seed, device, tmp_path):
    with backends.use_backend("triton"):
        _, _, trainer = train(seed, "triton", device, tmp_path, "exact", epochs=0)
        trainer.train_one_epoch(make_loader(seed))
    kind = type(device_epoch.epochs_of(trainer)._beside)
    assert kind is (branches.CudaBranches if device.type == "cuda" else type(None))
    assert isinstance(make_model(), MMOE)
