"""Samples a second from rows to a validated model: torch-rechub against fastmtl, each with its own loader and trainer.

    python -m bench.end_to_end --shape census --rounds 5
    python -m bench.end_to_end --shape ali-ccp --model ple --amp bf16
    python -m bench.end_to_end --shape census --busy 2

Census is the real data set where its file is found (FASTMTL_DATA), otherwise made-up rows of its shape. First every
contender trains one epoch from the same seed, and the epoch's losses must be those of the same epoch in float64, as
closely as rounding alone would leave them (:mod:`bench.equality`). Then each round trains every contender for an epoch
with its validation, in turns that begin with another one each round; a ratio is the median of the rounds' ratios.
Everything is fp32, Adam with weight decay, the same rows and batches; ``--amp bf16`` adds fastmtl in bf16, and
torch-rechub stays in fp32, having nothing else. Where the tables are large (ali-ccp), fastmtl's native backend trains
them by its exact updates at sparse cost, which is its default.
"""

from __future__ import annotations

import os

# before torch is loaded: threads that wait by spinning spoil every figure on a machine with other work on it
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import argparse
import contextlib
import gc
import importlib
import json
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch

from bench import equality
from bench.floors import Machine
from bench.models import MODELS, build, columns
from bench.shapes import SHAPES, Shape
from fastmtl import backend
from fastmtl.data import find_census, load_census

PEER = "torch-rechub"
SEED = 2022


class Rows(NamedTuple):
    """Columns and labels of training and validation rows, and each column's vocabulary (None: dense)."""

    x_train: dict[str, np.ndarray]
    y_train: np.ndarray
    x_valid: dict[str, np.ndarray]
    y_valid: np.ndarray
    vocabs: dict[str, int | None]
    note: str


@dataclass(frozen=True)
class Contender:
    """A package, and how it trains.

    Args:
        name: in the tables.
        package: ``"torch_rechub"`` or ``"fastmtl"``.
        backend: what fastmtl is held to; None: its own choice.
        amp: fastmtl's precision.
        dtype: of the parameters.
        nudge: start from weights moved in their last bits, by this seed.
    """

    name: str
    package: str
    backend: str | None = None
    amp: str | None = None
    dtype: torch.dtype = torch.float32
    nudge: int | None = None

    @property
    def precision(self) -> str:
        """``"fp32"`` or ``"bf16"``."""
        return self.amp or "fp32"

    def train(self, model_name: str, shape: Shape, rows: Rows, epochs: int) -> tuple[list[float], float]:
        """Train with the package's own loader and trainer.

        Returns:
            (the tasks' losses in the first epoch, seconds of ``fit``).
        """
        trainers = importlib.import_module(f"{self.package}.trainers")
        generator = importlib.import_module(f"{self.package}.utils.data").DataGenerator
        with contextlib.ExitStack() as stack:
            folder = stack.enter_context(tempfile.TemporaryDirectory())
            silent = stack.enter_context(open(os.devnull, "w"))
            stack.enter_context(contextlib.redirect_stdout(silent))
            stack.enter_context(contextlib.redirect_stderr(silent))
            if self.backend is not None:
                stack.enter_context(backend.use_backend(self.backend))
            torch.manual_seed(SEED)
            model = build(self.package, model_name, shape, rows.vocabs).to(self.dtype)
            if self.nudge is not None:
                model.load_state_dict(equality.nudged(model.state_dict(), self.nudge))
            train, valid, _ = generator(rows.x_train, rows.y_train).generate_dataloader(
                x_val=rows.x_valid, y_val=rows.y_valid, x_test=rows.x_valid, y_test=rows.y_valid,
                batch_size=shape.batch_size,
            )  # fmt: skip
            trainer = trainers.MTLTrainer(
                model,
                task_types=["classification"] * len(shape.task_names),
                optimizer_params={"lr": 1e-3, "weight_decay": 1e-4},
                n_epoch=epochs,
                earlystop_patience=epochs + 1,
                model_path=folder,
                **({} if self.amp is None else {"amp": self.amp}),
            )
            gc.collect()
            start = time.perf_counter()
            log = trainer.fit(train, valid)
            return [float(loss) for loss in log[0][: len(shape.task_names)]], time.perf_counter() - start


