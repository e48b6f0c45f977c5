"""All that a CUDA machine is asked for, in one command and under nine minutes: `make gpu`.

It needs no network: torch for CUDA, triton, nvcc, cmake, ninja, scikit-build-core and pytest are there. First the
package is built; then everything that asks whether it is right runs side by side, each part a process of its own with a
limit of its time and a log in build/gpu; at last the benchmarks have the GPU for themselves. A part that fails does not
keep the others from running. The last lines are the short table and how each part ended.

    python -m bench.gpu_session --list          # say what would run
    python -m bench.gpu_session --peer-wheel    # with a network: fetch torch-rechub's wheel for a machine without one
"""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from bench import gpu_peer

ROOT = Path(__file__).resolve().parents[1]
LOGS = ROOT / "build" / "gpu"
#: Seconds that the whole may take, and those that the benchmarks keep for themselves.
BUDGET, BENCH = 525, 200
#: Processes that the test-suite is dealt out to, and those that compile what the benchmarks will run.
SHARDS, WARM = 10, 3
#: The folders of tests/, the most telling first: the time may be up before the last.
FOLDERS = (
    "gpu/kernels", "ops", "trainers", "basic", "behaviour", "parity", "reliability", "optim", "serving", "native",
    "data", "utils", "export", "cli",
)  # fmt: skip
#: Not run here: compilers and emulators, which need no GPU (`make gpu-check`), and what looks at the project's files.
ELSEWHERE = ("gpu", "project")
#: RELIABILITY's rows, and the cases of each that its time allows.
ROWS = {1: 40, 2: 10, 4: 3, 9: 1, 10: 60, 11: 1}


class Part(NamedTuple):
    """A command, the seconds it may take, and what it adds to the environment."""

    name: str
    command: list[str]
    limit: int
    variables: tuple[tuple[str, str], ...] = ()


def install(architecture: str, cuda: str = "AUTO") -> Part:
    """The package, editable, so that what is tested and what is measured is what lies here; the CUDA library for this
    GPU alone."""
    defines = {"FASTMTL_CUDA_ARCHITECTURES": architecture, "FASTMTL_CUDA": cuda}
    settings = [f"--config-settings=cmake.define.{name}={value}" for name, value in defines.items()]
    settings.append("--config-settings=build-dir=build/gpu/cmake")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "--verbose", "--force-reinstall"]
    command = [*pip, "--no-build-isolation", "--no-deps", "--no-index", *settings, "--editable", "."]
    return Part("install" if cuda == "AUTO" else "install without CUDA C++", command, 150)


def checks() -> list[Part]:
    """Side by side, the longest first."""
    python, variables = sys.executable, (("PYTHONPATH", "tests"), ("FASTMTL_TEST_DEVICE", "cuda"))
    # plugins that a machine happens to have must not change what runs
    options = ["-q", "-p", "no:cacheprovider", "-p", "no:benchmark", "-p", "no:xdist", "-W", "default"]
    pytest = [python, "-m", "pytest", *options, *(f"tests/{folder}" for folder in FOLDERS)]
    soak = [python, "-m", "reliability.soak", "--device", "cuda"]
    rows = [
        Part(f"reliability row {row}", [*soak, "--row", str(row), "--count", str(count)], 240, variables)
        for row, count in ROWS.items()
    ]
    warm = [python, "-m", "bench.gpu", "--cases", "16", "--warm"]
    caches = [Part(f"compile caches {i} of {WARM}", [*warm, f"{i}/{WARM}"], 240) for i in range(1, WARM + 1)]
    shards = [
        Part(f"tests {i} of {SHARDS}", [*pytest, "--part", f"{i}/{SHARDS}"], 240, variables)
        for i in range(1, SHARDS + 1)
    ]
    return [*rows, *caches, *shards]


def run(part: Part, environment: dict[str, str], limit: float) -> tuple[str, float]:
    """How a part ended, and its seconds."""
    log = LOGS / f"{part.name.replace(' ', '-')}.log"
    limit = min(part.limit, limit)
    start = time.monotonic()
    if limit < 5:
        return "NOT RUN: the time was up", 0.0
    variables = dict(part.variables)
    if "PYTHONPATH" in variables:
        variables["PYTHONPATH"] = os.pathsep.join((variables["PYTHONPATH"], environment.get("PYTHONPATH", "")))
    with log.open("w") as file:
        # a group of its own: what it has started ends with it
        process = subprocess.Popen(
            part.command, stdout=file, stderr=subprocess.STDOUT, cwd=ROOT, env=environment | variables,
            start_new_session=True,
        )  # fmt: skip
        try:
            code = process.wait(limit)
            ended = "passed" if code == 0 else f"FAILED ({code})"
        except subprocess.TimeoutExpired:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            ended = f"STOPPED after {limit:.0f} s"
    return f"{ended}, log {log.relative_to(ROOT)}", time.monotonic() - start


