"""Training steps and single calls on a GPU: a plain peer, eager, triton and cuda, alternated in one run.

    python -m bench.gpu --seconds 240
    python -m bench.gpu --dry-run            # everything at tiny shapes on the CPU: no figure is written

All contenders of a case take turns. Before that fastmtl's, which start from the same weights, must agree in the losses
of their first two steps up to the precision; the peer's, whose weights are its own, must be finite. Cases run in the
order of their worth until the time is up; what was left out is named in the report.
"""

from __future__ import annotations

import argparse
import gc
import math
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

from bench import gpu_report
from bench.gpu_kernels import calls
from bench.gpu_models import CONTENDERS, PLE_EXPERTS, make_batches, make_step
from bench.gpu_timing import alternated, limits
from bench.shapes import SHAPES, Shape
from fastmtl import backend

RESULTS = Path(__file__).parent / "results"
#: How far apart, relatively, the losses of the first two steps of the same model may be.
TOLERANCE = {"ieee": 1e-4, "tf32": 5e-3, "bf16": 3e-2}


class Case(NamedTuple):
    """One row of the plan."""

    shape: str
    model: str
    batch: int
    precision: str
    contenders: tuple[str, ...]


def plan(compiled: bool) -> list[Case]:
    """All cases, the most telling first; torch.compile takes about a minute a model and takes part in few."""
    quick = ("peer", "eager", "triton", "cuda")
    everyone = tuple(CONTENDERS) if compiled else quick
    cases = [
        Case("ali-ccp", "mmoe", 65536, "bf16", everyone),
        Case("ali-ccp", "mmoe", 4096, "bf16", quick),
        Case("ali-ccp", "ple", 65536, "bf16", quick),
        Case("ali-ccp", "mmoe", 65536, "ieee", quick),
        Case("ali-ccp", "mmoe", 65536, "tf32", quick),
    ]
    for shape in ("ali-ccp", "aliexpress"):
        for model in ("mmoe", "ple"):
            for batch in (4096, 65536):
                for precision in ("bf16", "tf32", "ieee"):
                    case = Case(shape, model, batch, precision, quick)
                    if all(case[:4] != known[:4] for known in cases):
                        cases.append(case)
    return cases


def training_flops(shape: Shape, model: str) -> int:
    """Of one row; PLE's levels beside MMoE's one layer."""
    if model == "mmoe":
        return shape.training_flops
    specific, shared, levels = PLE_EXPERTS
    tasks = len(shape.task_names)
    everyone, width, flops = tasks * specific + shared, shape.input_width, 0
    for level in range(levels):
        sizes, inside = (width, *shape.expert_dims), 0
        for i in range(len(shape.expert_dims)):
            inside += sizes[i] * sizes[i + 1]
        gates = tasks * (specific + shared) + (everyone if level + 1 < levels else 0)
        flops += everyone * inside + gates * width
        width = shape.expert_dims[-1]
    sizes = (width, *shape.tower_dims, 1)
    flops += tasks * sum(sizes[i] * sizes[i + 1] for i in range(len(sizes) - 1))
    return 6 * flops


def tiny(shape: Shape) -> Shape:
    """The same columns at a size that a CPU runs in no time."""
    return replace(
        shape, vocabs=tuple(min(rows, 50) for rows in shape.vocabs[:4]), n_dense=3, embed_dim=4, n_expert=2,
        expert_dims=(8, 4), tower_dims=(4,),
    )  # fmt: skip


def missing(contender: str) -> str | None:
    """Why a contender's backend can't run here; None: it can."""
    name = CONTENDERS[contender][0]
    return None if name is None else backend.TABLE["embedding_bag"][name].unavailable()


