"""Epochs as a GPU runs them, on the CPU: places that are filled in turn, steps run again on them, nothing waited for.

A recorded step is here the step itself, run again on the same places (``Rerun``); tests/gpu/kernels has the tape and,
on a GPU, the graphs.
"""

import copy

import devices
import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Subset, WeightedRandomSampler

from fastmtl import backend
from fastmtl.basic.features import DenseFeature, SequenceFeature, SparseFeature
from fastmtl.data.datasets import PredictDataset, TorchDataset
from fastmtl.data.loader import ColumnLoader
from fastmtl.data.resident import ResidentLoader
from fastmtl.errors import BadDataError, BadIdError
from fastmtl.models import AITM, ESMM, MMOE
from fastmtl.trainers import MTLTrainer, device_optimizer, graph_step, slots
from fastmtl.trainers.device_epoch import DeviceEpochs, epochs_of
from fastmtl.trainers.device_scores import main_scores

FEATURES = [
    SparseFeature("user", 40, 4),
    SparseFeature("item", 7, 3),
    SequenceFeature("seen", 40, 4, pooling="mean", shared_with="user", padding_idx=0),
    DenseFeature("age"),
]
RATE = 0.05
SETTINGS = {"lr": RATE, "momentum": 0.9, "weight_decay": 1e-3}


def columns(seed, n=101):
    rng = np.random.default_rng(seed)
    x = {
        "age": rng.random(n),  # not in the model's order
        "user": rng.integers(0, 40, n),
        "item": rng.integers(0, 7, n, dtype=np.int32),
        "seen": rng.integers(0, 40, (n, 3)),
    }
    y = rng.integers(0, 2, (n, 2)).astype(np.float32)
    y[rng.random((n, 2)) < 0.1] = np.nan
    return x, y


def make(seed, kind="mmoe"):
    torch.manual_seed(seed)
    if kind == "esmm":
        return ESMM(FEATURES[:1], FEATURES[1:], {"dims": [6]}, {"dims": [6]})
    if kind == "aitm":
        return AITM(FEATURES, 2, {"dims": [6]}, [{"dims": [4]}] * 2)
    return MMOE(FEATURES, ["classification", "regression"], 2, {"dims": [6]}, [{"dims": [4]}] * 2)


def trainer(seed, folder, kind="mmoe", **more):
    more = {"optimizer_fn": device_optimizer.SGD, "optimizer_params": SETTINGS} | more
    made = MTLTrainer(make(seed, kind), model_path=str(folder), progress=False, **more)
    made._ready(loader(seed))
    return made


def loader(seed, n=101, **more):
    return ColumnLoader(TorchDataset(*columns(seed, n)), 16, **({"shuffle": True} | more))


def epochs(one):
    one.model.train()
    return epochs_of(one)


def assert_same_training(mine, theirs, losses, right):
    torch.testing.assert_close(torch.tensor(losses), torch.tensor(right), rtol=1e-6, atol=1e-7)
    for (name, value), other in zip(mine.model.state_dict().items(), theirs.model.state_dict().values(), strict=True):
        torch.testing.assert_close(value, other, rtol=1e-5, atol=1e-6, msg=name)


@pytest.mark.parametrize("kind", ["mmoe", "esmm", "aitm"])
@pytest.mark.parametrize("weighting", [None, {"method": "uwl"}])
def test_epochs_are_the_trainers_own(kind, weighting, seed, tmp_path):
    """To rounding of the losses, whose gradients the trainer's own step has from another formula."""
    mine, theirs = (trainer(seed, tmp_path, kind, adaptive_params=weighting) for _ in range(2))
    data = [loader(seed), loader(seed)]
    losses, right = [], []
    for _ in range(3):
        torch.manual_seed(seed)
        losses.append(epochs(mine).run(data[0])[0])
        torch.manual_seed(seed)
        right.append(theirs.train_one_epoch(data[1]))
    assert_same_training(mine, theirs, losses, right)


