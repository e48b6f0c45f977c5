"""Wrong arguments for every op of the native library: each call works or raises, and none touches foreign memory.

    python -m reliability.fuzz COUNT SEED [FILE]      # FILE: eight bytes, the number of the case that runs now

A case is a right call in which one to three things are wrong: a number, a dtype, a shape, a stride, a missing tensor,
an id, an offset, an entry of a plan. Case n depends on the seed and n alone. What is foreign memory only the
sanitizers can tell, see reliability/sanitize.py; without them a case must at least not end the process.
"""

from __future__ import annotations

import copy
import mmap
import random
import sys
from collections.abc import Callable, Iterator
from itertools import accumulate
from typing import Any

import torch
from native.folded_layers import random_case as folded_case
from native.general_lookups import random_case
from native.layers import new_params
from native.lookups import random_lookup
from torch import Tensor

from fastmtl.backends import native
from fastmtl.backends.native_folding import Folding, split, table_of
from fastmtl.backends.native_inference import Program
from fastmtl.optim.rules import FIELDS, RULES
from fastmtl.optim.waiting import WAIT_FIELDS
from fastmtl.spec import ExpertGateSpec, Gate

#: Mutations of one right call: making it costs more than twenty wrong ones.
BLOCK = 50
#: For numbers: not such that an output of their size could be allocated.
NUMBERS = (-1, 0, 1, 2, 3, -2, 2**40, -(2**40), 2**62, -(2**63), 2**63 - 1)
#: For what lies in a tensor of integers.
IDS = (-1, 0, 1, -2, 7, 2**31 - 1, -(2**31), 2**31, 2**32 + 1, 2**62, -(2**63), 2**63 - 1)
DTYPES = (
    torch.float32,
    torch.float64,
    torch.bfloat16,
    torch.float16,
    torch.int32,
    torch.int64,
    torch.uint8,
    torch.bool,
)
#: Numbers of state that each of the optimizers' rules keeps for a weight.
STATES = {"sgd": 0, "momentum": 1, "nesterov": 1, "adam": 2, "adamw": 2, "adagrad": 1}
REFUSALS = (MemoryError, RuntimeError, NotImplementedError, TypeError, ValueError, IndexError, OverflowError)

Call = tuple[str, list[Any]]


# ----------------------------------------------------------------------------------------------------- right calls


def lookups(rng: random.Random) -> list[Call]:
    """Forward, backward, index and sparse backward of one small lookup."""
    lookup = random_lookup(rng.randrange(2**31), batch=rng.choice((1, 2, 5, 130)))
    plan = native.bag_plan(lookup.spec, lookup.columns)
    width = lookup.spec.width(lookup.columns)
    shapes = [n for w in lookup.weights for n in w.shape]
    index = torch.ops.fastmtl.embedding_bag_index(lookup.ids, plan, shapes)
    return [
        ("embedding_bag_fwd", [lookup.weights, lookup.ids, lookup.dense, plan, width]),
        ("embedding_bag_bwd", [lookup.grad, lookup.ids, plan, shapes]),
        ("embedding_bag_index", [lookup.ids, plan, shapes]),
        ("embedding_bag_bwd_sparse", [lookup.grad, lookup.ids, plan, shapes, list(index)]),
        ("embedding_bag_picks", [lookup.ids, plan[[bag[native.BAG_LENGTH] == 1 for bag in plan.tolist()]], shapes]),
    ]


def general_lookups(rng: random.Random) -> list[Call]:
    """Forward and backward of one small lookup with maxima, scales, ragged bags or narrow tables."""
    case = random_case(rng.randrange(2**31), rng.choice((torch.float32, torch.bfloat16)), rng.choice((1, 2, 9)))
    flat = native._ragged_arguments(case.ids, case.spec, case.scales, case.ragged)
    plan = native.bag_plan(case.spec, case.columns)
    return [
        (
            "embedding_bag_general_fwd",
            [case.weights, case.ids, case.dense, plan, case.spec.width(case.columns), *flat],
        ),
        ("embedding_bag_general_bwd", [case.grad, case.weights, case.ids, plan, *flat]),
    ]


