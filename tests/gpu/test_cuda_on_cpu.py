"""The CUDA kernels run on the CPU, by emulation/: a thread for each of a block's. Numbers, races and bounds."""

import importlib.util
import subprocess

import numpy as np
import pytest
import torch
from emulated import COMPILER, HERE, emulator
from kernels.triton_cases import check, random_lookup

from fastmtl.backends import eager, native, updates
from fastmtl.spec import Bag, EmbeddingSpec

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed: 'fastmtl[gpu]'"),
    pytest.mark.skipif(COMPILER is None, reason="no C++ compiler is here"),
]
NO_RULE = -1
ROWWISE = updates.ROWWISE_ADAGRAD
STEP = (0.01, 0.99, 0.9, 0.1, 0.01, 0.9, 0.3, 1e-6, -0.1)


@pytest.fixture(scope="module")
def emulate(tmp_path_factory):
    """See :func:`emulated.emulator`."""
    return emulator(tmp_path_factory.mktemp("emulated"), "emulate.cpp")


def backward(emulate, lookup, table, grad, target, rule=NO_RULE, listed=False, kind="plain"):
    """One weight's gradients, or its optimizer's step: the arrays of ``target`` as the kernels leave them."""
    from fastmtl.backends.triton.embedding_plan import TablePlan

    spec, ids, weight = lookup.spec, lookup.ids, lookup.weights[table]
    plan = TablePlan(spec, lookup.columns, table, 8, torch.device("cpu"))
    tables, lookups = plan.tiny_group(2**31 - 1) or (torch.zeros(0, 4), torch.zeros(0, 3))
    bits = grad.view(torch.int16) if grad.dtype is torch.bfloat16 else grad
    arrays = {
        "ids": ids.numpy(),
        "bags": plan.bags.numpy(),
        "columns": plan.sorted_columns.numpy(),
        "tables": tables.int().numpy(),
        "lookups": lookups.int().numpy(),
        "places": plan.tiny_rows.numpy(),
        "grad": bits.numpy(),
        **target,
    }
    found = emulate(
        arrays,
        kind,
        is_update=False,
        rule=rule,
        vectors=weight.shape[1] % 4 == 0 and plan.align % 4 == 0 and grad.stride(0) % 4 == 0,
        n_rows=len(ids),
        n_ids=ids.shape[1],
        n_tiny=plan.n_tiny_columns,
        n_table_rows=len(weight),
        n_listed=min(len(ids) * plan.n_sorted, len(weight)) if listed else 0,
        grad_stride=grad.stride(0),
        half=grad.dtype is torch.bfloat16,
        mean=plan.has_mean,
        dim=weight.shape[1],
    )
    return {name: torch.from_numpy(found(name, array)) for name, array in target.items()}


def dense(emulate, lookup, table, grad, kind="plain"):
    out = np.zeros(lookup.weights[table].shape, np.float32)
    return backward(emulate, lookup, table, grad, {"out": out}, kind=kind)["out"]


def eager_gradients(lookup, grad, dtype):
    weights = [weight.to(dtype).requires_grad_() for weight in lookup.weights]
    dense_values = None if lookup.dense is None else lookup.dense.to(dtype)
    out = eager.embedding_bag(weights, lookup.ids, lookup.columns, dense_values, lookup.spec)
    grads = torch.autograd.grad(out, weights, grad.to(dtype), allow_unused=True)
    return [torch.zeros_like(w) if g is None else g for w, g in zip(weights, grads, strict=True)]


def hot_lookup(seed, dim):
    """Rows with hundreds of lookups, which have a block of their own, beside rows with one; a mean among them."""
    rng = torch.Generator().manual_seed(seed)
    bags = (Bag("a", 0, 0, 40, dim), Bag("b", 0, 40, 900, dim, "mean"), Bag("c", 0, 940, 3, dim))
    ids = torch.cat([torch.randint(0, vocab, (310, n), generator=rng) for vocab, n in ((40, 1), (900, 2), (3, 1))], 1)
    ids[:, 0] = torch.where(torch.rand(310, generator=rng) < 0.95, 7, ids[:, 0])
    ids[:, 1] = torch.where(torch.rand(310, generator=rng) < 0.97, 899, ids[:, 1])
    weight = torch.zeros(943, dim, dtype=torch.float64)
    from kernels.triton_cases import Lookup

    return Lookup([weight], ids, (0, 1, 3, 4), None, EmbeddingSpec(bags))


