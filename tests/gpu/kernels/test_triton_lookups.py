"""embedding_bag as Triton kernels: values, gradients in both forms, refused ids."""

from dataclasses import replace

import pytest
import torch
from triton_cases import check, random_lookup

from fastmtl import ops
from fastmtl.backends import eager
from fastmtl.backends import triton as backend
from fastmtl.backends.deferred import Watch, watching
from fastmtl.backends.triton import configs
from fastmtl.backends.updates import RULES, Update
from fastmtl.errors import BadIdError
from fastmtl.spec import Bag, EmbeddingSpec


def eager_step(lookup, dtype, grad):
    """Output and weight gradients on eager."""
    weights = [weight.to(dtype).requires_grad_() for weight in lookup.weights]
    dense = None if lookup.dense is None else lookup.dense.to(dtype)
    out = eager.embedding_bag(weights, lookup.ids, lookup.columns, dense, lookup.spec)
    return out.detach(), list(torch.autograd.grad(out, weights, grad.to(dtype)))


@pytest.mark.parametrize("tiny_vocab", [0, 8, 128])
@pytest.mark.parametrize("case", range(6))
def test_values_and_gradients(case, tiny_vocab, seed, device, monkeypatch):
    """Against float64, with all tables sorted, some, and none; and the sparse form holds exactly the dense one."""
    options = {**vars(configs.EMBEDDING), "tiny_vocab": tiny_vocab}
    monkeypatch.setattr(configs, "EMBEDDING", configs.EmbeddingConfig(**options))
    lookup = random_lookup(seed + case)
    shape = (len(lookup.ids), lookup.spec.width(lookup.columns))
    grad = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    ref, ref_grads = eager_step(lookup, torch.float64, grad)
    out32, grads32 = eager_step(lookup, torch.float32, grad)
    weights = [weight.float().to(device) for weight in lookup.weights]
    dense = None if lookup.dense is None else lookup.dense.float().to(device)
    ids = lookup.ids.to(device, torch.int32 if case % 2 else torch.int64)
    out = backend.embedding_bag_fwd(weights, ids, lookup.columns, dense, lookup.spec)
    check([out], [out32], [ref])
    arguments = (grad.float().to(device), ids, lookup.columns, lookup.spec, [weight.shape for weight in weights])
    grads = backend.embedding_bag_bwd(*arguments, [True] * len(weights))
    check(grads, grads32, ref_grads)
    sparse = backend.embedding_bag_bwd_sparse(*arguments, [True] * len(weights))
    for dense_grad, (rows, values) in zip(grads, sparse, strict=True):
        held = rows < len(dense_grad)
        assert rows[held].unique().numel() == int(held.sum()), "a row is listed twice"
        assert set(dense_grad.abs().sum(1).nonzero().flatten().tolist()) <= set(rows[held].tolist())
        again = torch.zeros_like(dense_grad)
        again[rows[held]] = values[held]
        assert torch.equal(again, dense_grad)
    assert backend.embedding_bag_bwd(*arguments, [False] * len(weights)) == [None] * len(weights)


