"""Adam with weight decay over ali-ccp's tables: torch's fused sweep against fastmtl's exact updates at sparse cost.

    python -m bench.optimizer --steps 60
    python -m bench.optimizer --rule adamw        # or adam: without decay
    python -m bench.optimizer --after 1500        # when weight decay has made idle rows small

First both train the same table with the same gradients and must agree. Then they take turns, step by step; a figure is
the median of the steps. fastmtl's step is catch_up (before a forward would read the rows) and step; the making of the
gradient is timed apart, dense against rows and values.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import argparse
import json
import statistics
import time
from collections.abc import Callable
from itertools import accumulate

import numpy as np
import torch
from torch import Tensor, nn

from bench.shapes import ALI_CCP
from fastmtl import optim
from fastmtl.backends import native
from fastmtl.optim.waiting import MOST_MISSED, Replays
from fastmtl.spec import Bag, EmbeddingSpec

#: name -> (class in torch.optim and fastmtl.optim, settings)
RULES: dict[str, tuple[str, dict[str, float]]] = {
    "adam with decay": ("Adam", {"lr": 1e-3, "weight_decay": 1e-5}),
    "adam": ("Adam", {"lr": 1e-3, "weight_decay": 0.0}),
    "adamw": ("AdamW", {"lr": 1e-3, "weight_decay": 1e-2}),
}
TOLERANCE = 1e-6


def milliseconds(work: Callable[[], object]) -> float:
    """How long ``work`` takes."""
    start = time.perf_counter()
    work()
    return 1e3 * (time.perf_counter() - start)


class Run:
    """One table under both optimizers, and the batches that they train on."""

    def __init__(self, rule: str, n_batches: int, batch_size: int) -> None:
        shape, (name, settings) = ALI_CCP, RULES[rule]
        offsets = [0, *accumulate(shape.vocabs)]
        self.spec = EmbeddingSpec(
            tuple(
                Bag(f"s{i}", 0, offsets[i], vocab, shape.embed_dim, "sum", (), "raise")
                for i, vocab in enumerate(shape.vocabs)
            )
        )
        self.columns = tuple(range(len(shape.vocabs) + 1))
        self.shapes = [torch.Size((offsets[-1], shape.embed_dim))]
        columns, _ = shape.rows(n_batches * batch_size)
        ids = torch.from_numpy(np.stack([columns[f"s{i}"] for i in range(len(shape.vocabs))], axis=1))
        self.ids = ids.split(batch_size)
        torch.manual_seed(0)
        start = torch.randn(self.shapes[0]) * 1e-4
        self.table, self.dense = nn.Parameter(start), nn.Parameter(start.clone())
        self.ours = getattr(optim, name)([self.table], tables=[self.table], **settings)
        self.fused = getattr(torch.optim, name)([self.dense], fused=True, **settings)
        self.grad = torch.randn(batch_size, self.spec.width(self.columns)) * 1e-4

    def index(self, step: int) -> list[native.RowIndex | None]:
        """The rows of a batch."""
        return native.embedding_bag_index(self._ids(step), self.columns, self.spec, self.shapes, [True])

    def _ids(self, step: int) -> Tensor:
        return self.ids[step % len(self.ids)]

    def advance(self, number: int) -> None:
        """A step of fastmtl's alone."""
        (index,) = self.index(number)
        self.ours.catch_up(self.table, index.rows)
        ((rows, values),) = native.embedding_bag_bwd_sparse(
            self.grad, self._ids(number), self.columns, self.spec, self.shapes, [index]
        )
        self.table.grad = torch.sparse_coo_tensor(rows[None], values, self.shapes[0], check_invariants=False)
        self.ours.step()

    def step(self, number: int) -> dict[str, float]:
        """A step of both; milliseconds of each part."""
        ids, times = self._ids(number), {}
        found: list = []
        times["index"] = milliseconds(lambda: found.extend(self.index(number)))
        (index,) = found
        times["catch up"] = milliseconds(lambda: self.ours.catch_up(self.table, index.rows))
        grads: list = []
        times["sparse gradient"] = milliseconds(
            lambda: grads.extend(
                native.embedding_bag_bwd_sparse(self.grad, ids, self.columns, self.spec, self.shapes, [index])
            )
        )
        rows, values = grads[0]
        self.table.grad = torch.sparse_coo_tensor(rows[None], values, self.shapes[0], check_invariants=False)
        times["step"] = milliseconds(self.ours.step)
        dense: list = []
        times["dense gradient"] = milliseconds(
            lambda: dense.extend(native.embedding_bag_bwd(self.grad, ids, self.columns, self.spec, self.shapes, [True]))
        )
        self.dense.grad = dense[0]
        times["fused"] = milliseconds(self.fused.step)
        times["rows"] = float(len(rows))
        return times

    def difference(self) -> float:
        """The largest difference of the two tables, by the largest weight; every row made current."""
        self.ours.flush()
        weights, right = self.table.detach(), self.dense.detach()
        return float((weights - right).abs().max() / right.abs().max())


