"""What the GPU's work is at least: operations, bytes, floors and the targets. The one place that has the formulas.

    products of a row     2 a b for each linear layer a -> b (``Shape.flops``); backward twice that
    floor of a step       3 F B / R + (P B C s + G + O) / W
    floor of a forward      F B / R + (G + 4 B T) / W

F  operations of a row, forward.  B  rows.  R  rate of a product in this precision, W  bandwidth of a copy (bytes read
and written), both measured in the same run.  C  columns of all normalised layers of a row, s  bytes of one in this
precision.  P  5 passes over them: written and read forward, read, and its gradient written and read, backward.  G
bytes of the lookup: ids of 8 bytes, and D numbers of 4 for each, read.  O  of the exact optimizer: each touched row's
weight and two states read and written, a 32nd of each table's likewise, dense parameters read p, g, m, v and write p,
m, v.

    bytes of a kernel     each tensor that it is given, once; of a table, and of what has a number for each of its rows,
                          the rows that the batch looks up; what an optimizer moves, twice
    bytes of a product    both operands and what is written, once
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

from torch import Tensor

from bench.shapes import PLE_LEVELS, PLE_SHARED, PLE_SPECIFIC, Shape
from fastmtl.trainers.device_tables import MOST_MISSED

PASSES = 5
#: Arguments of a kernel that are read and written.
MOVED = ("P_ptr", "First_ptr", "Second_ptr", "Last_ptr")


class Layer(NamedTuple):
    """A linear layer of a model: its products and its normalised columns, of a row."""

    name: str
    flops: float
    columns: int


def layers(shape: Shape, model: str) -> list[Layer]:
    """The products in the order of a forward: gates go with the first layer of their level's experts."""
    n_task, found = len(shape.task_names), []
    levels = 1 if model == "mmoe" else PLE_LEVELS
    width = shape.input_width
    for level in range(levels):
        if model == "mmoe":
            experts, gates = shape.n_expert, n_task * shape.n_expert
        else:
            experts = n_task * PLE_SPECIFIC + PLE_SHARED
            gates = n_task * (PLE_SPECIFIC + PLE_SHARED) + (experts if level + 1 < levels else 0)
        name = "experts" if levels == 1 else f"level {level}"
        for i, (a, b) in enumerate(pairwise((width, *shape.expert_dims))):
            extra = gates if i == 0 else 0
            found.append(Layer(f"{name}, layer {i}", 2.0 * (experts * a * b + a * extra), experts * b + extra))
        width = shape.expert_dims[-1]
    for i, (a, b) in enumerate(pairwise((width, *shape.tower_dims))):
        found.append(Layer(f"towers, layer {i}", 2.0 * n_task * a * b, n_task * b))
    return found


def dense_params(shape: Shape, model: str) -> int:
    """About how many parameters are in no table: the weights of the products."""
    return round(shape.flops(model) / 2)


def touched_rows(ids: Sequence[Tensor]) -> int:
    """Rows of all tables that a batch looks up; one tensor of ids a table."""
    return sum(len(column.unique()) for column in ids)


def _size(precision: str) -> int:
    return 2 if precision == "bf16" else 4


def step_floor(
    shape: Shape, model: str, batch: int, precision: str, touched: int, reached: Mapping[str, float]
) -> float:
    """Seconds of a training step; ``reached``: the limits of this run."""
    products = 3 * shape.flops(model) * batch / reached[precision]
    columns = sum(layer.columns for layer in layers(shape, model))
    activations = PASSES * batch * columns * _size(precision)
    moved = touched + sum(shape.vocabs) / MOST_MISSED
    optimizer = 4 * (6 * shape.embed_dim * moved + 7 * dense_params(shape, model))
    return products + (activations + lookup_bytes(shape, batch) + optimizer) / reached["copy"]


def forward_floor(shape: Shape, model: str, batch: int, precision: str, reached: Mapping[str, float]) -> float:
    """Seconds of a prediction."""
    out = 4 * batch * len(shape.task_names)
    return shape.flops(model) * batch / reached[precision] + (lookup_bytes(shape, batch) + out) / reached["copy"]


