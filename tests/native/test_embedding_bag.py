"""embedding_bag on native against eager: the same numbers, the same refusals, nothing read out of bounds."""

import pytest
import torch

from fastmtl.backend import use_backend
from fastmtl.backends import native
from fastmtl.errors import BadIdError
from fastmtl.ops import embedding_bag
from fastmtl.spec import Bag, EmbeddingSpec

from .lookups import Lookup, random_lookup

CASES = 300


def run(lookup: Lookup, backend: str, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    """The output, and the gradients of the weights and of the dense columns."""
    weights = [w.to(dtype, copy=True).requires_grad_() for w in lookup.weights]
    dense = None if lookup.dense is None else lookup.dense.to(dtype).detach().requires_grad_()
    ids = lookup.ids.long() if backend == "eager" else lookup.ids
    with use_backend(backend):
        out = embedding_bag(weights, ids, lookup.columns, dense, lookup.spec)
    out.backward(lookup.grad.to(dtype))
    gradients = [torch.zeros_like(w) if w.grad is None else w.grad for w in weights]
    return [out.detach(), *gradients, *([] if dense is None else [dense.grad])]


def test_random_lookups(base_seed):
    for i in range(CASES):
        lookup = random_lookup(base_seed + i)
        reference, eager, native = run(lookup, "eager", torch.float64), run(lookup, "eager"), run(lookup, "native")
        for want, theirs, mine in zip(reference, eager, native, strict=True):
            assert mine.shape == want.shape
            if want.numel():
                error, allowed = (mine - want).abs().max().item(), (theirs - want).abs().max().item()
                floor = 1e-6 * max(1.0, want.abs().max().item())
                assert error <= 2 * allowed + floor, f"seed {base_seed + i}: {error} against eager's {allowed}"


@pytest.mark.parametrize("pooling", ["sum", "concat"])
def test_rows_of_every_width_are_copied_and_nothing_beside_them(pooling, base_seed):
    torch.manual_seed(base_seed)
    for dim in range(1, 41):
        bags = (Bag("left", 0, 0, 7, dim, pooling), Bag("right", 0, 7, 9, dim, pooling))
        weight, ids = torch.randn(16, dim), torch.stack([torch.randint(0, 7, (70,)), torch.randint(0, 9, (70,))], 1)
        with use_backend("native"):
            out = embedding_bag([weight], ids, (0, 1, 2), None, EmbeddingSpec(bags))
        assert torch.equal(out, torch.cat([weight[ids[:, 0]], weight[7 + ids[:, 1]]], dim=1)), f"width {dim}"


def test_gradient_of_a_few_weights(base_seed):
    lookup = next(c for c in map(random_lookup, range(base_seed, base_seed + 1000)) if len(c.weights) == 3)
    whole = run(lookup, "native")
    weights = [w.clone().requires_grad_(t == 1) for t, w in enumerate(lookup.weights)]
    with use_backend("native"):
        embedding_bag(weights, lookup.ids, lookup.columns, lookup.dense, lookup.spec).backward(lookup.grad)
    assert [w.grad is None for w in weights] == [True, False, True]
    assert torch.equal(weights[1].grad, whole[2])


def test_rows_that_no_bag_reads_get_zero(base_seed):
    torch.manual_seed(base_seed)
    spec = EmbeddingSpec((Bag("a", 0, 3, 5, 4), Bag("b", 0, 10, 2, 4)))
    weight = torch.randn(20, 4, requires_grad=True)
    ids = torch.stack([torch.randint(0, 5, (300,)), torch.randint(0, 2, (300,))], dim=1)
    with use_backend("native"):
        embedding_bag([weight], ids, (0, 1, 2), None, spec).sum().backward()
    touched = weight.grad[:, 0]
    assert touched[3:8].sum() == 300
    assert touched[10:12].sum() == 300
    assert touched.sum() == 600


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
@pytest.mark.parametrize("bad", [-1, -(2**31), 10, 2**31 - 1, 2**63 - 1, -(2**63)])
def test_bad_ids_are_refused_as_eager_refuses_them(bad, dtype):
    if dtype is torch.int32 and abs(bad) >= 2**31 and bad != -(2**31):
        pytest.skip("does not fit")
    spec = EmbeddingSpec((Bag("user", 0, 0, 50, 4), Bag("item", 0, 50, 10, 4)))
    ids = torch.zeros(300, 2, dtype=dtype)
    ids[17, 1] = ids[200, 1] = bad
    messages = []
    for backend in ("eager", "native"):
        with use_backend(backend), pytest.raises(BadIdError) as raised:
            embedding_bag([torch.zeros(60, 4)], ids.long() if backend == "eager" else ids, (0, 1, 2), None, spec)
        messages.append(str(raised.value))
    assert messages[0] == messages[1]
    assert f"'item': id {bad} in row 17" in messages[1]


@pytest.mark.parametrize("bad", [-1, -(2**31), 10, 2**31 - 1, 2**63 - 1])
@pytest.mark.parametrize(("oov", "row"), [("zero", None), (7, 57)])
def test_bad_ids_by_choice(bad, oov, row):
    spec = EmbeddingSpec((Bag("user", 0, 0, 50, 4), Bag("item", 0, 50, 10, 4, oov=oov)))
    weight = torch.arange(240.0).view(60, 4).requires_grad_()
    ids = torch.tensor([[1, bad], [2, 3]])
    with use_backend("native"):
        out = embedding_bag([weight], ids, (0, 1, 2), None, spec)
    assert torch.equal(out[0, 4:], torch.zeros(4) if row is None else weight[row])
    out.sum().backward()
    assert weight.grad[:, 0].nonzero().flatten().tolist() == ([1, 2, 53] if row is None else [1, 2, 53, 57])


def test_ids_that_change_before_the_backward_are_not_followed():
    """Autograd forbids it, but memory shared with another process can change behind its back."""
    spec = EmbeddingSpec((Bag("item", 0, 0, 10, 4),))
    ids = torch.full((200, 1), 2**40)
    (grad,) = native.embedding_bag_bwd(torch.ones(200, 4), ids, (0, 1), spec, [torch.Size((10, 4))], [True])
    assert not grad.any()
