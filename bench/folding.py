"""Forward and backward of a batch with small tables folded into the first layer, and without.

    python -m bench.folding --shape ali-ccp --amp bf16
    python -m bench.folding --shape aliexpress --model ple --rounds 20

Three ways take turns: as models are trained; with every table looked up; and that with the dense columns' gradient
computed too. The gradients of large tables are sparse, as their exact optimizer wants them. First all must have equal
losses.
docs/performance.md, "Small tables", has the figures.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import argparse
import contextlib
import statistics
from typing import Any

import torch

from bench.measure import Turns
from bench.models import MODELS, build
from bench.shapes import SHAPES, Shape
from fastmtl import optim
from fastmtl.trainers.native_gradients import ChainGradients
from fastmtl.trainers.optimizer import LARGE_TABLES
from fastmtl.weighting import make_strategy

#: Of the losses, relative: folding adds in another order, and in bf16 rounds no embedding.
TOLERANCE = {None: 1e-5, "bf16": 1e-2}


def ways(model: Any) -> dict[str, ChainGradients]:
    """The model's gradients as it is trained, without folded tables, and with the dense columns' gradient too."""
    strategy = make_strategy("mean")
    strategy.attach(model, model.task_types)
    folded, looked_up, whole = (ChainGradients.of(model, strategy) for _ in range(3))
    if folded is None or looked_up is None or whole is None:
        raise SystemExit("bench.folding: the native backend can't train this model without autograd")
    looked_up._folding = whole._folding = lambda *_: None  # type: ignore[method-assign]
    whole._columns_of_tables = lambda width, _: width  # type: ignore[method-assign]
    return {"folded": folded, "looked up": looked_up, "dense columns too": whole}


def measure(shape: Shape, model_name: str, amp: str | None, rounds: int) -> dict[str, float]:
    """Milliseconds of each way, the medians of the rounds."""
    torch.manual_seed(0)
    model: Any = build("fastmtl", model_name, shape)
    columns, labels = shape.rows(shape.batch_size)
    x, y = {name: torch.from_numpy(column) for name, column in columns.items()}, torch.from_numpy(labels)
    found = ways(model)
    autocast = torch.autocast("cpu", torch.bfloat16) if amp else contextlib.nullcontext()
    is_large = sum(table.numel() for table in model.embedding.parameters()) >= LARGE_TABLES
    with optim.sparse_gradients(model.embedding) if is_large else contextlib.nullcontext(), autocast:
        losses = {name: way(x, y)[0] for name, way in found.items()}
        want = losses["dense columns too"]
        for name, got in losses.items():
            if not torch.allclose(got, want, rtol=TOLERANCE[amp], atol=0):
                raise SystemExit(f"bench.folding: {name}: its losses are {got.tolist()}, not {want.tolist()}")
        turns = Turns({name: lambda way=way: way(x, y) for name, way in found.items()}, 0)
        for _ in range(rounds):
            turns.round()
    return {name: 1e3 * statistics.median(times) for name, times in turns.times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.folding", description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=SHAPES, default="ali-ccp")
    parser.add_argument("--model", choices=MODELS, default="mmoe")
    parser.add_argument("--amp", choices=("bf16",))
    parser.add_argument("--rounds", type=int, default=30)
    args = parser.parse_args()
    found = measure(SHAPES[args.shape], args.model, args.amp, args.rounds)
    for name, ms in found.items():
        print(f"{name:18} {ms:8.2f} ms  {ms / found['dense columns too']:.3f}")


if __name__ == "__main__":
    main()