def lookup_bytes(shape: Shape, batch: int) -> float:
    """G."""
    return batch * (len(shape.vocabs) * (8 + 4 * shape.embed_dim) + 4 * shape.n_dense)


# ------------------------------------------------------------------------------------------------------- the calls


def forward_bytes(shape: Shape, batch: int, precision: str, touched: int) -> float:
    """Of a lookup: ids, rows and dense columns read, the output written."""
    read = batch * (8 * len(shape.vocabs) + 4 * shape.n_dense) + 4 * touched * shape.embed_dim
    return read + batch * shape.input_width * _size(precision)


def gradient_bytes(shape: Shape, batch: int, precision: str) -> float:
    """Of what every backward of a lookup reads: ids and the gradient."""
    return batch * len(shape.vocabs) * (8 + shape.embed_dim * _size(precision))


def moved_bytes(shape: Shape, rows: float) -> float:
    """Of a step of Adam: weight and both states of ``rows`` rows, read and written."""
    return 4 * 6 * shape.embed_dim * rows


# ------------------------------------------------------------------------------------------- launches of a step


def launch_bytes(arguments: Mapping[str, Any], rows: int, touched: int) -> float:
    """Of one launch of a kernel.

    Args:
        arguments: the kernel's, tensors among them.
        rows: V of the table; a tensor with so many rows counts those that are touched.
        touched: see :func:`touched_rows`.
    """
    found, seen = 0.0, set()
    flat = [
        (name, one) for name, value in arguments.items() for one in (value if isinstance(value, tuple) else (value,))
    ]
    for name, tensor in flat:
        if not isinstance(tensor, Tensor) or (tensor.data_ptr(), tensor.numel()) in seen:
            continue
        seen.add((tensor.data_ptr(), tensor.numel()))
        share = touched / rows if tensor.ndim and len(tensor) == rows else 1.0
        found += share * tensor.numel() * tensor.element_size() * (2 if name in MOVED else 1)
    return found


def launch_flops(name: str, arguments: Mapping[str, Any]) -> float:
    """Of one launch: of those that lie between two hidden layers (fastmtl/backends/triton/hopper.py), products of every
    expert's two widths; 0: a product of the library, or a pass."""
    products = {"expert_gate_up": 1, "expert_gate_down_sums": 1, "expert_gate_down": 2}.get(name, 0)
    if not products:
        return 0.0
    rows = len(arguments["Z_ptr"])
    other = arguments["n_below" if name == "expert_gate_up" else "n_above"]
    return 2.0 * products * rows * arguments["n_experts"] * arguments["n_units"] * other


# ------------------------------------------------------------------------------------------------------- targets


class Target(NamedTuple):
    """A line of the project's aims on one H200.

    Args:
        what: in words.
        key: the case, ``(mode, model, batch, precision)`` of ali-ccp.
        wanted: millions of samples a second, or times as fast as ``base``.
        base: a contender and its precision whose speed is the unit; None: millions of samples a second.
    """

    what: str
    key: tuple[str, str, int, str]
    wanted: float
    base: tuple[str, str] | None = None


_BEST = ("training", "mmoe", 65536, "bf16")
TARGETS = (
    Target("MMoE training, B=65536, bf16, M samples/s", _BEST, 35),
    Target("the same, times the peer in fp32", _BEST, 20, ("{peer}", "ieee")),
    Target("the same, times the peer compiled, fp32", _BEST, 5, ("{peer} compiled", "ieee")),
    Target("MMoE training, B=4096, bf16, M samples/s", ("training", "mmoe", 4096, "bf16"), 12),
    Target("PLE training, B=65536, bf16, M samples/s", ("training", "ple", 65536, "bf16"), 16),
    Target("inference MMoE, B=65536, bf16, M samples/s", ("inference", "mmoe", 65536, "bf16"), 190),
)
#: Share of the copy bandwidth that the lookup's backward with Adam is to reach at D=16.
BACKWARD_TARGET = 0.7
#: Contenders whose figures count for the targets.
OURS = ("triton", "cuda", "trainer")
