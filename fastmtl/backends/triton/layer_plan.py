"""What depends only on the description of a layer of experts and gates: buffer layouts, and tables of GEMM tiles.

Layout of a hidden layer's columns, for z, its statistics and everything of their shape: the experts' units one behind
the other, then, in the first layer, the gates' rows, those of each input from a multiple of 16 on. The row pitch is a
multiple of 16, so that every row begins on 16 bytes. What pads the gates is 0 in every buffer that is read.

The tables name, for each tile of a GEMM's output, what it reads and where it goes. They are made on the host, once for
each tile size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...spec import ExpertGateSpec, Span
from .launch import alignment, power_of_two, round_up


class Tiles(NamedTuple):
    """A table of tiles ``[n, fields]`` int32, and a power of two that divides all its columns' beginnings."""

    table: Tensor
    align: int


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
        self._tables: dict[tuple, Tiles] = {}

    def per_column(self, layer: int, rows: int) -> Tensor:
        """``[rows, pitch]`` fp32 for numbers of a layer's columns, all to be written; those that pad gates are 0."""
        gates = self.spec.gate_rows if layer == 0 else 0
        is_padded = self.pitch[layer] != self.columns[layer] + gates
        make = torch.zeros if is_padded else torch.empty
        return make(rows, self.pitch[layer], dtype=torch.float32, device=self.device)

    def width_in(self, layer: int) -> int:
        """Units an expert of ``layer`` reads."""
        return self.spec.dims[layer - 1] if layer else self.spec.in_features

    def _tiles(self, key: tuple, columns: tuple[int, ...], make: Callable[[], Iterator[tuple[int, ...]]]) -> Tiles:
        """``columns``: the fields that hold a number of columns."""
        if key not in self._tables:
            rows = list(make())
            align = alignment(*(row[field] for row in rows for field in columns))
            self._tables[key] = Tiles(torch.tensor(rows, dtype=torch.int32, device=self.device), align)
        return self._tables[key]

    def _blocks(self, layer: int) -> Iterator[tuple[int, Span, Span]]:
        """For each thing a layer reads (an input, or an expert's units below): it, the experts' columns that read it,
        and the gates' rows that do."""
        spec = self.spec
        width = spec.dims[layer]
        if layer:
            yield from ((e, Span(e * width, (e + 1) * width), Span(0, 0)) for e in range(spec.n_experts))
            return
        for n, (experts, gates) in enumerate(zip(spec.expert_spans, spec.gate_input_spans, strict=True)):
            yield n, Span(experts.start * width, experts.stop * width), gates

    def linear_tiles(self, layer: int, block: int) -> Tiles:
        """``[tiles, 6]``: what is read, first weight row, first column of z, rows, whether the weight is the gates',
        columns that are written (rows, or more where the gates are padded)."""

        def rows() -> Iterator[tuple[int, ...]]:
            for source, experts, gates in self._blocks(layer):
                for at in range(*experts, block):
                    size = min(block, experts.stop - at)
                    yield source, at, at, size, 0, size
                for at in range(*gates, block):
                    size = min(block, gates.stop - at)
                    yield source, at, self._gate_column(source, at), size, 1, round_up(size, 16)

        return self._tiles(("linear", layer, block), (2, 5), rows)

    def dgrad_tiles(self, layer: int, block: int) -> Tiles:
        """``[tiles, 7]``: what is written, the experts' first column of dz and their number, the gates' first column,
        first row and their number, first unit written."""

        def rows() -> Iterator[tuple[int, ...]]:
            width = self.width_in(layer)
            for source, experts, gates in self._blocks(layer):
                count = gates.stop - gates.start
                mixed = (self._gate_column(source, gates.start), gates.start, count) if count else (0, 0, 0)
                for at in range(0, width, block):
                    yield source, experts.start, experts.stop - experts.start, *mixed, at

        return self._tiles(("dgrad", layer, block), (1, 2, 6), rows)

    def wgrad_tiles(self, layer: int, block_m: int, block_n: int) -> Tiles:
        """``[tiles, 6]``: what is read, first column of dz, rows of the gradient, its first row, first unit read,
        columns of dz that may be read (rows, or more where the gates are padded). The gates' rows of the gradient
        follow the experts'."""

        def rows() -> Iterator[tuple[int, ...]]:
            width = self.width_in(layer)
            for source, experts, gates in self._blocks(layer):
                for at in range(*experts, block_m):
                    size = min(block_m, experts.stop - at)
                    for n in range(0, width, block_n):
                        yield source, at, size, at, n, size
                for at in range(*gates, block_m):
                    size, row = min(block_m, gates.stop - at), self.columns[layer] + at
                    for n in range(0, width, block_n):
                        yield source, self._gate_column(source, at), size, row, n, round_up(size, 16)

        return self._tiles(("wgrad", layer, block_m, block_n), (1, 4, 5), rows)

    def _gate_column(self, source: int, row: int) -> int:
        """The column of a row of the gates that read input ``source``."""
        return self.gate_start[source] + row - self.spec.gate_input_spans[source].start

    @cached_property
    def gate_columns(self) -> list[int]:
        """The column of each of the gates' rows."""
        spans = self.spec.gate_input_spans
        return [self._gate_column(n, row) for n, span in enumerate(spans) for row in range(*span)]

    @cached_property
    def gate_places(self) -> Tensor:
        """:attr:`gate_columns` as ``[C]`` int32."""
        return torch.tensor(self.gate_columns, dtype=torch.int32, device=self.device)

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
