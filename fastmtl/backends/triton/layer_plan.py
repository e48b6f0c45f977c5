"""What depends only on the description of a layer of experts and gates: buffer layouts, and which products it is.

Layout of a hidden layer's columns, for z, its statistics and everything of their shape: the experts' units one behind
the other, then, in the first layer, the gates' rows, those of each input from a multiple of 16 on. The row pitch is a
multiple of 16, so that every row begins on 16 bytes. What pads the gates is 0 in every buffer that is read.
"""

from __future__ import annotations

from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...spec import ExpertGateSpec
from .launch import power_of_two, round_up


class Block(NamedTuple):
    """Products of one shape: ``n`` sources from ``source`` on, each with ``width`` columns of z, from column
    ``first`` on one behind the other. A source is an input of the first layer, or an expert's units below."""

    source: int
    n: int
    first: int
    width: int


def _joined(blocks: list[Block]) -> list[Block]:
    """Neighbours of one width as one."""
    found: list[Block] = []
    for block in blocks:
        last = found[-1] if found else None
        if (
            last
            and last.width == block.width
            and last.source + last.n == block.source
            and last.first + last.n * last.width == block.first
        ):
            found[-1] = last._replace(n=last.n + 1)
        else:
            found.append(block)
    return found


class LayerPlan:
    """The layouts and tables of one layer.

    Attributes:
        pitch: for each hidden layer, the row pitch of its buffers.
        columns: for each hidden layer, the experts' columns.
        gate_start: for each input, the first column of its gates in the first layer's buffers.
        n_gates2: the gates, rounded up to a power of two.
    """

    def __init__(self, spec: ExpertGateSpec, device: torch.device):
        self.spec, self.device = spec, device
        self.columns = [spec.n_experts * width for width in spec.dims]
        self.pitch = [round_up(columns, 16) for columns in self.columns]
        self.gate_start: list[int] = []
        for span in spec.gate_input_spans if spec.gates else ():
            self.gate_start.append(self.pitch[0])
            self.pitch[0] += round_up(span.stop - span.start, 16)
        self.n_gates2 = power_of_two(len(spec.gates))
        self._blocks: dict[int, list[Block]] = {}

    def per_column(self, layer: int, rows: int) -> Tensor:
        """``[rows, pitch]`` fp32 for numbers of a layer's columns, all to be written; those that pad gates are 0."""
        make = torch.zeros if self._is_padded(layer) else torch.empty
        return make(rows, self.pitch[layer], dtype=torch.float32, device=self.device)

    def like(self, z: Tensor, layer: int) -> Tensor:
        """A buffer of a layer's shape for D: what pads a gate is written with it, what lies behind experts by nobody,
        and is 0."""
        end = self.gate_start[0] if layer == 0 and self.spec.gates else self.pitch[layer]
        has_gap = end != self.columns[layer]
        return (torch.zeros_like if has_gap else torch.empty_like)(z)

    def _is_padded(self, layer: int) -> bool:
        gates = self.spec.gate_rows if layer == 0 else 0
        return self.pitch[layer] != self.columns[layer] + gates

    def blocks(self, layer: int) -> list[Block]:
        """The products that a layer's z is: all its columns, those that pad nothing but a row of z left out."""
        if layer not in self._blocks:
            self._blocks[layer] = self._upper(layer) if layer else self._first()
        return self._blocks[layer]

    def _upper(self, layer: int) -> list[Block]:
        return [Block(0, self.spec.n_experts, 0, self.spec.dims[layer])]

    def _first(self) -> list[Block]:
        spec, width = self.spec, self.spec.dims[0]
        if spec.n_inputs == 1:  # experts, gates and what pads them
            return [Block(0, 1, 0, self.pitch[0] if spec.gates else self.columns[0])]
        found = [
            Block(n, 1, experts.start * width, (experts.stop - experts.start) * width)
            for n, experts in enumerate(spec.expert_spans)
        ]
        for n, gates in enumerate(spec.gate_input_spans if spec.gates else ()):
            found.append(Block(n, 1, self.gate_start[n], round_up(gates.stop - gates.start, 16)))
        return _joined([block for block in found if block.width])

    def _gate_column(self, source: int, row: int) -> int:
        """The column of a row of the gates that read input ``source``."""
        return self.gate_start[source] + row - self.spec.gate_input_spans[source].start

    @cached_property
    def gate_columns(self) -> list[int]:
        """The column of each of the gates' rows."""
        spans = self.spec.gate_input_spans
        return [self._gate_column(n, row) for n, span in enumerate(spans) for row in range(*span)]

    @cached_property
    def gates_are_together(self) -> bool:
        """Whether nothing lies between the gates' columns."""
        return self.gate_columns[-1] - self.gate_columns[0] == self.spec.gate_rows - 1

    def of_gates(self, buffer: Tensor, axis: int) -> Tensor:
        """The gates' rows of a buffer with one for each column of the first layer; a view where they are together."""
        if self.gates_are_together:
            return buffer.narrow(axis, self.gate_columns[0], self.spec.gate_rows)
        return buffer.index_select(axis, self.gate_places)

    @cached_property
    def gate_places(self) -> Tensor:
        """:attr:`gate_columns` as ``[C]`` int32."""
        return torch.tensor(self.gate_columns, dtype=torch.int32, device=self.device)

    @cached_property
    def rows_of_gates(self) -> Tensor:
        """``[pitch - columns of the experts]`` int32: the gates' row that each column behind the experts' is, or -1."""
        rows = [-1] * (self.pitch[0] - self.columns[0])
        for row, column in enumerate(self.gate_columns):
            rows[column - self.columns[0]] = row
        return torch.tensor(rows, dtype=torch.int32, device=self.device)

    @cached_property
    def members(self) -> Tensor:
        """``[E, n_gates2]`` int32: the column in which gate g weighs expert e, or -1."""
        table = torch.full((self.spec.n_experts, self.n_gates2), -1, dtype=torch.int32)
        for g, (gate, span) in enumerate(zip(self.spec.gates, self.spec.gate_spans, strict=True)):
            for row, e in zip(range(*span), gate.experts, strict=True):
                table[e, g] = self.gate_columns[row]
        return table.to(self.device)

    @cached_property
    def sources(self) -> Tensor:
        """``[E]`` int32: the input that each expert reads."""
        return torch.tensor(self.spec.expert_input, dtype=torch.int32, device=self.device)

    @cached_property
    def readers(self) -> Tensor:
        """``[N, 2]`` int32: first and last + 1 of the experts that read each input."""
        return torch.tensor(self.spec.expert_spans, dtype=torch.int32, device=self.device)

    @cached_property
    def gate_spans(self) -> Tensor:
        """``[G, 3]`` int32: each gate's first column, their number, and the columns of padding behind them."""
        spans = []
        for g, span in enumerate(self.spec.gate_spans):
            follows = self.spec.gate_spans[g + 1 : g + 2]
            end = self.gate_columns[follows[0].start] if follows else self.pitch[0]
            spans.append((self.gate_columns[span.start], len(range(*span)), end - self.gate_columns[span.stop - 1] - 1))
        return torch.tensor(spans, dtype=torch.int32, device=self.device)

    @cached_property
    def widest_gate(self) -> int:
        """Experts of the gate that mixes most."""
        return max(len(gate.experts) for gate in self.spec.gates)


_plans: dict[tuple, LayerPlan] = {}


def layer_plan(spec: ExpertGateSpec, device: torch.device) -> LayerPlan:
    """The plan of ``spec``, found by identity: hashing a description costs more than a launch."""
    key = (id(spec), device)
    plan = _plans.get(key)
    if plan is None or plan.spec is not spec:
        if len(_plans) >= 256:
            _plans.clear()
        plan = _plans[key] = LayerPlan(spec, device)
    return plan


def kept() -> list[Any]:
    """The plans made so far that would be found again."""
    return list(_plans.values())
