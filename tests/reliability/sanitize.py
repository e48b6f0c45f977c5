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
#: Builds of the kernels, None the one that runs by itself; one that this processor lacks falls back to the baseline.
ISAS = (None, "baseline", "avx2", "avx512", "avx512_bf16")
#: Wrong calls on one build, then comes the next one.
CHUNK = 20_000
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


def environment(isa: str | None = None) -> dict[str, str]:
    """The sanitizers' runtime comes before everything else; Python's own leaks are not looked at.

    Args:
        isa: the build of the kernels that is forced.
    """
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
        **({} if isa is None else {"FASTMTL_ISA": isa}),
    }


def run_tests() -> None:
    """tests/native, and whole steps; then, on every other build of the kernels that this processor runs, those of its
    tests that differ.

    The tests that start processes of their own load the library that is installed, and are left out.
    """
    for isa in ISAS:
        folder, steps = ROOT / "tests" / "native", ROOT / "tests" / "trainers" / "test_chain_steps.py"
        files = [folder / f"test_{name}.py" for name in ("expert_gate", "packed_gemm", "bf16", "dropout")]
        command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "reliability.sanitized", "-p", "no:cacheprovider"]
        command += ["--capture=no"]  # a report ends the process, and what pytest had captured with it
        command += ["-k", "not each_build and not does_not_load", *map(str, [folder, steps] if isa is None else files)]
        done = subprocess.run(command, env=environment(isa), capture_output=True, text=True, cwd=ROOT)
        if done.returncode:
            found = [line for line in done.stderr.splitlines() if "runtime error" in line or "Sanitizer:" in line]
            text = "\n".join([*found, done.stdout[-6000:], done.stderr[-6000:]])
            raise SystemExit(f"tests/native, {isa or 'best'} build:\n{text}")


def check_that_it_sees() -> None:
    """A lookup whose ids may not be read must end in a report: sanitizers that see nothing find nothing.

    Raises:
        SystemExit: it was not reported.
    """
    command = [sys.executable, "-m", "reliability.sanitized", "forbidden"]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, cwd=ROOT)
    if done.returncode == 0 or "AddressSanitizer: use-after-poison" not in done.stderr:
        raise SystemExit(f"the sanitizers missed a forbidden read, exit {done.returncode}:\n{done.stderr[-3000:]}")


def run_fuzz(count: int, seed: int, sanitized: bool = True) -> tuple[int, int, list[str]]:
    """Wrong calls, on one build of the kernels after the other, ``CHUNK`` in a process; one begins anew behind a call
    that ends it.

    Returns:
        (calls that worked, calls that raised, what ended a process, a line each).
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
            isa = ISAS[first // CHUNK % len(ISAS)]
            stop = min(count, (first // CHUNK + 1) * CHUNK)
            words = [str(first), str(stop - first), str(seed), note.name]
            done = subprocess.run(
                [sys.executable, "-m", module, *words], env=environment(isa) if sanitized else plain,
                capture_output=True, text=True, cwd=ROOT,
            )  # fmt: skip
            if done.returncode == 0:
                a, b = map(int, done.stdout.split()[-2:])
                worked, refused, first = worked + a, refused + b, stop
                continue
            number = int.from_bytes(Path(note.name).read_bytes(), "little")
            what = re.search(r"(?:runtime error|ERROR: AddressSanitizer|what\(\)|Error): .*", done.stderr)
            findings.append(
                f"case {number} (seed {seed}, {isa or 'best'} build): {what.group() if what else done.stderr[-300:]!r}"
            )
            first = number + 1
    return worked, refused, findings


def soak(count: int, seed: int) -> str:
    """Build, a forbidden read, tests/native, ``count`` wrong calls."""
    build()
    check_that_it_sees()
    run_tests()
    worked, refused, findings = run_fuzz(count, seed)
    assert not findings, "\n".join(["", *findings])
    return f"tests/native, {count:,} wrong calls, on all builds: {worked:,} worked, {refused:,} refused, 0 findings"


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
