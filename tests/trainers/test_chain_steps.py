"""A step as one call: the bits of its parts one after the other, and only where nobody is to act between them."""

import contextlib
import copy
import itertools
import warnings

import numpy as np
import pytest
import torch

from fastmtl import optim
from fastmtl.backends import native
from fastmtl.basic.features import DenseFeature, SequenceFeature, SparseFeature
from fastmtl.errors import BadDataError, BadIdError
from fastmtl.models import MMOE, PLE, SharedBottom
from fastmtl.trainers import MTLTrainer, chain_steps

pytestmark = pytest.mark.skipif(native.unavailable() is not None, reason="needs the native library")

TASKS = ["classification", "regression"]
OPTIMIZERS = [
    (torch.optim.Adam, {"lr": 1e-2, "weight_decay": 1e-3}),
    (torch.optim.Adam, {"lr": 1e-2}),
    (torch.optim.AdamW, {"lr": 1e-2, "weight_decay": 0.1}),
    (torch.optim.SGD, {"lr": 1e-2}),
    (torch.optim.SGD, {"lr": 1e-2, "momentum": 0.9, "nesterov": True, "weight_decay": 1e-3}),
    (torch.optim.Adagrad, {"lr": 1e-2, "lr_decay": 0.1}),
]
WORDS = SequenceFeature("words", 40, 4, pooling="mean", padding_idx=0)


def features(rng):
    """Tables that are folded, that share rows, that are not, of two widths, one of them frozen now and then."""
    small = [SparseFeature(f"small{i}", int(rng.integers(2, 30)), 8) for i in range(3)]
    shared = [SparseFeature("again", small[0].vocab_size, 8, shared_with="small0")] if rng.random() < 0.5 else []
    others = [SparseFeature("wide", 300, 8)] if rng.random() < 0.5 else []
    words = [WORDS] if rng.random() < 0.7 else []
    dense = [DenseFeature("a"), DenseFeature("b")] if rng.random() < 0.8 else []
    return [*small, *shared, *others, *words, SparseFeature("five", 50, 5), *dense]


def new_model(kind, fields, seed):
    torch.manual_seed(seed)
    mlp = {"dims": [12, 6], "dropout": 0.2 if seed % 2 else 0.0}
    towers = [{"dims": [5]}] * 2
    if kind is MMOE:
        return MMOE(fields, TASKS, 3, mlp, towers)
    if kind is PLE:
        return PLE(fields, TASKS, 2, 2, 1, mlp, towers)
    return SharedBottom(fields, TASKS, mlp, towers)


def batch_of(rng, fields, rows):
    x = {}
    for field in fields:
        if isinstance(field, DenseFeature):
            x[field.name] = torch.from_numpy(rng.normal(size=rows).astype(np.float32))
        else:
            size = (rows, 6) if isinstance(field, SequenceFeature) else rows
            x[field.name] = torch.from_numpy(rng.integers(0, field.vocab_size, size))
    y = torch.from_numpy(rng.random((rows, 2), dtype=np.float32))
    y[:, 0] = y[:, 0].round()
    y[::5, 1] = torch.nan
    return x, y


def new_trainer(model, folder, fn=torch.optim.Adam, settings=None, **more):
    return MTLTrainer(
        model, optimizer_fn=fn, optimizer_params=settings, model_path=str(folder), progress=False, device="cpu", **more
    )


@contextlib.contextmanager
def in_parts():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chain_steps, "_OWN", ())
        yield


def train(trainer, batches, seed, rates=()):
    """Steps on batches by :meth:`MTLTrainer._steps`, and whether the last was one call."""
    torch.manual_seed(seed)
    trainer.model.train()
    losses = []
    with trainer._steps(trainer._gradients()) as step:
        for i, (x, y) in enumerate(batches):
            if i in dict(rates):
                trainer.optimizer.param_groups[0]["lr"] = dict(rates)[i]
            losses.append(step(x, y).clone())
        at_once = step._at_once is not None
    return losses, at_once