def layers(rng: random.Random) -> list[Call]:
    """Forward and backward of one small layer."""
    generator = torch.Generator().manual_seed(rng.randrange(2**31))
    output_layer = rng.random() < 0.3
    n_inputs, n_experts = rng.choice((1, 1, 2)), rng.choice((1, 2, 5))
    gates = () if output_layer or rng.random() < 0.3 else (Gate(0, tuple(range(n_experts))), Gate(n_inputs - 1, (0,)))
    dims = tuple(rng.choice((1, 3, 17)) for _ in range(rng.choice((0, 1, 2) if output_layer else (1, 2))))
    activation = rng.choice(("relu", "prelu", "dice", "softmax", "gelu"))
    inputs = tuple(sorted(rng.randrange(n_inputs) for _ in range(n_experts)))
    spec = ExpertGateSpec(rng.choice((1, 4, 19)), inputs, dims, activation, gates=gates, output_layer=output_layer)
    params, plan = new_params(spec, generator), native.layer_plan(spec)
    x = torch.randn(spec.n_inputs, rng.choice((1, 2, 9)), spec.in_features, generator=generator)
    training, dropout = rng.random() < 0.6, rng.choice((0.0, 0.3))
    forward = [x, params.learned(), params.running(), plan, training, dropout, 7, rng.random() < 0.5]
    out, *saved = torch.ops.fastmtl.expert_gate_fwd(*forward)
    backward = [torch.ones_like(out), x, params.learned(), list(saved), plan, training, dropout, 7, x.shape[2]]
    return [("expert_gate_fwd", forward), ("expert_gate_bwd", backward)]


def chains(rng: random.Random) -> list[Call]:
    """Gradients of a few layers, each on what the one before made, with or without tables folded into the first."""
    generator = torch.Generator().manual_seed(rng.randrange(2**31))
    n_rows, n_tasks, specs, given = rng.choice((1, 2, 9, 70)), rng.choice((1, 3)), [], []
    x = torch.randn(1, n_rows, rng.choice((1, 4, 19)), generator=generator)
    if rng.random() < 0.5:
        case = folded_case(rng.randrange(2**31), batch=n_rows)
        if not case.spec.output_layer:
            specs, x, given = [case.spec], case.x[None], [torch.tensor(case.places), case.table, case.picks]
    for _ in range(rng.choice((0, 1, 2))):
        width, inputs = (specs[-1].dims[-1], outputs_of(specs[-1])) if specs else (x.shape[2], 1)
        gates = tuple(Gate(i, (0, 1)) for i in sorted(rng.randrange(inputs) for _ in range(2)))
        of = (0, inputs - 1)
        specs.append(ExpertGateSpec(width, of, (rng.choice((3, 17)),), gates=gates))
    width, inputs = (specs[-1].dims[-1], outputs_of(specs[-1])) if specs else (x.shape[2], 1)
    of = (*sorted(rng.randrange(inputs) for _ in range(n_tasks - 1)), inputs - 1)
    specs.append(ExpertGateSpec(width, of, (rng.choice((1, 8)),), output_layer=True))
    params = [new_params(spec, generator) for spec in specs]
    labels = (torch.rand(n_rows, n_tasks, generator=generator) < 0.3).float()
    return [
        (
            "chain_gradients",
            [
                x,
                [p for one in params for p in one.learned()],
                [p for one in params for p in one.running()],
                [native.layer_plan(spec) for spec in specs],
                [rng.choice((0.0, 0.3)) for _ in specs],
                [7] * len(specs),
                rng.random() < 0.5,
                labels,
                torch.rand(n_tasks, generator=generator) < 0.5,
                torch.ones(n_tasks),
                rng.choice((-1, 0, x.shape[2])),
                *given,
            ],
        )
    ]


def outputs_of(spec: ExpertGateSpec) -> int:
    """Matrices that a layer makes."""
    return len(spec.gates) or spec.n_experts


