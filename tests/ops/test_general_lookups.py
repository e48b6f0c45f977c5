"""embedding_bag with maxima, weights of ids, ragged bags and tables of 16 bits, on each backend."""

import random
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from devices import BACKENDS, DEVICE, call
from native.general_lookups import random_case

from fastmtl import backend as backends
from fastmtl.backends import native
from fastmtl.errors import BadDataError, BadIdError, ConfigError
from fastmtl.ops import embedding_bag
from fastmtl.spec import Bag, EmbeddingSpec, Ragged

#: dtype of the tables -> allowed relative error of results in float32, and of gradients in that dtype
ERRORS = {torch.float32: (2e-6, 4e-6), torch.bfloat16: (2e-6, 1e-2), torch.float16: (2e-6, 2e-3)}


@pytest.fixture(params=[name for name in BACKENDS if name in ("native", "eager")])
def backend(request):
    """Those that know more than sums and means of columns; on a GPU that is eager."""
    with backends.use_backend(request.param):
        yield request.param


def look_up(*args, **keywords):
    """embedding_bag where the backend's tensors live."""
    on_cpu = backends.forced() == "native"
    return embedding_bag(*args, **keywords) if on_cpu else call(embedding_bag, *args, **keywords)


def run(case, name, dtype=None):
    """The output, and the gradients of all that has one; everything in ``dtype``."""

    def leaf(tensor, own=dtype):
        return None if tensor is None else tensor.detach().to(own or tensor.dtype, copy=True).requires_grad_()

    weights, dense, scales = [leaf(w) for w in case.weights], leaf(case.dense), leaf(case.scales)
    list_scales = None if case.ragged is None else leaf(case.ragged.scales)
    ragged = None if case.ragged is None else case.ragged._replace(scales=list_scales)
    with backends.use_backend(name):
        out = look_up(weights, case.ids, case.columns, dense, case.spec, scales=scales, ragged=ragged)
    out.backward(case.grad.to(out.dtype))
    leaves = [*weights, *(t for t in (dense, scales, list_scales) if t is not None)]
    return [out.detach(), *(torch.zeros_like(t) if t.grad is None else t.grad for t in leaves)]


def assert_near(mine, right, error, what):
    largest = float(right.abs().max()) if right.numel() else 0.0
    torch.testing.assert_close(
        mine.double(), right, rtol=error, atol=error * max(1.0, largest), msg=lambda m: f"{what}: {m}"
    )


@pytest.mark.parametrize("dtype", ERRORS, ids=str)
def test_random_lookups(backend, dtype, seed):
    if dtype is not torch.float32 and DEVICE.type != "cpu":
        pytest.skip("tables of 16 bits are summed in float32 on the CPU")
    for case_seed in range(seed, seed + 30):
        case = random_case(case_seed, dtype)
        right = run(case, "eager", torch.float64)
        mine = run(case, backend)
        assert mine[0].dtype is torch.float32
        for number, (one, other) in enumerate(zip(mine, right, strict=True)):
            narrow = 0 < number <= len(case.weights)
            assert one.dtype is (dtype if narrow else torch.float32)
            assert_near(one, other, ERRORS[dtype][narrow], f"seed {case_seed}, result {number}")


@pytest.mark.parametrize("pooling", ["sum", "mean", "max"])
def test_torchs_own_embedding_bag_agrees(backend, pooling, seed):
    """Ragged bags with offsets, with weights of ids where torch takes them; bags may be empty."""
    for case_seed in range(seed, seed + 20):
        rng, generator = random.Random(case_seed), torch.Generator().manual_seed(case_seed)
        vocab, dim, batch = rng.randint(1, 50), rng.choice((1, 4, 17)), rng.randint(1, 40)
        offsets = torch.randint(0, 6, (batch,), generator=generator).cumsum(0)
        offsets = torch.cat([torch.zeros(1, dtype=torch.int64), offsets])
        ids = torch.randint(0, vocab, (int(offsets[-1]),), generator=generator)
        table = (torch.randn(vocab, dim, generator=generator) * 2).round()
        scales = torch.randn(len(ids), generator=generator) if pooling == "sum" else None
        grad = torch.randn(batch, dim, generator=generator)
        mine, theirs = (table.to(d, copy=True).requires_grad_() for d in (torch.float32, torch.float64))
        own, other = None, None
        if scales is not None:
            own, other = (scales.to(d, copy=True).requires_grad_() for d in (torch.float32, torch.float64))
        right = F.embedding_bag(ids, theirs, offsets, mode=pooling, per_sample_weights=other, include_last_offset=True)
        right.backward(grad.double())
        spec = EmbeddingSpec((Bag("f", 0, 0, vocab, dim, pooling, is_ragged=True),))
        none = torch.zeros(batch, 0, dtype=torch.int64)
        with backends.use_backend(backend):
            out = look_up([mine], none, (0, 0), None, spec, ragged=Ragged(ids, offsets[None], own))
        out.backward(grad)
        assert_near(out.detach(), right.detach(), 2e-6, case_seed)
        assert_near(mine.grad, theirs.grad, 4e-6, case_seed)
        if own is not None:
            assert_near(own.grad, other.grad, 4e-6, case_seed)