def same_state(one, other):
    flat = [torch.utils._pytree.tree_flatten(state)[0] for state in (one, other)]
    return all(torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b for a, b in zip(*flat, strict=True))


@pytest.mark.parametrize("kind", [SharedBottom, MMOE, PLE])
def test_the_bits_of_a_step_in_parts(kind, seed, tmp_path):
    for case in range(8):
        rng = np.random.default_rng([seed, case])
        fields = features(rng)
        fn, settings = OPTIMIZERS[rng.integers(len(OPTIMIZERS))]
        model = new_model(kind, fields, seed + case)
        if rng.random() < 0.3:
            next(model.embedding.parameters()).requires_grad_(False)
        if rng.random() < 0.3:
            next(p for name, p in model.named_parameters() if "weight0" in name).requires_grad_(False)
        # a few rows are too few for tables to be folded, and one has no statistics
        batches = [batch_of(rng, fields, int(rows)) for rows in (300, 300, 257, 20, 300, 1, 400)]
        rates, other = [(4, 3e-3)], copy.deepcopy(model)
        more = {"amp": "bf16"} if case % 3 == 2 else {}
        more |= {"adaptive_params": {"method": "uwl"}} if case % 4 == 3 else {}
        trainer = new_trainer(model, tmp_path, fn, settings, **more)
        got, at_once = train(trainer, batches, seed, rates)
        assert at_once
        with in_parts():
            expected = new_trainer(other, tmp_path, fn, settings, **more)
            want, in_one = train(expected, batches, seed, rates)
        assert not in_one
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True)), case
        assert same_state(model.state_dict(), other.state_dict()), case
        assert same_state(trainer.optimizer.state_dict(), expected.optimizer.state_dict()), case
        for p, q in zip(model.parameters(), other.parameters(), strict=True):
            assert (p.grad is None and q.grad is None) or torch.equal(p.grad, q.grad)


def prepared(seed, folder, **more):
    rng = np.random.default_rng(seed)
    fields = features(rng)
    trainer = new_trainer(new_model(MMOE, fields, 2 * seed), folder, **more)
    return trainer, [batch_of(rng, fields, 200) for _ in range(5)]


def test_whole_epochs_with_a_schedule(seed, tmp_path):
    """Through train_one_epoch, with a scheduler that wants to have seen the optimizer's step."""
    scores = []
    for context in (contextlib.nullcontext(), in_parts()):
        with context, warnings.catch_warnings():
            warnings.simplefilter("error")
            schedule = {"scheduler_fn": torch.optim.lr_scheduler.StepLR, "scheduler_params": {"step_size": 1}}
            trainer, batches = prepared(seed, tmp_path, **schedule)
            torch.manual_seed(seed)
            losses = []
            for _ in range(3):
                losses.append(trainer.train_one_epoch(batches))
                trainer.scheduler.step()
            scores.append((losses, trainer.model.state_dict(), trainer.optimizer.state_dict()))
    assert same_state(*scores)


class Watching(optim.Adam):
    """Somebody's own optimizer."""

    def step(self, closure=None):
        return super().step(closure)


def test_in_parts_where_somebody_acts_between_them(seed, tmp_path):
    def own_step(trainer):
        inner = trainer.optimizer.step
        trainer.optimizer.step = lambda *args: inner(*args)

    def hook(trainer):
        trainer.optimizer.register_step_post_hook(lambda *_: None)

    cases = {
        "plain": (lambda _: None, {}, True),
        "a step of its own": (own_step, {}, False),
        "a hook": (hook, {}, False),
        "a class of its own": (lambda _: None, {"fn": Watching}, False),
        "learned loss weights": (lambda _: None, {"adaptive_params": {"method": "uwl"}}, True),
        "tables at sparse cost": (lambda _: None, {"embedding_update": "exact"}, False),
        "a task's learning rate": (lambda _: None, {"task_specific_lr": {"task_0": 0.1}}, False),
        "torch's own": (lambda _: None, {"settings": {"lr": 1e-3, "fused": True}}, False),
    }
    for name, (change, more, expected) in cases.items():
        trainer, batches = prepared(seed, tmp_path, **more)
        trainer._ready(batches)
        change(trainer)
        assert train(trainer, batches[:3], seed)[1] == expected, name


