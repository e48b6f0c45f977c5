"""Predictions that repeat the launches of an earlier call: the same numbers for other tensors, errors, threads."""

import threading

import pytest
import torch
from test_triton_inference import MODELS, batch, in_float64, make
from triton_cases import staged_logits

from fastmtl.backends.deferred import Watch, watching
from fastmtl.backends.triton import configs, folded_stages, inference, launch, replay
from fastmtl.basic.features import DenseFeature, SparseFeature
from fastmtl.errors import BadDataError, BadIdError
from fastmtl.models import MMOE
from fastmtl.serving import Predictor

pytestmark = pytest.mark.usefixtures("triton_backend")


@pytest.fixture
def repeats(monkeypatch):
    """A list that is longer by one for each call that repeated another's launches."""
    done = []
    call = replay.Replay.__call__
    monkeypatch.setattr(replay.Replay, "__call__", lambda self, *given: (done.append(self), call(self, *given))[1])
    return done


def plain_model(device, oov="raise"):
    """Without sequences: one column a feature."""
    torch.manual_seed(7)
    features = [
        SparseFeature("user", 30, embed_dim=4, oov=oov),
        SparseFeature("item", 9, embed_dim=8),
        SparseFeature("shop", 90, embed_dim=4),
        DenseFeature("age"),
        DenseFeature("price"),
    ]
    model = MMOE(features, ["classification", "regression"], 3, {"dims": [9, 6]}, [{"dims": [7, 5]}] * 2)
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            if tensor.is_floating_point():
                tensor.add_(torch.rand_like(tensor), alpha=0.3)
    return model.eval().to(device)


def plain_batch(seed, rows, device):
    rng = torch.Generator().manual_seed(seed)
    ids = {name: torch.randint(0, v, (rows,), generator=rng) for name, v in (("user", 30), ("item", 9), ("shop", 90))}
    dense = {name: torch.rand(rows, generator=rng) for name in ("age", "price")}
    return {name: column.to(device) for name, column in (ids | dense).items()}


@pytest.mark.parametrize("name", MODELS)
def test_any_model_again(name, seed, device, repeats):
    model = make(name, device)
    for i, rows in enumerate((37, 37, 5, 37, 5, 5)):
        x = batch(seed + i, rows, device)
        with torch.no_grad():
            out = model(x)
        torch.testing.assert_close(out.cpu().double(), in_float64(model, x), rtol=1e-5, atol=1e-5)
    # two are repeated where a call is launches alone: ESMM multiplies its outputs, others have layers as in training
    assert len(repeats) == (0 if name in ("esmm", "deep", "dice", "linear towers") else 2)


def test_what_changes_between_calls(seed, device, repeats):
    """Ids of 32 bits, columns as one matrix, precisions, tables that are trained on or moved, weights that moved."""
    model = plain_model(device)
    predict = Predictor(model)

    def same(x, call=model):
        with torch.no_grad():
            torch.testing.assert_close(call(x).cpu().double(), in_float64(model, x), rtol=1e-5, atol=1e-5)

    for i in range(4):
        x = plain_batch(seed + i, 21, device)
        same(x)
        same({name: column.int() if column.dtype is torch.int64 else column for name, column in x.items()})
        same({name: column.double() if name == "age" else column for name, column in x.items()})
        same(x, lambda x: predict.run(torch.stack([x[n] for n in predict.id_columns], 1),
                                      torch.stack([x[n] for n in predict.dense_columns], 1)))  # fmt: skip
        with torch.no_grad(), torch.autocast(device.type, torch.bfloat16):
            rounded = model(x)
        torch.testing.assert_close(rounded.cpu().double(), in_float64(model, x), rtol=0.05, atol=0.05)
    assert len(repeats) >= 10
    x = plain_batch(seed, 21, device)
    with torch.no_grad():
        model.embedding.table0.mul_(1.5)  # in place: read where it is
    same(x)
    model.embedding.table0.data = model.embedding.table0.data * 1.5  # elsewhere
    for _ in range(3):
        same(x)
    with torch.no_grad():
        model.towers.banks[0].out_bias.add_(1.0)
    for _ in range(3):
        same(x)


def test_bad_ids_and_data_are_told_all_the_same(seed, device, repeats):
    model, x = plain_model(device), plain_batch(seed, 21, device)
    with torch.no_grad():
        for _ in range(3):
            good = model(x)
        assert repeats
        for row, bad in ((4, 30), (20, -1)):
            wrong = {**x, "user": x["user"].clone()}
            wrong["user"][row] = bad
            with pytest.raises(BadIdError, match=f"'user': id {bad} in row {row} "):
                model(wrong)
        with pytest.raises(BadDataError, match="no such column"):
            model({name: column for name, column in x.items() if name != "age"})
        assert torch.equal(model(x), good)
        lenient = plain_model(device, oov="zero")
        first = lenient(wrong)
        assert torch.equal(lenient(wrong), first)
        assert torch.equal(lenient(wrong), first)