def test_the_first_of_equal_maxima_has_the_gradient(backend):
    spec = EmbeddingSpec((Bag("f", 0, 0, 4, 2, "max", (3,)),))
    weight = torch.tensor([[1.0, 5.0], [1.0, 2.0], [0.0, 5.0], [9.0, 9.0]], requires_grad=True)
    ids = torch.tensor([[3, 1, 0, 2], [3, 3, 3, 3], [2, 0, 0, 0]])
    with backends.use_backend(backend):
        out = look_up([weight], ids, (0, 4), None, spec)
    assert out.tolist() == [[1, 5], [0, 0], [1, 5]]
    out.backward(torch.tensor([[1.0, 2.0], [4.0, 4.0], [8.0, 16.0]]))
    assert weight.grad.tolist() == [[8, 2], [1, 0], [0, 16], [0, 0]]


def test_gradients_as_rows(seed):
    """With an index the gradient of a maximum is sparse, and has a row for each that was looked up."""
    if native.unavailable():
        pytest.skip(f"native backend: {native.unavailable()}")
    spec = EmbeddingSpec((Bag("f", 0, 0, 50, 3, "max", (0,)), Bag("g", 0, 50, 20, 3)))
    generator = torch.Generator().manual_seed(seed)
    ids = torch.cat([torch.randint(0, 50, (30, 4), generator=generator), torch.randint(0, 20, (30, 1))], dim=1)
    weight = torch.randn(70, 3, generator=generator)
    grad = torch.randn(30, 6, generator=generator)
    results = []
    for sparse in (True, False):
        leaf = weight.clone().requires_grad_()
        index = native.embedding_bag_index(ids, (0, 4, 5), spec, [weight.shape], [True]) if sparse else None
        with backends.use_backend("native"):
            embedding_bag([leaf], ids, (0, 4, 5), None, spec, index).backward(grad)
        assert leaf.grad.is_sparse == sparse
        results.append(leaf.grad)
    rows = torch.cat([ids[:, :4].flatten(), ids[:, 4] + 50]).unique()
    assert results[0]._indices()[0].tolist() == [row for row in rows.tolist() if row != 0]
    assert torch.equal(results[0].to_dense(), results[1])


def test_the_number_of_threads_changes_nothing(seed):
    if native.unavailable():
        pytest.skip(f"native backend: {native.unavailable()}")
    before = torch.get_num_threads()
    try:
        for case_seed in range(seed, seed + 10):
            case, results = random_case(case_seed, batch=300), []
            for threads in (1, 2, 3):
                torch.set_num_threads(threads)
                results.append(run(case, "native"))
            for other in results[1:]:
                assert all(map(torch.equal, results[0], other)), case_seed
    finally:
        torch.set_num_threads(before)


def test_more_than_two_to_the_31_numbers():
    """A table of 2.2 billion numbers, of which a few pages are ever touched."""
    if native.unavailable():
        pytest.skip(f"native backend: {native.unavailable()}")
    dim, rows = 1030, 2_100_000
    weight = torch.empty(rows, dim, dtype=torch.bfloat16, requires_grad=True)
    with torch.no_grad():
        weight[rows - 1], weight[3] = 2.5, -1.0
    spec = EmbeddingSpec((Bag("f", 0, 0, rows, dim, "max"),))
    ids = torch.tensor([[3, rows - 1]])
    with backends.use_backend("native"):
        out = embedding_bag([weight], ids, (0, 2), None, spec, [None])
    assert out.unique().tolist() == [2.5]
    out.sum().backward()
    assert weight.grad._indices().tolist() == [[3, rows - 1]]
    assert weight.grad._values().unique(dim=1).tolist() == [[0], [1]]


@pytest.mark.parametrize("bad", [-1, 5, 2**31 - 1])
def test_bad_ragged_ids_are_named(backend, bad):
    spec = EmbeddingSpec((Bag("seen", 0, 0, 5, 2, is_ragged=True),))
    ragged = Ragged(torch.tensor([1, 2, bad]), torch.tensor([[0, 1, 1, 3]]))
    with (
        backends.use_backend(backend),
        pytest.raises(BadIdError, match=rf"'seen': id {bad} in row 2 .* vocabulary of 5"),
    ):
        look_up([torch.zeros(5, 2)], torch.zeros(3, 0, dtype=torch.int64), (0, 0), None, spec, ragged=ragged)


@pytest.mark.parametrize("offsets", [[[0, 2, 1, 3]], [[-1, 1, 1, 3]], [[0, 1, 2, 4]], [[0, 1, 3]]])
def test_bad_offsets_are_refused(backend, offsets):
    spec = EmbeddingSpec((Bag("seen", 0, 0, 5, 2, is_ragged=True),))
    ragged = Ragged(torch.tensor([1, 2, 3]), torch.tensor(offsets))
    with backends.use_backend(backend), pytest.raises(BadDataError, match="offsets"):
        look_up([torch.zeros(5, 2)], torch.zeros(3, 0, dtype=torch.int64), (0, 0), None, spec, ragged=ragged)


@pytest.mark.parametrize(
    ("bag", "message"),
    [
        ({"pooling": "max"}, "no weights of ids"),
        ({"is_ragged": True}, "is ragged; give its ids"),
        ({"is_ragged": True, "pooling": "concat"}, "is ragged"),
    ],
)
def test_what_does_not_fit_is_refused(backend, bag, message):
    spec = EmbeddingSpec((replace(Bag("f", 0, 0, 5, 2), **bag),))
    ids = torch.zeros(3, 1, dtype=torch.int64)
    with backends.use_backend(backend), pytest.raises(ConfigError, match=message):
        look_up([torch.zeros(5, 2)], ids, (0, 1), None, spec, scales=torch.ones(3, 1))