def batches_of(seed):
    """Loaders of other kinds, made anew for each training."""
    x, y = columns(seed)
    data = TorchDataset(x, y)
    rows = torch.randperm(len(y), generator=torch.Generator().manual_seed(seed))[:50]
    weights = torch.rand(len(y), generator=torch.Generator().manual_seed(seed))

    def part(rows):
        return {name: torch.as_tensor(column[rows]) for name, column in x.items()}, torch.as_tensor(y[rows])

    return {
        "rows one by one": lambda: DataLoader(data, 16, shuffle=True),
        "dicts": lambda: [part(slice(i, i + 30)) for i in range(0, 101, 30)],
        "in order": lambda: ColumnLoader(data, 16),
        "a subset": lambda: ColumnLoader(Subset(data, rows), 16, shuffle=True),
        "a subset in order": lambda: ColumnLoader(Subset(data, rows), 16),
        "a sampler": lambda: ColumnLoader(data, 16, sampler=WeightedRandomSampler(weights, 70)),
        "workers": lambda: ColumnLoader(data, 16, shuffle=True, num_workers=2, drop_last=True),
        "one batch": lambda: ColumnLoader(data, 200),
    }  # fmt: skip


@pytest.mark.parametrize("kind", batches_of(0))
def test_any_loader_is_taken(kind, seed, tmp_path):
    mine, theirs = trainer(seed, tmp_path), trainer(seed, tmp_path)
    data = [batches_of(seed)[kind]() for _ in range(2)]
    losses, right = [], []
    for _ in range(2):
        torch.manual_seed(seed)
        found, rows = epochs(mine).run(data[0])
        losses.append(found)
        torch.manual_seed(seed)
        right.append(theirs.train_one_epoch(data[1]))
        assert rows == theirs._rows_seen
    assert_same_training(mine, theirs, losses, right)


def test_columns_that_do_not_fit_are_cut_on_the_host(seed, tmp_path):
    mine, theirs = trainer(seed, tmp_path), trainer(seed, tmp_path)
    held = ResidentLoader(loader(seed), torch.device("cpu"), budget=10)
    assert not held.is_resident
    losses, right = [], []
    for _ in range(2):
        torch.manual_seed(seed)
        losses.append(epochs(mine).run(held)[0])
        torch.manual_seed(seed)
        right.append(theirs.train_one_epoch(loader(seed)))
    assert_same_training(mine, theirs, losses, right)


def test_steps_are_recorded_for_each_place(seed, tmp_path):
    one = trainer(seed, tmp_path)
    run = epochs(one)
    for expected in (2, 3, 4):
        run.run(loader_of(one, seed))
        assert run._graphs.n_recorded == expected
    first = dict(run._graphs._recordings)
    run.run(loader_of(one, seed))
    assert run._graphs._recordings == first, "nothing has changed: nothing is recorded anew"


def test_a_step_is_queued_before_the_next_batch_is_cut(seed, tmp_path, monkeypatch):
    """But for batches from the device, which wait for what was queued before them."""
    one, done = trainer(seed, tmp_path), []
    run = epochs(one)
    fill, step = slots.Slots.fill, DeviceEpochs.step
    monkeypatch.setattr(slots.Slots, "fill", lambda self, batch: (done.append("fill"), fill(self, batch))[1])
    monkeypatch.setattr(DeviceEpochs, "step", lambda self, slot: (done.append("step"), step(self, slot))[1])
    data = loader(seed, 48)
    run.run(data)
    assert done == ["fill", "step"] * 3
    done.clear()
    monkeypatch.setattr(slots.GivenBatch, "__init__", _on_device(slots.GivenBatch.__init__))
    run.run(list(data))
    assert done == ["fill", "fill", "step", "fill", "step", "step"]


def _on_device(init):
    def made(self, *parts):
        init(self, *parts)
        self.is_on_device = True

    return made


_held = {}


def loader_of(one, seed):
    """The same loader in every epoch: another one's columns have other places."""
    return _held.setdefault(id(one), loader(seed))


@pytest.mark.parametrize("change", ["decay", "frozen", "moved", "state", "precision", "weights"])
def test_what_a_recorded_step_has_fixed_is_recorded_anew(change, seed, tmp_path):
    one = trainer(seed, tmp_path, adaptive_params={"method": "static", "weights": [1, 2]})
    run, data = epochs(one), loader(seed, 96)
    torch.manual_seed(seed)
    run.run(data)
    before = dict(run._graphs._recordings)
    assert before
    if change == "decay":
        one.optimizer.param_groups[0]["weight_decay"] = 0.5
    elif change == "frozen":
        one.model.embedding.table0.requires_grad_(False)
    elif change == "moved":
        one.model.embedding.table0.data = one.model.embedding.table0.data.clone()
    elif change == "state":
        one.optimizer.load_state_dict(copy.deepcopy(one.optimizer.state_dict()))
    elif change == "weights":
        one.strategy.fixed[0] = 3
    else:
        torch.set_float32_matmul_precision("high")
    try:
        run.run(data)
    finally:
        torch.set_float32_matmul_precision("highest")
    after = run._graphs._recordings
    assert all(after[place] is not before[place] for place in before)


