"""embedding_bag against a bag-by-bag computation in float64, and its gradients."""

import pytest
import torch
from devices import call

from fastmtl import backend as backends
from fastmtl import ops
from fastmtl.errors import BadIdError
from fastmtl.spec import Bag, EmbeddingSpec


def random_case(rng: torch.Generator, batch: int):
    """A spec with mixed widths, poolings, padding and unknown ids; weights, ids, columns and dense values for it."""

    def draw(low, high):
        return int(torch.randint(low, high, (), generator=rng))

    dims = [draw(1, 9) for _ in range(draw(1, 4))]
    rows = [0] * len(dims)
    bags, columns, ids = [], [0], []
    for f in range(draw(1, 8)):
        table, vocab = draw(0, len(dims)), draw(2, 30)
        pooling = ("sum", "mean", "concat")[draw(0, 3)]
        length = draw(1, 6)
        padding = ((), (-1,), (0, -1))[draw(0, 3)]
        oov = ("raise", "zero", vocab - 1)[draw(0, 3)]
        bags.append(Bag(f"f{f}", table, rows[table], vocab, dims[table], pooling, padding, oov))
        rows[table] += vocab
        low, high = (-1 if padding else 0, vocab) if oov == "raise" else (-3, vocab + 3)
        ids.append(torch.randint(low, high, (batch, length), generator=rng))
        columns.append(columns[-1] + length)
    used = sorted({bag.table for bag in bags})  # a weight without a bag does not occur in a model
    bags = [bag.__class__(**{**vars(bag), "table": used.index(bag.table)}) for bag in bags]
    weights = [torch.randn(rows[t], dims[t], generator=rng, dtype=torch.float64) for t in used]
    n_dense = draw(0, 4)
    dense = torch.randn(batch, n_dense, generator=rng, dtype=torch.float64) if n_dense else None
    return weights, torch.cat(ids, 1), tuple(columns), dense, EmbeddingSpec(tuple(bags), n_dense)


def naive(weights, ids, columns, dense, spec):
    """One row and one bag at a time."""
    out = []
    for row in range(len(ids)):
        pieces = []
        for f, bag in enumerate(spec.bags):
            vectors, counted = [], 0
            for value in ids[row, columns[f] : columns[f + 1]].tolist():
                known = 0 <= value < bag.vocab
                if value in bag.padding or (not known and bag.oov == "zero"):
                    vectors.append(torch.zeros(bag.dim, dtype=torch.float64))
                    continue
                counted += 1
                vectors.append(weights[bag.table][bag.offset + (value if known else bag.oov)])
            if bag.pooling == "concat":
                pieces += vectors
            else:
                pieces.append(sum(vectors) / (max(counted, 1) if bag.pooling == "mean" else 1))
        out.append(torch.cat(pieces))
    out = torch.stack(out)
    return out if dense is None else torch.cat([out, dense], 1)


@pytest.mark.parametrize("case", range(40))
def test_matches_a_bag_by_bag_computation(case, seed):
    rng = torch.Generator().manual_seed(seed + case)
    weights, ids, columns, dense, spec = random_case(rng, 7)
    with backends.use_backend("eager"):
        out = ops.embedding_bag(weights, ids, columns, dense, spec)
    assert out.shape == (7, spec.width(columns))
    torch.testing.assert_close(out, naive(weights, ids, columns, dense, spec), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("case", range(10))
def test_gradients(case, seed):
    rng = torch.Generator().manual_seed(seed + case)
    weights, ids, columns, dense, spec = random_case(rng, 3)
    weights = [weight.requires_grad_() for weight in weights]
    with backends.use_backend("eager"):
        assert torch.autograd.gradcheck(lambda *w: ops.embedding_bag(list(w), ids, columns, dense, spec), weights)


@pytest.mark.parametrize("bad", [-1, -(2**31), 5, 2**63 - 1])
def test_bad_ids(backend, bad):
    """The message names feature, row, id and vocabulary; 'zero' and a row swallow the id."""
    weight = torch.arange(10, dtype=torch.float32).view(5, 2)
    ids = torch.tensor([[1], [bad]])

    def look_up(oov):
        spec = EmbeddingSpec((Bag("item", 0, 0, 5, 2, oov=oov),))
        return call(ops.embedding_bag, [weight], ids, (0, 1), None, spec)

    with backends.use_backend(backend):
        with pytest.raises(BadIdError, match=rf"feature 'item': id {bad} in row 1 .* vocabulary of 5"):
            look_up("raise")
        assert look_up("zero").tolist() == [[2.0, 3.0], [0.0, 0.0]]
        assert look_up(4).tolist() == [[2.0, 3.0], [8.0, 9.0]]
