"""When a pack is good, when it is made anew, and what refused input is told."""

import copy
import pickle

import pytest
import torch

from fastmtl.backends import native
from fastmtl.backends.native_inference import Program
from fastmtl.basic.bank import ExpertGate
from fastmtl.basic.batch import ColumnBatch
from fastmtl.basic.features import DenseFeature, SequenceFeature, SparseFeature
from fastmtl.errors import BackendError, BadDataError, BadIdError, ConfigError, NotBuiltError
from fastmtl.models import AITM, ESMM, MMOE, PLE, SharedBottom
from fastmtl.serving import Predictor
from fastmtl.trainers import MTLTrainer
from fastmtl.utils import DataGenerator

from .models import enliven, exact

N = 64
EXPERT, TOWER = {"dims": [16, 8]}, {"dims": [8]}


def features(users=30, items=20):
    return [SparseFeature("user", users, 4), SparseFeature("item", items, 4), DenseFeature("price")]


def mmoe(task_types=("classification", "regression"), **vocabs):
    model = MMOE(features(**vocabs), list(task_types), 3, EXPERT, [TOWER] * len(task_types)).eval()
    enliven(model, torch.Generator().manual_seed(0))
    return model


def batch(n=N, seed=0):
    g = torch.Generator().manual_seed(seed)
    return {
        "user": torch.randint(0, 30, (n,), generator=g),
        "item": torch.randint(0, 20, (n,), generator=g),
        "price": torch.rand(n, generator=g),
    }


def is_exact(got, model, x):
    return (got - exact(model, x)).abs().max() < 1e-5


@pytest.mark.parametrize("step", ["train", "load", "in place", "replaced", "moved"])
def test_a_change_of_the_parameters_is_noticed(step):
    model, x = mmoe(), batch()
    predictor = Predictor(model)
    before = predictor(x)
    with torch.no_grad():
        assert torch.equal(model(x), before)
    if step == "train":
        model.train()
        optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
        for _ in range(2):
            optimizer.zero_grad()
            model(x).sum().backward()
            optimizer.step()
        assert is_exact(predictor(x), copy.deepcopy(model).eval(), x)
        model.eval()
    elif step == "load":
        other = mmoe()
        enliven(other, torch.Generator().manual_seed(7))
        model.load_state_dict(other.state_dict())
    elif step == "in place":
        with torch.no_grad():
            model.bank.weight1.mul_(-1)
    elif step == "replaced":
        model.bank.weight1 = torch.nn.Parameter(-model.bank.weight1.detach())
    else:
        model.bank.weight1.data = -model.bank.weight1.data
    after = predictor(x)
    assert (after - before).abs().max() > 1e-3
    assert is_exact(after, model, x)
    with torch.no_grad():
        assert torch.equal(model(x), after)


def test_running_statistics_alone_are_noticed():
    model, x = mmoe(), batch()
    predictor = Predictor(model)
    before = predictor(x)
    model.train()
    with torch.no_grad():
        for _ in range(3):
            model(x)
    model.eval()
    after = predictor(x)
    assert (after - before).abs().max() > 1e-3
    assert is_exact(after, model, x)


def test_tables_are_read_where_they_are():
    model, x = mmoe(users=300, items=200), batch()  # too large to be folded
    predictor = Predictor(model)
    pack = predictor._current()
    with torch.no_grad():
        model.embedding.table0.neg_()
    assert is_exact(predictor(x), model, x)
    assert predictor._current() is pack


def test_rows_that_wait_for_their_optimizer_are_made_current():
    """The trainer's tables lag behind while it trains; a predictor made before must see them as they should be."""
    torch.manual_seed(0)
    model, x = mmoe(("classification", "classification")), batch(1000)
    y = {name: (torch.rand(1000) < 0.5).float().numpy() for name in ("click", "buy")}
    columns = {name: column.numpy() for name, column in x.items()}
    loader, _, _ = DataGenerator(columns, y).generate_dataloader(split_ratio=[0.3, 0.1], batch_size=16)
    predictor = Predictor(model)
    trainer = MTLTrainer(
        model, optimizer_params={"lr": 0.01, "weight_decay": 0.1}, n_epoch=1, progress=False, embedding_update="exact"
    )
    trainer.fit(loader, loader)
    got = predictor(x)
    model.eval()
    assert is_exact(got, model, x)


def test_what_autograd_does_not_see_needs_a_refresh():
    model, x = mmoe(), batch()
    predictor = Predictor(model)
    model.bank.weight1.data.neg_()
    predictor.refresh()
    assert is_exact(predictor(x), model, x)


def test_training_is_never_packed():
    model, x = mmoe(), batch()
    with torch.no_grad():
        packed = model(x)
        model.train()
        assert (model(x) - packed).abs().max() > 1e-3  # by batch statistics
        model.eval()
        model.towers.train()
        assert (model(x) - packed).abs().max() > 1e-3
    model.eval()
    assert model(x).requires_grad