@pytest.mark.parametrize("half", [False, True], ids=["fp32", "bf16"])
def test_gradients(emulate, seed, half):
    for case in range(3):
        lookup = random_lookup(seed + case)
        if lookup.spec.width(lookup.columns) == 0 or len(lookup.ids) == 0:
            continue
        rng = torch.Generator().manual_seed(seed)
        grad = torch.randn(len(lookup.ids), lookup.spec.width(lookup.columns), generator=rng)
        grad = grad.bfloat16() if half else grad
        # ids that the forward would have refused: they never get here, and must not be followed if they do
        reference = eager_gradients(lookup, grad, torch.float64)
        mine = [dense(emulate, lookup, table, grad) for table in range(len(lookup.weights))]
        check(mine, eager_gradients(lookup, grad.float(), torch.float32), reference)


@pytest.mark.parametrize("dim", [1, 4, 16, 70])
def test_rows_with_many_lookups(emulate, seed, dim):
    lookup = hot_lookup(seed, dim)
    grad = torch.randn(310, 3 * dim, generator=torch.Generator().manual_seed(seed))
    mine = dense(emulate, lookup, 0, grad)
    reference = eager_gradients(lookup, grad, torch.float64)
    check([mine], eager_gradients(lookup, grad, torch.float32), reference)
    assert torch.equal(mine, dense(emulate, lookup, 0, grad))  # another order of threads, the same bits


def test_listed_rows(emulate, seed):
    lookup = hot_lookup(seed, 4)
    grad = torch.randn(310, 12, generator=torch.Generator().manual_seed(seed))
    n = min(310 * 3, 943) + 3
    target = {"out": np.full((n, 4), np.nan, np.float32), "rows": np.full(n, 943)}
    found = backward(emulate, lookup, 0, grad, target, listed=True)
    whole = dense(emulate, lookup, 0, grad)
    live = found["rows"] < 943
    rows = found["rows"][live]
    assert len(rows.unique()) == len(rows)
    touched = torch.cat([lookup.ids[:, 0], 40 + lookup.ids[:, 1:3].flatten(), 940 + lookup.ids[:, 3]]).unique()
    assert rows.sort().values.tolist() == touched.tolist()
    assert torch.equal(found["out"][live], whole[rows])


def table_of(rng, rows, dim, rule):
    """A table and its states, random."""
    names = ("first", "second")[: updates.STATES[rule]]
    shape = (rows,) if rule == ROWWISE else (rows, dim)
    states = {name: torch.rand(shape, generator=rng).numpy() for name in names}
    return {"p": torch.randn(rows, dim, generator=rng).numpy(), **states}


@pytest.mark.parametrize("rule", range(len(updates.RULES)), ids=updates.RULES)
def test_a_step_in_the_backward_is_the_step_after_it(emulate, seed, rule):
    dim = (4, 5, 16)[seed % 3]
    lookup = hot_lookup(seed, dim)
    rng = torch.Generator().manual_seed(seed)
    grad = torch.randn(310, 3 * dim, generator=rng)
    table = table_of(rng, 943, dim, rule) | {"last": np.full(943, 6, np.int32)}
    once = np.array([STEP], np.float32), np.array([7], np.int32)
    mine = backward(emulate, lookup, 0, grad, table | {"steps": once[0], "now": once[1]}, rule)
    gradient = dense(emulate, lookup, 0, grad)
    rows = gradient.any(1).nonzero()[:, 0]
    after = update(emulate, table, rule, once[0], 7, 7, rows.numpy(), gradient[rows].numpy(), lazily=True)
    for name in table:
        assert torch.equal(mine[name], after[name]), name
    vetoed = backward(emulate, lookup, 0, grad, table | {"steps": once[0], "now": np.array([-1], np.int32)}, rule)
    for name in table:
        assert torch.equal(vetoed[name], torch.from_numpy(table[name])), name


def update(emulate, table, rule, steps, first_step, upto, rows=None, grads=None, kind="plain", **how):
    """The table's arrays after a replay or a step."""
    empty = np.zeros(0, np.float32)
    arrays = table | {
        "steps": steps,
        "listed": np.zeros(0, np.int64) if rows is None else rows,
        "grads": empty if grads is None else grads,
        **{name: how.pop(name) for name in ("clock",) if name in how},
    }
    rows_of_table, dim = table["p"].shape
    n = how.pop("n", rows_of_table) if rows is None else len(rows)
    numbers = {"start": 0, "lazily": False, "is_listed": rows is not None, **how}
    found = emulate(
        arrays, kind, is_update=True, rule=rule, vectors=dim % 4 == 0, dim=dim, n_table_rows=rows_of_table, n=n,
        given=grads is not None, first_step=first_step, upto=upto, **numbers,
    )  # fmt: skip
    state = {name: torch.from_numpy(found(name, array)) for name, array in table.items()}
    return state | {"behind": torch.from_numpy(found("behind", np.zeros(1, np.int32)))}


