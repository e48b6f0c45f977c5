"""MTLTrainer chooses sparse updates where they are possible and pay, and trains to the dense optimizer's numbers."""

import copy
import pickle
import warnings

import pytest
import torch

from fastmtl import backend
from fastmtl.basic.features import DenseFeature, SequenceFeature, SparseFeature
from fastmtl.errors import ConfigError
from fastmtl.models import ESMM, MMOE
from fastmtl.trainers import MTLTrainer
from fastmtl.trainers import optimizer as trainer_optimizer

VOCAB = 400
OPTIMIZERS = [
    (torch.optim.Adam, {"lr": 1e-2, "weight_decay": 1e-4}),
    (torch.optim.AdamW, {"lr": 1e-2}),
    (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9}),
    (torch.optim.Adagrad, {"lr": 0.05}),
]


def make_model(seed):
    torch.manual_seed(seed)
    features = [
        SparseFeature("item", VOCAB, 16),
        SparseFeature("user", VOCAB, 8, padding_idx=0),
        SequenceFeature("seen", VOCAB, 16, pooling="mean", shared_with="item"),
        DenseFeature("price"),
    ]
    return MMOE(features, ["classification"] * 2, 2, {"dims": [8]}, [{"dims": [4]}] * 2)


def batches(seed, n=8, size=32):
    generator = torch.Generator().manual_seed(seed)
    return [
        (
            {
                "item": torch.randint(0, VOCAB, (size,), generator=generator),
                "user": torch.randint(0, VOCAB, (size,), generator=generator),
                "seen": torch.randint(0, VOCAB, (size, 3), generator=generator),
                "price": torch.rand(size, generator=generator),
            },
            torch.randint(0, 2, (size, 2), generator=generator).float(),
        )
        for _ in range(n)
    ]


def is_sparse(trainer):
    """Whether the trainer's tables are updated where they were looked up."""
    return bool(getattr(trainer.optimizer, "tables", []))


def trained(seed, folder, update, fn=torch.optim.Adam, settings=None, epochs=3, nudge=None, **more):
    """``nudge``: a seed by which each number of the first weights is moved by its last bit, or not at all."""
    model = make_model(seed)
    if nudge is not None:
        generator = torch.Generator().manual_seed(nudge)
        with torch.no_grad():
            for p in model.parameters():
                p.mul_(1 + (torch.randint(0, 3, p.shape, generator=generator) - 1) * 2.0**-23)
    trainer = MTLTrainer(
        model, optimizer_fn=fn, optimizer_params=settings, embedding_update=update, model_path=str(folder), **more
    )
    losses = [trainer.train_one_epoch(batches(seed)) for _ in range(epochs)]
    return trainer, losses


def apart(losses, others):
    """The largest relative difference."""
    a, b = torch.tensor(losses), torch.tensor(others)
    return ((a - b).abs() / b.abs()).max().item()


@pytest.mark.parametrize(("fn", "settings"), OPTIMIZERS, ids=lambda value: getattr(value, "__name__", ""))
def test_sparse_training_is_dense_training(fn, settings, seed, tmp_path):
    sparse, losses = trained(seed, tmp_path, "exact", fn, settings)
    dense, right = trained(seed, tmp_path, "dense", fn, (settings or {}) | {"fused": True})
    assert is_sparse(sparse)
    assert isinstance(sparse.optimizer, fn)
    assert type(dense.optimizer) is fn
    assert not sparse.model.state_dict()["embedding.embed_dict.user.weight"][0].any()
    if apart(losses, right) > 5e-5:
        # one seed in some hundreds: a gradient that is nearly 0 changes its sign by rounding, and Adam moves the weight
        # the other way; then torch's own runs from weights that differ in the last bit are as far from one another
        near = [trained(seed, tmp_path, "dense", fn, (settings or {}) | {"fused": True}, nudge=i)[1] for i in range(8)]
        assert apart(losses, right) <= 2 * max(apart(other, right) for other in near)
        return
    # after 24 steps torch's own implementations differ by up to 1e-4: a rounding decides where a weight at zero goes
    for (name, value), other in zip(sparse.model.state_dict().items(), dense.model.state_dict().values(), strict=True):
        torch.testing.assert_close(value, other, rtol=1e-3, atol=1e-5, msg=name)