def test_hooks_still_run():
    model, x, seen = mmoe(), batch(), []
    with torch.no_grad():
        model(x)
        handle = model.bank.register_forward_hook(lambda module, args, out: seen.append(out.shape))
        model(x)
        handle.remove()
        model(x)
    assert seen == [(2, N, 8)]


def test_other_models_are_run_as_they_are():
    class Doubled(MMOE):
        def _logits(self, row):
            return 2 * super()._logits(row)

    doubled = Doubled(features(), ["regression"], 3, EXPERT, [TOWER]).eval()
    plain = MMOE(features(), ["regression"], 3, EXPERT, [TOWER]).eval()
    plain.load_state_dict(doubled.state_dict())
    with torch.no_grad():
        torch.testing.assert_close(doubled(batch()), 2 * plain(batch()), rtol=1e-5, atol=1e-6)
    with pytest.raises(BackendError, match="_logits of its own"):
        Predictor(doubled)
    swapped = mmoe()
    swapped.bank.__class__ = Louder
    with torch.no_grad():
        assert is_exact(swapped(batch()), swapped, batch())
    with pytest.raises(BackendError, match="Louder is not ExpertGate itself"):
        Predictor(swapped)


class Louder(ExpertGate):
    def forward(self, x):
        return 3 * super().forward(x)


@pytest.mark.parametrize("form", ["dict", "batch", "matrices", "model"])
def test_a_bad_id_is_named(form):
    model, x = mmoe(), batch()
    predictor = Predictor(model)
    x["item"][5] = 20
    forms = {
        "dict": lambda: predictor(x),
        "batch": lambda: predictor(ColumnBatch.from_columns(x)),
        "matrices": lambda: predictor.run(torch.stack([x["user"], x["item"]], 1), x["price"][:, None]),
        "model": torch.no_grad()(lambda: model(x)),
    }
    with pytest.raises(BadIdError, match=r"'item': id 20 in row 5 .* vocabulary of 20"):
        forms[form]()


def test_the_first_bad_id_of_many_tiles_is_named(threads):
    model = mmoe()
    x = batch(50_000)
    x["item"][[40_000, 700, 41_000]] = -1
    x["user"][49_999] = 30
    with pytest.raises(BadIdError) as ordinary:
        model(x)
    for n in (1, 2, 4):
        threads(n)
        with pytest.raises(BadIdError) as found:
            Predictor(model)(x)
        assert str(found.value) == str(ordinary.value)


def test_refused_data_is_named():
    predictor, x = Predictor(mmoe()), batch()
    with pytest.raises(BadDataError, match="row 3 of the batch is NaN"):
        predictor(x | {"price": torch.where(torch.arange(N) == 3, torch.nan, x["price"])})
    with pytest.raises(BadDataError, match="no such column"):
        predictor({"user": x["user"], "price": x["price"]})
    with pytest.raises(BadDataError, match=r"'price': the data has 2 values a row"):
        predictor(x | {"price": torch.rand(N, 2)})
    ids, dense = torch.stack([x["user"], x["item"]], 1), x["price"][:, None]
    with pytest.raises(BadDataError, match=r"ids must be \[B, 2\], got \[64, 1\]"):
        predictor.run(ids[:, :1], dense)
    with pytest.raises(BadDataError, match=r"dense must be \[B, 1\], got None"):
        predictor.run(ids)
    with pytest.raises(BadDataError, match="row 0 of the batch is NaN or infinite"):
        predictor.run(ids, dense * torch.inf)
    with pytest.raises(BadDataError, match="'user': its column has 3 rows, the others of the batch have 64"):
        predictor(x | {"user": x["user"][:3]})
    with pytest.raises(BadDataError, match="'price': its column has 3 rows, the others of the batch have 64"):
        predictor.run(ids, dense[:3])


def test_every_form_of_a_batch_gives_the_same_bits():
    predictor, x = Predictor(mmoe()), batch()
    want = predictor(x)
    assert torch.equal(predictor(ColumnBatch.from_columns(x)), want)
    assert predictor.id_columns == ["user", "item"]
    assert predictor.dense_columns == ["price"]
    ids, dense = torch.stack([x["user"], x["item"]], 1), x["price"][:, None]
    for matrix in (ids, ids.int(), ids.T.contiguous().T, ids.short()):
        assert torch.equal(predictor.run(matrix, dense), want)
    for column in (dense.double(), dense.expand(-1, 1)):
        assert torch.equal(predictor.run(ids, column), want)
    assert torch.equal(predictor({name: c[:, None] for name, c in x.items()}), want)
    assert torch.equal(predictor(x | {"user": x["user"].int(), "item": x["item"].to(torch.uint8)}), want)