def contenders(amp: str | None = None) -> tuple[list[Contender], dict[str, str]]:
    """(who runs, backend -> why it does not); with ``amp`` fastmtl in that precision too."""
    runs, missing = [Contender(PEER, "torch_rechub")], {}
    for name in ("eager", "native"):
        if name in backend.available():
            runs.append(Contender(f"fastmtl {name}", "fastmtl", name))
        else:
            missing[name] = str(backend.TABLE["expert_gate"][name].unavailable())
    if amp is not None:
        runs.append(Contender(f"fastmtl {amp}", "fastmtl", amp=amp))
    return runs, missing


def load(shape: Shape, limit: int | None) -> Rows:
    """The rows of a shape: real ones for census where they are found.

    Args:
        shape: what to load.
        limit: training rows at most; a third as many are for validation.
    """
    if shape.name == "census" and find_census():
        data = load_census()
        n, n_valid = _sizes(len(data.train), limit, len(data.valid))
        vocabs = {spec.name: spec.vocab for spec in data.features}
        train, valid = data.train, data.valid
        x_train = {name: column[:n] for name, column in train.x.items()}
        x_valid = {name: column[:n_valid] for name, column in valid.x.items()}
        return Rows(x_train, train.y[:n], x_valid, valid.y[:n_valid], vocabs, "real rows")
    n, n_valid = _sizes(60_000, limit, 20_000)
    x, y = shape.rows(n + n_valid)
    x_train = {name: column[:n] for name, column in x.items()}
    x_valid = {name: column[n:] for name, column in x.items()}
    return Rows(x_train, y[:n], x_valid, y[n:], columns(shape), "made-up rows")


