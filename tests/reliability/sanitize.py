"""The native library under the address and undefined-behaviour sanitizers: tests/native, and wrong arguments.

    make sanitize                                # builds into build/sanitize; tests/native, then 20,000 wrong calls
    make sanitize ARGS="--count 1000000"         # as many wrong calls as the property asks for
    make sanitize ARGS="--count 0"               # the tests alone

A wrong call that a sanitizer stops is named by its number and seed, and the run goes on behind it.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[2]
BUILD = ROOT / "build" / "sanitize"
LIBRARY = BUILD / "_native.so"
#: Set where fastmtl is to load that library instead of its own.
VARIABLE = "FASTMTL_SANITIZED"
#: Findings after which there is nothing more to learn.
MOST_FINDINGS = 20


def use_sanitized_library() -> None:
    """Let fastmtl, not imported yet, find the library that the environment names."""
    path, found = os.environ[VARIABLE], importlib.util.find_spec
    spec = importlib.util.spec_from_file_location("fastmtl._native", path)

    def find_spec(name: str, package: str | None = None) -> object:
        return spec if name == "fastmtl._native" else found(name, package)

    importlib.util.find_spec = find_spec  # type: ignore[assignment]


def build() -> None:
    """Configure and build, two files at once; what is up to date stays."""
    BUILD.mkdir(parents=True, exist_ok=True)
    configure = [
        "cmake",
        "-S",
        str(ROOT),
        "-B",
        str(BUILD),
        "-DFASTMTL_SANITIZE=ON",
        f"-DPython_EXECUTABLE={sys.executable}",
    ]
    for command in (configure, ["cmake", "--build", str(BUILD), "-j2"]):
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"{' '.join(command)}:\n{done.stdout[-3000:]}{done.stderr[-3000:]}")


def environment() -> dict[str, str]:
    """The sanitizers' runtime comes before everything else; Python's own leaks are not looked at."""
    libraries = [
        subprocess.run(["g++", f"-print-file-name={name}"], capture_output=True, text=True, check=True).stdout.strip()
        for name in ("libasan.so", "libstdc++.so.6")
    ]
    paths = [str(ROOT / "tests"), str(ROOT), os.environ.get("PYTHONPATH", "")]
    options = "detect_leaks=0:allocator_may_return_null=1:max_allocation_size_mb=4096"
    return {
        **os.environ,
        VARIABLE: str(LIBRARY),
        "LD_PRELOAD": " ".join(libraries),
        "ASAN_OPTIONS": options,
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "OMP_WAIT_POLICY": "passive",
        "TORCH_SHOW_CPP_STACKTRACES": "0",
        "PYTHONPATH": os.pathsep.join(paths),
    }


def run_tests() -> None:
    """tests/native; the tests of other builds load their own library and are left out."""
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "reliability.sanitized", "-p", "no:cacheprovider"]
    command += [str(ROOT / "tests" / "native"), "-k", "not each_build and not does_not_load"]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, cwd=ROOT)
    if done.returncode:
        raise SystemExit(f"tests/native under the sanitizers:\n{done.stdout[-6000:]}{done.stderr[-6000:]}")


def run_fuzz(count: int, seed: int, sanitized: bool = True) -> tuple[int, int, list[str]]:
    """Wrong calls, in a process of their own that is begun anew behind each that ends it.

    Returns:
        (calls that worked, calls that raised, what ended the process, a line each).
    """
    worked = refused = first = 0
    findings: list[str] = []
    paths = os.pathsep.join((str(ROOT / "tests"), str(ROOT), os.environ.get("PYTHONPATH", "")))
    plain = {**os.environ, "PYTHONPATH": paths, "OMP_WAIT_POLICY": "passive"}
    with tempfile.NamedTemporaryFile() as note:
        note.write(bytes(8))
        note.flush()
        while first < count and len(findings) < MOST_FINDINGS:
            module = "reliability.sanitized" if sanitized else "reliability.fuzz"
            words = [str(first), str(count - first), str(seed), note.name]
            done = subprocess.run(
                [sys.executable, "-m", module, *words], env=environment() if sanitized else plain, capture_output=True,
                text=True, cwd=ROOT,
            )  # fmt: skip
            if done.returncode == 0:
                a, b = map(int, done.stdout.split()[-2:])
                return worked + a, refused + b, findings
            number = int.from_bytes(Path(note.name).read_bytes(), "little")
            what = re.search(r"(?:runtime error|ERROR: AddressSanitizer|what\(\)|Error): .*", done.stderr)
            findings.append(f"case {number} (seed {seed}): {what.group() if what else done.stderr[-300:]!r}")
            first = number + 1
    return worked, refused, findings


def soak(count: int, seed: int) -> str:
    """Build, tests/native, ``count`` wrong calls."""
    build()
    run_tests()
    worked, refused, findings = run_fuzz(count, seed)
    assert not findings, "\n".join(["", *findings])
    return f"tests/native, and {count:,} wrong calls: {worked:,} worked, {refused:,} were refused, 0 findings"


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(prog="make sanitize", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--count", type=int, default=20_000, help="wrong calls (%(default)s)")
    parser.add_argument("--seed", type=int, default=int.from_bytes(os.urandom(3), "little"))
    args = parser.parse_args()
    print(f"seed {args.seed}; building into {BUILD.relative_to(ROOT)}", flush=True)
    print(soak(args.count, args.seed))


if __name__ == "__main__":
    main()