def random_steps(rng, n):
    """Numbers of steps whose learning rate changes."""
    steps = torch.tensor([STEP]).repeat(n, 1)
    steps[:, -1] *= torch.rand(n, generator=rng)
    steps[:, 6] = torch.linspace(0.2, 1, n)
    return steps


@pytest.mark.skipif(
    native.unavailable() is not None, reason=f"no native library to compare with: {native.unavailable()}"
)
@pytest.mark.parametrize("rule", range(6), ids=updates.RULES[:6])
def test_the_bits_are_those_of_the_native_backend(emulate, seed, rule):
    rng = torch.Generator().manual_seed(seed)
    rows, dim, now = 37, (4, 7, 40)[seed % 3], 50
    steps = random_steps(rng, 12)
    table = table_of(rng, rows, dim, rule)
    table["last"] = (now - 1 - torch.randint(0, 10, (rows,), generator=rng)).int().numpy()
    listed = torch.randperm(rows, generator=rng)[:20].sort().values
    grads = torch.randn(20, dim, generator=rng)
    mine = update(emulate, table, rule, steps.numpy(), now - 11, now, listed.numpy(), grads.numpy())
    assert mine.pop("behind") == 0
    mine = {name: tensor.numpy() for name, tensor in mine.items()}
    mine = update(emulate, mine, rule, steps.numpy(), now - 11, now, n=9, start=5)
    theirs = {name: torch.from_numpy(array.copy()) for name, array in table.items()}
    states = [theirs[name] for name in ("first", "second") if name in theirs]
    torch.ops.fastmtl.table_step(
        theirs["p"], states, theirs["last"], rule, steps, now - 11, listed, grads, False, 5, 14
    )
    for name, want in theirs.items():
        assert torch.equal(mine[name], want), name


@pytest.mark.skipif(
    native.unavailable() is not None, reason=f"no native library to compare with: {native.unavailable()}"
)
def test_numbers_that_the_quick_steps_leave_to_the_others(emulate, seed):
    """Zeros, numbers that are tiny, huge or not finite, and steps that are not ordinary: the native backend's bits."""
    rng = torch.Generator().manual_seed(seed)
    rows, dim, n = 60, (4, 7)[seed % 2], 40

    def spread(low, high):
        return torch.randn(rows, dim, generator=rng) * 10.0 ** torch.randint(low, high, (rows, 1), generator=rng)

    for rule, eps in (("adam", 1e-8), ("adamw", 1e-8), ("adam", 1e-12)):
        rule = updates.RULES.index(rule)
        steps = random_steps(rng, n)
        steps[:, 0], steps[:, 7] = 1e-5, eps
        p, first, second = spread(-8, 2), spread(-9, 1), spread(-20, 1).square()
        p[::7], first[::7], second[::7] = 0, 0, 0
        second[1::8], second[2::9, 1], p[3::10, 0], first[4::11, 2] = 1e25, float("inf"), float("inf"), float("nan")
        p[5::12], second[6::13] = 1e30, 0
        table = {"p": p.numpy(), "first": first.numpy(), "second": second.numpy()}
        table["last"] = (n - torch.randint(0, 34, (rows,), generator=rng)).int().numpy()
        mine = update(emulate, table, rule, steps.numpy(), 1, n)
        theirs = {name: torch.from_numpy(array.copy()) for name, array in table.items()}
        none = torch.zeros(0, dtype=torch.int64), torch.zeros(0, dim)
        torch.ops.fastmtl.table_step(
            theirs["p"], [theirs["first"], theirs["second"]], theirs["last"], rule, steps, 1, *none, False, 0, rows
        )
        for name, want in theirs.items():
            found = torch.from_numpy(mine[name].numpy())
            if want.is_floating_point():  # below 1.2e-38, or moved by what is, the native backend takes it for zero
                found, want = (torch.where(x.abs() < 1e-29, 0.0, x).nan_to_num(nan=-7.0) for x in (found, want))
            assert torch.equal(found, want), (rule, eps, name)


def test_sorted_rows_catch_up_once_each(emulate, seed):
    """As an index has them: ascending, repeated, void ones last."""
    rng = torch.Generator().manual_seed(seed)
    for rule in (3, ROWWISE):
        table = table_of(rng, 37, (4, 7)[seed % 2], rule)
        table["last"] = torch.randint(0, 8, (37,), generator=rng).int().numpy()
        steps = random_steps(rng, 9).numpy()
        keys = torch.cat([torch.randint(0, 37, (60,), generator=rng), torch.full((4,), 37)]).sort().values
        mine = update(emulate, table, rule, steps, 1, 8, keys.numpy(), is_listed=2)
        right = update(emulate, table, rule, steps, 1, 8, keys.unique().numpy())
        for name, want in right.items():
            assert torch.equal(mine[name], want), name