def _sizes(n: int, limit: int | None, n_valid: int) -> tuple[int, int]:
    return (n, n_valid) if limit is None or limit >= n else (limit, max(limit // 3, 1))


def check_equality(runs: Sequence[Contender], model: str, shape: Shape, rows: Rows) -> dict[str, float]:
    """Train every contender for one epoch from one seed.

    Returns:
        contender -> the greatest relative distance of its losses from those in float64.

    Raises:
        SystemExit: one is too far away (:mod:`bench.equality`).
    """

    def epoch(contender: Contender) -> list[float]:
        return contender.train(model, shape, rows, epochs=1)[0]

    exact = epoch(Contender("float64", "fastmtl", "eager", dtype=torch.float64))
    losses = {contender.name: epoch(contender) for contender in runs}
    peers = [losses[PEER], *(epoch(Contender(PEER, "torch_rechub", nudge=seed)) for seed in equality.NUDGES)]
    return equality.check(losses, {contender.name: contender.precision for contender in runs}, exact, peers, given=0)


def measure(
    runs: Sequence[Contender],
    model: str,
    shape: Shape,
    rows: Rows,
    rounds: int,
    epochs: int,
    tell: Callable[[str], None],
) -> dict[str, list[float]]:
    """contender -> samples a second of each round, the contenders in turns."""
    speeds: dict[str, list[float]] = {contender.name: [] for contender in runs}
    n = len(rows.y_train) * epochs
    for number in range(rounds):
        first = number % len(runs)
        for contender in (*runs[first:], *runs[:first]):
            speeds[contender.name].append(n / contender.train(model, shape, rows, epochs)[1])
        latest = ", ".join(f"{name} {values[-1]:,.0f}" for name, values in speeds.items())
        tell(f"round {number + 1} of {rounds}: {latest} samples/s")
    return speeds


@contextlib.contextmanager
def neighbours(count: int) -> Iterator[None]:
    """``count`` other processes that compute all the while."""
    with contextlib.ExitStack() as stack:
        for _ in range(count):
            process = stack.enter_context(subprocess.Popen([sys.executable, "-c", "while True: pass"]))
            stack.callback(process.kill)
        yield


def summary(
    speeds: dict[str, list[float]], runs: Sequence[Contender], model: str, shape: Shape, machine: Machine
) -> list[dict[str, Any]]:
    """For each contender its figures; ratios are medians of the rounds' own ratios, the limit is the GEMM rate."""
    figures = []
    for contender in runs:
        name, values = contender.name, speeds[contender.name]
        speed = statistics.median(values)
        gflops = speed * 3 * shape.flops(model) / 1e9
        figures.append(
            {
                "contender": name,
                "samples_per_second": speed,
                "us_per_batch": shape.batch_size / speed * 1e6,
                "gflops": gflops,
                "fraction_of_limit": 1e9 * gflops / machine.rate(contender.precision),
                "ratio": statistics.median(a / b for a, b in zip(values, speeds[PEER], strict=True)),
                "rounds": values,
            }
        )
    return figures


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark; the table or JSON goes to stdout, progress to stderr."""
    parser = argparse.ArgumentParser(prog="python -m bench.end_to_end", description=__doc__.partition("\n")[0])
    parser.add_argument("--shape", choices=SHAPES, default="census")
    parser.add_argument("--model", choices=MODELS, default="mmoe")
    parser.add_argument("--amp", choices=("bf16",), help="run fastmtl in bf16 too")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--epochs", type=int, default=1, help="epochs of a contender in a round (%(default)s)")
    parser.add_argument("--rows", type=int, help="training rows at most")
    parser.add_argument("--busy", type=int, default=0, help="other processes that compute beside the contenders")
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
    args = parser.parse_args(argv)
    warnings.filterwarnings("ignore")  # torch-rechub's, of other packages
    shape = SHAPES[args.shape]
    rows = load(shape, args.rows)
    runs, missing = contenders(args.amp)

    def tell(line: str) -> None:
        print(line, file=sys.stderr, flush=True)

    tell(f"{shape.name}, {rows.note}: {len(rows.y_train):,} train, {len(rows.y_valid):,} valid")
    machine = Machine.measured()
    tell(
        f"{args.model}, experts {list(shape.expert_dims)}, towers {list(shape.tower_dims)}, batch {shape.batch_size}; "
        f"OMP_WAIT_POLICY={os.environ['OMP_WAIT_POLICY']}, torch {torch.__version__}; {machine}"
    )
    for name, why in missing.items():
        tell(f"fastmtl {name} does not run: {why}")
    distances = check_equality(runs, args.model, shape, rows)
    tell("first epoch's losses, from float64's: " + ", ".join(f"{name} to {d:.1e}" for name, d in distances.items()))
    with neighbours(args.busy):
        speeds = measure(runs, args.model, shape, rows, args.rounds, args.epochs, tell)
    figures = summary(speeds, runs, args.model, shape, machine)
    if args.json:
        print(
            json.dumps(
                {
                    "shape": shape.name,
                    "model": args.model,
                    "rows": {"note": rows.note, "train": len(rows.y_train), "valid": len(rows.y_valid)},
                    "threads": torch.get_num_threads(),
                    "loss_distance": distances,
                    "missing": missing,
                    "contenders": figures,
                }
            )
        )
        return 0
    print(f"{'':16} {'samples/s':>10} {'us/batch':>9} {'GFLOP/s':>8} {'of limit':>9} {'ratio':>6}")
    for f in figures:
        print(
            f"{f['contender']:16} {f['samples_per_second']:>10,.0f} {f['us_per_batch']:>9,.0f} {f['gflops']:>8.2f} "
            f"{f['fraction_of_limit']:>9.1%} {f['ratio']:>6.2f}"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