def run_case(
    case: Case, device: torch.device, dry: bool, reached: dict[str, float], left_out: list[str]
) -> list[dict[str, Any]]:
    """The rows of one case."""
    shape = tiny(SHAPES[case.shape]) if dry else SHAPES[case.shape]
    batch_size = 16 if dry else case.batch
    batches = make_batches(shape, batch_size, 2, device)
    steps, names = [], []
    agreed: list[float] | None = None
    for contender in case.contenders:
        reason = missing(contender)
        if reason is None or dry:
            stand_in, reason = ("eager" if reason else None), None
            try:
                step = make_step(contender, shape, case.model, case.precision, device, stand_in)
                losses = [float(step(batch)) for batch in batches]
                if CONTENDERS[contender][0] is None:
                    reason = None if all(map(math.isfinite, losses)) else f"its losses are {losses}"
                elif agreed is None:
                    agreed = losses
                elif not all(_near(a, b, case.precision) for a, b in zip(losses, agreed, strict=True)):
                    reason = f"its losses are {losses}, not {agreed}"
            except (RuntimeError, ValueError) as error:
                reason = f"{type(error).__name__}: {str(error).splitlines()[0][:200]}"
        if reason:
            left_out.append(f"{case.shape} {case.model} {case.batch} {case.precision}: {contender}: {reason}")
            continue
        names.append(contender)
        steps.append(step)
    works = [(lambda step=step: [step(batch) for batch in batches]) for step in steps]
    times = alternated(works, device, 2 if dry else 3, 1 if dry else (3 if case.batch > 10000 else 10))
    rows = []
    for name, seconds in zip(names, times, strict=True):
        a_step = seconds / len(batches)
        flops = training_flops(shape, case.model) * batch_size / a_step
        rows.append(
            {
                "shape": case.shape, "model": case.model, "batch": batch_size, "precision": case.precision,
                "contender": name, "us": a_step * 1e6, "samples_per_second": batch_size / a_step,
                "tflops": flops / 1e12, "of_limit": flops / reached[case.precision],
            }
        )  # fmt: skip
        print(f"{case.shape} {case.model} {batch_size} {case.precision} {name}: {a_step * 1e6:.0f} us", flush=True)
    del steps, works
    gc.collect()
    return rows


def _near(a: float, b: float, precision: str) -> bool:
    return abs(a - b) <= TOLERANCE[precision] * abs(b)


def run_calls(case: Case, device: torch.device, dry: bool, reached: dict[str, float]) -> list[dict[str, Any]]:
    """The single calls of a case's shape."""
    shape = tiny(SHAPES[case.shape]) if dry else SHAPES[case.shape]
    batch = make_batches(shape, 16 if dry else case.batch, 1, device)[0]
    wanted = ("eager", "native", "triton") if dry else ("eager", "triton", "cuda")
    backends = [name for name in wanted if backend.TABLE["embedding_bag"][name].unavailable() is None]
    found = list(calls(shape, batch, case.precision, device, backends))
    times = alternated([call.work for call in found], device, 2 if dry else 5, 2 if dry else 20)
    return [
        {
            "shape": case.shape, "batch": case.batch, "precision": case.precision, "call": call.name, "us": t * 1e6,
            "gbytes_per_second": call.bytes / t / 1e9, "of_limit": call.bytes / t / reached["copy"],
        }
        for call, t in zip(found, times, strict=True)
    ]  # fmt: skip


def main() -> int:
    """Run the plan, write the report, print the short table last."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=240, help="begin no case after so many")
    parser.add_argument("--dry-run", action="store_true", help="tiny shapes on the CPU; writes into --folder only")
    parser.add_argument("--no-compile", action="store_true", help="without the contenders of torch.compile")
    parser.add_argument("--cases", type=int, default=None, help="at most so many")
    parser.add_argument("--folder", type=Path, default=None, help="where the report goes; bench/results by default")
    arguments = parser.parse_args()
    dry = arguments.dry_run
    if not dry and not torch.cuda.is_available():
        print("bench.gpu: torch finds no GPU here; --dry-run runs everything on the CPU", file=sys.stderr)
        return 2
    device = torch.device("cpu" if dry else "cuda")
    start = time.monotonic()
    reached = limits(device, dry)
    steps: list[dict[str, Any]] = []
    single: list[dict[str, Any]] = []
    left_out: list[str] = []
    cases = plan(not arguments.no_compile)[: arguments.cases]
    seen: set[tuple[str, int, str]] = set()
    for case in cases:
        if time.monotonic() - start > arguments.seconds:
            left_out.append(f"{' '.join(map(str, case[:4]))}: the time was up")
            continue
        steps += run_case(case, device, dry, reached, left_out)
        if case.model == "mmoe" and (key := (case.shape, case.batch, case.precision)) not in seen:
            seen.add(key)
            single += run_calls(case, device, dry, reached)
    found = {
        "device": "dry run" if dry else torch.cuda.get_device_name(),
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "torch": torch.__version__,
        "commit": _commit(),
        "machine": _machine(),
        "limits": reached,
        "steps": steps,
        "calls": single,
        "left_out": left_out,
    }
    if arguments.folder or not dry:
        for path in gpu_report.write(found, arguments.folder or RESULTS):
            print(f"written: {path}")
    for what in left_out:
        print(f"left out: {what}")
    print(gpu_report.short(found))
    return 0


def _commit() -> str:
    done = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=RESULTS.parent)
    return done.stdout.strip() or "unknown"


def _machine() -> str:
    driver = "no nvidia-smi"
    try:
        ask = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        driver = subprocess.run(ask, capture_output=True, text=True).stdout.strip() or driver
    except OSError:
        pass
    return f"{driver}, load {os.getloadavg()[0]:.1f} on {os.cpu_count()} CPUs"


if __name__ == "__main__":
    sys.exit(main())