def summary(part: Part) -> str:
    """The last line of a log that counts something."""
    log = LOGS / f"{part.name.replace(' ', '-')}.log"
    lines = log.read_text(errors="replace").splitlines() if log.exists() else []
    telling = [line for line in lines if re.search(r"\d+ (passed|failed|error)|^row ", line)]
    return f" [{telling[-1].strip('= ')[:160]}]" if telling else ""


def failures(parts: Iterable[Part]) -> list[str]:
    """The tests that failed, by their logs."""
    found = []
    for part in parts:
        log = LOGS / f"{part.name.replace(' ', '-')}.log"
        if log.exists():
            lines = log.read_text(errors="replace").splitlines()
            found += [line[:200] for line in lines if line.startswith(("FAILED ", "ERROR ")) or " FAILED " in line[:20]]
    return found


def architecture() -> str:
    """Of the GPU that is here, as nvcc names it: only for this one the library is compiled."""
    import torch

    major, minor = torch.cuda.get_device_capability()
    return f"{major}{minor}"


def built() -> list[str]:
    """The libraries that the installed package has."""
    words = "import importlib.util as u; print(*(n for n in ('_native', '_cuda') if u.find_spec('fastmtl.' + n)))"
    done = subprocess.run([sys.executable, "-c", words], cwd=ROOT, capture_output=True, text=True)
    return done.stdout.split()


def fetch_peer() -> int:
    """Download torch-rechub's wheel into build/peers; pip's exit status."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--dest", str(gpu_peer.WHEELS)]
    return subprocess.run([*command, gpu_peer.REQUIREMENT]).returncode


def main() -> int:
    """Run the parts; not 0 where one failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--list", action="store_true", help="say what would run, and stop")
    parser.add_argument(
        "--peer-wheel", action="store_true", help="fetch torch-rechub's wheel into build/peers, and stop"
    )
    arguments = parser.parse_args()
    if arguments.peer_wheel:
        return fetch_peer()
    if arguments.list:
        for part in [install("90"), *checks()]:
            shown = " ".join((*(f"{name}={value}" for name, value in part.variables), *part.command))
            print(f"{part.limit:4d} s  {part.name}: {shown}")
        return 0
    import torch

    if not torch.cuda.is_available():
        print("make gpu: torch finds no GPU here; `make gpu-check` is what runs without one", file=sys.stderr)
        return 2
    start = time.monotonic()

    def left() -> float:
        return BUDGET - (time.monotonic() - start)

    LOGS.mkdir(parents=True, exist_ok=True)
    environment = {
        **os.environ, "OMP_WAIT_POLICY": "passive", "TRITON_CACHE_DIR": str(LOGS / "triton"), "PYTHONUNBUFFERED": "1",
        "TORCHINDUCTOR_CACHE_DIR": str(LOGS / "inductor"),
        "PIP_BREAK_SYSTEM_PACKAGES": "1",  # the Python that has torch is where the package goes
    }  # fmt: skip
    peer = gpu_peer.unpacked()
    if peer is not None:
        environment["PYTHONPATH"] = os.pathsep.join((str(peer), environment.get("PYTHONPATH", "")))
    endings: dict[str, str] = {}

    def finish(part: Part, limit: float) -> None:
        ended, seconds = run(part, environment, limit)
        endings[part.name] = f"{ended}, {seconds:.0f} s{summary(part)}"
        print(f"{part.name}: {endings[part.name]}", flush=True)

    finish(install(architecture()), left() - BENCH)
    libraries = built()
    if "_cuda" not in libraries:  # then at least everything else
        endings["CUDA C++"] = "FAILED: no library, see the log of install"
        finish(install(architecture(), "OFF"), left() - BENCH)
        libraries = built()
    if "_native" not in libraries:
        endings["native"] = "FAILED: no library, see the log of install"
    # a thread or two for each of them: the machine's cores are dealt out, not fought for
    environment["OMP_NUM_THREADS"] = "2"
    parts = checks()
    end = time.monotonic() + left() - BENCH
    with ThreadPoolExecutor(max(4, os.cpu_count() or 4)) as pool:
        list(pool.map(lambda part: finish(part, end - time.monotonic()), parts))
    del environment["OMP_NUM_THREADS"]
    seconds = max(left() - 45, 30)
    bench = Part("benchmarks", [sys.executable, "-m", "bench.gpu", "--seconds", f"{seconds:.0f}"], BUDGET)
    finish(bench, left())
    print((LOGS / "benchmarks.log").read_text(errors="replace")[-6000:])
    for line in failures(parts):
        print(line)
    for name, ended in endings.items():
        print(f"{name}: {ended}")
    print(f"{time.monotonic() - start:.0f} s in all")
    return int(any(not ended.startswith("passed") for ended in endings.values()))


if __name__ == "__main__":
    sys.exit(main())
