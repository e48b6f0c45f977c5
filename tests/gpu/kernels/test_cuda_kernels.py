"""The CUDA library on a GPU: its numbers against eager in float64 and against triton's. (Without one it runs on the
CPU, see ../test_cuda_on_cpu.py.)"""

import copy

import pytest
import torch
from trainer_cases import train
from triton_cases import check, check_staged, drawer, random_lookup, staged_layer, staged_logits

from fastmtl import backend as backends
from fastmtl.backends import cuda, eager, triton, updates
from fastmtl.backends.triton import folded, folded_stages, launch
from fastmtl.backends.triton import optimizer as triton_updates
from fastmtl.backends.triton.precision import of_dtype
from fastmtl.basic.features import DenseFeature, SparseFeature
from fastmtl.models import MMOE
from fastmtl.serving import Predictor

pytestmark = pytest.mark.skipif(cuda.unavailable() is not None, reason=str(cuda.unavailable()))
STEP = [0.01, 0.99, 0.9, 0.1, 0.01, 0.9, 0.3, 1e-6, -0.1]


def gradients(lookup, grad, dtype):
    weights = [weight.to(dtype).requires_grad_() for weight in lookup.weights]
    values = None if lookup.dense is None else lookup.dense.to(dtype)
    out = eager.embedding_bag(weights, lookup.ids, lookup.columns, values, lookup.spec)
    found = torch.autograd.grad(out, weights, grad.to(dtype), allow_unused=True)
    return [torch.zeros_like(w) if g is None else g for w, g in zip(weights, found, strict=True)]


@pytest.mark.parametrize("case", range(20))
def test_gradients_sanitized(case, seed, device):
    lookup = random_lookup(seed + case, batch=23)
    grad = torch.randn(23, lookup.spec.width(lookup.columns), generator=torch.Generator().manual_seed(seed))
    shapes, needs = [weight.shape for weight in lookup.weights], [True] * len(lookup.weights)
    arguments = (grad.to(device), lookup.ids.to(device), lookup.columns, lookup.spec, shapes, needs)
    mine = cuda.embedding_bag_bwd(*arguments)
    check(mine, gradients(lookup, grad, torch.float32), gradients(lookup, grad, torch.float64))
    for whole, (rows, values) in zip(mine, cuda.embedding_bag_bwd_sparse(*arguments), strict=True):
        live = rows < len(whole)
        listed = torch.zeros_like(whole)
        listed[rows[live]] = values[live]
        assert torch.equal(listed, whole)
    again = cuda.embedding_bag_bwd(*arguments)
    assert all(torch.equal(one, other) for one, other in zip(mine, again, strict=True))


@pytest.mark.parametrize("rule", range(len(updates.RULES)), ids=updates.RULES)
def test_steps_sanitized(rule, seed, device):
    """Replays and steps: triton's bits (a row-wise mean may be summed in another order)."""
    rng = torch.Generator().manual_seed(seed)
    for dim in (3, 16):
        p = torch.randn(300, dim, generator=rng).to(device)
        like = p[:, 0] if rule == updates.ROWWISE_ADAGRAD else p
        states = [torch.rand(like.shape, generator=rng).to(device) for _ in range(updates.STATES[rule])]
        last = (40 - torch.randint(1, 10, (300,), generator=rng)).int().to(device)
        steps = torch.tensor([STEP] * 12, device=device)
        rows = torch.randperm(300, generator=rng)[:90].to(device)
        grads = torch.randn(90, dim, generator=rng).to(device)
        found = []
        for module in (cuda, triton_updates):
            table = (p.clone(), [state.clone() for state in states], last.clone())
            module.table_step(*table, rule, steps, 29, rows, grads, False, 50, 200)
            found.append((table[0], *table[1], table[2]))
        updates.check_reached(p.device)
        for mine, theirs in zip(*found, strict=True):
            if rule == updates.ROWWISE_ADAGRAD:
                torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6)
            else:
                assert torch.equal(mine, theirs)