def test_the_rate_of_a_schedule_reaches_recorded_steps(seed, tmp_path):
    schedule = {"scheduler_fn": torch.optim.lr_scheduler.StepLR, "scheduler_params": {"step_size": 1, "gamma": 0.3}}
    mine, theirs = trainer(seed, tmp_path, **schedule), trainer(seed, tmp_path, **schedule)
    losses, right = [], []
    for _ in range(4):
        torch.manual_seed(seed)
        losses.append(epochs(mine).run(loader_of(mine, seed))[0])
        torch.manual_seed(seed)
        right.append(theirs.train_one_epoch(loader_of(theirs, seed)))
        mine.scheduler.step()
        theirs.scheduler.step()
    assert mine.optimizer.param_groups[0]["lr"] == pytest.approx(RATE * 0.3**4)
    assert_same_training(mine, theirs, losses, right)


class Refusing:
    """A recorder for which nothing can be recorded."""

    def record(self, work):
        raise RuntimeError("operation not permitted when stream is capturing\nmore")


def test_where_recording_fails_steps_run_as_they_are(seed, tmp_path, capsys):
    mine, theirs = trainer(seed, tmp_path), trainer(seed, tmp_path)
    mine.progress = None
    mine._epochs = DeviceEpochs(
        mine.model, mine.strategy, mine.optimizer, mine.reg_loss_fn, mine._update, mine._autocast, mine.device, None,
        recorder=Refusing(),
    )  # fmt: skip
    torch.manual_seed(seed)
    losses, _ = epochs(mine).run(loader(seed))
    torch.manual_seed(seed)
    right = theirs.train_one_epoch(loader(seed))
    assert_same_training(mine, theirs, losses, right)
    said = capsys.readouterr().err
    assert said == "fastmtl: steps run without CUDA graphs: operation not permitted when stream is capturing\n"


def test_who_watches_gets_plain_steps(seed, tmp_path):
    def reason(change, **more):
        one = trainer(seed, tmp_path, **more)
        one.model.train()
        changed = change(one.model)
        model = one.model if changed is None else changed
        return graph_step.why_plain(model, one.strategy, one.optimizer)

    def hooked(model):
        model.towers.register_forward_hook(lambda *_: None)

    assert reason(lambda model: None) is None
    assert "hooks" in reason(hooked)
    assert "compiled" in reason(lambda model: torch.compile(model))
    assert "evaluation mode" in reason(lambda model: setattr(model.towers.eval(), "any", None))
    assert "GradNorm" in reason(lambda model: None, adaptive_params={"method": "gradnorm"})
    assert "MetaBalanceStrategy" in reason(lambda model: None, adaptive_params={"method": "metabalance"})
    assert "RMSprop" in reason(lambda model: None, optimizer_fn=torch.optim.RMSprop, optimizer_params={"lr": 1e-3})
    assert "foreach=True" in reason(lambda model: None, optimizer_params={"lr": 1e-3, "foreach": True})
    with backend.use_backend("eager"):
        assert "runs on eager" in reason(lambda model: None)


@pytest.mark.parametrize("method", ["gradnorm", "metabalance"])
def test_strategies_that_look_at_gradients_train_too(method, seed, tmp_path):
    mine, theirs = (trainer(seed, tmp_path, "aitm", adaptive_params={"method": method}) for _ in range(2))
    torch.manual_seed(seed)
    losses, _ = epochs(mine).run(loader(seed))
    torch.manual_seed(seed)
    right = theirs.train_one_epoch(loader(seed))
    assert_same_training(mine, theirs, losses, right)


