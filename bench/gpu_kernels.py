"""Single calls and single kernels of bench.gpu, caches cold: us, bytes or operations a second, fraction of the limit.

A kernel's launch is taken out of a training step and repeated alone, as it was; calls of several launches are timed as
a CUDA graph. The formulas are in bench/gpu_work.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bench import gpu_work
from bench.gpu_models import Batch, Contender, Runner, make_model
from bench.gpu_timing import Cold, graphed
from bench.shapes import Shape
from fastmtl import backend
from fastmtl.backends.updates import RULES, Update
from fastmtl.trainers.device_tables import MOST_MISSED

ADAM = RULES.index("adam")
#: A step's numbers of Adam with weight decay, see fastmtl.optim.rules.
NUMBERS = (1e-5, 1.0, 0.999, 0.1, 0.001, 0.0, 0.5, 1e-8, -1e-3)

#: Kernels that find nothing left to do when they are repeated; the sweep is among the calls.
ONCE = ("advance", "table_rows")


class Call(NamedTuple):
    """Something to time: its work, and the bytes or operations that it cannot do without."""

    name: str
    work: Callable[[], object]
    bytes: float
    flops: float = 0.0


def calls(shape: Shape, batch: Batch, precision: str, device: torch.device, backends: list[str]) -> Iterator[Call]:
    """The lookup's calls on each backend: forward, backward in its forms, with Adam, the sort and the sweep."""
    model = make_model(shape, "mmoe").to(device).train()
    found = model.embedding.lookup(batch.columns, model.features)
    ids, columns, dense, spec = found.ids, found.columns, found.dense, found.spec
    weights = [weight.detach() for weight in found.weights]
    shapes, needs = [weight.shape for weight in weights], [True] * len(weights)
    rows, n_table = len(ids), sum(len(weight) for weight in weights)
    touched = gpu_work.touched_rows(ids.unbind(1))
    forward = gpu_work.forward_bytes(shape, rows, precision, touched)
    gradient = gpu_work.gradient_bytes(shape, rows, precision)
    rows_written = 4 * shape.embed_dim
    half = precision == "bf16"
    grad = torch.randn(rows, spec.width(columns), device=device).to(torch.bfloat16 if half else torch.float32)
    for name in backends:
        module: Any = backend.TABLE["embedding_bag"][name]
        if module.DIFFERENTIABLE:
            yield Call(
                f"embedding_bag forward, {name}",
                lambda module=module: module.embedding_bag(weights, ids, columns, dense, spec),
                forward,
            )
            continue
        common = (ids, columns, spec)
        if name != "cuda":  # whose forward is triton's
            yield Call(
                f"embedding_bag forward, {name}",
                lambda module=module: module.embedding_bag_fwd(weights, ids, columns, dense, spec),
                forward,
            )
        full = grad if name in ("triton", "cuda") else grad.float()
        yield Call(
            f"embedding_bag backward, dense, {name}",
            lambda module=module, full=full, common=common: module.embedding_bag_bwd(full, *common, shapes, needs),
            gradient + rows_written * n_table,
        )
        if not hasattr(module, "embedding_bag_bwd_step"):
            continue
        yield Call(
            f"embedding_bag backward, rows, {name}",
            lambda module=module, common=common: module.embedding_bag_bwd_sparse(grad, *common, shapes, needs),
            gradient + (rows_written + 8) * touched,
        )
        updates = [_update(weight) for weight in weights]
        yield Call(
            f"embedding_bag backward + Adam, {name}",
            lambda module=module, updates=updates, common=common: module.embedding_bag_bwd_step(grad, *common, updates),
            gradient + gpu_work.moved_bytes(shape, touched),
        )
        index = module.embedding_bag_index(*common, shapes, needs)
        sorted_ahead = [update._replace(index=part) for update, part in zip(updates, index, strict=True)]
        yield Call(
            f"embedding_bag backward + Adam, sorted ahead, {name}",
            lambda module=module, ahead=sorted_ahead, common=common: module.embedding_bag_bwd_step(
                grad, *common, ahead
            ),
            gradient + gpu_work.moved_bytes(shape, touched),
        )
        yield Call(
            f"index of the ids, {name}",
            lambda module=module, common=common: module.embedding_bag_index(*common, shapes, needs),
            ids.numel() * (8 + 4 * 4),
        )
        swept = [_update(weight) for weight in weights]
        yield Call(
            f"sweep of 1/{MOST_MISSED}, {name}",
            lambda module=module, swept=swept: _sweep(module, swept),
            gpu_work.moved_bytes(shape, n_table / MOST_MISSED),
        )
    offsets = torch.tensor([bag.offset for bag in spec.bags], device=device)
    keys = (ids + offsets).int().flatten()
    yield Call("sort of the batch's rows, torch", lambda: torch.sort(keys), 2 * 4 * keys.numel() + 8 * keys.numel())