def test_the_optimizers_state_is_read_again(seed, tmp_path):
    """One that was loaded, or whose counters were set, between two batches."""
    results = []
    for context in (contextlib.nullcontext(), in_parts()):
        with context:
            trainer, batches = prepared(seed, tmp_path, adaptive_params={"method": "uwl"})
            trainer.model.train()
            torch.manual_seed(seed)
            with trainer._steps(trainer._gradients()) as step:
                for x, y in batches:
                    step(x, y)
                held = copy.deepcopy(trainer.optimizer.state_dict())
                for x, y in batches:
                    step(x, y)
                trainer.optimizer.load_state_dict(held)
                for x, y in batches:
                    step(x, y)
                for state in trainer.optimizer.state.values():
                    state["step"] += 5
                for x, y in batches:
                    step(x, y)
                trainer.optimizer.state[trainer.loss_weight]["step"] += 5
                for x, y in batches:
                    step(x, y)
            results.append((trainer.model.state_dict(), trainer.optimizer.state_dict()))
    assert same_state(*results)
    assert sorted({int(state["step"]) for state in results[0][1]["state"].values()}) == [25, 30]


def test_bad_input_is_told_as_ever_and_moves_nothing(seed, tmp_path):
    trainer, batches = prepared(seed, tmp_path)
    x, y = batches[0]
    fields = trainer.model.features
    x = x if "a" in x else x | {"a": torch.zeros(200), "b": torch.zeros(200)}
    trainer.model.train()
    with trainer._steps(trainer._gradients()) as step:
        for batch in batches:
            step(*batch)
        assert step._at_once is not None
        before = copy.deepcopy((trainer.model.state_dict(), trainer.optimizer.state_dict()))
        bad = x | {"small1": torch.where(torch.arange(200) == 7, 999, x["small1"])}
        with pytest.raises(BadIdError, match=r"'small1'.*999"):
            step(bad, y)
        if any(field.name == "a" for field in fields):
            broken = torch.where(torch.arange(200) == 11, torch.inf, x["a"])
            with pytest.raises(BadDataError, match=r"'a': row 11 .* NaN or infinite"):
                step(x | {"a": broken}, y)
        with pytest.raises(BadDataError, match="no such column"):
            step({name: column for name, column in x.items() if name != "five"}, y)
        with pytest.raises(BadDataError, match="label columns"):
            step(x, y[:, :1])
        after = trainer.model.state_dict(), trainer.optimizer.state_dict()
        assert same_state(before, after)


def test_nan_is_explained(seed, tmp_path):
    trainer, batches = prepared(seed, tmp_path)
    trainer.model.train()
    with trainer._steps(trainer._gradients()) as step:
        for batch in batches:
            step(*batch)
        weight = trainer.model.state_dict()["towers.0.mlp.0.weight"]
        weight[0, 0] = torch.nan
        with pytest.raises(FloatingPointError, match=r"towers\.0\.mlp\.0\.weight' is not finite"):
            step(*batches[0])
        assert all(int(state["step"]) == 5 for state in trainer.optimizer.state.values())


def test_predictions_see_that_the_weights_have_moved(seed, tmp_path):
    """Packed weights are made anew when a step was taken, of one call or not."""
    trainer, batches = prepared(seed, tmp_path)
    model, x = trainer.model, batches[0][0]

    def ask():
        model.eval()
        with torch.no_grad():
            out = model(x)
        model.train()
        return out

    model.train()
    with trainer._steps(trainer._gradients()) as step:
        seen = []
        for batch in batches:
            step(*batch)
            seen.append(ask())
    fresh = copy.deepcopy(model)
    fresh.eval()
    with torch.no_grad():
        torch.testing.assert_close(seen[-1], fresh(x), rtol=1e-5, atol=1e-6)
    assert all(not torch.equal(a, b) for a, b in itertools.pairwise(seen))
