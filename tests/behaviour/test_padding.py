"""Padding adds nothing, counts nothing and learns nothing."""

import numpy as np
import pytest
import torch
from devices import call, fetch

from behaviour.helpers import ITEMS, data, features, loader, model, trainer
from fastmtl.basic.features import SequenceFeature, SparseFeature
from fastmtl.basic.initializers import RandomNormal

INIT = RandomNormal(0, 0.3)


def _lookup(feature, ids):
    """The pooled row of one sequence feature, and its table."""
    made = model(features=[SparseFeature("user", 3, 4), feature])
    batch = {"user": torch.zeros(len(ids), dtype=torch.int64), "history": torch.tensor(ids)}
    row = call(made.embedding, batch, made.features, squeeze_dim=True)[:, 4:]
    return row.detach(), fetch(made.state_dict())["embedding.embed_dict.history.weight"]


@pytest.mark.parametrize("padding_idx", [None, 0, 9])
def test_minus_one_is_padding(padding_idx, backend):
    """torch-rechub masks -1 by default and then looks it up, an IndexError."""
    for pooling in ("mean", "sum"):
        feature = SequenceFeature("history", 10, 4, pooling=pooling, padding_idx=padding_idx, initializer=INIT)
        row, table = _lookup(feature, [[1, 2, -1, -1], [-1, -1, -1, -1], [3, -1, 3, 5], [4, 4, 4, 4]])
        expected = torch.stack([table[[1, 2]].sum(0), torch.zeros(4), table[[3, 3, 5]].sum(0), table[[4] * 4].sum(0)])
        if pooling == "mean":
            expected /= torch.tensor([[2.0], [1.0], [3.0], [4.0]])
        torch.testing.assert_close(row, expected, rtol=1e-6, atol=1e-6)


def test_padding_idx_is_not_counted_by_the_mean(backend):
    feature = SequenceFeature("history", 10, 4, padding_idx=0, initializer=INIT)
    row, table = _lookup(feature, [[1, 2, 0, 0], [0, 0, 0, 0], [0, 7, -1, 0]])
    torch.testing.assert_close(
        row, torch.stack([table[[1, 2]].mean(0), torch.zeros(4), table[7]]), rtol=1e-6, atol=1e-6
    )


def test_without_padding_idx_zero_is_an_id_like_any_other(backend):
    row, table = _lookup(SequenceFeature("history", 10, 4, initializer=INIT), [[1, 0, -1, -1]])
    torch.testing.assert_close(row[0], table[[1, 0]].mean(0), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("optimizer", [torch.optim.Adam, torch.optim.AdamW, torch.optim.SGD])
def test_padding_rows_stay_zero(optimizer, backend, tmp_path):
    """Also the row that a sparse feature shares with a padded history, under weight decay."""
    x, y = data(256)
    x["item"][::7] = 0
    trained = model(features=features())
    name = "embedding.embed_dict.item.weight"
    assert (trained.state_dict()[name][0] == 0).all()
    runner = trainer(trained, tmp_path, optimizer_fn=optimizer, optimizer_params={"lr": 1e-2, "weight_decay": 1e-2})
    for _ in range(5):
        runner.train_one_epoch(loader(x, y))
    table = trained.state_dict()[name]
    assert table.shape == (ITEMS, 4)
    assert (table[0] == 0).all()
    assert (table[1:] != 0).any(dim=1).all()


@pytest.mark.parametrize("kind", ["sparse", "sum", "mean"])
def test_padding_rows_stay_zero_whoever_shares_the_table(kind, backend, tmp_path):
    """The second feature reads the padded table and names no padding of its own."""
    x, y = data(256)
    x["item"][::7] = 0
    if kind == "sparse":
        sharing, x["history"] = SparseFeature("history", ITEMS, 4, shared_with="item"), x["history"][:, 4]
    else:
        sharing = SequenceFeature("history", ITEMS, 4, pooling=kind, shared_with="item")
    assert (x["history"] == 0).any()
    trained = model(features=[SparseFeature("item", ITEMS, 4, padding_idx=0, initializer=INIT), sharing])
    runner = trainer(trained, tmp_path)
    for _ in range(3):
        runner.train_one_epoch(loader(x, y))
    table = trained.state_dict()["embedding.embed_dict.item.weight"]
    assert (table[0] == 0).all()
    assert (table[1:] != 0).any(dim=1).all()


def test_padding_gets_no_gradient(backend):
    x, y = data(64)
    trained = model()
    batch, labels = next(iter(loader(x, y)))
    torch.nn.functional.binary_cross_entropy(call(trained, batch), labels).backward()
    gradient = fetch(dict(trained.named_gradients()))["embedding.embed_dict.item.weight"]
    used = np.union1d(x["item"], x["history"])
    assert (gradient[0] == 0).all()
    assert (gradient[used[used > 0]].abs().sum(1) > 0).all()
