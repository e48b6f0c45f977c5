"""Ids outside the vocabulary: an error naming feature, row, id and vocabulary, or zeros, or a row of one's choice."""

import numpy as np
import pytest
import torch
from devices import call, fetch

from behaviour.helpers import data, features, loader, model, trainer
from fastmtl.basic.features import SequenceFeature, SparseFeature
from fastmtl.basic.initializers import RandomNormal
from fastmtl.errors import BadIdError, FastMTLError

VOCAB = 1000
BAD = (-1, -2, -(2**31), VOCAB, 2**31, 2**63 - 1, -(2**63))
INIT = RandomNormal(0, 0.3)


def _made(oov, kind="SharedBottom"):
    listed = [
        SparseFeature("user", 50, 4, initializer=INIT),
        SparseFeature("item", VOCAB, 4, initializer=INIT, oov=oov),
        SequenceFeature("history", VOCAB, 4, pooling="sum", shared_with="item", oov=oov),
    ]
    return model(kind, features=listed)


def _batch(n=32):
    rng = np.random.default_rng(0)
    ids = {"user": rng.integers(0, 50, n), "item": rng.integers(0, VOCAB, n), "history": rng.integers(0, VOCAB, (n, 3))}
    return {name: torch.from_numpy(column) for name, column in ids.items()}


@pytest.mark.parametrize("train", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("bad", BAD)
def test_a_bad_id_raises_and_is_named(bad, train, backend):
    made = _made("raise").train(train)
    batch = _batch()
    batch["item"][17] = bad
    with pytest.raises(BadIdError) as caught:
        call(made, batch)
    for part in ("'item'", f"id {bad} ", "row 17", f"vocabulary of {VOCAB}"):
        assert part in str(caught.value)


@pytest.mark.parametrize("bad", [bad for bad in BAD if bad != -1])
def test_a_bad_id_in_a_sequence_raises_and_is_named(bad, backend):
    """-1 is padding there."""
    made = _made("raise")
    batch = _batch()
    batch["history"][5, 2] = bad
    with pytest.raises(BadIdError) as caught:
        call(made, batch)
    for part in ("'history'", f"id {bad} ", "row 5", f"vocabulary of {VOCAB}"):
        assert part in str(caught.value)


@pytest.mark.parametrize("oov", ["zero", 3])
@pytest.mark.parametrize("bad", BAD)
def test_a_bad_id_becomes_zeros_or_the_row_asked_for(bad, oov, backend):
    made = _made(oov)
    batch = _batch()
    batch["item"][17] = bad
    batch["history"][5, 2] = bad
    table = fetch(made.state_dict())["embedding.embed_dict.item.weight"]
    vector = torch.zeros(4) if oov == "zero" else table[oov]
    row = call(made.embedding, batch, made.features, squeeze_dim=True).detach()
    torch.testing.assert_close(row[17, 4:8], vector, rtol=0, atol=0)
    last = torch.zeros(4) if bad == -1 else vector
    torch.testing.assert_close(row[5, 8:], table[batch["history"][5, :2]].sum(0) + last, rtol=1e-6, atol=1e-6)
    kept = torch.arange(32) != 17
    torch.testing.assert_close(row[kept, 4:8], table[batch["item"][kept]], rtol=0, atol=0)


@pytest.mark.parametrize("oov", ["zero", 3])
def test_gradients_of_bad_ids(oov, backend):
    """Zeros learn nothing; the row that stands for unknown ids learns from all of them."""
    made = _made(oov)
    batch = _batch()
    batch["item"][:] = torch.tensor([VOCAB, -5] * 16)
    batch["history"][:] = -1
    call(made, batch).sum().backward()
    gradient = fetch(dict(made.named_gradients()))["embedding.embed_dict.item.weight"]
    assert (gradient != 0).any(dim=1).nonzero().flatten().tolist() == ([] if oov == "zero" else [3])


def test_the_trainer_names_the_bad_id(backend, tmp_path):
    x, y = data(100)
    x["item"][70] = 1200
    trained = model(features=features())
    with pytest.raises(BadIdError, match=r"'item'.*1200"):
        trainer(trained, tmp_path).train_one_epoch(loader(x, y))


@pytest.mark.parametrize("oov", ["skip", -1, VOCAB, 2.5])
def test_an_oov_rule_that_does_not_exist_is_named(oov):
    with pytest.raises(FastMTLError, match=r"item.*raise.*zero"):
        SparseFeature("item", VOCAB, 4, oov=oov)