@pytest.mark.parametrize("pooling", ["mean", "sum", "max"])
def test_sequences_and_dense_alone(pooling):
    sequence = SequenceFeature("items", 9, embed_dim=4, pooling=pooling, padding_idx=0)
    model = MMOE([sequence, DenseFeature("price")], ["regression"], 2, EXPERT, [TOWER]).eval()
    enliven(model, torch.Generator().manual_seed(0))
    for length in (1, 3, 7):
        x = {"items": torch.randint(0, 9, (N, length)), "price": torch.rand(N)}
        assert is_exact(Predictor(model)(x), model, x)
    with pytest.raises(ConfigError, match="sequence"):
        Predictor(model).run(x["items"], x["price"][:, None])
    numbers = SharedBottom([DenseFeature("a", 3)], ["regression"], EXPERT, [TOWER]).eval()
    x = {"a": torch.randn(N, 3)}
    assert is_exact(Predictor(numbers).run(None, x["a"]), numbers, x)


def test_no_rows_give_no_predictions():
    towers = [TOWER, {"dims": []}]
    models = [
        SharedBottom(features(), ["classification"] * 2, EXPERT, towers),
        mmoe(),
        PLE(features(), ["classification"] * 2, 2, 1, 1, EXPERT, towers),
        AITM(features(), 2, EXPERT, [TOWER] * 2),
        ESMM(features()[:1], features()[1:], TOWER, {"dims": []}),
    ]
    for model, n_outputs in zip(models, (2, 2, 2, 2, 3), strict=True):
        model.eval()
        with torch.no_grad():
            assert model(batch(0)).shape == (0, n_outputs)
            assert is_exact(model(batch()), model, batch())


def test_what_can_not_be_packed_says_so():
    with pytest.raises(ConfigError, match="fp32, bf16"):
        Predictor(mmoe(), "fp16")
    with pytest.raises(NotBuiltError):
        Predictor(SharedBottom(features=["a", "b"], hidden_units=[4], task_hidden_units=[2], num_tasks=2))
    with pytest.raises(BackendError, match="float64"):
        Predictor(mmoe().double())


def test_copies_pack_for_themselves():
    model, x = mmoe(), batch()
    predictor = Predictor(model)
    with torch.no_grad():
        model(x)
    want = predictor(x)
    for twin in (copy.deepcopy(predictor), pickle.loads(pickle.dumps(predictor))):
        assert torch.equal(twin(x), want)
        with torch.no_grad():
            twin.model.bank.weight1.neg_()
        assert (twin(x) - want).abs().max() > 1e-3
        assert torch.equal(predictor(x), want)


def test_a_pack_is_given_back():
    program = Program(3)
    logits = program.layer(*layer(), [0])
    program.output("logit", logits[0])
    packed = program.pack(False)
    number = packed._number
    args = ([], [], [torch.ones(2, 3)], torch.empty(0, 12, dtype=torch.int64))
    assert packed.run(*args).shape == (2, 1)
    del packed
    with pytest.raises(RuntimeError, match=f"no packed model has the number {number}"):
        torch.ops.fastmtl.inference_run.default(number, *args)


def layer():
    bank = SharedBottom([DenseFeature("a", 3)], ["regression"], {"dims": [3]}, [{"dims": [2]}]).towers.banks[0]
    return bank.spec, bank.params()


def test_a_plan_that_does_not_fit_is_refused():
    """Plans come from our own code, but a wrong one must raise and never read out of bounds."""
    model = AITM(features(), 2, EXPERT, [TOWER] * 2).eval()
    plans = []
    real = torch.ops.fastmtl.inference_new.default

    class Recorder:
        default = staticmethod(lambda *args: plans.append(args) or real(*args))

    torch.ops.fastmtl.inference_new = Recorder
    try:
        Predictor(model)
    finally:
        torch.ops.fastmtl.inference_new = real.overloadpacket if hasattr(real, "overloadpacket") else real
    ((plan, learned, running, bf16),) = plans
    x = batch()
    lookup = native.bag_plan(model.embedding.spec_of(model.embedding.features), (0, 1, 2))
    ids, dense = [torch.stack([x["user"], x["item"]], 1)], [x["price"][:, None]]
    refused = 0
    for i in range(len(plan)):
        for value in (-1, 2, 1000):
            wrong = plan.clone()
            wrong[i] = value
            try:
                number = real(wrong, learned, running, bf16)
                out = torch.ops.fastmtl.inference_run.default(number, model.embedding.weights(), ids, dense, lookup)
                torch.ops.fastmtl.inference_free.default(number)
                assert out.shape == (N, 2)
            except RuntimeError:
                refused += 1
    assert refused > 2 * len(plan)  # what is left names another logit, matrix or activation
    with pytest.raises(RuntimeError):
        real(plan, learned[:-1], running, bf16)
    with pytest.raises(RuntimeError):
        real(plan[:-1], learned, running, bf16)