@pytest.mark.parametrize("case", range(4))
def test_an_index_made_ahead_sanitized(case, seed, device):
    """Triton's rows; the backward and the rows that catch up are the same with it."""
    lookup = random_lookup(seed + case, batch=23)
    rng = torch.Generator().manual_seed(seed)
    grad = torch.randn(23, lookup.spec.width(lookup.columns), generator=rng).to(device)
    ids = lookup.ids.to(device, torch.int32 if case % 2 else torch.int64)
    shapes, needs = [weight.shape for weight in lookup.weights], [True] * len(lookup.weights)
    other = cuda.embedding_bag_index(ids.flip(0), lookup.columns, lookup.spec, shapes, needs)
    index = cuda.embedding_bag_index(ids, lookup.columns, lookup.spec, shapes, needs, other)
    assert all(one is another for one, another in zip(index, other, strict=True))
    expected = triton.embedding_bag_index(ids, lookup.columns, lookup.spec, shapes, needs)
    for mine, theirs in zip(index, expected, strict=True):
        assert torch.equal(mine.keys.long(), theirs.keys.long())
        assert sorted(mine.order.tolist()) == list(range(len(mine.keys)))
        assert torch.equal(mine.tiny < 0, theirs.tiny.T < 0)
        assert torch.equal(mine.counted, theirs.counted.T) or not len(theirs.counted)
    step = torch.tensor(STEP, device=device)
    steps = torch.tensor([STEP] * 9, device=device)
    clock = torch.tensor([8], dtype=torch.int32, device=device)
    for number, weight in enumerate(lookup.weights):
        found = []
        for made in (None, index[number]):
            p = weight.float().to(device)
            states = [torch.full_like(p, 0.3) for _ in range(2)]
            last = torch.arange(len(p), device=device).int() % 8
            cuda.table_catch_up(p, states, last, 3, steps, 1, index[number], -1, clock)
            updates_of = [None] * len(shapes)
            updates_of[number] = updates.Update(p, states, last, 3, step, clock, made)
            cuda.embedding_bag_bwd_step(grad, ids, lookup.columns, lookup.spec, updates_of)
            found.append((p, *states, last))
        assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


@pytest.mark.parametrize("optimizer", ["adam", "adagrad"])
def test_a_captured_training_is_triton_s(optimizer, seed, device, tmp_path):
    losses, weights, trainer = train(seed, "cuda", device, tmp_path, "exact", optimizer)
    assert trainer._epochs._graphs.n_recorded == 3
    right, same, _ = train(seed, "triton", device, tmp_path, "exact", optimizer)
    torch.testing.assert_close(losses, right, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(weights["embedding.embed_dict.user.weight"],
                               same["embedding.embed_dict.user.weight"], rtol=2e-4, atol=2e-5)  # fmt: skip


def has_folded():
    return torch.cuda.get_device_capability() == (9, 0) and hasattr(torch.ops.fastmtl_cuda, "folded")


@pytest.mark.parametrize("case", range(6))
def test_predictions_of_random_layers(case, seed, device):
    """Random widths, gates over some experts, the others NaN: one row, tiles of which the last has one, many each."""
    if not has_folded():
        pytest.skip("the kernel is for Hopper")
    n_rows = (9000, 65 * 128 + 1, 3 * 132 * 128 - 5, 1, 300, 20000)[case]
    rng = torch.Generator().manual_seed(seed + case)
    activation = folded_stages.ACTIVATIONS[case % 3]
    layer, towers = staged_layer(rng, 1 + (case + 3) % 7, activation, device)
    n_in, n_gates = layer.spec.in_features, len(layer.spec.gates)
    x = torch.full((n_rows, -(-n_in // 8) * 8 + 8 * drawer(rng)(0, 2)), torch.nan, dtype=torch.bfloat16)
    x[:, :n_in] = torch.randn(n_rows, n_in, generator=rng)
    x = x.to(device)[:, :n_in]
    is_probability = (torch.rand(n_gates, generator=rng) < 0.5).to(device)
    packed = list(folded_stages.stages_of(layer, towers))
    found = [torch.full((n_rows, n_gates), torch.nan, device=device) for _ in range(2)]
    for out in found:
        torch.ops.fastmtl_cuda.folded(x, packed, is_probability, case % 3, out)
    assert torch.equal(*found)
    logits = staged_logits(x.double(), layer, towers)
    wanted = torch.where(is_probability, logits.sigmoid(), logits)
    check_staged(found[0], wanted)
    torch.ops.fastmtl_cuda.folded(x, packed, None, case % 3, found[0])
    folded.run_folded(x.unsqueeze(0), layer, of_dtype(torch.bfloat16), found[1], towers)
    check_staged(found[0], found[1].double())


def test_a_predictor_takes_it_for_many_rows(seed, device):
    """Repeated calls too; few rows are Triton's."""
    if not has_folded():
        pytest.skip("the kernel is for Hopper")
    torch.manual_seed(seed)
    features = [SparseFeature("user", 900, embed_dim=40), SparseFeature("item", 70, embed_dim=40), DenseFeature("age")]
    towers = [{"dims": [64, 32]}] * 2
    model = MMOE(features, ["classification", "regression"], 5, {"dims": [256, 128]}, towers).eval().to(device)
    predict = Predictor(model, "bf16")
    for rows, takes_it in ((20000, True), (300, False)):
        ids = torch.stack([torch.randint(0, n, (rows,)) for n in (900, 70)], 1)
        dense = torch.rand(rows, 1)
        with launch.noting() as launches:
            found = [predict.run(ids.to(device), dense.to(device)) for _ in range(4)]
        assert ("folded" in [one.kernel.__name__ for one in launches]) is takes_it
        assert all(torch.equal(one, found[0]) for one in found)
        x = {"user": ids[:, 0], "item": ids[:, 1], "age": dense[:, 0]}
        with torch.no_grad(), backends.use_backend("eager"):
            wanted = copy.deepcopy(model).cpu().double()(x)
        torch.testing.assert_close(found[0].cpu().double(), wanted, rtol=0.02, atol=0.02)
