"""Weights of a layer for inference: BatchNorms folded in, in the products' dtype, padded with zeros to blocks.

A pack is a copy: good as long as the parameters are what they were (models/multi_task/packed.py watches that).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...spec import BN_EPSILON, ExpertGateParams, ExpertGateSpec
from .activations import ROW_WISE
from .launch import power_of_two, round_up

#: Widest last hidden layer, whose accumulator a program holds, and widest other, of which it has a chunk.
_WIDEST, _WIDEST_FIRST = 256, 2048


def why_not(spec: ExpertGateSpec) -> str | None:
    """Why a layer can't be packed; None: it can."""
    if not 1 <= len(spec.dims) <= 2:
        return f"{len(spec.dims)} hidden layers; the folded kernel has one or two"
    if spec.activation in ROW_WISE:
        return f"{spec.activation} needs all units of an expert at once"
    if spec.dims[-1] > _WIDEST or spec.dims[0] > _WIDEST_FIRST:
        return f"hidden layers {spec.dims} are wider than {_WIDEST} at the end, or {_WIDEST_FIRST} before"
    if spec.gate_rows > 128:
        return f"{spec.gate_rows} weights of gates, more than 128"
    return None


def _fold(
    weight: Tensor, bias: Tensor, gamma: Tensor, beta: Tensor, mean: Tensor, var: Tensor
) -> tuple[Tensor, Tensor]:
    """Weight and bias of a Linear with the BatchNorm behind it, in float64."""
    scale = gamma.double() / (var.double() + BN_EPSILON).sqrt()
    return weight.double() * scale[:, None], (bias.double() - mean.double()) * scale + beta.double()


def _padded(tensor: Tensor, *shape: int, dtype: torch.dtype) -> Tensor:
    out = torch.zeros(shape, dtype=dtype, device=tensor.device)
    out[tuple(slice(0, n) for n in tensor.shape)] = tensor.to(dtype)
    return out


def pieces(width: int) -> tuple[int, int, int]:
    """``width``, or somewhat more, as the sum of up to three powers of two from 16 on, the largest first: a block's
    sides are such."""
    width, found = round_up(width, 16), [0, 0, 0]
    for i in range(3):
        if width > 0:
            found[i] = power_of_two(width) if i == 2 else 1 << (width.bit_length() - 1)
            width -= found[i]
    return found[0], found[1], found[2]


@dataclass(frozen=True)
class _Mlps:
    """Equal MLPs of one or two hidden layers, perhaps with a Linear(H, 1) behind: as the kernel's fields want them."""

    weight: tuple[Tensor, ...]
    bias: tuple[Tensor, ...]
    alpha: tuple[Tensor, ...]
    head: Tensor
    head_bias: Tensor

    @classmethod
    def of(cls, spec: ExpertGateSpec, params: ExpertGateParams, widths: tuple[int, ...], dtype: torch.dtype) -> _Mlps:
        """``widths``: the padded widths, that of the input first."""
        n, weights, biases = spec.n_experts, [], []
        for layer in range(len(spec.dims)):
            fields = (params.weight, params.bias, params.gamma, params.beta, params.running_mean, params.running_var)
            weight, bias = _fold(*(field[layer] for field in fields))
            weights.append(
                _padded(weight.view(n, spec.dims[layer], -1), n, widths[layer + 1], widths[layer], dtype=dtype)
            )
            biases.append(_padded(bias.view(n, -1), n, widths[layer + 1], dtype=torch.float32))
        alpha = tuple(params.alpha) or (biases[0],) * len(spec.dims)
        head, head_bias = biases[0], biases[0]
        if params.out_weight is not None and params.out_bias is not None:
            head = _padded(params.out_weight, n, widths[-1], dtype=torch.float32)
            head_bias = params.out_bias.detach().clone()
        return cls(tuple(weights), tuple(biases), tuple(a.detach().clone() for a in alpha), head, head_bias)


class PackedTowers:
    """Towers that read the mixtures of a layer's gates one by one.

    Args:
        spec, params: theirs.
        width: of a mixture, as the layer pads it.
        is_probability: ``[T]`` bool, or None where logits are wanted.
        dtype: of the weights.
    """

    def __init__(
        self,
        spec: ExpertGateSpec,
        params: ExpertGateParams,
        width: int,
        is_probability: Tensor | None,
        dtype: torch.dtype,
    ) -> None:
        self.spec = spec
        self.widths = (width, *(power_of_two(units, 16) for units in spec.dims))
        self.is_probability = is_probability
        self._mlps = _Mlps.of(spec, params, self.widths, dtype)

    def tower_arguments(self) -> dict[str, Any]:
        """What the kernel takes by these names."""
        mlps, depth = self._mlps, len(self.spec.dims)
        return {
            "T1_ptr": mlps.weight[0],
            "Tb1_ptr": mlps.bias[0],
            "Ta1_ptr": mlps.alpha[0],
            "T2_ptr": mlps.weight[-1],
            "Tb2_ptr": mlps.bias[-1],
            "Ta2_ptr": mlps.alpha[-1],
            "Head_ptr": mlps.head,
            "Headb_ptr": mlps.head_bias,
            "Binary_ptr": mlps.head if self.is_probability is None else self.is_probability,
            "SIGMOID": self.is_probability is not None,
            "TOWER_ACT": self.spec.activation,
            "D1": self.widths[depth - 1],
            "D2": self.widths[depth],
        }