def test_a_compiled_model_trains_here(seed, tmp_path):
    theirs = trainer(seed, tmp_path)
    compiled = MTLTrainer(
        torch.compile(make(seed), backend="eager"), optimizer_fn=device_optimizer.SGD, optimizer_params=SETTINGS,
        model_path=str(tmp_path), progress=False,
    )  # fmt: skip
    compiled._ready(loader(seed))
    torch.manual_seed(seed)
    losses, _ = epochs(compiled).run(loader(seed, 96))
    torch.manual_seed(seed)
    right = theirs.train_one_epoch(loader(seed, 96))
    torch.testing.assert_close(torch.tensor(losses), torch.tensor(right), rtol=1e-5, atol=1e-6)


def test_a_loss_that_is_nan_is_found(seed, tmp_path):
    one = trainer(seed, tmp_path)
    run = epochs(one)
    run.run(loader_of(one, seed))
    with torch.no_grad():
        dict(one.model.named_modules())["towers"].banks[0].out_bias[1] = torch.nan
    with pytest.raises(FloatingPointError, match=r"task 'task_1': the loss of step 1 of the epoch is NaN; .*'towers.1"):
        run.run(loader_of(one, seed))
    one.model.load_state_dict(make(seed).state_dict())
    assert np.isfinite(run.run(loader_of(one, seed))[0]).all(), "what was found is forgotten"


def test_bad_data_is_refused_by_name(seed, tmp_path):
    one = trainer(seed, tmp_path)
    x, y = columns(seed)
    with pytest.raises(BadDataError, match="no labels"):
        epochs(one).run(ColumnLoader(PredictDataset(x), 16))
    with pytest.raises(BadDataError, match="no labels"):
        epochs(one).run([{name: torch.as_tensor(c) for name, c in x.items()}])
    with pytest.raises(BadDataError, match="no rows"):
        epochs(one).run([])
    x["item"][40] = 7
    with pytest.raises(BadIdError, match="feature 'item': id 7 in row 8 of the batch"):
        epochs(one).run(ColumnLoader(TorchDataset(x, y), 16))


def test_at_most_a_few_shapes_keep_their_places(seed, tmp_path):
    """Sequences of many lengths: places are given up and made anew, and the training is the same."""
    rng = np.random.default_rng(seed)
    x, y = columns(seed)
    data = []
    for start in range(0, 96, 8):
        rows = slice(start, start + 8)
        part = {name: torch.as_tensor(c[rows]) for name, c in x.items()}
        part["seen"] = torch.as_tensor(rng.integers(0, 40, (8, 1 + start % 7)))
        data.append((part, torch.as_tensor(y[rows])))
    mine, theirs = trainer(seed, tmp_path), trainer(seed, tmp_path)
    run = epochs(mine)
    losses, right = [], []
    for _ in range(2):
        losses.append(run.run(data)[0])
        right.append(theirs.train_one_epoch(data))
    assert len(run._slots.live()) <= 8
    assert_same_training(mine, theirs, losses, right)


@pytest.mark.parametrize("is_resident", [True, False], ids=["resident", "host"])
@pytest.mark.parametrize(
    "more",
    [
        {},
        {"adaptive_params": {"method": "uwl"}},
        {"adaptive_params": {"method": "static", "weights": [1, 2]}},
        {"regularization_params": {"dense_l2": 1e-3}},
    ],
    ids=["mean", "uwl", "static", "penalty"],
)
def test_on_the_device_under_test(more, is_resident, seed, tmp_path):
    """Nothing stays behind on the CPU, or is expected there (FASTMTL_TEST_DEVICE: a GPU, or one that is made up)."""
    losses, scores = [], []
    for device in (devices.DEVICE, torch.device("cpu")):
        settings = {"lr": RATE, "momentum": 0.9, "foreach": False}
        one = trainer(seed, tmp_path, device=device, optimizer_fn=torch.optim.SGD, optimizer_params=settings, **more)
        run, data = epochs(one), ResidentLoader(loader(seed), device, None if is_resident else 0)
        assert data.is_resident == is_resident
        torch.manual_seed(seed)
        losses.append([run.run(data)[0] for _ in range(2)])
        scores.append(main_scores(one.model, data, device))
    torch.testing.assert_close(torch.tensor(losses[0]), torch.tensor(losses[1]), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(torch.tensor(scores[0]), torch.tensor(scores[1]), rtol=2e-2, atol=1e-3)
