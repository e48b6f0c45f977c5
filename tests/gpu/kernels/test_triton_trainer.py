"""MTLTrainer on a GPU: every way to update tables, checkpoints that go both ways, errors told later, scores.

Without one, what stands in for graphs is tape.py.
"""

import copy
import warnings

import numpy as np
import pytest
import torch
from trainer_cases import SETTINGS, make_loader, make_model, train

from fastmtl import backend as backends
from fastmtl.backends.triton import embedding_bag_backward, embedding_index
from fastmtl.basic.features import SequenceFeature, SparseFeature
from fastmtl.data.loader import ColumnLoader
from fastmtl.errors import BadIdError, ConfigError
from fastmtl.models import ESMM, MMOE
from fastmtl.trainers import MTLTrainer, evaluate_multi_task
from fastmtl.trainers.device_epoch import DeviceEpochs
from fastmtl.trainers.device_optimizer import Adam, RowwiseAdagrad
from fastmtl.trainers.optimizer import sparse_updates

TABLE = "embedding.embed_dict.user.weight"


def comparable(state):
    """Without what a BatchNorm cancels: there Adam makes noise of rounding."""
    return {k: v for k, v in state.items() if k.startswith("embed") or "output" in k or "gate" in k}


def test_exact_updates_are_dense_updates(seed, device, tmp_path):
    """To rounding, through an epoch's end and a change of the learning rate; lazily, only rows looked up move."""
    exact, weights, trainer = train(seed, "triton", device, tmp_path, "exact")
    assert trainer.optimizer.tables
    dense, right, other = train(seed, "triton", device, tmp_path, "dense")
    assert not other.optimizer.tables
    torch.testing.assert_close(exact, dense, rtol=1e-5, atol=1e-6)
    for name, value in comparable(weights).items():
        torch.testing.assert_close(value, right[name], rtol=2e-4, atol=2e-5, msg=name)
    states = [one.optimizer.state_dict()["state"] for one in (trainer, other)]
    for number, state in states[0].items():
        assert state.keys() == states[1][number].keys()
        assert float(state["step"]) == float(states[1][number]["step"])