@pytest.mark.parametrize("case", range(4))
def test_the_pieces_of_an_index(case, seed, device, monkeypatch):
    """Every lookup that counts is in one piece, of its row; pieces are short; tiny tables' rows are all listed."""
    monkeypatch.setattr(configs, "EMBEDDING", replace(configs.EMBEDDING, tiny_vocab=8))
    rng = torch.Generator().manual_seed(seed + case)
    n_rows, vocab = 5 + 40 * case, (9, 60)[case % 2]
    ids = (vocab * torch.rand(n_rows, 3, generator=rng) ** 3).long() - case % 2
    ids[:, 2] = torch.randint(-1, 5, (n_rows,), generator=rng)
    bags = (Bag("a", 0, 2, vocab, 4, oov="zero"), Bag("b", 0, 2, vocab, 4, oov="zero"), Bag("c", 0, 70, 5, 4, oov=1))
    spec = EmbeddingSpec(bags)
    (made,) = backend.embedding_bag_index(ids.to(device), (0, 1, 2, 3), spec, [torch.Size((75, 4))], [True])
    n, (n_pieces, n_longs) = 2 * n_rows, made.sizes.tolist()
    found = ids[:, :2].T.flatten()
    found = torch.where((found >= 0) & (found < vocab), found + 2, 75)
    keys, order = found.sort(stable=True)
    counts = keys.unique(return_counts=True)
    assert made.keys.tolist() == keys.tolist()
    assert made.places.tolist() == [o % n_rows * 16 + o // n_rows * 4 for o in order.tolist()]
    begins = made.begins[: n_pieces + 1].tolist()
    chunk = configs.EMBEDDING.chunk(n)
    assert begins[-1] == 2 * int((keys < 75).sum())
    pieces = list(zip([b // 2 for b in begins[:-1]], [b // 2 for b in begins[1:]], strict=True))
    assert all(0 < end - begin < 2 * chunk for begin, end in pieces)
    rows = made.rows.tolist()
    assert all(set(keys[begin:end].tolist()) == {row} for (begin, end), row in zip(pieces, rows, strict=False))
    assert rows[n_pieces:] == [75] * (n - n_pieces) + [*range(70, 75)]
    whole = [int((keys == row).sum()) == end - begin for (begin, end), row in zip(pieces, rows, strict=False)]
    assert [b % 2 == 0 for b in begins[:-1]] == whole
    longs = [row for row in counts[0].tolist() if row < 75 and rows[:n_pieces].count(row) > 1]
    assert keys[made.longs[:n_longs].long().cpu()].tolist() == longs
    right = torch.where((ids[:, 2] >= 0) & (ids[:, 2] < 5), ids[:, 2], 1)
    assert made.tiny.tolist() == [right.tolist()]


@pytest.mark.parametrize("pooling", ["sum", "mean"])
def test_gradients_of_bf16_are_summed_in_fp32(pooling, seed, device):
    """In tables of few rows and of many: what bf16 cannot hold of a sum is there, and of a quotient."""
    rng = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, 6, (35, 5), generator=rng)
    ids[:, 3:] += torch.randint(0, 30, (35, 2), generator=rng)
    bags = (Bag("tiny", 0, 0, 6, 3, pooling), Bag("sorted", 0, 6, 40, 3, pooling))
    spec, columns = EmbeddingSpec(bags), (0, 3, 5)
    grad = torch.randn(35, 6, generator=rng).bfloat16()
    weight = torch.zeros(46, 3, dtype=torch.float64, requires_grad=True)
    out = eager.embedding_bag([weight], ids, columns, None, spec)
    (want,) = torch.autograd.grad(out, [weight], grad.double())
    (got,) = backend.embedding_bag_bwd(grad.to(device), ids.to(device), columns, spec, [weight.shape], [True])
    torch.testing.assert_close(got.cpu().double(), want, rtol=2e-6, atol=2e-6)


def test_gradients_that_32_bits_do_not_reach(seed, device):
    """Nine rows 2^28 elements apart (memory of which few pages are touched): the bits of the same rows side by side."""
    rng = torch.Generator().manual_seed(seed)
    bags = (Bag("tiny", 0, 0, 6, 3), Bag("sorted", 0, 6, 40, 3))
    spec, columns, shapes = EmbeddingSpec(bags), (0, 1, 4), [torch.Size((46, 3))]
    ids = torch.randint(0, 6, (9, 4), generator=rng).to(device)
    near = torch.randn(9, 6, generator=rng).bfloat16().to(device)
    far = torch.empty(8 * 2**28 + 6, dtype=torch.bfloat16, device=device).as_strided((9, 6), (2**28, 1))
    far.copy_(near)
    (want,), (got,) = (backend.embedding_bag_bwd(grad, ids, columns, spec, shapes, [True]) for grad in (near, far))
    assert want[:6].any()
    assert want[6:].any()
    assert torch.equal(got, want)


def test_a_row_with_many_lookups_is_stitched_from_many_chunks(device):
    """300 lookups of one row among others: more chunks than one step of the stitching takes."""
    ids = torch.arange(300, device=device).unsqueeze(1) % 3 % 2 * 7
    spec = EmbeddingSpec((Bag("f", 0, 0, 50, 3),))
    grad = torch.ones(300, 3, device=device)
    (got,) = backend.embedding_bag_bwd(grad, ids, (0, 1), spec, [torch.Size((50, 3))], [True])
    want = torch.zeros(50, 3)
    want[0], want[7] = 200.0, 100.0
    assert torch.equal(got.cpu(), want)


@pytest.fixture
def poisoned():
    """Memory that nobody has written holds NaN and the largest integers, not the zeros of a fresh page."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    assert torch.empty(1).isnan().all()
    yield
    torch.use_deterministic_algorithms(before)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_hot_rows_behind_more_rows_than_run_at_a_time(dtype, seed, device, monkeypatch):
    """Each program adds several blocks of rows, the longest last, at the launch choices of a GPU too; one row has more
    pieces than are stitched at once. Written out, and as a step."""
    rng = torch.Generator().manual_seed(seed)
    config = configs.EMBEDDING
    if device.type == "cpu":  # the interpreter takes long for small blocks of many lookups
        config = replace(config, indexed=1024, elements=2048, stitched=64)
        monkeypatch.setattr(configs, "EMBEDDING", config)
    at_a_time = config.segments(1 << 40, 3, False)
    n_cold = at_a_time.programs * at_a_time.pieces + 50
    hot = (128 * config.chunk(n_cold) + 76, 70, 9)
    vocab = n_cold + len(hot)
    ids = torch.cat([torch.arange(n_cold), torch.arange(n_cold, vocab).repeat_interleave(torch.tensor(hot))])
    ids = torch.stack([ids[torch.randperm(len(ids), generator=rng)], torch.randint(0, 5, ids.shape, generator=rng)], 1)
    assert hot[0] > 128 * config.chunk(len(ids)) >= 128 * 8
    spec, shape = EmbeddingSpec((Bag("hot", 0, 5, vocab, 3), Bag("tiny", 0, 0, 5, 3))), torch.Size((vocab + 5, 3))
    grad = torch.randn(len(ids), 6, generator=rng).to(dtype)
    want = torch.zeros(shape, dtype=torch.float64)
    want.index_add_(0, ids[:, 0] + 5, grad[:, :3].double())
    want.index_add_(0, ids[:, 1], grad[:, 3:].double())
    grad, ids, columns = grad.to(device), ids.to(device), (0, 1, 2)
    (got,) = backend.embedding_bag_bwd(grad, ids, columns, spec, [shape], [True])
    scale = want.abs().max().item()
    torch.testing.assert_close(got.cpu().double(), want, rtol=2e-6, atol=2e-7 * scale)
    p, last = torch.zeros(shape, device=device), torch.zeros(shape[0], dtype=torch.int32, device=device)
    descent = torch.tensor([0.0, 1.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, -1.0], device=device)
    step = Update(p, [], last, RULES.index("sgd"), descent, torch.ones(1, dtype=torch.int32, device=device))
    backend.embedding_bag_bwd_step(grad, ids, columns, spec, [step])
    assert torch.equal(p, -got)
    assert last.eq(1).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_narrow_tables_are_summed_in_fp32(dtype, device):
    weight = torch.randn(20, 5, generator=torch.Generator().manual_seed(0)).to(device, dtype)
    ids = torch.randint(0, 20, (4, 9), generator=torch.Generator().manual_seed(1)).to(device)
    out = backend.embedding_bag_fwd([weight], ids, (0, 9), None, EmbeddingSpec((Bag("f", 0, 0, 20, 5),)))
    assert out.dtype is dtype
    assert torch.equal(out, weight.float()[ids].sum(1).to(dtype))


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("bad", [-1, -(2**31), 5, 2**31 - 1, 2**63 - 1])
@pytest.mark.usefixtures("triton_backend")
def test_bad_ids(bad, dtype, device):
    """The first one in the batch is named; nothing outside the table is read; 'zero' and a row swallow it."""
    if bad > 2**31 - 1 and dtype is torch.int32:
        pytest.skip("no such id in int32")
    weight = torch.arange(10, dtype=torch.float32, device=device).view(5, 2)
    ids = torch.tensor([[1, 2], [3, bad], [bad, 0]], dtype=dtype, device=device)

    def look_up(oov):
        bags = (Bag("user", 0, 0, 5, 2), Bag("item", 0, 0, 5, 2, oov=oov))
        return ops.embedding_bag([weight], ids[:2], (0, 1, 2), None, EmbeddingSpec(bags))

    with pytest.raises(BadIdError, match=rf"feature 'item': id {bad} in row 1 .* vocabulary of 5"):
        look_up("raise")
    assert look_up("zero").tolist() == [[2.0, 3.0, 4.0, 5.0], [6.0, 7.0, 0.0, 0.0]]
    assert look_up(4).tolist() == [[2.0, 3.0, 4.0, 5.0], [6.0, 7.0, 8.0, 9.0]]
    bags = (Bag("user", 0, 0, 5, 2), Bag("item", 0, 0, 5, 2))
    with pytest.raises(BadIdError) as mine:
        ops.embedding_bag([weight], ids, (0, 1, 2), None, EmbeddingSpec(bags))
    with pytest.raises(BadIdError) as theirs:
        eager.embedding_bag([weight], ids.long(), (0, 1, 2), None, EmbeddingSpec(bags))
    assert str(mine.value) == str(theirs.value)


@pytest.mark.usefixtures("triton_backend")
def test_bad_ids_that_are_told_later(device):
    """The first of all lookups is written down, with its id, whatever becomes of the batch; nobody waits for it."""
    weight = torch.arange(10, dtype=torch.float32, device=device).view(5, 2)
    specs = [EmbeddingSpec((Bag(f"{name} user", 0, 0, 5, 2), Bag(f"{name} item", 0, 0, 5, 2))) for name in "ab"]
    watch = Watch(device, extra=2)

    def look_up(rows, spec):
        ids = torch.tensor(rows, dtype=torch.int32, device=device)
        out = ops.embedding_bag([weight], ids, (0, 1, 2), None, spec)
        ids.fill_(99)
        watch.post()
        return out

    with watching(watch):
        assert look_up([[1, 2], [3, 0]], specs[0]).tolist() == [[2, 3, 4, 5], [6, 7, 0, 1]]
        assert max(watch.wait()) == -1
        assert look_up([[1, 2], [3, -7]], specs[1]).tolist() == [[2, 3, 4, 5], [6, 7, 0, 0]]
        look_up([[8, 2], [3, 1]], specs[0])
        look_up([[1, 2], [3, 0]], specs[0])
    watch.found[-1] = 5  # the owner's places are left alone
    assert watch.wait()[1:] == [1, 1, -7, -1, 5]
    assert watch.seen() is not None
    with pytest.raises(BadIdError, match=r"feature 'b item': id -7 in row 1 of the batch .* vocabulary of 5"):
        watch.raise_bad_id(watch.wait())
    watch.clear()
    assert watch.seen() is None
    watch.raise_bad_id(watch.wait())
    with pytest.raises(BadIdError, match="feature 'a user': id 8 in row 0"):  # at once again
        look_up([[8, 2], [3, 1]], specs[0])


@pytest.mark.usefixtures("triton_backend")
def test_autograd_and_autocast(device):
    """Through the op: the gradients of weights and dense values, and bf16 rows under autocast."""
    rng = torch.Generator().manual_seed(3)
    weight = torch.randn(30, 4, generator=rng).to(device).requires_grad_()
    dense = torch.randn(6, 3, generator=rng).to(device).requires_grad_()
    ids = torch.randint(0, 30, (6, 2), generator=rng).to(device)
    spec = EmbeddingSpec((Bag("a", 0, 0, 30, 4), Bag("b", 0, 0, 30, 4)), 3)
    out = ops.embedding_bag([weight], ids, (0, 1, 2), dense, spec)
    d_weight, d_dense = torch.autograd.grad(out.square().sum(), [weight, dense])
    counts = torch.bincount(ids.flatten().cpu(), minlength=30).unsqueeze(1).to(device)
    torch.testing.assert_close(d_weight, 2 * weight.detach() * counts)
    torch.testing.assert_close(d_dense, 2 * dense.detach())
    with torch.autocast(device.type, dtype=torch.bfloat16):
        rounded = ops.embedding_bag([weight], ids, (0, 1, 2), dense, spec)
    assert rounded.dtype is torch.bfloat16
    assert torch.equal(rounded, out.bfloat16())
    (d_rounded,) = torch.autograd.grad(rounded.sum(), [weight])
    assert d_rounded.dtype is torch.float32
    assert torch.equal(d_rounded, counts.expand(30, 4).float())
