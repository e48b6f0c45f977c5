"""A step without autograd: autograd's gradients, and only where nobody would miss autograd."""

import copy

import numpy as np
import pytest
import torch

from fastmtl import backend
from fastmtl.backends import native
from fastmtl.basic.features import DenseFeature, SequenceFeature, SparseFeature
from fastmtl.basic.loss_func import multi_task_loss
from fastmtl.models import AITM, ESMM, MMOE, PLE, SharedBottom
from fastmtl.trainers import MTLTrainer
from fastmtl.trainers.native_gradients import ChainGradients
from fastmtl.weighting import make_strategy

pytestmark = pytest.mark.skipif(native.unavailable() is not None, reason="needs the native library")

#: Two of them small and wide enough to be folded into the first layer.
SMALL = [SparseFeature("small", 12, 8), SparseFeature("tiny", 5, 8, padding_idx=2)]
FEATURES = [
    SparseFeature("a", 30, 4),
    *SMALL,
    SparseFeature("b", 7, 5),
    SparseFeature("wide", 80, 8),
    DenseFeature("c"),
]
# without a kink, on whose other side rounding may put an element
MLP = {"dims": [9, 6], "activation": "tanh"}


def make(kind: type, seed: int, task_types: list[str]) -> torch.nn.Module:
    torch.manual_seed(seed)
    towers = [{"dims": [5]}] * len(task_types)
    if kind is MMOE:
        return MMOE(FEATURES, task_types, 3, MLP, towers)
    if kind is PLE:
        return PLE(FEATURES, task_types, 2, 2, 1, MLP, towers)
    return SharedBottom(FEATURES, task_types, MLP, towers)


def batch(rng: np.random.Generator, task_types: list[str]) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    n = int(rng.integers(32, 200))  # of a smaller batch rounding leaves too little to compare
    x = {
        "a": torch.from_numpy(rng.integers(0, 30, n)),
        "b": torch.from_numpy(rng.integers(0, 7, n)),
        "small": torch.from_numpy(rng.integers(0, 12, n)),
        "tiny": torch.from_numpy(rng.integers(0, 5, n)),
        "wide": torch.from_numpy(rng.integers(0, 80, n)),
        "c": torch.from_numpy(rng.random(n, dtype=np.float32)),
    }
    y = torch.from_numpy(rng.random((n, len(task_types)), dtype=np.float32))
    binary = torch.tensor([kind == "classification" for kind in task_types])
    y = torch.where(binary, y.round(), 3 * y)
    y[torch.from_numpy(rng.random(y.shape)) < rng.choice([0, 0.3])] = torch.nan
    return x, y


@pytest.mark.parametrize("kind", [SharedBottom, MMOE, PLE])
def test_gradients_are_autograds(kind, seed):
    distances = []
    for case in range(10):
        rng = np.random.default_rng([seed, case])
        task_types = [str(rng.choice(["classification", "regression"])) for _ in range(rng.integers(1, 4))]
        x, y = batch(rng, task_types)
        model = make(kind, seed + case, task_types)
        weights = rng.random(len(task_types))
        name, settings = (("mean", {}), ("static", {"weights": weights}), ("uwl", {}))[case % 3]
        expected = copy.deepcopy(model)
        strategy, theirs = make_strategy(name, **settings), make_strategy(name, **settings)
        for one, of in ((strategy, model), (theirs, expected)):
            one.attach(of, task_types)
            if one.weights() is not None:
                one.weights().data = torch.tensor(weights).float() - 0.5
        losses = multi_task_loss(expected(x), y, task_types)
        theirs.backward(losses, 0.0)

        gradients = ChainGradients.of(model, strategy)
        assert gradients is not None
        found, logits = gradients(x, y)
        assert logits.shape == y.shape
        torch.testing.assert_close(found, losses.detach(), rtol=1e-5, atol=1e-6)
        for (name, p), q in zip(model.named_parameters(), expected.parameters(), strict=True):
            # where a batch's gradients cancel, the rounding of the losses' gradient is more than elsewhere
            distances.append(float((p.grad - q.grad).norm()) / (float(q.grad.norm()) + 1e-6))
            assert distances[-1] < 5e-3, (case, name, distances[-1])
        for p, q in zip(model.buffers(), expected.buffers(), strict=True):
            torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)
        if len(y) >= 64:
            assert gradients._kept[3] is not None, "nothing was folded"
    assert np.median(distances) < 1e-5