def tables(rng: random.Random) -> list[Call]:
    """The optimizers' ops on a small table and a small parameter, the losses, rows, and the steps of a shuffle; now and
    then memory that is large enough for huge pages."""
    generator = torch.Generator().manual_seed(rng.randrange(2**31))
    height, dim, rule = rng.choice((1, 5, 40)), rng.choice((1, 4, 17)), rng.randrange(len(RULES))
    now = rng.randrange(1, 5)  # steps 0 .. now are kept
    p = torch.randn(height, dim, generator=generator)
    rows = torch.randperm(height, generator=generator)[: rng.randrange(height + 1)].sort().values
    grads = torch.randn(len(rows), dim, generator=generator)
    steps = torch.rand(now + 1, len(FIELDS), generator=generator)
    last = torch.randint(0, now, (height,), generator=generator).int()
    states = [p.abs() for _ in range(STATES[RULES[rule]])]
    adam, waits = [p.abs(), p.abs()], torch.rand(now + 1, WAIT_FIELDS, generator=generator, dtype=torch.float64)
    counters = [torch.zeros(())] if rng.random() < 0.5 else []
    logits, kinds = torch.randn(height, dim, generator=generator), torch.rand(dim, generator=generator) < 0.5
    return [
        ("table_replay", [p, states, last, rule, steps, 0, rows, 0, 0, now]),
        ("table_replay", [p, states, last, rule, steps, 0, None, 0, height, now]),
        ("table_step", [p, states, last, rule, steps, 0, rows, grads, rng.random() < 0.5, 0, height]),
        ("table_wait_from", [waits]),
        ("table_wait", [waits, now, rng.randrange(now), [0.5] * len(FIELDS)]),
        ("table_close", [p, adam, last, RULES.index("adamw"), waits, now + 1, 0, rng.choice((rows, None))]),
        ("dense_step", [[p], [p.clone()], states, counters, rule, [0.1] * len(FIELDS), 1.0]),
        ("take_rows", [[p, last, p > 0], rows]),
        ("in_huge_pages", [[p, waits, *([torch.zeros(4 << 20)] if rng.random() < 0.02 else [])]]),
        ("task_losses", [logits, (logits > 0).float(), kinds, torch.ones(dim)]),
        (
            "shuffle_ahead",
            [torch.arange(height + len(rows), dtype=rng.choice((torch.int32, torch.int64))), height, rows],
        ),
    ]


def predictions(rng: random.Random) -> list[Call]:
    """A lookup and a layer of towers packed, run, and given back."""
    generator = torch.Generator().manual_seed(rng.randrange(2**31))
    lookup = random_lookup(rng.randrange(2**31), batch=rng.choice((1, 2, 5, 130)))
    width = lookup.spec.width(lookup.columns)
    spec = ExpertGateSpec(width, (0, 0), (rng.choice((1, 17)),), output_layer=True)
    program = Program(width)
    for logit in program.layer(spec, new_params(spec, generator), [0]):
        program.output("probability", logit)
    starts = [0, *accumulate(lookup.spec.bag_widths(lookup.columns))]
    folded = [
        f
        for f, bag in enumerate(lookup.spec.bags)
        if bag.pooling == "sum" and lookup.columns[f + 1] - lookup.columns[f] == 1 and rng.random() < 0.5
    ]
    program.fold([(starts[f], table_of(lookup.spec.bags[f], lookup.weights)) for f in folded])
    new = [*program.arguments(), rng.random() < 0.5]
    dense = [] if lookup.dense is None else [lookup.dense]
    plan, small = split(native.bag_plan(lookup.spec, lookup.columns), folded)
    number = torch.ops.fastmtl.inference_new(*new)
    return [
        ("inference_new", new),
        ("inference_run", [number, lookup.weights, [lookup.ids], dense, plan, small]),
        ("inference_free", [torch.ops.fastmtl.inference_new(*new)]),
    ]


def folded_layers(rng: random.Random) -> list[Call]:
    """Forward and backward of one small layer with tables folded into it."""
    case = folded_case(rng.randrange(2**31), batch=rng.choice((1, 2, 70)))
    plan, dropout = native.layer_plan(case.spec), rng.choice((0.0, 0.3))
    given = [torch.tensor(case.places), case.table, case.picks]
    learned, x = case.params.learned(), case.x.unsqueeze(0)
    forward = [x, learned, case.params.running(), plan, case.training, dropout, 7, rng.random() < 0.5, *given]
    _, *saved = torch.ops.fastmtl.expert_gate_fwd(*forward)
    backward = [
        case.grad,
        x,
        learned,
        list(saved),
        plan,
        case.training,
        dropout,
        7,
        rng.choice((-1, 0, x.shape[2])),
        *given,
    ]
    return [("expert_gate_fwd", forward), ("expert_gate_bwd", backward)]