def test_rowwise_adagrad_replays_and_steps(emulate, seed):
    rng = torch.Generator().manual_seed(seed)
    rows, dim = 11, (4, 7, 16)[seed % 3]
    table = table_of(rng, rows, dim, ROWWISE) | {"last": np.array([3, 5, 6] + [6] * 8, np.int32)}
    steps, grads = random_steps(rng, 7), torch.randn(3, dim, generator=rng)
    listed = torch.tensor([0, 1, 4])
    mine = update(emulate, table, ROWWISE, steps.numpy(), 1, 7, listed.numpy(), grads.numpy())
    p, square = torch.from_numpy(table["p"]).double(), torch.from_numpy(table["first"]).double()
    for i, row in enumerate(listed.tolist()):
        for step in range(int(table["last"][row]) + 1, 8):
            l2, *_, eps, neg_lr = steps[step - 1].double()
            g = l2 * p[row] + (grads[i].double() if step == 7 else 0)
            square[row] += g.square().mean()
            p[row] += neg_lr * g / (square[row].sqrt() + eps)
    torch.testing.assert_close(mine["p"].double(), p, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(mine["first"].double(), square, rtol=1e-5, atol=1e-7)
    assert mine["last"].tolist() == [7, 7, 6, 6, 7] + [6] * 6


def test_void_rows_lagging_rows_and_the_clock(emulate):
    table = {"p": np.ones((5, 4), np.float32), "last": np.array([0, 5, 9, 9, 9], np.int32)}
    steps = np.zeros((4, updates.FIELDS), np.float32)
    steps[:, 0], steps[:, 8] = 0.5, -1.0  # p halves in each step
    rows = np.array([1, 5, -1, 2**40, 0])
    mine = update(emulate, table, 0, steps, 6, 9, rows)
    assert mine["p"][:, 0].tolist() == [1, 1 / 16, 1, 1, 1]
    assert mine["last"].tolist() == [0, 9, 9, 9, 9]
    assert mine["behind"] == 1
    # step 10 of a sweep by twos: (10 % 3) * 2 = 2: rows 2 and 3
    clocked = update(emulate, table, 0, steps, 6, 0, n=2, clock=np.array([10], np.int32))
    assert clocked["p"][:, 0].tolist() == [1, 1, 0.5, 0.5, 1]
    assert clocked["last"].tolist() == [0, 5, 10, 10, 9]


@pytest.mark.parametrize("kind", ["race", "memory"])
def test_sanitizers_find_nothing(emulate, seed, kind):
    """Threads race where a barrier is missing; reads outside the arrays end the program."""
    lookup = hot_lookup(seed, 16)
    rng = torch.Generator().manual_seed(seed)
    grad = torch.randn(310, 48, generator=rng)
    wild = lookup._replace(ids=lookup.ids.clone())
    wild.ids[::3, 0], wild.ids[1::3, 1], wild.ids[2::3, 3] = -(2**31), 2**63 - 1, -1
    assert dense(emulate, wild, 0, grad, kind).isfinite().all()
    for rule in (3, ROWWISE):
        table = table_of(rng, 943, 16, rule) | {"last": np.full(943, 6, np.int32)}
        step = {"steps": np.array([STEP], np.float32), "now": np.array([7], np.int32)}
        backward(emulate, lookup, 0, grad, table | step, rule, kind=kind)
        steps = random_steps(rng, 9).numpy()
        update(emulate, table, rule, steps, 1, 9, np.arange(900), grad.repeat(15, 1)[:900, :16].numpy(), kind)


def test_the_race_detector_sees_a_race(tmp_path):
    """A kernel without its barrier, so that the silence above means something."""
    source = tmp_path / "racy.cpp"
    source.write_text(
        '#include "cuda_on_cpu.h"\n'
        "float shared_sum[64];\n"
        "void kernel(float* out) { shared_sum[threadIdx.x] = 1; out[threadIdx.x] = shared_sum[63 - threadIdx.x]; }\n"
        "int main() { float out[64]; emulated::run(kernel, 1u, 64u, out); }\n"
    )
    flags = ["-std=c++20", "-g", "-pthread", "-fsanitize=thread", "-I", HERE / "emulation"]
    subprocess.run([COMPILER, *flags, source, "-o", tmp_path / "racy"], check=True)
    done = subprocess.run([tmp_path / "racy"], capture_output=True, text=True)
    assert done.returncode != 0
    assert "data race" in done.stderr
