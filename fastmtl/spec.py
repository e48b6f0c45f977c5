"""What the ops tell their backends: plain, hashable descriptions of a lookup and of a layer of experts and gates.

Nothing here knows a model, a device or a kernel. Parameters travel beside the description, batched:

- an embedding weight holds the tables of all features of one width, one below the other: ``[V_total, D]``;
- a layer of experts and gates holds its first linear layers as ONE wide weight ``[C, I]`` whose rows ("columns" of the
  product ``x @ weight.T``) are ordered by input: for input 0 its experts, then its gates, then input 1, and so on.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch

ACTIVATIONS = ("relu", "sigmoid", "leakyrelu", "prelu", "dice", "softmax", "tanh", "gelu", "silu", "linear")
#: Activations with one learned scalar per MLP and layer (PReLU's slope, Dice's alpha).
LEARNED_ACTIVATIONS = ("prelu", "dice")
LEAKY_SLOPE = 0.01
DICE_EPSILON = 1e-3
BN_MOMENTUM = 0.1
BN_EPSILON = 1e-5
#: torch-rechub divides a mean-pooled bag by count + this.
MEAN_EPSILON = 1e-16


@dataclass(frozen=True)
class Bag:
    """How one feature is looked up.

    Args:
        name: the feature, for error messages.
        table: index of the weight tensor that holds the feature's table.
        offset: first row of the table in that weight.
        vocab: rows of the table; valid ids are ``0 .. vocab - 1``.
        dim: width D of the table.
        pooling: ``"sum"``, ``"mean"`` (over the ids that are no padding; an empty bag gives zeros) or ``"concat"``.
        padding: ids that stand for "nothing": they add zero, are not counted by the mean and get no gradient.
        oov: what an id outside the vocabulary does: ``"raise"``, ``"zero"`` (as padding) or a row of the table.
    """

    name: str
    table: int
    offset: int
    vocab: int
    dim: int
    pooling: str = "sum"
    padding: tuple[int, ...] = ()
    oov: str | int = "raise"


@dataclass(frozen=True)
class EmbeddingSpec:
    """All bags of a model, in the order of the output columns; ``n_dense`` dense columns follow them."""

    bags: tuple[Bag, ...]
    n_dense: int = 0

    def width(self, columns: tuple[int, ...]) -> int:
        """Columns of the output when bag f owns the id columns ``columns[f]:columns[f + 1]``."""
        return sum(self.bag_widths(columns)) + self.n_dense

    def bag_widths(self, columns: tuple[int, ...]) -> tuple[int, ...]:
        """Output columns of each bag: D, or L * D where the bag is concatenated."""
        return tuple(
            bag.dim * (columns[f + 1] - columns[f] if bag.pooling == "concat" else 1) for f, bag in enumerate(self.bags)
        )


@dataclass(frozen=True)
class Gate:
    """A softmax gate: Linear -> BatchNorm -> softmax over ``experts``, computed from input ``input``."""

    input: int
    experts: tuple[int, ...]


class Span(NamedTuple):
    """A range of rows (or columns): ``start <= i < stop``."""

    start: int
    stop: int


@dataclass(frozen=True)
class ExpertGateSpec:
    """A layer of E equal MLP experts and G gates over N inputs of one width.

    Each hidden layer of an expert is Linear -> BatchNorm -> activation -> dropout. With ``output_layer`` a last
    Linear(H, 1) follows (towers). Without gates the result is the experts' outputs.

    Args:
        in_features: width I of every input.
        expert_input: for each expert, the input it reads (ascending).
        dims: hidden widths H_1 .. H_L; may be empty only with ``output_layer``.
        activation: one of :data:`ACTIVATIONS`.
        dropout: probability of zeroing an activation in training.
        gates: the gates (inputs ascending); each mixes the experts it names.
        output_layer: whether a Linear(H_L, 1) ends every expert; excludes gates.
    """

    in_features: int
    expert_input: tuple[int, ...]
    dims: tuple[int, ...]
    activation: str = "relu"
    dropout: float = 0.0
    gates: tuple[Gate, ...] = ()
    output_layer: bool = False

    @property
    def n_experts(self) -> int:
        return len(self.expert_input)

    @cached_property
    def n_inputs(self) -> int:
        return 1 + max((*self.expert_input, *(gate.input for gate in self.gates)))

    @cached_property
    def _layout(self) -> tuple[tuple[Span, ...], tuple[Span, ...], tuple[Span, ...]]:
        width = self.dims[0] if self.dims else 0
        experts: dict[int, Span] = {}
        gates: dict[int, Span] = {}
        inputs = []
        at = 0
        for n in range(self.n_inputs):
            start = at
            for e, source in enumerate(self.expert_input):
                if source == n:
                    experts[e] = Span(at, at + width)
                    at += width
            for g, gate in enumerate(self.gates):
                if gate.input == n:
                    gates[g] = Span(at, at + len(gate.experts))
                    at += len(gate.experts)
            inputs.append(Span(start, at))
        return (
            tuple(experts[e] for e in range(self.n_experts)),
            tuple(gates[g] for g in range(len(self.gates))),
            tuple(inputs),
        )

    @property
    def expert_spans(self) -> tuple[Span, ...]:
        """Rows of the wide first weight that belong to each expert."""
        return self._layout[0]

    @property
    def gate_spans(self) -> tuple[Span, ...]:
        """Rows of the wide first weight that belong to each gate."""
        return self._layout[1]

    @property
    def input_spans(self) -> tuple[Span, ...]:
        """Rows of the wide first weight that read each input."""
        return self._layout[2]

    @property
    def wide(self) -> int:
        """Rows C of the wide first weight."""
        return self._layout[2][-1].stop


class ExpertGateParams(NamedTuple):
    """The batched parameters of an expert-gate layer; L hidden layers, E experts, C = ``spec.wide``.

    ``weight[0]`` is ``[C, I]``, ``weight[l]`` is ``[E * H_l, H_{l-1}]``; ``bias``, ``gamma``, ``beta``,
    ``running_mean`` and ``running_var`` are ``[C]`` or ``[E * H_l]``; ``alpha`` (learned activations only) is one
    ``[E]`` a layer; ``out_weight`` is ``[E, H_L]`` and ``out_bias`` ``[E]`` where there is an output layer.
    """

    weight: tuple[torch.Tensor, ...]
    bias: tuple[torch.Tensor, ...]
    gamma: tuple[torch.Tensor, ...]
    beta: tuple[torch.Tensor, ...]
    running_mean: tuple[torch.Tensor, ...]
    running_var: tuple[torch.Tensor, ...]
    alpha: tuple[torch.Tensor, ...] = ()
    out_weight: torch.Tensor | None = None
    out_bias: torch.Tensor | None = None