def trainings(rng: random.Random) -> list[Call]:
    """Whole steps of a lookup and two layers, with or without folded tables, by an optimizer that keeps no numbers: one
    case leaves the next one other weights, and nothing else."""
    generator = torch.Generator().manual_seed(rng.randrange(2**31))
    lookup = random_lookup(rng.randrange(2**31), batch=rng.choice((1, 2, 70)))
    spec, columns, weights = lookup.spec, lookup.columns, lookup.weights
    shapes, needs = [weight.shape for weight in weights], [rng.random() < 0.8 for _ in weights]
    kept: tuple[Any, ...] = native.bag_plan(spec, columns), spec.width(columns)
    small: tuple[Any, ...] = None, None, 0, None, None, False
    folded = [
        f
        for f, bag in enumerate(spec.bags)
        if bag.table == 0 and bag.pooling == "sum" and columns[f + 1] - columns[f] == 1 and bag.vocab <= 100
    ]
    others = needs
    if folded and rng.random() < 0.7:
        kept, small, others = Folding(spec, columns, folded).for_program(shapes, needs)
    first = ExpertGateSpec(spec.width(columns), (0, 0), (rng.choice((3, 17)),), gates=(Gate(0, (0, 1)),))
    specs = [first, ExpertGateSpec(first.dims[-1], (0,), (rng.choice((1, 8)),), output_layer=True)]
    params = [new_params(one, generator) for one in specs]
    learned = [p for one in params for p in one.learned()]
    x_columns = kept[1] if any(needs) else -1
    new = [
        weights, *kept, native._wanted(shapes, others), *small, learned, [p for one in params for p in one.running()],
        [native.layer_plan(one) for one in specs], [torch.zeros(2, dtype=torch.int64)],
        [rng.choice((0.0, 0.3)) for _ in specs], rng.random() < 0.5, torch.tensor([True]), x_columns,
    ]  # fmt: skip
    at = [*range(len(learned)), *(len(learned) + w for w, need in enumerate(needs) if need)]
    rule = [at, [], [], RULES.index("sgd")]
    number = torch.ops.fastmtl.training_new(*new)
    torch.ops.fastmtl.training_add_rule(number, *rule)
    labels = (torch.rand(len(lookup.ids), 1, generator=generator) < 0.3).float()
    step = [number, lookup.ids, lookup.dense, labels, torch.ones(1), [7, 7], [0.0] * len(FIELDS), [1.0]]
    torch.ops.fastmtl.training_step(*step)
    return [
        ("training_new", new),
        ("training_add_rule", [torch.ops.fastmtl.training_new(*new), *rule]),
        ("training_step", step),
        ("training_step", step),
        ("training_gradients", [number, at]),
        ("training_free", [torch.ops.fastmtl.training_new(*new)]),
    ]


MAKERS: tuple[Callable[[random.Random], list[Call]], ...] = (
    lookups,
    layers,
    predictions,
    general_lookups,
    layers,
    tables,
    folded_layers,
    chains,
    trainings,
)


# ----------------------------------------------------------------------------------------------------- wrong calls


