"""expert_gate, forward: a product and its statistics a layer, then the mix, the head or the experts themselves."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ...spec import ExpertGateParams, ExpertGateSpec
from .. import branches
from . import hopper, products
from .batch_norm import statistics
from .hidden import Hidden
from .layer_plan import layer_plan
from .linear_heads import linear_heads
from .mixing import activations, experts, head, mix
from .operands import operands
from .passes import pieces
from .precision import Precision, of_input


class Saved(NamedTuple):
    """What the backward needs beside the input and the parameters. It is only ever read.

    Args:
        z: each hidden layer's ``[B, pitch]``.
        stat: each hidden layer's ``[4, pitch]``.
        weight: each hidden layer's weight as the products read it.
        h: the activations of each hidden layer but the last, ``[B, pitch]``; empty where hopper.py makes them anew.
        share: ``[B, columns of the gates]`` fp32, their softmax.
        seed: of the dropout.
    """

    z: tuple[Tensor, ...]
    stat: tuple[Tensor, ...]
    weight: tuple[Tensor, ...]
    h: tuple[Tensor, ...]
    share: Tensor | None
    seed: Tensor | None

    def flatten(self) -> tuple[Tensor, ...]:
        """As the tensors that autograd keeps."""
        extra = (self.share, self.seed)
        return (*self.z, *self.stat, *self.weight, *self.h, *(tensor for tensor in extra if tensor is not None))

    @classmethod
    def of(cls, tensors: Sequence[Tensor], spec: ExpertGateSpec, training: bool) -> Saved:
        """The inverse of :meth:`flatten`."""
        n, rest = len(spec.dims), iter(tensors)
        z, stat, weight, h = (tuple(itertools.islice(rest, many)) for many in (n, n, n, n - 1))
        share = next(rest) if spec.gates else None
        return cls(z, stat, weight, h, share, next(rest) if drops(spec, training) else None)


def drops(spec: ExpertGateSpec, training: bool) -> bool:
    """Whether a call drops activations."""
    return training and spec.dropout > 0 and bool(spec.dims)


def as_input(x: Tensor, precision: Precision) -> Tensor:
    """The input as the products read it: in their dtype, units contiguous."""
    x = x.to(precision.dtype)
    return x if x.stride(2) == 1 else x.contiguous()


def _empty(x: Tensor, spec: ExpertGateSpec, dtype: torch.dtype) -> Tensor:
    if spec.output_layer:
        return x.new_empty(0, spec.n_experts, dtype=torch.float32)
    return x.new_empty(len(spec.gates) or spec.n_experts, 0, spec.dims[-1], dtype=dtype)


def expert_gate_fwd(
    x: Tensor,
    params: ExpertGateParams,
    spec: ExpertGateSpec,
    training: bool,
    weights: tuple[Tensor, ...] | None = None,
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """See :func:`fastmtl.ops.expert_gate`; returns what the backward needs beside the output. ``weights``: the hidden
    layers', as operands.weights_ahead gives them, where they were made before."""
    precision = of_input(x)
    n_rows = x.shape[1]
    if n_rows == 0:
        return _empty(x, spec, precision.dtype), ()
    if not spec.dims:
        return linear_heads(x if x.stride(2) == 1 else x.contiguous(), params, spec), ()
    layers, saved = hidden_layers(x, params, spec, training, weights)
    last = layers[-1]
    if spec.output_layer:
        out = head(last, params)
    elif spec.gates:
        out, share = mix(last, layers[0], layer_plan(spec, x.device))
        saved = saved._replace(share=share)
    else:
        out = experts(last)
    return out, saved.flatten()


def hidden_layers(
    x: Tensor,
    params: ExpertGateParams,
    spec: ExpertGateSpec,
    training: bool,
    weights: tuple[Tensor, ...] | None = None,
) -> tuple[list[Hidden], Saved]:
    """The hidden layers of a call, and what its backward needs of them; ``weights``: see :func:`expert_gate_fwd`."""
    precision = of_input(x)
    plan = layer_plan(spec, x.device)
    seed = torch.empty((), dtype=torch.int64, device=x.device).random_() if drops(spec, training) else None
    weights = operands(params, plan, precision) if weights is None else weights
    branches.join(branches.OPERANDS)
    layers: list[Hidden] = []
    written: list[Tensor] = []
    is_by_batch = training and x.shape[1] > 1
    for layer, weight in enumerate(weights):
        part: Tensor | None = None
        run = 1
        if layer and is_by_batch and hopper.takes(layers[-1]):
            z, part, run = hopper.up(layers[-1], weight, plan.pitch[layer])
            written.append(z.new_empty(0))
        else:
            if layer:
                written.append(activations(layers[-1]))
            h = layers[-1].by_expert(written[-1]) if layer else as_input(x, precision)
            z = products.forward(h, weight, plan, layer)
            if is_by_batch:
                part, run = pieces(z)
        layers.append(Hidden.of(z, statistics(part, len(z), run, params, plan, layer), params, spec, seed, layer))
    zs, stats = (tuple(getattr(layer, name) for layer in layers) for name in ("z", "stat"))
    return layers, Saved(zs, stats, weights, tuple(written), None, seed)