class PackedLayer:
    """A layer of experts and gates, or of towers.

    Args:
        spec, params: the layer's; :func:`why_not` has nothing to say of it.
        is_probability: ``[T]`` bool of a layer of towers, or None where their logits are wanted.
        dtype: of the weights.

    Attributes:
        pitch: elements of a row of the weights that read the input.
        h1, h2: padded widths of the first (0 where there is one only) and the last hidden layer.
    """

    def __init__(
        self, spec: ExpertGateSpec, params: ExpertGateParams, is_probability: Tensor | None, dtype: torch.dtype
    ) -> None:
        self.spec = spec
        self.pitch = sum(pieces(spec.in_features))
        self.h2 = power_of_two(spec.dims[-1], 16)
        self.h1 = round_up(spec.dims[0], 64 if spec.dims[0] > 32 else 32) if len(spec.dims) == 2 else 0
        self.is_probability = is_probability
        device = params.bias[0].device
        widths = (self.pitch, self.h1, self.h2) if self.h1 else (self.pitch, self.h2)
        self._mlps = _Mlps.of(spec, params, widths, dtype)
        self._source = torch.tensor(spec.expert_input, dtype=torch.int32, device=device)
        self._gates = self._pack_gates(params, dtype)

    def _pack_gates(self, params: ExpertGateParams, dtype: torch.dtype) -> dict[str, Any]:
        spec, gate = self.spec, params.gate
        if gate is None:
            unused = self._mlps.bias[0]
            return {"Wg_ptr": unused, "Bg_ptr": unused, "Gate_ptr": unused, "Members_ptr": unused, "C2": 16}
        columns = power_of_two(spec.gate_rows, 16)
        weight, bias = _fold(*gate)
        by_input = torch.zeros(spec.n_inputs, columns, self.pitch, dtype=dtype, device=weight.device)
        gate_of = torch.full((columns,), -1, dtype=torch.int32)
        members = torch.full((spec.n_experts, len(spec.gates)), -1, dtype=torch.int32)
        for g, (one, span) in enumerate(zip(spec.gates, spec.gate_spans, strict=True)):
            rows = slice(*span)
            by_input[one.input, rows, : spec.in_features] = weight[rows].to(dtype)
            gate_of[rows] = g
            members[list(one.experts), g] = torch.arange(*span, dtype=torch.int32)
        return {
            "Wg_ptr": by_input,
            "Bg_ptr": _padded(bias, columns, dtype=torch.float32),
            "Gate_ptr": gate_of.to(weight.device),
            "Members_ptr": members.to(weight.device),
            "C2": columns,
        }

    def arguments(self) -> dict[str, Any]:
        """What the kernel takes by these names."""
        mlps = self._mlps
        return {
            "W1_ptr": mlps.weight[0],
            "B1_ptr": mlps.bias[0],
            "A1_ptr": mlps.alpha[0],
            "W2_ptr": mlps.weight[-1],
            "B2_ptr": mlps.bias[-1],
            "A2_ptr": mlps.alpha[-1],
            "Source_ptr": self._source,
            **self._gates,
            "ONE": self.spec.n_inputs == 1,
            "ACT": self.spec.activation,
            "H1": self.h1,
            "H2": self.h2,
            "PITCH": self.pitch,
        }

    def tower_arguments(self) -> dict[str, Any]:
        """As :meth:`PackedTowers.tower_arguments`, where no towers follow: of the layer's own heads."""
        mlps = self._mlps
        unused = mlps.bias[0]
        towers = {f"{name}_ptr": unused for name in ("T1", "Tb1", "Ta1", "T2", "Tb2", "Ta2")}
        return {
            **towers,
            "Head_ptr": mlps.head,
            "Headb_ptr": mlps.head_bias,
            "Binary_ptr": unused if self.is_probability is None else self.is_probability,
            "SIGMOID": self.is_probability is not None,
            "TOWER_ACT": "linear",
            "D1": 16,
            "D2": 16,
        }
