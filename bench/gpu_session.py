"""All that a CUDA machine is asked for, in one command and under nine minutes: `make gpu`.

It needs no network: torch for CUDA, triton, nvcc, cmake, ninja, scikit-build-core and pytest are there. Each part runs
as a process of its own with a limit of its time and leaves its log in build/gpu; a part that fails does not keep the
others from running. The last lines are the short table and how each part ended.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
LOGS = ROOT / "build" / "gpu"
#: Seconds that the whole may take, and those that the benchmarks keep for themselves.
BUDGET, BENCH = 525, 170


class Part(NamedTuple):
    """A command, and the seconds it may take."""

    name: str
    command: list[str]
    limit: int


def parts(sanitizer: str | None, architectures: str) -> list[Part]:
    """In their order."""
    python = sys.executable
    pytest = [python, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-W", "default"]
    define = f"--config-settings=cmake.define.FASTMTL_CUDA_ARCHITECTURES={architectures}"
    install = [python, "-m", "pip", "install", "--no-build-isolation", "--no-deps", "--force-reinstall", define, "."]
    found = [
        Part("install", install, 150),
        Part("kernels on the device", [*pytest, "tests/gpu/kernels"], 150),
    ]
    if sanitizer:
        few = [*pytest, "tests/gpu/kernels/test_cuda_kernels.py", "-k", "sanitized"]
        for tool in ("memcheck", "racecheck"):
            check = [sanitizer, f"--tool={tool}", "--error-exitcode=9", "--target-processes=all"]
            found.append(Part(f"compute-sanitizer {tool}", [*check, *few], 60))
    return found


def run(part: Part, environment: dict[str, str]) -> tuple[str, float]:
    """How a part ended, and its seconds."""
    log = LOGS / f"{part.name.replace(' ', '-')}.log"
    start = time.monotonic()
    with log.open("w") as file:
        try:
            code = subprocess.run(
                part.command, stdout=file, stderr=subprocess.STDOUT, timeout=part.limit, cwd=ROOT, env=environment
            ).returncode
            ended = "passed" if code == 0 else f"FAILED ({code})"
        except subprocess.TimeoutExpired:
            ended = f"STOPPED after {part.limit} s"
    return f"{ended}, log {log.relative_to(ROOT)}", time.monotonic() - start


def architecture() -> str:
    """Of the GPU that is here, as nvcc names it: only for this one the library is compiled."""
    import torch

    major, minor = torch.cuda.get_device_capability()
    return f"{major}{minor}"


def main() -> int:
    """Run the parts; not 0 where one failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--list", action="store_true", help="say what would run, and stop")
    arguments = parser.parse_args()
    sanitizer = shutil.which("compute-sanitizer")
    if arguments.list:
        for part in parts(sanitizer or "compute-sanitizer", "90"):
            print(f"{part.limit:4d} s  {part.name}: {' '.join(part.command)}")
        return 0
    import torch

    if not torch.cuda.is_available():
        print("make gpu: torch finds no GPU here; `make gpu-check` is what runs without one", file=sys.stderr)
        return 2
    start = time.monotonic()
    LOGS.mkdir(parents=True, exist_ok=True)
    environment = {**os.environ, "OMP_WAIT_POLICY": "passive", "TRITON_CACHE_DIR": str(LOGS / "triton")}
    endings = {}
    for part in parts(sanitizer, architecture()):
        left = int(BUDGET - BENCH - (time.monotonic() - start))
        if left < 10:
            endings[part.name] = "NOT RUN: the time was up"
            continue
        ended, seconds = run(part._replace(limit=min(part.limit, left)), environment)
        endings[part.name] = f"{ended}, {seconds:.0f} s"
        print(f"{part.name}: {endings[part.name]}", flush=True)
    if sanitizer is None:
        endings["compute-sanitizer"] = "NOT RUN: it is not on the PATH"
    left = BUDGET - (time.monotonic() - start)
    bench = [sys.executable, "-m", "bench.gpu", "--seconds", str(max(int(left) - 60, 30))]
    log = LOGS / "bench.log"
    with log.open("w") as file:
        code = 1
        try:
            code = subprocess.run(
                bench, cwd=ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT, timeout=max(left, 60)
            ).returncode
            endings["benchmarks"] = "passed" if code == 0 else f"FAILED ({code}), log {log.relative_to(ROOT)}"
        except subprocess.TimeoutExpired:
            endings["benchmarks"] = f"STOPPED, log {log.relative_to(ROOT)}"
    print(log.read_text()[-6000:])
    for name, ended in endings.items():
        print(f"{name}: {ended}")
    return int(any(not ended.startswith("passed") for ended in endings.values()))


if __name__ == "__main__":
    sys.exit(main())