def copy_bandwidth() -> float:
    """Bytes a second, read and written, of copying a table."""
    source, target = torch.randn(25_000_000), torch.empty(25_000_000)
    target.copy_(source)
    seconds = statistics.median(milliseconds(lambda: target.copy_(source)) for _ in range(9)) / 1e3
    return 2 * 4 * len(source) / seconds


def main() -> None:
    """Check, time, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rule", choices=RULES, default="adam with decay")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--after", type=int, default=0, help="time rows that are as idle as after so many steps more")
    parser.add_argument("--batch-size", type=int, default=ALI_CCP.batch_size)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    run = Run(args.rule, args.steps, args.batch_size)
    # until every row has missed as many steps as rows do in a long run, the sweep has less to do
    warm = MOST_MISSED + 8
    for number in range(warm):
        run.step(number)
    difference = run.difference()
    if not difference <= TOLERANCE:
        raise SystemExit(f"the optimizers differ by {difference:.1e} of the largest weight; nothing was timed")
    for number in range(args.after):
        run.advance(number)
    for number in range(warm, 2 * warm):
        run.step(number)
    steps = [run.step(number) for number in range(2 * warm, 2 * warm + args.steps)]
    median = {key: statistics.median(step[key] for step in steps) for key in steps[0]}
    ours = statistics.median(step["catch up"] + step["step"] for step in steps)
    ratio = statistics.median(step["fused"] / (step["catch up"] + step["step"]) for step in steps)
    flush = milliseconds(run.ours.flush)
    bandwidth = copy_bandwidth()
    weights = run.table.numel()
    row = 4 * run.table.shape[1]
    sweeps = isinstance(run.ours._pending[run.table].waiting, Replays)
    moved = 6 * 4 * weights / MOST_MISSED * sweeps + median["rows"] * (6 * row + 6 * row + row)
    result = {
        "difference": difference,
        "fused_ms": median["fused"],
        "exact_ms": ours,
        "ratio": ratio,
        "catch_up_ms": median["catch up"],
        "step_ms": median["step"],
        "flush_ms": flush,
        "index_ms": median["index"],
        "sparse_gradient_ms": median["sparse gradient"],
        "dense_gradient_ms": median["dense gradient"],
        "touched_rows": median["rows"],
        "copy_gb_per_s": bandwidth / 1e9,
        "fused_mb": 28 * weights / 1e6,
        "exact_mb": moved / 1e6,
        "fused_share_of_copy": 28 * weights / bandwidth / (median["fused"] / 1e3),
        "exact_share_of_copy": moved / bandwidth / (ours / 1e3),
    }
    if args.json:
        print(json.dumps(result))
        return
    how = f"after {args.after + 2 * warm} steps, B={args.batch_size}, {torch.get_num_threads()} threads, fp32"
    print(f"{args.rule}, tables: {weights / 1e6:.2f} M parameters, {how}")
    for key, value in result.items():
        print(f"  {key:24} {value:.3g}")


if __name__ == "__main__":
    main()
