"""The same bits for every number of threads, so that a run can be repeated on another machine."""

import random

import pytest
import torch

from fastmtl.backend import use_backend
from fastmtl.ops import embedding_bag
from fastmtl.spec import ExpertGateSpec, Gate

from .layers import random_case, run
from .lookups import random_lookup

MMOE = ExpertGateSpec(70, (0,) * 8, (64, 32), dropout=0.2, gates=(Gate(0, tuple(range(8))),) * 2)


@pytest.mark.parametrize(("batch", "counts"), [(5, (1, 2, 4)), (300, (1, 2, 4)), (1024, (1, 2)), (2500, (1, 2))])
def test_a_large_layer(batch, counts, threads, base_seed):
    case = random_case(base_seed, MMOE, batch)
    case.training = True
    results = []
    for n in counts:
        threads(n)
        torch.manual_seed(base_seed)
        results.append(run(case, "native").tensors())
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_random_layers(threads, base_seed):
    rng = random.Random(base_seed)
    for i in range(30):
        case = random_case(base_seed + i, batch=rng.choice((64, 257, 1000)))
        results = []
        for n in (1, 2):
            threads(n)
            results.append(run(case, "native").tensors())
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True)), case.spec


def test_random_lookups(threads, base_seed):
    for i in range(30):
        lookup = random_lookup(base_seed + i, batch=random.Random(base_seed + i).choice((200, 1000, 2000)))
        results = []
        for n in (1, 2, 3):
            threads(n)
            weights = [w.clone().requires_grad_() for w in lookup.weights]
            with use_backend("native"):
                out = embedding_bag(weights, lookup.ids, lookup.columns, lookup.dense, lookup.spec)
            out.backward(lookup.grad)
            results.append([out.detach(), *(w.grad for w in weights)])
        for other in results[1:]:
            assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True)), lookup.spec