def test_lazy_updates_are_the_cpus(seed, device, tmp_path):
    lazy, weights, trainer = train(seed, "triton", device, tmp_path, "lazy")
    assert trainer.optimizer.updates.is_still
    cpu, right, _ = train(seed, "native", "cpu", tmp_path, "lazy")
    torch.testing.assert_close(lazy, cpu, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(weights[TABLE], right[TABLE], rtol=2e-4, atol=2e-5)
    exact = train(seed, "native", "cpu", tmp_path, "exact")[1]
    assert not torch.allclose(weights[TABLE], exact[TABLE], rtol=2e-4, atol=2e-5)


def test_rowwise_adagrad_is_the_cpus(seed, device, tmp_path):
    """With its checkpoint."""
    losses, weights, trainer = train(seed, "triton", device, tmp_path, None, "rowwise_adagrad")
    assert isinstance(trainer.optimizer, RowwiseAdagrad)
    cpu, right, native = train(seed, "native", "cpu", tmp_path, None, "rowwise_adagrad")
    torch.testing.assert_close(losses, cpu, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(weights[TABLE], right[TABLE], rtol=2e-4, atol=2e-5)
    states = [one.optimizer.state_dict()["state"] for one in (trainer, native)]
    for number, state in states[0].items():
        torch.testing.assert_close(state["sum"].cpu(), states[1][number]["sum"], rtol=1e-3, atol=1e-6)
    with backends.use_backend("triton"):
        trainer.optimizer.load_state_dict(copy.deepcopy(native.optimizer.state_dict()))
        assert np.isfinite(trainer.train_one_epoch(make_loader(seed))).all()
        other = train(seed, "triton", device, tmp_path, "exact", "adagrad", epochs=0)[2]
        with pytest.raises(ConfigError, match="one number a row"):
            trainer.optimizer.load_state_dict(other.optimizer.state_dict())


def test_dropout_draws_what_plain_steps_draw(seed, device, tmp_path, monkeypatch):
    losses, weights, trainer = train(seed, "triton", device, tmp_path, "exact", dropout=0.3)
    assert trainer._epochs._graphs.n_recorded == 3
    monkeypatch.setattr("fastmtl.trainers.graph_step.WARM_UPS", (10**9, 1))
    plain, same, _ = train(seed, "triton", device, tmp_path, "exact", dropout=0.3)
    assert torch.equal(losses, plain)
    for name, value in weights.items():
        assert torch.equal(value, same[name]), name


@pytest.mark.parametrize("update", ["exact", "lazy"])
def test_a_batch_s_ids_are_sorted_once_and_ahead(update, seed, device, tmp_path, monkeypatch):
    """For catching up and for the backward: queued behind the step on the batch before it, beside which it runs."""
    events = []
    sort, step = embedding_index.sort_rows, DeviceEpochs.step
    monkeypatch.setattr(embedding_index, "sort_rows", lambda *a, **k: (events.append("sort"), sort(*a, **k))[1])
    monkeypatch.setattr(embedding_bag_backward, "sort_rows", embedding_index.sort_rows)
    monkeypatch.setattr(DeviceEpochs, "step", lambda self, slot: (events.append("step"), step(self, slot))[1])
    train(seed, "triton", device, tmp_path, update, epochs=1)
    assert events == ["sort", "step"] * 4


def ready(seed, where, device, folder, update="exact", optimizer="adam", **more):
    """A trainer that has taken no step."""
    fn, settings = SETTINGS[optimizer]
    with backends.use_backend(where):
        one = MTLTrainer(
            make_model(), optimizer_fn=fn, optimizer_params=settings, device=device, embedding_update=update,
            model_path=str(folder), progress=False, **more,
        )  # fmt: skip
        one._ready(make_loader(seed))
    return one


@pytest.mark.parametrize("optimizer", ["adam", "momentum", "adagrad"])
def test_checkpoints_go_both_ways(optimizer, seed, device, tmp_path):
    """From this to torch's own on the CPU, and from there back: the training that was never interrupted."""

    def epoch(one, where, number):
        torch.manual_seed(seed + number)
        with backends.use_backend(where):
            return one.train_one_epoch(make_loader(seed + number))

    whole = ready(seed, "triton", device, tmp_path, optimizer=optimizer)
    right = [epoch(whole, "triton", number) for number in range(3)]
    here = ready(seed, "triton", device, tmp_path, optimizer=optimizer)
    losses = [epoch(here, "triton", 0)]
    for where, update in (("eager", "dense"), ("triton", "exact")):
        weights, state = copy.deepcopy(here.model.state_dict()), copy.deepcopy(here.optimizer.state_dict())
        here = ready(seed, where, "cpu" if where == "eager" else device, tmp_path, update, optimizer)
        here.model.load_state_dict(weights)
        with backends.use_backend(where):
            here.optimizer.load_state_dict(state)
        losses.append(epoch(here, where, len(losses)))
    torch.testing.assert_close(torch.tensor(losses), torch.tensor(right), rtol=1e-5, atol=1e-6)


def test_copies_of_the_optimizer_go_on(seed, device):
    table, weight = (torch.nn.Parameter(torch.randn(n, 2, device=device)) for n in (9, 3))
    with backends.use_backend("triton"):
        one = Adam([table, weight], lr=1e-2, tables=[table])
        weight.grad, table.grad = torch.ones_like(weight), torch.ones_like(table)
        one.step()
        other = copy.deepcopy(one)
        (again, also) = other.param_groups[0]["params"]
        assert other.tables == [again]
        assert torch.equal(again, table)
        for optimizer, params in ((one, (table, weight)), (other, (again, also))):
            for p in params:
                p.grad = torch.full_like(p, 0.5)
            optimizer.step()
            optimizer.flush()
        assert torch.equal(again, table)
        assert torch.equal(also, weight)
    reference = torch.nn.Parameter(torch.zeros(1))
    dense = torch.optim.Adam([reference], lr=1e-2)
    for value in (1.0, 0.5):
        reference.grad = torch.full((1,), value)
        dense.step()
    moved = table - again + reference.detach().to(device)
    torch.testing.assert_close(moved.detach().cpu(), reference.detach().expand(9, 2), rtol=1e-5, atol=1e-6)


def test_a_bad_id_is_named_and_the_training_can_go_on(seed, device, tmp_path):
    one = ready(seed, "triton", device, tmp_path)
    loader = make_loader(seed)
    wrong = ColumnLoader(copy.deepcopy(loader.source), 6)
    wrong.source.blocks[0][8, 1] = 6
    with backends.use_backend("triton"):
        one.train_one_epoch(loader)
        with pytest.raises(BadIdError, match=r"feature 'item': id 6 in row 2 of the batch .* vocabulary of 6"):
            one.train_one_epoch(wrong)
        with pytest.raises(BadIdError, match="feature 'item': id 6 in row 2"):
            one.evaluate(one.model, wrong)
        assert np.isfinite(one.train_one_epoch(loader)).all()


def test_a_nan_is_named_and_moves_nothing(seed, device, tmp_path):
    one = ready(seed, "triton", device, tmp_path)
    loader = make_loader(seed)
    with backends.use_backend("triton"):
        one.train_one_epoch(loader)
        with torch.no_grad():
            dict(one.model.named_modules())["towers"].banks[0].out_bias[1] = torch.nan
        with pytest.raises(FloatingPointError, match=r"task 'task_1': the loss of step 1 .*'towers.1.mlp.4.bias'"):
            one.train_one_epoch(loader)
    state = one.model.state_dict()
    assert [name for name, value in state.items() if not torch.isfinite(value).all()] == ["towers.1.mlp.4.bias"]


def test_scores_are_those_of_the_cpu(seed, device, tmp_path):
    one = ready(seed, "triton", device, tmp_path)
    loader = make_loader(seed)
    with backends.use_backend("triton"):
        found, named = one.evaluate(one.model, loader), evaluate_multi_task(one.model, loader)
        predicted = one.predict(one.model, make_loader(seed))
    one.model.cpu()
    with backends.use_backend("eager"):
        right = evaluate_multi_task(one.model, loader)
    assert named.keys() == right.keys()
    for (task, scores), score in zip(named.items(), found, strict=True):
        assert scores == pytest.approx(right[task], rel=1e-5)
        assert score == scores["auc"]
    assert np.shape(predicted) == (len(loader.dataset), 2)


def test_fit_keeps_and_saves_the_best(seed, device, tmp_path):
    logs = []
    for where, place in (("triton", device), ("eager", "cpu")):
        one = ready(seed, where, place, tmp_path, None, "momentum", n_epoch=2)
        torch.manual_seed(seed)
        with backends.use_backend(where), warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            logs.append(one.fit(make_loader(seed), make_loader(seed + 1), mode=where))
    np.testing.assert_allclose(logs[0], logs[1], rtol=1e-4, atol=1e-5)
    saved = [torch.load(tmp_path / f"model_{where}_0.pth", weights_only=True) for where in ("triton", "eager")]
    for name, value in saved[0].items():
        torch.testing.assert_close(value.cpu(), saved[1][name], rtol=1e-3, atol=1e-5, msg=name)


@pytest.mark.parametrize("place", ["_note_losses", "_update"])
def test_a_recording_that_fails_half_way_is_a_plain_step(place, seed, device, tmp_path):
    """Whatever Python has noted of it by then is undone."""
    one = ready(seed, "triton", device, tmp_path)

    class Failing:
        def record(self, work):
            run = one._epochs
            whole = getattr(run, place)

            def fail(*arguments):
                if place == "_update":
                    whole()
                raise RuntimeError("operation not permitted when stream is capturing")

            setattr(run, place, fail)
            try:
                work()
            finally:
                setattr(run, place, whole)

    with backends.use_backend("triton"):
        one._epochs = DeviceEpochs(
            one.model, one.strategy, one.optimizer, one.reg_loss_fn, one._update, one._autocast, one.device, False,
            recorder=Failing(),
        )  # fmt: skip
        for _ in range(2):
            assert np.isfinite(one.train_one_epoch(make_loader(seed))).all()
    assert one._epochs._graphs.n_recorded == 0
    assert one.optimizer.updates.now == 8


@pytest.mark.parametrize("kind", ["esmm", "uwl"])
def test_other_models_and_weightings_are_recorded(kind, seed, device, tmp_path):
    losses = []
    for where, place in (("triton", device), ("eager", "cpu")):
        torch.manual_seed(seed)
        features = make_model().embedding.features
        more = {}
        if kind == "esmm":
            model = ESMM(features[:1], features[1:], {"dims": [4]}, {"dims": [4]})
        else:
            model, more = make_model(), {"adaptive_params": {"method": "uwl"}}
        with backends.use_backend(where):
            one = MTLTrainer(
                model, optimizer_fn=torch.optim.SGD, optimizer_params={"lr": 0.1}, device=place, progress=False,
                embedding_update="exact" if where == "triton" else None, model_path=str(tmp_path), **more,
            )  # fmt: skip
            torch.manual_seed(seed)
            losses.append([one.train_one_epoch(make_loader(seed)) for _ in range(2)])
        if where == "triton":
            assert one._epochs._graphs.n_recorded == 3
    torch.testing.assert_close(torch.tensor(losses[0]), torch.tensor(losses[1]), rtol=1e-5, atol=1e-6)


def test_a_compiled_model_trains_on_eager(seed, device, tmp_path):
    """Under torch.compile every op is eager's; data, losses and scores stay on the device all the same."""
    losses = []
    for where, place, wrap in (
        ("triton", device, lambda model: torch.compile(model, backend="aot_eager")),
        ("eager", "cpu", lambda model: model),
    ):
        torch._dynamo.reset()
        with backends.use_backend(where):
            one = MTLTrainer(
                wrap(make_model()), optimizer_fn=torch.optim.SGD, optimizer_params={"lr": 0.1}, device=place,
                progress=False, model_path=str(tmp_path),
            )  # fmt: skip
            torch.manual_seed(seed)
            losses.append([one.train_one_epoch(make_loader(seed)) for _ in range(2)])
        if where == "triton":
            assert one._epochs._graphs is None
            assert one._epochs._slots is not None
    torch.testing.assert_close(torch.tensor(losses[0]), torch.tensor(losses[1]), rtol=1e-5, atol=1e-6)


def test_what_can_t_be_updated_in_the_backward_is_said(device, tmp_path):
    def make(features, **more):
        torch.manual_seed(0)
        model = MMOE(features, ["classification"] * 2, 2, {"dims": [4]}, [{"dims": [4]}] * 2)
        return MTLTrainer(model, device=device, model_path=str(tmp_path), progress=False, **more)

    plain = [SparseFeature("a", 20, 4)]
    with backends.use_backend("triton"):
        with pytest.raises(ConfigError, match="a feature takes a maximum"):
            make([*plain, SequenceFeature("s", 20, 4, pooling="max")], embedding_update="exact")
        with pytest.raises(ConfigError, match="have a sparse form"):
            make(plain, embedding_update="exact", optimizer_fn=torch.optim.RMSprop, optimizer_params={"lr": 1e-3})
        one = make(plain, embedding_update="lazy")
        x = {"a": torch.arange(8, device=device)}
        one.model.train()
        with sparse_updates(one.model, one.optimizer):
            one.optimizer.begin()
            one.model(x).sum().backward()
            with pytest.raises(ConfigError, match="more than once in a step"):
                one.model(x)
        small = make(plain).optimizer  # which does not pay, and is fit for graphs all the same
        assert isinstance(small, Adam)
        assert not small.tables