def test_who_watches_is_told(seed, device, repeats):
    model, x = plain_model(device), plain_batch(seed, 21, device)
    wrong = {**x, "user": x["user"].clone()}
    wrong["user"][3] = 77
    watch = Watch(device)
    with torch.no_grad(), watching(watch):
        for _ in range(3):
            model(x)
        assert len(repeats) == 1
        assert watch.wait()[0] < 0
        model(wrong)
        assert watch.wait()[1:4] == [3, 0, 77]
    assert len(repeats) == 2


def test_threads_share_one(seed, device):
    """Each with memory of its own."""
    if device.type == "cpu":
        pytest.skip("Triton's interpreter runs one kernel at a time")
    model = plain_model(device)
    batches = [plain_batch(seed + i, 21, device) for i in range(4)]
    with torch.no_grad():
        right = [model(x) for x in batches]
    wrong = []

    def work(i):
        with torch.no_grad():
            for _ in range(5):
                if not torch.equal(model(batches[i]), right[i]):
                    wrong.append(i)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_calls_of_many_sizes_are_not_all_kept(seed, device, monkeypatch):
    monkeypatch.setattr(inference, "_MOST_KEPT", 3)
    model = plain_model(device)
    with torch.no_grad():
        for rows in (1, 2, 3, 4, 5, 4, 4):
            x = plain_batch(seed, rows, device)
            torch.testing.assert_close(model(x).cpu().double(), in_float64(model, x), rtol=1e-5, atol=1e-5)
    (pack,) = model._packs.values()
    assert 1 <= len(pack._program._kept) <= 3


def test_what_was_computed_between_launches_is_not_repeated(seed, device):
    """A tensor that is read before a launch has written it."""
    model, x = plain_model(device), plain_batch(seed, 5, device)
    with torch.no_grad(), launch.noting() as launches:
        out = model(x)
    (pack,) = model._packs.values()
    ids = launches[0].arguments["Ids_ptr"]
    constants = [
        *pack._program._constants,
        *model.embedding.weights(),
        *(one.arguments["Bad_ptr"] for one in launches[:2]),
    ]
    constants += [one.arguments["Slots_ptr"] for one in launches[:2]]
    with pytest.raises(ValueError, match="Dense_ptr was made by other means"):
        replay.Replay(launches, {"ids": ids, "out": out}, constants)


def test_an_op_among_the_launches(seed, device, repeats, monkeypatch):
    """The layer in CUDA C++ is called again with new rows and a new result (in its place: float64)."""
    layers, calls = [], []

    def staged(layer, towers):
        assert folded_stages.why_not(layer, towers) is None
        layers.append((layer, towers))
        return list(folded_stages.stages_of(layer, towers))

    def run(x, packed, is_probability, activation, out):
        assert [len(packed), folded_stages.ACTIVATIONS[activation]] == [9, "silu"]
        logits = staged_logits(x.double(), *layers[-1])
        out.copy_(torch.where(is_probability, logits.sigmoid(), logits))
        calls.append(out)

    operation = launch.Operation("folded", run, inference._ON_HOPPER.arg_names)
    monkeypatch.setattr(inference, "_staged", staged)
    monkeypatch.setattr(inference, "_ON_HOPPER", operation)
    monkeypatch.setattr(configs, "PROGRAMS", 1)
    torch.manual_seed(seed)
    features = [SparseFeature("user", 30, embed_dim=40), SparseFeature("item", 9, embed_dim=30), DenseFeature("age")]
    kinds, layer, tower = ["classification", "regression"], [130, 70], [40, 20]
    options = {"activation": "silu"}
    model = MMOE(features, kinds, 3, {"dims": layer, **options}, [{"dims": tower, **options}] * 2).eval().to(device)
    predict, outs = Predictor(model, "bf16"), []
    for i in range(4):
        ids = plain_batch(seed + i, 21, device)
        columns = {name: ids[name] for name in ("user", "item", "age")}
        outs.append(predict(columns))
        torch.testing.assert_close(outs[-1].cpu().double(), in_float64(model, columns), rtol=0.02, atol=0.02)
    assert len(repeats) == 2
    assert [out.data_ptr() for out in calls] == [out.data_ptr() for out in outs]
    monkeypatch.setattr(configs, "PROGRAMS", 132)
    rows = torch.empty(1, 66 * 128 + 1, 72, dtype=torch.bfloat16, device=device)
    assert inference._fits(rows)
    assert not inference._fits(rows[:, 1:])  # few tiles
    assert not inference._fits(rows[:, :, 1:])  # 16 bytes cannot be loaded at a time
