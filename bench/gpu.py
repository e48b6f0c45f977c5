"""Training, predictions and single kernels on a GPU: torch-rechub (or a plain peer), eager, triton, cuda, in one run.

    python -m bench.gpu --seconds 240
    python -m bench.gpu --warm 1/4           # compile what the others will run, write no figure
    python -m bench.gpu --dry-run            # everything at tiny shapes on the CPU: no figure is written

All contenders of a case take turns. Before that those that start from the same weights must agree in the losses of
their first two steps, or in their predictions, up to the precision; the plain peer's weights are its own, and its
numbers must be finite. Cases run in the order of their worth until the time is up; what was left out is named in the
report. The report is written after every case, and a case that takes the GPU away from its process does not take the
cases behind it: the rest runs in a process anew (--behind).
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bench import gpu_report, gpu_trainer, gpu_work
from bench.gpu_kernels import time_calls, time_kernels
from bench.gpu_models import Batch, Contender, Runner, contenders, first_weights, make_batches
from bench.gpu_timing import alternated, limits
from bench.shapes import SHAPES, Shape
from fastmtl import backend

RESULTS = Path(__file__).parent / "results"
#: How far apart, relatively, the losses of the first two steps of the same model may be; or its probabilities.
TOLERANCE = {"ieee": 1e-4, "tf32": 5e-3, "bf16": 3e-2}
#: Why a case was not begun.
TIME_UP = "the time was up"
#: Contenders that torch.compile makes first, half a minute each.
COMPILED = ("peer compiled", "torch-rechub compiled", "eager compiled")


class Case(NamedTuple):
    """One row of the plan; mode: training, inference, trainer (whole epochs) or kernels."""

    mode: str
    shape: str
    model: str
    batch: int
    precision: str
    compiled: bool = False

    def __str__(self) -> str:
        return f"{self.mode}: {self.shape} {self.model} {self.batch} {self.precision}{' compiled' * self.compiled}"


def plan() -> list[Case]:
    """All cases, the most telling first; torch.compile's contenders take part in few."""
    cases = [
        Case("trainer", "ali-ccp", "mmoe", 65536, "bf16"),
        Case("trainer", "ali-ccp", "mmoe", 4096, "bf16"),
        Case("trainer", "ali-ccp", "ple", 65536, "bf16"),
        Case("inference", "ali-ccp", "mmoe", 65536, "bf16"),
        Case("training", "ali-ccp", "mmoe", 65536, "bf16"),
        Case("kernels", "ali-ccp", "mmoe", 65536, "bf16"),
        Case("training", "ali-ccp", "mmoe", 65536, "ieee", True),
        Case("training", "ali-ccp", "mmoe", 4096, "bf16"),
        Case("training", "ali-ccp", "ple", 65536, "bf16"),
        Case("inference", "ali-ccp", "mmoe", 4096, "bf16"),
        Case("training", "ali-ccp", "mmoe", 65536, "tf32"),
        Case("trainer", "ali-ccp", "mmoe", 65536, "tf32"),
        Case("kernels", "ali-ccp", "mmoe", 4096, "bf16"),
        Case("kernels", "ali-ccp", "ple", 65536, "bf16"),
        Case("training", "ali-ccp", "mmoe", 65536, "bf16", True),
        Case("kernels", "ali-ccp", "mmoe", 65536, "ieee"),
        Case("kernels", "ali-ccp", "mmoe", 65536, "tf32"),
    ]
    known = {case[:5] for case in cases}
    for mode in ("training", "inference", "kernels"):
        for shape in ("ali-ccp", "aliexpress"):
            for model in ("mmoe", "ple"):
                for batch in (65536, 4096):
                    for precision in ("bf16", "tf32", "ieee"):
                        case = Case(mode, shape, model, batch, precision)
                        if case[:5] not in known:
                            cases.append(case)
    return cases


