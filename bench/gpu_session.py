"""All that a CUDA machine is asked for, in one command and under nine minutes: `make gpu`.

It needs no network: torch for CUDA, triton, nvcc, cmake, ninja, scikit-build-core and pytest are there. First the
package is built; then everything that asks whether it is right runs side by side, each part a process of its own with a
limit of its time and a log in build/gpu; at last the benchmarks have the GPU for themselves. A part that fails does not
keep the others from running, nor a test that takes the GPU away from its process the tests behind it. The last lines
are the short table, the failures by what they say, and how each part ended.

    python -m bench.gpu_session --list          # say what would run
    python -m bench.gpu_session --only install tests --seconds 240     # some of it
    python -m bench.gpu_session --only benchmarks --logs logs.tar.gz   # the logs and the report in one file besides
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
import tarfile
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from bench import gpu_peer

ROOT = Path(__file__).resolve().parents[1]
LOGS = ROOT / "build" / "gpu"
#: Seconds that the whole may take, and those that the benchmarks keep for themselves.
BUDGET, BENCH = 525, 200
#: What `--only` chooses from.
GROUPS = ("install", "reliability", "caches", "tests", "benchmarks")
#: Processes that the test-suite is dealt out to, and those that compile what the benchmarks will run.
SHARDS, WARM = 13, 3
#: Random models that are held to torch-rechub's: each is half a minute's worth of new kernels to compile.
MODELS = 15
#: The folders of tests/, the most telling first. A process goes through all of them three times, with a third of its
#: tests each time, since its time may be up before the last.
FOLDERS = (
    "gpu/kernels", "ops", "trainers", "basic", "behaviour", "parity", "reliability", "optim", "serving", "native",
    "data", "utils", "export", "cli",
)  # fmt: skip
#: Not run here: compilers and emulators, which need no GPU (`make gpu-check`), and what looks at the project's files.
ELSEWHERE = ("gpu", "project")
#: The rows of docs/reliability.md, and the cases of each that its time allows.
ROWS = {1: 40, 2: 10, 4: 2, 9: 1, 10: 60, 11: 1}
#: Exit statuses of a pytest that came to its end: all passed, some failed, no test was left.
COMPLETE = (0, 1, 5)
#: Processes that a part may lose before it is given up.
LOSSES = 8
#: How a log names a failure and says why.
FAILURES = (
    r"(?:FAILED|ERROR) (.+?)(?: - (.*)|$)",
    r"!+ Interrupted: LOST (.+?) - (.*?) !*$",
    r"left out: (\w+: .+?): (?!the time was up)(.*)",
    r"(row +\d+) FAILED +(.*)",
)
#: Seconds that those side by side leave to each that runs alone.
ALONE = 30
#: Characters of the benchmarks' tables and of the failures that are printed.
TABLES, TOLD = 4000, 4000


class Part(NamedTuple):
    """A command, the seconds it may take, and what it adds to the environment.

    Args:
        begun: where the command names the tests that it began. It is given again then, to go on behind them, when its
            process was lost.
        alone: nothing else may run meanwhile: it takes most of the GPU's memory.
    """

    name: str
    command: list[str]
    limit: int
    variables: tuple[tuple[str, str], ...] = ()
    begun: Path | None = None
    alone: bool = False

    @property
    def log(self) -> Path:
        """What it writes goes there."""
        return LOGS / f"{self.name.replace(' ', '-')}.log"

    def lines(self) -> list[str]:
        """Of its log, if it has begun."""
        return self.log.read_text(errors="replace").splitlines() if self.log.exists() else []

    def tests(self) -> list[str]:
        """Those that it began."""
        return self.begun.read_text().splitlines() if self.begun and self.begun.exists() else []


def install(architecture: str, cuda: str = "AUTO") -> Part:
    """The package, editable, so that what is tested and what is measured is what lies here; the CUDA library for this
    GPU alone."""
    defines = {"FASTMTL_CUDA_ARCHITECTURES": architecture, "FASTMTL_CUDA": cuda}
    settings = [f"--config-settings=cmake.define.{name}={value}" for name, value in defines.items()]
    settings.append("--config-settings=build-dir=build/gpu/cmake")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "--verbose", "--force-reinstall"]
    command = [*pip, "--no-build-isolation", "--no-deps", "--no-index", *settings, "--editable", "."]
    return Part("install" if cuda == "AUTO" else "install without CUDA C++", command, 150)


def checks(groups: Sequence[str] = GROUPS) -> list[Part]:
    """Side by side, the longest first."""
    python = sys.executable
    variables = (("PYTHONPATH", "tests"), ("FASTMTL_TEST_DEVICE", "cuda"), ("FASTMTL_TEST_MODELS", str(MODELS)))
    # each failure is told when it happens (tests/conftest.py): a part that is stopped comes to no summary
    pytest = [python, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-W", "default", "--tb=short", "-rN"]
    pytest += [f"tests/{folder}" for folder in FOLDERS]
    soak = [python, "-m", "reliability.soak", "--device", "cuda"]
    rows = [
        Part(
            f"reliability row {row}", [*soak, "--row", str(row), "--count", str(count)], 240, variables, alone=row == 11
        )
        for row, count in ROWS.items()
    ]
    warm = [python, "-m", "bench.gpu", "--cases", "16", "--warm"]
    caches = [Part(f"compile caches {i} of {WARM}", [*warm, f"{i}/{WARM}"], 240) for i in range(1, WARM + 1)]
    shards = []
    for i in range(1, SHARDS + 1):
        begun = LOGS / f"tests-{i}.begun"
        command = [*pytest, "--part", f"{i}/{SHARDS}", "--begun", str(begun)]
        shards.append(Part(f"tests {i} of {SHARDS}", command, 240, variables, begun))
    parts = {"reliability": rows, "caches": caches, "tests": shards}
    return [part for group in parts if group in groups for part in parts[group]]


def run(part: Part, environment: dict[str, str], limit: float) -> tuple[str, float]:
    """How a part ended, and its seconds."""
    limit = min(part.limit, limit)
    start = time.monotonic()
    for left_before in (part.log, part.begun):
        if left_before:
            left_before.unlink(missing_ok=True)
    if limit < 5:
        return "NOT RUN: the time was up", 0.0
    codes: list[int] = []
    begun = -1  # tests
    while not codes or (codes[-1] not in COMPLETE and begun < len(part.tests()) and len(codes) <= LOSSES):
        begun = len(part.tests())
        code = _run_once(part, environment, limit - (time.monotonic() - start))
        if code is None:
            at = f" in {part.tests()[-1]}" if part.tests() else ""
            ended = f"STOPPED after {limit:.0f} s{at}"
            break
        codes.append(code)
        ended = "passed" if codes == [0] else f"FAILED ({', '.join(map(str, codes))})"
    return f"{ended}, log {part.log.relative_to(ROOT)}", time.monotonic() - start


def _run_once(part: Part, environment: dict[str, str], limit: float) -> int | None:
    """The exit status, or None where it took too long."""
    variables = dict(part.variables)
    if "PYTHONPATH" in variables:
        variables["PYTHONPATH"] = os.pathsep.join((variables["PYTHONPATH"], environment.get("PYTHONPATH", "")))
    with part.log.open("a") as file:
        # a group of its own: what it has started ends with it
        process = subprocess.Popen(
            part.command, stdout=file, stderr=subprocess.STDOUT, cwd=ROOT, env=environment | variables,
            start_new_session=True,
        )  # fmt: skip
        try:
            return process.wait(max(limit, 0))
        except subprocess.TimeoutExpired:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            return None


def summary(part: Part) -> str:
    """The last line of a log that counts something."""
    telling = [line for line in part.lines() if re.search(r"\d+ (passed|failed|error)|^row ", line)]
    return f" [{telling[-1].strip('= ')[:100]}]" if telling else ""


def failures(parts: Iterable[Part]) -> list[str]:
    """What failed, by the logs: a line for all that say the same but for their numbers."""
    told: dict[str, tuple[str, list[str]]] = {}
    for line in (line for part in parts for line in part.lines()):
        for found in filter(None, (re.match(pattern, line) for pattern in FAILURES)):
            name, why = found[1].removeprefix("tests/"), found[2] or ""
            _, names = told.setdefault(re.sub(r"\d[\d.e+-]*", "#", why), (why[:250], []))
            if name not in names:
                names.append(name)
    lines = []
    for number, (why, names) in enumerate(told.values()):
        lines.append(f"{len(names)} x {why}: {', '.join(names[:3])}{', ...' if len(names) > 3 else ''}"[:500])
        if sum(map(len, lines)) > TOLD:
            return [*lines, f"and {len(told) - number - 1} other kinds of failures, see the logs"]
    return lines


def pack(to: Path, since: float) -> None:
    """The logs, and what the benchmarks have written since then, in one file."""
    to.parent.mkdir(parents=True, exist_ok=True)
    reports = [path for path in sorted((ROOT / "bench" / "results").glob("*")) if path.stat().st_mtime >= since]
    with tarfile.open(to, "w:gz") as archive:
        for path in [*sorted(LOGS.glob("*.log")), *reports]:
            archive.add(path, path.name)


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
    parser.add_argument("--only", nargs="+", choices=GROUPS, default=GROUPS, metavar="NAME", help=", ".join(GROUPS))
    parser.add_argument("--seconds", type=float, default=BUDGET, help="that the whole may take (%(default)s)")
    parser.add_argument("--bench", type=float, default=BENCH, help="of these the benchmarks' own (%(default)s)")
    parser.add_argument("--logs", type=Path, metavar="FILE.tar.gz", help="the logs and the report go there besides")
    arguments = parser.parse_args()
    if arguments.peer_wheel:
        return fetch_peer()
    parts = checks(arguments.only)
    if arguments.list:
        for part in [install("90")] * ("install" in arguments.only) + parts:
            shown = " ".join((*(f"{name}={value}" for name, value in part.variables), *part.command))
            print(f"{part.limit:4d} s  {part.name}: {shown}")
        return 0
    import torch

    if not torch.cuda.is_available():
        print("make gpu: torch finds no GPU here; `make gpu-check` is what runs without one", file=sys.stderr)
        return 2
    start, since = time.monotonic(), time.time()
    own = arguments.bench if "benchmarks" in arguments.only else 0.0

    def left() -> float:
        return arguments.seconds - (time.monotonic() - start)

    LOGS.mkdir(parents=True, exist_ok=True)
    environment = {
        **os.environ, "OMP_WAIT_POLICY": "passive", "TRITON_CACHE_DIR": str(LOGS / "triton"), "PYTHONUNBUFFERED": "1",
        "TORCHINDUCTOR_CACHE_DIR": str(LOGS / "inductor"),
        "PIP_BREAK_SYSTEM_PACKAGES": "1",  # the Python that has torch is where the package goes
        "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",  # what a machine happens to have must not change what runs
        "COLUMNS": "400",  # a line of pytest's summary says why a test failed
    }  # fmt: skip
    # ROOT: without an installation the package is what lies here, with libraries that were put into it
    paths = [str(path) for path in (gpu_peer.unpacked(), ROOT) if path]
    environment["PYTHONPATH"] = os.pathsep.join((*paths, environment.get("PYTHONPATH", "")))
    endings: dict[str, str] = {}

    def finish(part: Part, limit: float) -> None:
        ended, seconds = run(part, environment, limit)
        endings[part.name] = f"{ended}, {seconds:.0f} s{summary(part)}"
        print(f"{part.name}: {endings[part.name]}", flush=True)

    if "install" in arguments.only:
        finish(install(architecture()), left() - own)
        if "_cuda" not in built():  # then at least everything else
            finish(install(architecture(), "OFF"), left() - own)
    for library in {"_native", "_cuda"} - set(built()):
        endings[library] = "FAILED: no such library, see the log of install"
    # a thread or two for each of them: the machine's cores are dealt out, not fought for; a few more than it has cores,
    # since some wait for the GPU
    environment["OMP_NUM_THREADS"] = "2"
    alone = [part for part in parts if part.alone]
    kept = own + ALONE * len(alone)
    with ThreadPoolExecutor((os.cpu_count() or 4) + 3) as pool:
        list(pool.map(lambda part: finish(part, left() - kept), (part for part in parts if not part.alone)))
    for part in alone:
        finish(part, left() - own)
    del environment["OMP_NUM_THREADS"]
    if "benchmarks" in arguments.only:
        seconds = max(left() - 45, 30)
        bench = Part("benchmarks", [sys.executable, "-m", "bench.gpu", "--seconds", f"{seconds:.0f}"], BUDGET)
        finish(bench, left())
        print("\n".join(bench.lines())[-TABLES:])
    for line in failures(parts):
        print(line)
    for name, ended in endings.items():
        print(f"{name}: {ended}")
    if arguments.logs:
        pack(arguments.logs, since)
    print(f"{time.monotonic() - start:.0f} s in all")
    return int(any(not ended.startswith("passed") for ended in endings.values()))


if __name__ == "__main__":
    sys.exit(main())