def test_large_tables_are_trained_sparsely(seed, tmp_path, monkeypatch):
    assert not is_sparse(trained(seed, tmp_path, None, epochs=0)[0])
    monkeypatch.setattr(trainer_optimizer, "LARGE_TABLES", 1000)
    assert is_sparse(trained(seed, tmp_path, None, epochs=0)[0])
    for more in (
        {"adaptive_params": {"method": "gradnorm"}},
        {"regularization_params": {"embedding_l2": 1e-4}},
        {"fn": torch.optim.RMSprop, "settings": {"lr": 1e-3}},
        {"settings": {"lr": 1e-3, "amsgrad": True}},
    ):
        assert not is_sparse(trained(seed, tmp_path, None, epochs=0, **more)[0])
    with backend.use_backend("eager"):
        assert not is_sparse(trained(seed, tmp_path, None, epochs=0)[0])


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"update": "sometimes"}, "use 'exact', 'lazy' or 'dense'"),
        ({"adaptive_params": {"method": "metabalance"}}, "one backward a step"),
        ({"regularization_params": {"embedding_l1": 1e-4}}, "no penalty of the tables"),
        ({"fn": torch.optim.RMSprop, "settings": {"lr": 1e-3}}, "have a sparse form"),
        ({"settings": {"lr": 1e-3, "amsgrad": True}}, "amsgrad"),
    ],
)
def test_what_is_asked_for_and_impossible_is_an_error(more, message, tmp_path):
    more = {"update": "exact"} | more
    with pytest.raises(ConfigError, match=message):
        trained(0, tmp_path, epochs=0, **more)


def test_lazy_training_leaves_other_rows_alone(seed, tmp_path):
    model = make_model(seed)
    start = copy.deepcopy(model.state_dict())
    trainer = MTLTrainer(model, embedding_update="lazy", model_path=str(tmp_path))
    data = batches(seed, 2)
    trainer.train_one_epoch(data)
    key = "embedding.embed_dict.user.weight"
    seen = torch.cat([x["user"] for x, _ in data]).unique()
    moved = (model.state_dict()[key] != start[key]).any(dim=1).nonzero()[:, 0]
    assert moved.tolist() == [row for row in seen.tolist() if row != 0]


def test_inside_an_epoch_too_everything_that_is_read_is_current(seed, tmp_path):
    """state_dict, copies, pickles and evaluations after a few steps hold what a dense optimizer's would."""
    model, dense_model = make_model(seed), make_model(seed)
    data, settings = batches(seed), {"lr": 1e-2, "weight_decay": 1e-2}
    trainers = [
        MTLTrainer(m, embedding_update=update, optimizer_params=settings, model_path=str(tmp_path))
        for m, update in ((model, "exact"), (dense_model, "dense"))
    ]
    with trainer_optimizer.sparse_updates(model, trainers[0].optimizer):
        for number, (x, y) in enumerate(data):
            for trainer in trainers:
                trainer._step(x, y)
            gradients = [dict(m.named_gradients()) for m in (model, dense_model)] if number == 3 else []
            for name in gradients and gradients[0]:
                torch.testing.assert_close(gradients[0][name], gradients[1][name], rtol=1e-5, atol=1e-7)
            for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
                assert copied.embedding.updater is None
                right = dense_model.state_dict()
                for name, value in copied.state_dict().items():
                    torch.testing.assert_close(value, right[name], rtol=1e-4, atol=1e-6, msg=name)
            with torch.no_grad():
                model.eval(), dense_model.eval()
                torch.testing.assert_close(model(x), dense_model(x), rtol=1e-5, atol=1e-6)
                model.train(), dense_model.train()
    assert model.embedding.updater is None


def test_fit_saves_and_schedules(seed, tmp_path):
    logs = []
    for update in ("exact", "dense"):
        trainer = MTLTrainer(
            make_model(seed), embedding_update=update, optimizer_params={"lr": 1e-2, "weight_decay": 1e-3}, n_epoch=3,
            scheduler_fn=torch.optim.lr_scheduler.StepLR, scheduler_params={"step_size": 1, "gamma": 0.3},
            model_path=str(tmp_path), progress=False,
        )  # fmt: skip
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            logs.append(trainer.fit(batches(seed), batches(seed + 1, 4), mode=update))
        assert trainer.optimizer.param_groups[0]["lr"] == pytest.approx(1e-2 * 0.3**3)
    torch.testing.assert_close(torch.tensor(logs[0]), torch.tensor(logs[1]), rtol=1e-4, atol=1e-5)
    saved = [torch.load(tmp_path / f"model_{update}_0.pth", weights_only=True) for update in ("exact", "dense")]
    for name, value in saved[0].items():
        torch.testing.assert_close(value, saved[1][name], rtol=1e-3, atol=1e-5, msg=name)


def test_two_lookups_in_one_step(seed, tmp_path):
    """ESMM reads user and item features apart; their tables are of one width and so of one parameter."""
    results = []
    for update in ("exact", "dense"):
        torch.manual_seed(seed)
        features = [SparseFeature("user", VOCAB, 8), SparseFeature("item", VOCAB, 8)]
        model = ESMM([features[0]], [features[1]], {"dims": [8]}, {"dims": [8]})
        trainer = MTLTrainer(model, embedding_update=update, model_path=str(tmp_path))
        data = [({name: x[name] for name in ("user", "item")}, y) for x, y in batches(seed)]
        results.append((trainer.train_one_epoch(data), model.state_dict()))
    torch.testing.assert_close(results[0][0], results[1][0], rtol=1e-6, atol=0)
    for name, value in results[0][1].items():
        torch.testing.assert_close(value, results[1][1][name], rtol=1e-5, atol=1e-7, msg=name)
