"""Gradients by finite differences, the ops' schemas by opcheck, several backwards over one graph."""

from __future__ import annotations

import random
from collections.abc import Callable

import torch
from devices import BACKENDS, DEVICE, KERNELS, place, run_on
from native.layers import Case, random_case, random_spec
from native.lookups import random_lookup
from torch.library import opcheck

from fastmtl.backend import use_backend
from fastmtl.backends import cuda, updates
from fastmtl.ops import embedding_bag, expert_gate
from fastmtl.spec import ExpertGateParams

from . import fuzz

#: opcheck's parts that hold for every op; the fakes are looked at where an op has one.
CHECKS = ("test_schema", "test_autograd_registration")


def check_finite_differences(seed: int) -> None:
    """gradcheck of a random layer and a random lookup in double, on eager: the one backend that computes in it.

    On the device under test.
    """
    rng = random.Random(seed)
    spec = random_spec(rng)
    while spec.n_experts * sum(spec.dims) * spec.in_features > 1500:
        spec = random_spec(rng)
    case: Case = random_case(seed, spec, rng.choice((2, 3, 5)))
    if spec.activation in ("softmax", "dice", "sigmoid", "tanh", "gelu", "silu", "linear"):
        params = case.copy_params(torch.float64)
        running, learned = place(params.running()), [p.detach().to(DEVICE).requires_grad_() for p in params.learned()]
        x = place(case.x.double()).detach().requires_grad_()

        def layer(x: torch.Tensor, *learned: torch.Tensor) -> torch.Tensor:
            kept = [one.clone() for one in running]  # in training the call moves them
            return expert_gate(x, ExpertGateParams.of(learned, kept, spec), spec, case.training)

        with use_backend("eager"):
            assert torch.autograd.gradcheck(layer, (x, *learned), fast_mode=True, atol=1e-4), spec
    lookup = random_lookup(seed, batch=3)
    weights = [place(w.double()).requires_grad_() for w in lookup.weights]
    dense = None if lookup.dense is None else place(lookup.dense.double())
    ids = place(lookup.ids.long())
    with use_backend("eager"):
        assert torch.autograd.gradcheck(
            lambda *w: embedding_bag(list(w), ids, lookup.columns, dense, lookup.spec), weights,
            fast_mode=True,
        )  # fmt: skip


def check_several_backwards(seed: int, backend: str) -> None:
    """A retained graph of a lookup and a layer gives the same bits again, and twice as much for twice the gradient."""
    lookup = random_lookup(seed, batch=64)
    weights = [w.clone().requires_grad_() for w in lookup.weights]
    ids = lookup.ids.long() if backend == "eager" else lookup.ids
    out = run_on(backend, embedding_bag, weights, ids, lookup.columns, lookup.dense, lookup.spec)
    again: Callable[[torch.Tensor], tuple] = lambda grad: torch.autograd.grad(  # noqa: E731
        out, weights, grad, retain_graph=True, allow_unused=True
    )
    first, other, third = again(lookup.grad), again(2 * lookup.grad), again(lookup.grad)
    for a, b, c in zip(first, other, third, strict=True):
        assert torch.equal(a, c)
        # doubling is exact, but numbers below the smallest normal one are rounded at places of their own
        torch.testing.assert_close(2 * a, b, rtol=0, atol=1e-37)


def registered() -> list[str]:
    """Names of all ops of the library but those for the tests of its core alone, which write where they are told."""
    names = {s.name.split("::")[1] for s in torch._C._jit_get_all_schemas() if s.name.startswith("fastmtl::")}
    return sorted(name for name in names if not name.startswith("check_"))


def check_ops(seed: int) -> set[str]:
    """opcheck of every op that :mod:`reliability.fuzz` has a right call of; returns their names."""
    rng, done = random.Random(seed), set()
    for make in dict.fromkeys(fuzz.MAKERS):
        for name, args in make(rng):
            op = getattr(torch.ops.fastmtl, name).default
            checks = list(CHECKS)
            if torch._C._dispatch_has_kernel_for_dispatch_key(f"fastmtl::{name}", "Meta"):
                checks.append("test_faketensor")
            opcheck(op, tuple(args), test_utils=checks)
            done.add(name)
    return done


class _Checked:
    """The CUDA library's ops, each call of which goes through opcheck first."""

    def __init__(self) -> None:
        self.done: set[str] = set()

    def __getattr__(self, name: str) -> Callable[..., None]:
        op = getattr(torch.ops.fastmtl_cuda, name).default

        def call(*args: object) -> None:
            opcheck(op, args, test_utils=CHECKS)
            self.done.add(name)
            op(*args)

        return call


def check_cuda_ops(seed: int) -> set[str]:
    """opcheck of the CUDA library's ops as the backend calls them; returns their names."""
    checked, usual = _Checked(), cuda._ops
    cuda._ops = checked
    try:
        lookup = random_lookup(seed, batch=64)
        grad, ids, shapes = place(lookup.grad), place(lookup.ids), [w.shape for w in lookup.weights]
        arguments = (grad, ids, lookup.columns, lookup.spec, shapes, [True] * len(shapes))
        cuda.embedding_bag_index(*arguments[1:])
        cuda.embedding_bag_bwd(*arguments)
        cuda.embedding_bag_bwd_sparse(*arguments)
        table = [torch.zeros(300, 16, device=DEVICE) for _ in range(3)]
        last, clock = (torch.zeros(n, dtype=torch.int32, device=DEVICE) for n in (300, 1))
        steps = torch.full((4, 9), 0.5, device=DEVICE)
        adam = updates.RULES.index("adam")
        cuda.table_replay(table[0], table[1:], last, adam, steps, 1, None, 0, 300, 2)
        tables = [place(w.clone()) for w in lookup.weights]
        found: list[updates.Update | None] = []
        for p in tables:
            mine = torch.zeros(len(p), dtype=torch.int32, device=DEVICE)
            states = [torch.zeros_like(p) for _ in range(2)]
            found.append(updates.Update(p, states, mine, adam, steps[0].clone(), clock + 1))
        cuda.embedding_bag_bwd_step(grad, ids, lookup.columns, lookup.spec, found)
    finally:
        cuda._ops = usual
    return checked.done


def soak(count: int, seed: int) -> str:
    """``count`` random layers and lookups, and every op."""
    for i in range(count):
        check_finite_differences(seed + i)
        for backend in BACKENDS:
            check_several_backwards(seed + i, backend)
    what = f"{count:,} layers and lookups by finite differences, several backwards on {', '.join(BACKENDS)}"
    if "cuda" in KERNELS:
        what += f"; opcheck of {', '.join(sorted(check_cuda_ops(seed)))}"
    if "native" not in KERNELS:
        return what
    done: set[str] = set()
    for i in range(20):
        done |= check_ops(seed + i)
    simple = {"isa", "gemm_isa", "embedding_rows"}  # no arguments, or PyTorch's own custom_op
    missing = set(registered()) - done - simple
    assert not missing, f"no right call is known of {sorted(missing)}: add one to tests/reliability/fuzz.py"
    return f"{what}; opcheck of {', '.join(sorted(done))}"