def _update(weight: Tensor) -> Update:
    states = [torch.zeros_like(weight) for _ in range(2)]
    last = torch.zeros(len(weight), dtype=torch.int32, device=weight.device)
    step = torch.tensor(NUMBERS, device=weight.device)
    return Update(weight.clone(), states, last, ADAM, step, last.new_ones(1))


def _sweep(module: Any, updates: list[Update]) -> None:
    """One missed step for a share of each table: rows are left behind anew before each call."""
    for one in updates:
        share = -(-len(one.p) // MOST_MISSED)
        one.last[:share].zero_()
        module.table_replay(one.p, one.states, one.last, one.rule, one.step[None], 1, None, 0, share, 1)


def time_calls(
    shape: Shape, batch: Batch, precision: str, device: torch.device, backends: list[str], reached: dict[str, float]
) -> list[dict[str, Any]]:
    """The rows of the calls."""
    found = list(calls(shape, batch, precision, device, backends))
    works, singly = [], []
    for call in found:
        work, is_graph = graphed(call.work, device)
        works.append(work)
        singly.append("" if is_graph else "launched singly")
    times = Cold(device).alternated(works, *((5, 5) if device.type == "cuda" else (2, 1)))
    return [
        _row(call, seconds, how, reached, precision) for call, seconds, how in zip(found, times, singly, strict=True)
    ]


# ------------------------------------------------------------------------------------------- kernels of a step


def launches(runner: Runner, batch: Batch, rows: int, touched: int) -> list[Call]:
    """Every launch of a Triton kernel and every product of layers in one training step, which is taken.

    Args:
        rows, touched: see :func:`bench.gpu_work.launch_bytes`.
    """
    from fastmtl.backends.triton import launch, products

    found: list[Call] = []
    multiply = products.product

    def note(kernel: Any, grid: tuple[int, ...], warps: Any, arguments: dict[str, Any]) -> None:
        def again() -> None:
            if isinstance(kernel, launch.Operation):
                kernel.run(*(arguments[name] for name in kernel.arg_names))
            else:
                kernel[grid](**arguments, **warps.options())

        again()
        name = getattr(kernel, "__name__", None) or kernel.fn.__name__
        moved = gpu_work.launch_bytes(arguments, rows, touched)
        found.append(Call(name.removesuffix("_kernel"), again, moved, gpu_work.launch_flops(name, arguments)))

    def product(a: Tensor, b: Tensor, out: Tensor, adds: bool = False) -> None:
        multiply(a, b, out, adds)
        a, b, out = a.detach(), b.detach(), out.detach()  # repeated where gradients are on
        n, m, k = a.shape
        name = f"product {n} x {m} x {k} x {b.shape[2]}"
        moved = sum(tensor.numel() * tensor.element_size() for tensor in (a, b, out))
        found.append(Call(name, lambda: multiply(a, b, out, adds), moved, 2.0 * n * m * k * b.shape[2]))

    launch.recorder, products.product = note, product
    try:
        runner.step(batch)
    finally:
        launch.recorder, products.product = None, multiply
    return found


def time_kernels(
    shape: Shape,
    kind: str,
    batch: Batch,
    precision: str,
    device: torch.device,
    state: dict[str, Tensor],
    reached: dict[str, float],
) -> list[dict[str, Any]]:
    """The rows of every Triton kernel and product of a training step."""
    runner = Runner(Contender("fastmtl", "triton", by_rows=True), shape, kind, state, precision, device)
    runner.step(batch)
    n_table = sum(shape.vocabs)
    touched = gpu_work.touched_rows([batch.columns[f"s{i}"] for i in range(len(shape.vocabs))])
    found = [one for one in launches(runner, batch, n_table, touched) if one.name not in ONCE]
    times = Cold(device).alternated([one.work for one in found], *((3, 3) if device.type == "cuda" else (1, 1)))
    return [
        _row(one, seconds, "in a step", reached, precision) | {"model": kind}
        for one, seconds in zip(found, times, strict=True)
    ]


def _row(call: Call, seconds: float, how: str, reached: dict[str, float], precision: str) -> dict[str, Any]:
    """Of the two limits the one that is nearer."""
    by_bytes, by_flops = call.bytes / seconds / reached["copy"], call.flops / seconds / reached[precision]
    return {
        "call": call.name, "us": seconds * 1e6, "gbytes_per_second": call.bytes / seconds / 1e9,
        "tflops": call.flops / seconds / 1e12 if call.flops else "", "of_limit": max(by_bytes, by_flops), "how": how,
    }  # fmt: skip
