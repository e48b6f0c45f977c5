"""Random lookups, layers and chains on the backends with kernels against float64, beyond the sizes of tests/native.

The rule is the suite's, in tests/native/accuracy.py: at most twice eager's own error in float32, plus a floor.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass, replace

import torch
from devices import KERNELS, run_on
from native import folded_layers, general_lookups
from native.accuracy import judge, moved, moved_params
from native.folded_layers import SMOOTH
from native.layers import KINKED, Case, in_any_layout, new_params, random_case
from native.layers import run as run_layer
from native.lookups import Lookup, random_lookup
from torch import Tensor

from fastmtl.backends import triton
from fastmtl.ops import embedding_bag, expert_gate
from fastmtl.spec import ExpertGateParams, ExpertGateSpec, Gate

#: Beyond what a vector register, a cache line or a tile divides.
WIDE = (1, 5, 1025, 1031, 1536, 2049)
#: Triton's interpreter takes a thousand times as long: small problems there.
SLOW = triton.interpreting()

#: What is computed and its gradients.
Parts = tuple[list[Tensor], list[Tensor]]
#: The logarithms of native's errors over eager's, and how many problems were drawn beside this one.
Verdict = tuple[list[float], int]


# -------------------------------------------------------------------------------------------------------- lookups


def wide_lookup(seed: int) -> Lookup:
    """A random lookup; in one of three, tables of odd widths and beyond 1024."""
    rng = random.Random(seed)
    lookup = random_lookup(seed, rng.choice((0, 1, 7, 23) if SLOW else (None, None, None, 4096)))
    if rng.random() > 1 / 3 or len(lookup.ids) > 500:
        return lookup
    generator = torch.Generator().manual_seed(seed)
    dims = [rng.choice(WIDE) for _ in lookup.weights]
    bags = tuple(replace(bag, dim=dims[bag.table]) for bag in lookup.spec.bags)
    spec = replace(lookup.spec, bags=bags)
    weights = [torch.randn(len(w), dim, generator=generator) for w, dim in zip(lookup.weights, dims, strict=True)]
    grad = torch.randn(len(lookup.ids), spec.width(lookup.columns), generator=generator)
    return replace(lookup, spec=spec, weights=weights, grad=grad)


def check_lookup(seed: int, backend: str = "native") -> Verdict:
    """Output and gradients of one lookup."""
    lookup = wide_lookup(seed)

    def run(name: str, dtype: torch.dtype, bits: torch.Generator | None) -> Parts:
        weights = [moved(w, bits).to(dtype, copy=True).requires_grad_() for w in lookup.weights]
        dense = None if lookup.dense is None else lookup.dense.to(dtype).detach().requires_grad_()
        ids = lookup.ids.long() if name == "eager" else lookup.ids
        out = run_on(name, embedding_bag, weights, ids, lookup.columns, dense, lookup.spec)
        out.backward(lookup.grad.to(dtype))
        gradients = [torch.zeros_like(w) if w.grad is None else w.grad for w in weights]
        return [out.detach()], [*gradients, *([] if dense is None else [dense.grad])]

    return judge(run, str(lookup.spec), seed, backend)


def check_general_lookup(seed: int, backend: str = "native") -> Verdict:
    """The same of maxima, weights of ids, ragged bags and tables of 16 bits, whose gradient is rounded to as many."""
    rng = random.Random(seed)
    narrow = rng.choice((torch.float32, torch.float32, torch.bfloat16, torch.float16))
    case = general_lookups.random_case(seed, narrow)
    list_scales = None if case.ragged is None else case.ragged.scales

    def run(name: str, dtype: torch.dtype, bits: torch.Generator | None) -> Parts:
        def leaf(tensor: Tensor | None, own: torch.dtype = dtype) -> Tensor | None:
            return None if tensor is None else tensor.to(own, copy=True).requires_grad_()

        weights = [leaf(w, dtype if dtype is torch.float64 else narrow) for w in case.weights]
        dense, scales, lists = leaf(case.dense), leaf(case.scales), leaf(list_scales)
        ragged = None if case.ragged is None else case.ragged._replace(scales=lists)
        arguments = (weights, case.ids, case.columns, dense, case.spec)
        out = run_on(name, embedding_bag, *arguments, scales=scales, ragged=ragged)
        out.backward(moved(case.grad, bits).to(dtype))
        leaves = [one for one in (*weights, dense, scales, lists) if one is not None]
        return [out.detach()], [torch.zeros_like(one) if one.grad is None else one.grad for one in leaves]

    return judge(run, f"{narrow}, {case.spec}", seed, backend)


# --------------------------------------------------------------------------------------------------------- layers


def wide_spec(rng: random.Random) -> ExpertGateSpec:
    """1 to 64 experts, 0 to 16 gates, widths from 1 to beyond 1024 (few of them then)."""
    n_experts = rng.choice((1, 2, 7) if SLOW else (1, 2, 7, 16, 33, 64))
    dims = [rng.choice((1, 3, 8, 17, 24)) for _ in range(rng.randint(1, 3))]
    if n_experts <= 2 and rng.random() < 0.3:
        dims[rng.randrange(len(dims))] = rng.choice((1025, 1100))
    n_inputs = rng.choice((1, 1, 2, 5))
    gates = [
        Gate(rng.randrange(n_inputs), tuple(sorted(rng.sample(range(n_experts), rng.randint(1, n_experts)))))
        for _ in range(rng.choice((0, 1, 2, 5, 16)))
    ]
    return ExpertGateSpec(
        in_features=rng.choice((1, 3, 16, 37, 130, 1030)),
        expert_input=tuple(sorted(rng.randrange(n_inputs) for _ in range(n_experts))),
        dims=tuple(dims),
        activation=rng.choice(("relu", "leakyrelu", "prelu", "linear", *SMOOTH)),
        gates=tuple(sorted(gates, key=lambda gate: gate.input)),
    )


def check_layer(seed: int, backend: str = "native") -> Verdict:
    """Output, gradients and running statistics of one layer."""
    rng = random.Random(seed)
    spec = wide_spec(rng)
    batch = rng.choice((0, 1, 2, 3, 17) if SLOW else (0, 1, 2, 3, 17, 64, 130))
    if not SLOW and spec.n_experts * max(spec.dims) < 200 and rng.random() < 0.15:
        batch = rng.choice((1000, 4096))
    if spec.activation in KINKED:  # of many elements, one always lies near the kink
        batch = min(batch, 17)
    case = random_case(seed, spec, batch)

    def run(name: str, dtype: torch.dtype, bits: torch.Generator | None) -> Parts:
        params = moved_params(case.params, spec, bits)
        return run_layer(Case(spec, params, moved(case.x, bits), case.grad, case.training), name, dtype).parts()

    return judge(run, f"batch {batch}, training {case.training}, {spec}", seed, backend)


# --------------------------------------------------------------------------------------------------------- chains


@dataclass
class Chain:
    """PLE's levels, one after the other, and the towers."""

    specs: list[ExpertGateSpec]
    params: list[ExpertGateParams]
    x: Tensor
    grad: Tensor
    training: bool


