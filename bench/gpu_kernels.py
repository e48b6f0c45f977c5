"""Single calls of bench.gpu: microseconds, bytes or operations a second, and the fraction of this run's limit."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch

from bench.gpu_models import Batch, make_model
from bench.shapes import Shape
from fastmtl import backend
from fastmtl.backends.updates import RULES, Update

ADAM = RULES.index("adam")
#: A step's numbers of Adam with weight decay, see fastmtl.optim.rules.
NUMBERS = (1e-5, 1.0, 0.999, 0.1, 0.001, 0.0, 0.5, 1e-8, -1e-3)


class Call(NamedTuple):
    """Something to time: its work, and the bytes or operations that it cannot do without."""

    name: str
    work: Callable[[], object]
    bytes: float
    flops: float


def calls(shape: Shape, batch: Batch, precision: str, device: torch.device, backends: list[str]) -> Iterator[Call]:
    """The lookup's calls on each backend, and the layer's.

    Bytes count each id, each looked-up row of the batch and its output once; of an optimizer's step the weight and both
    states of every distinct row, read and written.
    """
    model = make_model(shape, "mmoe").to(device).train()
    _, columns, dense, spec = _lookup(model, batch)
    ids, weights = batch.ids, model.embedding.weights()
    shapes, needs = [weight.shape for weight in weights], [True] * len(weights)
    rows = len(ids)
    width = spec.width(columns)
    looked_up = 4.0 * rows * len(spec.bags) * shape.embed_dim
    distinct = sum(len(ids[:, f].unique()) for f in range(ids.shape[1]))
    half = precision == "bf16"
    size = 2 if half else 4
    grad = torch.randn(rows, width, device=device, dtype=torch.bfloat16 if half else torch.float32)
    for name in backends:
        module: Any = backend.TABLE["embedding_bag"][name]
        if module.DIFFERENTIABLE:
            yield Call(
                f"embedding_bag forward, {name}",
                lambda module=module: module.embedding_bag(weights, ids, columns, dense, spec),
                ids.numel() * 8 + looked_up + size * rows * width,
                0,
            )
            continue
        if name != "cuda":  # whose forward is triton's
            yield Call(
                f"embedding_bag forward, {name}",
                lambda module=module: module.embedding_bag_fwd(weights, ids, columns, dense, spec),
                ids.numel() * 8 + looked_up + 4 * rows * width,
                0,
            )
        updated = distinct * shape.embed_dim * 4.0
        gathered = ids.numel() * 8 + size * rows * len(spec.bags) * shape.embed_dim
        if hasattr(module, "embedding_bag_bwd_step"):
            updates = [_update(weight) for weight in weights]
            yield Call(
                f"embedding_bag backward + Adam, {name}",
                lambda module=module, updates=updates: module.embedding_bag_bwd_step(grad, ids, columns, spec, updates),
                gathered + 6 * updated,
                0,
            )
        else:
            full = grad.float()
            yield Call(
                f"embedding_bag backward, {name}",
                lambda module=module, full=full: module.embedding_bag_bwd(full, ids, columns, spec, shapes, needs),
                gathered + 4.0 * sum(weight.numel() for weight in weights),
                0,
            )


def _update(weight: torch.Tensor) -> Update:
    states = [torch.zeros_like(weight) for _ in range(2)]
    last = torch.zeros(len(weight), dtype=torch.int32, device=weight.device)
    step = torch.tensor(NUMBERS, device=weight.device)
    return Update(weight.detach(), states, last, ADAM, step, last.new_ones(1))


def _lookup(model: Any, batch: Batch) -> tuple[Any, tuple[int, ...], Any, Any]:
    found = model.embedding.lookup(batch.columns, model.features)
    return found.weights, found.columns, found.dense, found.spec