def tiny(shape: Shape) -> Shape:
    """The same columns at a size that a CPU runs in no time."""
    return replace(
        shape, vocabs=tuple(min(rows, 50) for rows in shape.vocabs[:4]), n_dense=3, embed_dim=4, n_expert=2,
        expert_dims=(8, 4), tower_dims=(4,),
    )  # fmt: skip


def missing(who: Contender) -> str | None:
    """Why a contender's backend can't run here; None: it can."""
    return None if who.backend is None else backend.TABLE["embedding_bag"][who.backend].unavailable()


@dataclass
class Bench:
    """A run: where, how large, and what it has found so far."""

    device: torch.device
    dry: bool
    compiled: bool
    reached: dict[str, float]
    found: dict[str, list[dict[str, Any]]] = field(default_factory=lambda: {"steps": [], "calls": [], "kernels": []})
    left_out: list[str] = field(default_factory=list)
    begun: list[str] = field(default_factory=list)
    _states: dict[tuple[Shape, str], dict[str, Tensor]] = field(default_factory=dict)

    def shape(self, case: Case) -> Shape:
        """The case's, or a tiny one."""
        return tiny(SHAPES[case.shape]) if self.dry else SHAPES[case.shape]

    def rows(self, case: Case) -> int:
        """Of a batch."""
        return 16 if self.dry else case.batch

    def state(self, case: Case) -> dict[str, Tensor]:
        """The weights that contenders begin with."""
        key = self.shape(case), case.model
        if key not in self._states:
            self._states[key] = first_weights(*key)
        return self._states[key]

    def stand_in(self, who: Contender) -> str | None:
        """In a dry run the backend that takes the place of one for GPUs."""
        return "eager" if self.dry and missing(who) else None

    def run(self, case: Case, warm: bool = False) -> None:
        """One case; ``warm``: what it compiles, without a figure."""
        self.begun.append(str(case))
        try:
            if case.mode == "trainer":
                self._trainer(case, warm)
            elif case.mode == "kernels":
                self._kernels(case, warm)
            else:
                self._compare(case, warm)
        except Exception as error:  # whatever a compiler or a driver says: the others are to be measured
            self._leave_out(case, _told(error))
        gc.collect()

    def lost(self) -> str | None:
        """Why nothing runs on the GPU any more in this process; None: it does."""
        if self.device.type == "cuda":
            try:
                torch.cuda.synchronize()
                torch.cuda.empty_cache()
            except RuntimeError as error:
                return _told(error)
        return None

    def report(self) -> dict[str, Any]:
        """All that was found."""
        return self.found | {"limits": self.reached, "left_out": self.left_out, "begun": self.begun}

    def take(self, report: dict[str, Any]) -> None:
        """What an earlier process found."""
        self.found = {name: report[name] for name in self.found}
        self.left_out = [what for what in report["left_out"] if not what.endswith(TIME_UP)]
        self.reached, self.begun = report["limits"], report["begun"]

    # --------------------------------------------------------------------------------------------- the modes

    def _compare(self, case: Case, warm: bool) -> None:
        """Steps or predictions of all contenders, in turns."""
        shape, n = self.shape(case), self.rows(case)
        batches = make_batches(shape, n, 2, self.device)
        taken: dict[str, Callable[[Batch], Tensor]] = {}
        agreed: Tensor | None = None
        for name, who in contenders().items():
            if who.compiled and not (case.compiled and self.compiled):
                continue
            reason = None if self.dry else missing(who)
            if reason is None:
                try:
                    runner = Runner(
                        who, shape, case.model, self.state(case), case.precision, self.device, self.stand_in(who),
                        training=case.mode == "training",
                    )  # fmt: skip
                    work = runner.step if case.mode == "training" else runner.predict
                    mine = torch.stack([work(batch).detach().float().cpu() for batch in batches])
                    if who.package == "peer":
                        reason = None if mine.isfinite().all() else "its numbers are not finite"
                    elif agreed is None:
                        agreed = mine
                    else:
                        reason = _apart(mine, agreed, case)
                except Exception as error:  # as in run
                    reason = _told(error)
            if reason:
                self._leave_out(case, f"{name}: {reason}")
            else:
                taken[name] = work
        if warm:
            return
        works = [(lambda work=work: [work(batch) for batch in batches]) for work in taken.values()]
        # predictions many at a time: a stream of calls, each of which is queued while the one before it runs
        repeats = 1 if self.dry else (3 if case.batch > 10_000 else 10) * (7 if case.mode == "inference" else 1)
        times = alternated(works, self.device, 2 if self.dry else 5, repeats)
        for name, seconds in zip(taken, times, strict=True):
            self._note(case, name, seconds / len(batches), n, batches[0])

    def _trainer(self, case: Case, warm: bool) -> None:
        shape, n = self.shape(case), self.rows(case)
        rows = 4 * n if self.dry or warm else max(gpu_trainer.ROWS // n, 4) * n
        done = gpu_trainer.epoch(
            shape, case.model, n, self.state(case), case.precision, self.device, rows, "eager" if self.dry else None
        )
        if not all(math.isfinite(loss) for epoch in done["losses"] for loss in epoch):
            self._leave_out(case, f"its losses are {done['losses']}")
        elif not warm:
            batch = make_batches(shape, n, 1, self.device)[0]
            self._note(case, "trainer", done["seconds"] / rows * n, n, batch, tables=done["tables"])
            after = rows / (done["seconds"] - done["start"])
            self.found["steps"][-1] |= {"start_ms": done["start"] * 1e3, "after_start": after}

    def _kernels(self, case: Case, warm: bool) -> None:
        shape, n = self.shape(case), self.rows(case)
        batch = make_batches(shape, n, 1, self.device)[0]
        wanted = ("eager", "native", "triton") if self.dry else ("eager", "triton", "cuda")
        here = [name for name in wanted if backend.TABLE["embedding_bag"][name].unavailable() is None]
        key = {"shape": case.shape, "batch": n, "precision": case.precision}
        torch.set_float32_matmul_precision("high" if case.precision == "tf32" else "highest")
        if case.model == "mmoe":  # the lookup is the same for both
            calls = time_calls(shape, batch, case.precision, self.device, here, self.reached)
            self.found["calls"] += [] if warm else [key | call for call in calls]
        if "triton" in here:
            kernels = time_kernels(
                shape, case.model, batch, case.precision, self.device, self.state(case), self.reached
            )
            self.found["kernels"] += [] if warm else [key | kernel for kernel in kernels]

    # ------------------------------------------------------------------------------------------------ figures

    def _note(self, case: Case, name: str, seconds: float, n: int, batch: Batch, tables: str = "") -> None:
        shape = self.shape(case)
        flops = shape.flops(case.model) * n * (1 if case.mode == "inference" else 3)
        if case.mode == "inference":
            floor = gpu_work.forward_floor(shape, case.model, n, case.precision, self.reached)
        else:
            touched = gpu_work.touched_rows([batch.columns[f"s{i}"] for i in range(len(shape.vocabs))])
            floor = gpu_work.step_floor(shape, case.model, n, case.precision, touched, self.reached)
        by_rows = name == "trainer" or contenders()[name].by_rows
        self.found["steps"].append(
            {
                "mode": "inference" if case.mode == "inference" else "training", "shape": case.shape,
                "model": case.model, "batch": n, "precision": case.precision, "contender": name, "us": seconds * 1e6,
                "samples_per_second": n / seconds, "tflops": flops / seconds / 1e12,
                "of_limit": flops / seconds / self.reached[case.precision], "floor_us": floor * 1e6,
                "over_floor": seconds / floor,
                "tables": "" if case.mode == "inference" else tables or ("exact by rows" if by_rows else "dense"),
            }
        )  # fmt: skip
        print(f"{case} {name}: {seconds * 1e6:.0f} us, {n / seconds / 1e6:.3g} M samples/s", flush=True)

    def _leave_out(self, case: Case, why: str) -> None:
        why = why.replace(str(RESULTS.parents[1]), ".")  # a report says nothing of whose machine it was
        self.left_out.append(f"{case}: {why}")
        print(f"left out: {case}: {why}", flush=True)


def _told(error: Exception) -> str:
    """In one line: the first and the last line of what it says, where compilers have the reason, and of its causes."""
    found: list[str] = []
    cause: BaseException | None = error
    while cause is not None:
        lines = str(cause).strip().splitlines() or [""]
        ends = dict.fromkeys(line.strip()[:200] for line in (lines[0], lines[-1]))
        found.append(f"{type(cause).__name__}: {' ... '.join(ends)}")
        cause = cause.__cause__
    return "; from ".join(found)


def _apart(mine: Tensor, agreed: Tensor, case: Case) -> str | None:
    """Why two contenders do not compute the same; None: they do."""
    allowed = TOLERANCE[case.precision]
    distance = (mine - agreed).abs()
    off = float((distance / agreed.abs()).max() if case.mode == "training" else distance.max())
    return (
        None if off <= allowed else f"its {'losses' if case.mode == 'training' else 'predictions'} are {off:.1e} away"
    )


def main() -> int:
    """Run the plan, write the report, print the short table last."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=240, help="begin no case after so many")
    parser.add_argument("--warm", default=None, metavar="I/N", help="compile the I-th of N parts of the plan")
    parser.add_argument("--dry-run", action="store_true", help="tiny shapes on the CPU; writes into --folder only")
    parser.add_argument("--no-compile", action="store_true", help="without the contenders of torch.compile")
    parser.add_argument("--cases", type=int, default=None, help="at most so many")
    parser.add_argument("--folder", type=Path, default=None, help="where the report goes; bench/results by default")
    parser.add_argument("--behind", type=Path, metavar="FILE.json", help="go on behind the cases of this report")
    arguments = parser.parse_args()
    dry = arguments.dry_run
    if not dry and not torch.cuda.is_available():
        print("bench.gpu: torch finds no GPU here; --dry-run runs everything on the CPU", file=sys.stderr)
        return 2
    device = torch.device("cpu" if dry else "cuda")
    start = time.monotonic()
    cases = plan()[: arguments.cases]
    if arguments.warm:
        part, n = map(int, arguments.warm.split("/"))
        bench = Bench(device, dry, not arguments.no_compile, limits(device, True))
        for case in cases[part - 1 :: n]:
            if time.monotonic() - start < arguments.seconds:
                bench.run(case, warm=True)
        return 0
    bench = Bench(device, dry, not arguments.no_compile, {})
    if arguments.behind:
        bench.take(json.loads(arguments.behind.read_text()))
    else:
        bench.reached = limits(device, dry)
    head, written = gpu_report.head(device), []
    for case in (case for case in cases if str(case) not in bench.begun):
        if time.monotonic() - start > arguments.seconds:
            bench.left_out.append(f"{case}: {TIME_UP}")
            continue
        bench.run(case)
        why = bench.lost()
        if why:
            bench.left_out.append(f"{case}: the process: {why}")
        if arguments.folder or not dry:
            written = gpu_report.write(head | bench.report(), arguments.folder or RESULTS)
        if why and written:
            left = max(arguments.seconds - (time.monotonic() - start), 0)
            print(f"going on in another process: {why}", flush=True)
            again = ["--behind", str(written[0]), "--seconds", f"{left:.0f}"]
            os.execv(sys.executable, [sys.executable, "-m", "bench.gpu", *sys.argv[1:], *again])
    found = head | bench.report()
    if arguments.folder or not dry:
        for path in gpu_report.write(found, arguments.folder or RESULTS):
            print(f"written: {path}")
    for what in bench.left_out:
        print(f"left out: {what}")
    print(gpu_report.short(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
