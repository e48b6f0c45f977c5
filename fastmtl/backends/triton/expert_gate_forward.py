"""expert_gate, forward: a GEMM a hidden layer, then the mix, the head or the experts themselves."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ...spec import ExpertGateParams, ExpertGateSpec
from .hidden import Hidden, Operand
from .launch import round_up
from .layer_plan import LayerPlan, layer_plan
from .linear import linear
from .linear_heads import linear_heads
from .mixing import activations, experts, head, mix
from .precision import Precision, of_input


class Saved(NamedTuple):
    """What the backward needs beside the input and the parameters. It is only ever read.

    Args:
        z: each hidden layer's ``[B, pitch]``.
        stat: each hidden layer's ``[4, pitch]``.
        weight: each hidden layer's weight as the products read it.
        gate_weight: the gates' likewise.
        soft: ``[2, n_gates2, B]``, each gate's largest logit and sum of exponentials.
        seed: of the dropout.
    """

    z: tuple[Tensor, ...]
    stat: tuple[Tensor, ...]
    weight: tuple[Tensor, ...]
    gate_weight: Tensor | None
    soft: Tensor | None
    seed: Tensor | None

    def flatten(self) -> tuple[Tensor, ...]:
        """As the tensors that autograd keeps."""
        extra = (self.gate_weight, self.soft, self.seed)
        return (*self.z, *self.stat, *self.weight, *(tensor for tensor in extra if tensor is not None))

    @classmethod
    def of(cls, tensors: Sequence[Tensor], spec: ExpertGateSpec, training: bool) -> Saved:
        """The inverse of :meth:`flatten`."""
        n = len(spec.dims)
        rest = iter(tensors[3 * n :])
        gate_weight, soft = (next(rest), next(rest)) if spec.gates else (None, None)
        seed = next(rest) if drops(spec, training) else None
        return cls(
            tuple(tensors[:n]), tuple(tensors[n : 2 * n]), tuple(tensors[2 * n : 3 * n]), gate_weight, soft, seed
        )


def drops(spec: ExpertGateSpec, training: bool) -> bool:
    """Whether a call drops activations."""
    return training and spec.dropout > 0 and bool(spec.dims)


def as_operand(weight: Tensor, precision: Precision) -> Tensor:
    """A weight as the products read it: in their dtype, and with rows that begin on 16 bytes, zeros behind them."""
    rows, width = weight.shape
    pitch = round_up(width, 16 // precision.dtype.itemsize)
    if weight.dtype is precision.dtype and pitch == width:
        return weight.contiguous()
    if pitch == width:
        return weight.to(precision.dtype, memory_format=torch.contiguous_format)
    return torch.zeros(rows, pitch, dtype=precision.dtype, device=weight.device)[:, :width].copy_(weight)


def below(hidden: Hidden | None, x: Tensor) -> Operand:
    """What a layer's products read: the input, or the activations of the layer below."""
    if hidden is None:
        return Operand.of_input(x)
    if hidden.row_wise:  # a product's prologue sees only some units of a row at a time
        return Operand.of_activations(activations(hidden), hidden.units)
    return Operand.of_hidden(hidden)


def _empty(x: Tensor, spec: ExpertGateSpec, dtype: torch.dtype) -> Tensor:
    if spec.output_layer:
        return x.new_empty(0, spec.n_experts, dtype=torch.float32)
    return x.new_empty(len(spec.gates) or spec.n_experts, 0, spec.dims[-1], dtype=dtype)


def expert_gate_fwd(
    x: Tensor, params: ExpertGateParams, spec: ExpertGateSpec, training: bool
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """See :func:`fastmtl.ops.expert_gate`; returns what the backward needs beside the output."""
    precision = of_input(x)
    n_rows = x.shape[1]
    if n_rows == 0:
        return _empty(x, spec, precision.dtype), ()
    if not spec.dims:
        return linear_heads(x if x.stride(2) == 1 else x.contiguous(), params, spec), ()
    layers, saved = hidden_layers(x, params, spec, training)
    last = layers[-1]
    if spec.output_layer:
        out = head(last, params)
    elif spec.gates:
        out, soft = mix(last, layers[0], layer_plan(spec, x.device))
        saved = saved._replace(soft=soft)
    else:
        out = experts(last)
    return out, saved.flatten()


def hidden_layers(
    x: Tensor, params: ExpertGateParams, spec: ExpertGateSpec, training: bool
) -> tuple[list[Hidden], Saved]:
    """The hidden layers of a call, and what its backward needs of them."""
    precision = of_input(x)
    x = x if x.stride(2) == 1 else x.contiguous()
    plan = layer_plan(spec, x.device)
    seed = torch.empty((), dtype=torch.int64, device=x.device).random_() if drops(spec, training) else None
    weights = tuple(as_operand(weight, precision) for weight in params.weight)
    gate_weight = None if params.gate is None else as_operand(params.gate.weight, precision)
    layers = _hidden_layers(x, weights, gate_weight, params, plan, precision, training, seed)
    z, stat = (tuple(getattr(layer, name) for layer in layers) for name in ("z", "stat"))
    return layers, Saved(z, stat, weights, gate_weight, None, seed)


def _hidden_layers(
    x: Tensor,
    weights: tuple[Tensor, ...],
    gate_weight: Tensor | None,
    params: ExpertGateParams,
    plan: LayerPlan,
    precision: Precision,
    training: bool,
    seed: Tensor | None,
) -> list[Hidden]:
    n_rows = x.shape[1]
    layers: list[Hidden] = []
    for layer, weight in enumerate(weights):
        z, stat = linear(
            below(layers[-1] if layers else None, x),
            n_rows,
            weight,
            None if layer else gate_weight,
            params,
            plan,
            layer,
            precision,
            training and n_rows > 1,
        )
        layers.append(Hidden.of(z, stat, params, plan.spec, seed, layer))
    return layers