@pytest.mark.parametrize("update", ["dense", "exact"])
def test_sequences_of_every_pooling(seed, update, tmp_path):
    """Two epochs with and without autograd: the same weights to rounding."""
    rng = np.random.default_rng([seed, 77])
    features = [*FEATURES, *(SequenceFeature(f"q{i}", 11 + i, 4, p) for i, p in enumerate(("max", "mean", "sum")))]
    batches = []
    for _ in range(4):
        x, y = batch(rng, ["classification"])
        x |= {f"q{i}": torch.from_numpy(rng.integers(-1, 11, (len(y), 5))) for i in range(3)}
        batches.append((x, y.nan_to_num(0.0)))
    weights = []
    for watches in (False, True):
        torch.manual_seed(seed)
        model = MMOE(features, ["classification"], 2, MLP, [{"dims": [5]}])
        if watches:
            model.towers.register_forward_hook(lambda *_: None)
        trainer = MTLTrainer(
            model, optimizer_fn=torch.optim.SGD, optimizer_params={"lr": 0.05}, embedding_update=update,
            model_path=str(tmp_path), progress=False,
        )  # fmt: skip
        trainer.model.train()
        assert (trainer._gradients() is None) == watches
        for _ in range(2):
            trainer.train_one_epoch(batches)
        weights.append(model.state_dict())
    for name, value in weights[0].items():
        torch.testing.assert_close(value, weights[1][name], rtol=2e-4, atol=2e-5, msg=name)


def test_frozen_tables_get_no_gradient(seed):
    model = make(MMOE, seed, ["classification"])
    for table in model.embedding.parameters():
        table.requires_grad_(False)
    strategy = make_strategy("mean")
    strategy.attach(model, model.task_types)
    gradients = ChainGradients.of(model, strategy)
    gradients(*batch(np.random.default_rng(seed), model.task_types))
    assert all((p.grad is not None) == p.requires_grad for p in model.parameters())


def plain(model: torch.nn.Module, strategy: str = "mean") -> bool:
    chosen = make_strategy(strategy)
    chosen.attach(model, model.task_types)
    return ChainGradients.of(model, chosen) is not None


def test_whoever_needs_autograd_gets_it(seed):
    types = ["classification"] * 2
    assert plain(make(PLE, seed, types))
    assert plain(make(PLE, seed, types), "uwl")
    assert not plain(make(PLE, seed, types), "gradnorm")
    assert not plain(AITM(FEATURES, 2, {"dims": [4]}, [{"dims": [4]}] * 2))
    assert not plain(ESMM([FEATURES[0]], [FEATURES[1]], {"dims": [4]}, {"dims": [4]}))
    assert not plain(make(PLE, seed, types).double())
    with backend.use_backend("eager"):
        assert not plain(make(PLE, seed, types))
    towers_differ = MMOE(FEATURES, types, 3, MLP, [{"dims": [5]}, {"dims": [4]}])
    assert not plain(towers_differ)

    frozen = make(PLE, seed, types)
    frozen.cgc_layers[0].eval()
    assert not plain(frozen)

    watched = make(PLE, seed, types)
    handle = watched.towers.register_forward_hook(lambda *_: None)
    assert not plain(watched)
    handle.remove()
    assert plain(watched)
    next(watched.parameters()).register_hook(lambda grad: grad)
    assert not plain(watched)

    class Mine(MMOE):
        def forward(self, x):
            return super().forward(x) / 2

    assert not plain(Mine(FEATURES, types, 3, MLP, [{"dims": [5]}] * 2))


def test_nan_in_training_names_the_task(seed, tmp_path):
    model = make(MMOE, seed, ["classification"] * 2)
    trainer = MTLTrainer(model, model_path=str(tmp_path))
    x, y = batch(np.random.default_rng(seed), model.task_types)
    with torch.no_grad():
        dict(model.named_modules())["towers"].banks[0].out_bias[1] = torch.nan
    with pytest.raises(FloatingPointError, match=r"task 'task_1'.*'towers.1"):
        trainer.train_one_epoch([(x, y.nan_to_num(0.0))])