def wrong_tensor(tensor: Tensor, rng: random.Random) -> Tensor | None:
    """The tensor with one thing wrong."""
    kind = rng.randrange(9)
    if kind == 0:
        return tensor.to(rng.choice(DTYPES))
    if kind == 1:
        return tensor.unsqueeze(rng.randrange(tensor.ndim + 1))
    if kind == 2 and tensor.ndim:
        axis = rng.randrange(tensor.ndim)
        return tensor.narrow(axis, 0, rng.randrange(tensor.shape[axis] + 1))
    if kind == 3 and tensor.ndim:
        axis = rng.randrange(tensor.ndim)
        return torch.cat([tensor, tensor], axis)
    if kind == 4 and tensor.ndim >= 2:
        return tensor.transpose(0, -1)
    if kind == 5 and tensor.ndim and tensor.numel():  # stride 0
        return tensor.flatten()[:1].expand(tensor.shape)
    if kind == 6 and tensor.ndim:  # every second one, of a tensor that ends where its window does
        wide = torch.repeat_interleave(tensor, 2, -1)
        return wide[..., ::2]
    if kind == 7:
        return rng.choice((None, tensor.new_empty(0), torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")))
    return wrong_value(tensor, rng)


def wrong_value(tensor: Tensor, rng: random.Random) -> Tensor:
    """The tensor with one other number in it."""
    if not tensor.numel() or tensor.is_meta:
        return tensor
    changed = tensor.clone()  # keeps a dense tensor's strides
    at = tuple(rng.randrange(n) for n in changed.shape)
    if changed.dtype.is_floating_point:
        changed[at] = rng.choice((float("nan"), float("inf"), -float("inf"), 6e4, 0.0))
    elif changed.dtype is torch.int64:
        changed[at] = rng.choice(
            (*IDS, int(changed[at]) + 1, int(changed[at]) - 1) if abs(int(changed[at])) < 2**60 else IDS
        )
    elif changed.dtype is torch.int32:
        changed[at] = rng.choice([i for i in IDS if -(2**31) <= i < 2**31])
    return changed


def wrong(value: Any, rng: random.Random) -> Any:
    """An argument with one thing wrong."""
    if isinstance(value, Tensor):
        # a plan's, an index's and the ids' numbers are what kernels index with
        is_index = not value.dtype.is_floating_point and rng.random() < 0.7
        return wrong_value(value, rng) if is_index else wrong_tensor(value, rng)
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return rng.choice((*NUMBERS, value + 1, value - 1))
    if isinstance(value, float):
        return rng.choice((float("nan"), float("inf"), -1.0, 0.0, 1.0, 1e38))
    if isinstance(value, list):
        changed = list(value)
        if changed and rng.random() < 0.7:
            at = rng.randrange(len(changed))
            changed[at] = wrong(changed[at], rng)
        elif changed and rng.random() < 0.5:
            del changed[rng.randrange(len(changed))]
        elif changed:
            changed.insert(rng.randrange(len(changed)), rng.choice(changed))
        return changed
    return value


def cases(first: int, count: int, seed: int) -> Iterator[tuple[int, str, list[Any]]]:
    """(number, op, arguments) of the cases ``first .. first + count - 1``."""
    number = first
    while number < first + count:
        block = number // BLOCK
        rng = random.Random(seed * 1_000_003 + block)
        calls = MAKERS[block % len(MAKERS)](rng)
        for i in range(BLOCK):
            name, args = calls[rng.randrange(len(calls))]
            args = list(args)
            for _ in range(rng.choice((1, 1, 2, 3))):
                at = rng.randrange(len(args))
                args[at] = wrong(args[at], rng)
            if block * BLOCK + i == number and number < first + count:
                yield number, name, args
                number += 1


def run(first: int, count: int, seed: int, tell: Callable[[int], None] = lambda number: None) -> tuple[int, int]:
    """(calls that worked, calls that raised); written tensors are copies, so that no case depends on an earlier one."""
    worked = refused = 0
    ops = {name: getattr(torch.ops.fastmtl, name).default for name in NAMES}
    for number, name, args in cases(first, count, seed):
        tell(number)
        args = [copy.deepcopy(arg) if name in WRITING else arg for arg in args]
        try:
            result = ops[name](*args)
            worked += 1
            if name in ("inference_new", "training_new"):
                ops[name.replace("new", "free")](result)
        except REFUSALS:
            refused += 1
    return worked, refused


NAMES = (
    "embedding_bag_fwd", "embedding_bag_bwd", "embedding_bag_index", "embedding_bag_bwd_sparse", "expert_gate_fwd",
    "expert_gate_bwd", "table_replay", "table_step", "table_wait_from", "table_wait", "table_close", "dense_step",
    "task_losses", "inference_new", "inference_run", "inference_free", "embedding_bag_general_fwd",
    "embedding_bag_general_bwd", "shuffle_ahead", "in_huge_pages", "embedding_bag_picks", "take_rows",
    "chain_gradients", "training_new", "training_add_rule", "training_step", "training_gradients", "training_free",
)  # fmt: skip
WRITING = (
    "expert_gate_fwd",
    "chain_gradients",
    "table_replay",
    "table_step",
    "table_wait_from",
    "table_wait",
    "table_close",
    "dense_step",
    "shuffle_ahead",
)


def main(first: int, count: int, seed: int, path: str) -> None:
    """Run cases, noting in a file which one runs: what is left when the process dies."""
    torch.set_num_threads(1)  # threads add nothing to what is read
    with open(path, "r+b") as file, mmap.mmap(file.fileno(), 8) as note:

        def tell(number: int) -> None:
            note[:] = number.to_bytes(8, "little")

        worked, refused = run(first, count, seed, tell)
    print(worked, refused)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:4]), sys.argv[4])
