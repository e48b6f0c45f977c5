"""Features that torch-rechub refuses or confuses: mixed and automatic widths, concat, dense ESMM, a list used twice."""

import numpy as np
import pytest
import torch
from devices import call, fetch
from torch.nn import functional as F

from behaviour.helpers import KINDS, data, features, loader, model, same_state, trainer
from fastmtl.basic.features import DenseFeature, SequenceFeature, SparseFeature
from fastmtl.basic.initializers import RandomNormal
from fastmtl.errors import FastMTLError

INIT = RandomNormal(0, 0.3)


def _rows(n=130):
    x, y = data(n)
    return {**x, "history": np.where(x["history"] == 0, -1, x["history"])}, y


def _fitted(made, rows, path, n_task=2):
    log = np.array(trainer(made, path, ("classification",) * n_task, n_epoch=2).fit(loader(*rows), loader(*rows)))
    assert np.isfinite(log).all()
    return log


@pytest.mark.parametrize("kind", KINDS)
def test_mixed_widths(kind, backend, tmp_path):
    """The looked-up row is the tables' rows side by side, then the dense columns."""
    listed = [
        SparseFeature("user", 50, 2, initializer=INIT),
        DenseFeature("profile", 3),
        SparseFeature("item", 80, 7, initializer=INIT),
        SequenceFeature("history", 80, 7, pooling="sum", shared_with="item"),
        DenseFeature("age"),
    ]
    made = model(kind, features=listed)
    (x, y) = _rows()
    batch, _ = next(iter(loader(x, y)))
    state = fetch(made.state_dict())
    user, item = (state[f"embedding.embed_dict.{name}.weight"] for name in ("user", "item"))
    history = torch.stack([item[row[row >= 0]].sum(0) for row in batch["history"]])
    expected = torch.cat(
        [user[batch["user"]], item[batch["item"]], history, batch["profile"], batch["age"].unsqueeze(1)], dim=1
    )
    torch.testing.assert_close(call(made.embedding, batch, listed, squeeze_dim=True), expected, rtol=1e-6, atol=1e-6)
    y = y if kind != "ESMM" else np.stack([y[:, 0], y[:, 1], y[:, 0] * y[:, 1]], axis=1)
    _fitted(made, (x, y), tmp_path, n_task=y.shape[1])


def test_automatic_widths(backend, tmp_path):
    listed = [
        SparseFeature("user", 50),
        SparseFeature("item", 1000),
        SequenceFeature("history", 1000, shared_with="item"),
    ]
    made = model(features=listed)
    shapes = {name: tuple(value.shape) for name, value in made.state_dict().items() if name.startswith("embedding.")}
    # floor(6 * V ** 0.25)
    assert shapes == {"embedding.embed_dict.user.weight": (50, 15), "embedding.embed_dict.item.weight": (1000, 33)}
    assert made.state_dict()["bottom_mlp.mlp.0.weight"].shape == (12, 15 + 33 + 33)
    _fitted(made, _rows(), tmp_path)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("max_len", [5, None])
def test_concat_pooling(kind, max_len, backend, tmp_path):
    """All L vectors side by side, padding as zeros; without ``max_len`` the first batch tells L."""
    listed = [
        SparseFeature("user", 50, 4, initializer=INIT),
        SequenceFeature("history", 80, 3, pooling="concat", max_len=max_len, initializer=INIT),
    ]
    x, y = _rows()
    batch, _ = next(iter(loader(x, y)))
    made = model(kind, features=listed)
    assert made.is_built == (max_len is not None)
    assert call(made, batch).shape[0] == 64
    state = fetch(made.state_dict())
    table = state["embedding.embed_dict.history.weight"]
    ids = batch["history"].long()
    vectors = F.embedding(ids.clamp(min=0), table) * (ids >= 0).unsqueeze(-1)
    expected = torch.cat([state["embedding.embed_dict.user.weight"][batch["user"]], vectors.flatten(1)], dim=1)
    torch.testing.assert_close(call(made.embedding, batch, listed, squeeze_dim=True), expected, rtol=0, atol=0)
    n_task = 3 if kind == "ESMM" else 2
    y = np.stack([y[:, 0], y[:, 1], y[:, 0] * y[:, 1]], axis=1)[:, :n_task]
    fresh = model(kind, features=listed)
    _fitted(fresh, (x, y), tmp_path, n_task=n_task)


def test_esmm_takes_dense_features(backend, tmp_path):
    listed = features(history=False)
    made = model("ESMM", features=listed)
    assert made.state_dict()["tower_ctr.mlp.0.weight"].shape == (8, 4 + 4 + 1 + 3)
    log = _fitted(made, data(256, n_task=3), tmp_path, n_task=3)
    assert log[-1, 1] < log[0, 1]


@pytest.mark.parametrize("kind", KINDS)
def test_two_models_from_one_list_share_nothing(kind, tmp_path):
    listed = features()
    first, second = model(kind, features=listed), model(kind, features=listed)
    storages = [{p.data_ptr() for p in made.parameters()} for made in (first, second)]
    assert not storages[0] & storages[1]
    n_task = 3 if kind == "ESMM" else 2
    untouched = model(kind, features=listed)
    assert same_state(first, untouched)
    trainer(first, tmp_path, ("classification",) * n_task).train_one_epoch(loader(*data(128, n_task=n_task)))
    assert same_state(second, untouched)
    assert not same_state(first, untouched)


def test_a_shared_table_that_does_not_exist_is_named():
    with pytest.raises(FastMTLError, match=r"history.*nothing"):
        model(features=[SparseFeature("user", 50, 4), SequenceFeature("history", 80, 4, shared_with="nothing")])
