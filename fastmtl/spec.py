"""What the ops tell their backends: plain, hashable descriptions of a lookup and of a layer of experts and gates.

Nothing here knows a model, a device or a kernel. Parameters travel beside the description, batched:

- an embedding weight holds the tables of all features of one width, one below the other: ``[V_total, D]``;
- a layer of experts and gates holds the first linear layers of its E experts one below the other, ``[E * H, I]``, and
  those of its G gates likewise, ``[C, I]``; both are ordered by the input they read, so that the rows that read one
  input are one range. (Two tensors, not one: MMoE's experts are shared between the tasks, its gates are not.)
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, islice
from typing import NamedTuple

import torch

ACTIVATIONS = ("relu", "sigmoid", "leakyrelu", "prelu", "dice", "softmax", "tanh", "gelu", "silu", "linear")
#: Activations with one learned scalar per MLP and layer (PReLU's slope, Dice's alpha).
LEARNED_ACTIVATIONS = ("prelu", "dice")
LEAKY_SLOPE = 0.01
DICE_EPSILON = 1e-3
BN_MOMENTUM = 0.1
BN_EPSILON = 1e-5


@dataclass(frozen=True)
class Bag:
    """How one feature is looked up.

    Args:
        name: the feature, for error messages.
        table: index of the weight tensor that holds the feature's table.
        offset: first row of the table in that weight.
        vocab: rows of the table; valid ids are ``0 .. vocab - 1``.
        dim: width D of the table.
        pooling: ``"sum"``, ``"mean"`` (over the ids that are no padding), ``"max"`` (of each number apart; of
            equal ones the first has the gradient) or ``"concat"``. An empty bag gives zeros.
        padding: ids that stand for "nothing": they add zero, are not counted by the mean and get no gradient.
        oov: what an id outside the vocabulary does: ``"raise"``, ``"zero"`` (as padding) or a row of the table.
        is_ragged: whether the ids are in a :class:`Ragged` list; such a bag has no id columns and no "concat".
    """

    name: str
    table: int
    offset: int
    vocab: int
    dim: int
    pooling: str = "sum"
    padding: tuple[int, ...] = ()
    oov: str | int = "raise"
    is_ragged: bool = False


class Ragged(NamedTuple):
    """Bags of any length: the ids of all ragged bags of a batch in one list.

    Args:
        ids: ``[N]`` int64 or int32.
        offsets: ``[R, B + 1]`` int64 or int32, ascending throughout; the r-th ragged bag of the spec has in row b the
            ids ``offsets[r, b]:offsets[r, b + 1]``.
        scales: ``[N]`` float32, what each id's embedding is multiplied by; None: nothing.
    """

    ids: torch.Tensor
    offsets: torch.Tensor
    scales: torch.Tensor | None = None


@dataclass(frozen=True)
class EmbeddingSpec:
    """All bags of a model, in the order of the output columns; ``n_dense`` dense columns follow them."""

    bags: tuple[Bag, ...]
    n_dense: int = 0

    def __post_init__(self) -> None:
        _ = self.is_common  # the first access takes a lock in Python 3.11, at which torch.compile breaks its graph

    @cached_property
    def is_common(self) -> bool:
        """Whether no bag is ragged or takes a maximum."""
        return not any(bag.is_ragged or bag.pooling == "max" for bag in self.bags)

    @property
    def n_tables(self) -> int:
        """Weight tensors the bags read."""
        return len({bag.table for bag in self.bags})

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

    def __post_init__(self) -> None:
        _ = self.n_inputs, self.expert_spans, self.gate_spans, self.gate_input_spans  # as in EmbeddingSpec

    @property
    def n_experts(self) -> int:
        """E."""
        return len(self.expert_input)

    @cached_property
    def n_inputs(self) -> int:
        """N."""
        return 1 + max((*self.expert_input, *(gate.input for gate in self.gates)))

    @cached_property
    def expert_spans(self) -> tuple[Span, ...]:
        """For each input, the range of experts that read it."""
        return _runs(self.expert_input, [1] * self.n_experts, self.n_inputs)

    @cached_property
    def gate_spans(self) -> tuple[Span, ...]:
        """For each gate, its rows of the gates' weight: one for each expert it mixes."""
        stops = list(accumulate(len(gate.experts) for gate in self.gates))
        return tuple(Span(stop - len(gate.experts), stop) for gate, stop in zip(self.gates, stops, strict=True))

    @cached_property
    def gate_input_spans(self) -> tuple[Span, ...]:
        """For each input, the rows of the gates' weight that read it."""
        return _runs([gate.input for gate in self.gates], [len(gate.experts) for gate in self.gates], self.n_inputs)

    @property
    def gate_rows(self) -> int:
        """Rows C of the gates' weight."""
        return sum(len(gate.experts) for gate in self.gates)


def _runs(inputs: Sequence[int], sizes: Sequence[int], n_inputs: int) -> tuple[Span, ...]:
    counts = [sum(size for source, size in zip(inputs, sizes, strict=True) if source == n) for n in range(n_inputs)]
    return tuple(Span(stop - count, stop) for count, stop in zip(counts, accumulate(counts), strict=True))


class GateParams(NamedTuple):
    """The batched parameters of all gates: ``weight [C, I]``, the others ``[C]``; C = ``spec.gate_rows``."""

    weight: torch.Tensor
    bias: torch.Tensor
    gamma: torch.Tensor
    beta: torch.Tensor
    running_mean: torch.Tensor
    running_var: torch.Tensor


class ExpertGateParams(NamedTuple):
    """The batched parameters of an expert-gate layer; L hidden layers, E experts.

    ``weight[l]`` is ``[E * H_l, H_{l-1}]`` with H_{-1} = I; ``bias``, ``gamma``, ``beta``, ``running_mean`` and
    ``running_var`` are ``[E * H_l]``; ``alpha`` (learned activations only) is one ``[E]`` a layer; ``out_weight`` is
    ``[E, H_L]`` and ``out_bias`` ``[E]`` where there is an output layer; ``gate`` where there are gates.
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
    gate: GateParams | None = None

    def learned(self) -> list[torch.Tensor]:
        """The tensors that have a gradient, in the order in which a backend's backward returns them."""
        flat = [*self.weight, *self.bias, *self.gamma, *self.beta, *self.alpha]
        if self.out_weight is not None and self.out_bias is not None:
            flat += [self.out_weight, self.out_bias]
        return flat if self.gate is None else flat + list(self.gate[:4])

    def running(self) -> list[torch.Tensor]:
        """The running statistics, which are no parameters."""
        flat = [*self.running_mean, *self.running_var]
        return flat if self.gate is None else flat + list(self.gate[4:])

    @classmethod
    def of(
        cls, learned: Sequence[torch.Tensor], running: Sequence[torch.Tensor], spec: ExpertGateSpec
    ) -> ExpertGateParams:
        """The inverse of :meth:`learned` and :meth:`running`."""
        n, it, buffers = len(spec.dims), iter(learned), iter(running)

        def take(source: Iterator[torch.Tensor]) -> tuple[torch.Tensor, ...]:
            return tuple(islice(source, n))

        weight, bias, gamma, beta, mean, var = (*(take(it) for _ in range(4)), *(take(buffers) for _ in range(2)))
        alpha = take(it) if spec.activation in LEARNED_ACTIVATIONS else ()
        out = (next(it), next(it)) if spec.output_layer else (None, None)
        gate = GateParams(*it, *buffers) if spec.gates else None
        return cls(weight, bias, gamma, beta, mean, var, alpha, out[0], out[1], gate)