def random_chain(seed: int) -> Chain:
    """1 to 16 tasks, 1 to 4 levels.

    No batch of two rows and no width of one: through several BNs those are all rounding, and a single layer sees them.
    """
    rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    tasks, levels = rng.choice((1, 2) if SLOW else (1, 2, 3, 8, 16)), rng.randint(1, 2 if SLOW else 4)
    specific, shared = rng.randint(1, 2 if tasks > 3 else 4), rng.randint(1, 3)
    width, activation = rng.choice((5, 16, 40)), rng.choice(SMOOTH)
    n_specific, n_all = tasks * specific, tasks * specific + shared
    specs = []
    for level in range(levels):
        first = level == 0
        common = tuple(range(n_specific, n_all))
        gates = [Gate(0 if first else t, (*range(t * specific, (t + 1) * specific), *common)) for t in range(tasks)]
        if level + 1 < levels:
            gates.append(Gate(0 if first else tasks, tuple(range(n_all))))
        inputs = (0,) * n_all if first else (*(e // specific for e in range(n_specific)), *[tasks] * shared)
        dims = tuple(rng.choice((4, 9, 16)) for _ in range(rng.randint(1, 2)))
        specs.append(ExpertGateSpec(width, inputs, dims, activation, gates=tuple(gates)))
        width = dims[-1]
    specs.append(ExpertGateSpec(width, tuple(range(tasks)), (rng.choice((3, 8)),), activation, output_layer=True))
    batch = 16 if SLOW else rng.choice((16, 64, 300))
    x = in_any_layout(torch.randn(1, batch, specs[0].in_features, generator=generator), rng)
    grad = torch.randn(batch, tasks, generator=generator)
    return Chain(specs, [new_params(spec, generator) for spec in specs], x, grad, rng.random() < 0.6)


def check_chain(seed: int, backend: str = "native") -> Verdict:
    """Outputs and gradients of one chain. (The running statistics are a single layer's business.)"""
    chain = random_chain(seed)

    def run(name: str, dtype: torch.dtype, bits: torch.Generator | None) -> Parts:
        x = start = moved(chain.x, bits).to(dtype).detach().requires_grad_()
        learned = []
        for spec, params in zip(chain.specs, chain.params, strict=True):
            case = Case(spec, moved_params(params, spec, bits), x, x, chain.training)
            copy = case.copy_params(dtype)
            learned += copy.learned()
            x = run_on(name, expert_gate, x, copy, spec, chain.training)
        x.backward(chain.grad.to(dtype))
        return [x.detach()], [start.grad, *(torch.zeros_like(p) if p.grad is None else p.grad for p in learned)]

    return judge(run, f"training {chain.training}, {chain.specs}", seed, backend)


def check_folded(seed: int, backend: str = "native") -> Verdict:
    """One layer that small tables are folded into."""
    assert backend == "native"
    return folded_layers.check(seed)


#: What a configuration may be, and its share of a run.
KINDS = {
    "lookups": (check_lookup, 0.45),
    "general lookups": (check_general_lookup, 0.15),
    "layers": (check_layer, 0.2),
    "folded layers": (check_folded, 0.1),
    "chains": (check_chain, 0.1),
}
#: Of the native backend alone; on a GPU such lookups are eager's.
ON_NATIVE = ("general lookups", "folded layers")


def soak(count: int, seed: int) -> str:
    """``count`` fresh configurations on each backend; those that break the rule are all named."""
    return "; ".join(_soak(count, seed, backend) for backend in KERNELS)


def _soak(count: int, seed: int, backend: str) -> str:
    done, failures, ratios, close = {}, [], [], 0
    for kind, (check, share) in KINDS.items():
        if kind in ON_NATIVE and backend != "native":
            continue
        done[kind] = max(round(count * share), 1)
        for i in range(done[kind]):
            try:
                found, drawn = check(seed + i, backend)
            except AssertionError as error:
                failures.append(f"{kind}: {error}")
                continue
            ratios += found
            close += drawn > 0
    assert not failures, "\n".join([f"{len(failures)} of {sum(done.values()):,} configurations", *failures])
    mean = math.exp(sum(ratios) / len(ratios))
    assert mean < 1.05, f"{backend}'s errors are {mean:.2f} of eager's on average"
    return (
        f"{', '.join(f'{n:,} {kind}' for kind, n in done.items())}; {backend}'s errors are {mean:.2f} of eager's on "
        f"average, {close:,} problems were drawn again"
    )
