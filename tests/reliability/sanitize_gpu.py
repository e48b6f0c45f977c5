"""compute-sanitizer over the kernels: no access out of bounds (memcheck), no race in shared memory (racecheck).

Needs a GPU and compute-sanitizer. Each tensor has memory of its own then, so that a read one element behind its end is
seen. A planted fault comes first: a tool that sees nothing finds nothing.

python -m reliability.sanitize_gpu planted      # writes behind the end of a tensor
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).parents[2]
TESTS = "tests/gpu/kernels"
#: tool -> which of them it looks at: few, small calls, since each takes many times as long. The barriers of Triton's
#: kernels are its compiler's business.
TOOLS = {
    "memcheck": "sanitized or test_a_row_with_many_lookups or test_a_step_of_a_model"
    " or (test_triton_hopper and 0-True)",
    "racecheck": "sanitized",
}
FOUND = 9
#: Where the toolkit's own programs lie; not everyone has them on the PATH.
TOOLKIT = os.pathsep.join(
    os.path.join(os.environ.get("CUDA_HOME", "/usr/local/cuda"), folder) for folder in ("bin", "compute-sanitizer")
)


def command(tool: str, *words: str) -> list[str]:
    """Of a Python program under a tool; its exit status is :data:`FOUND` where the tool found something."""
    program = shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path=TOOLKIT)
    if program is None:
        raise FileNotFoundError("compute-sanitizer is not on the PATH: it comes with CUDA's toolkit")
    # the compilers that Triton starts are left alone
    options = ["--error-exitcode", str(FOUND), "--target-processes", "application-only", "--print-limit", "10"]
    return [program, "--tool", tool, *options, sys.executable, *words]


def run(tool: str, *words: str) -> subprocess.CompletedProcess[str]:
    """Run it, tensors without a cache around them."""
    paths = os.pathsep.join((str(ROOT / "tests"), str(ROOT), os.environ.get("PYTHONPATH", "")))
    environment = {**os.environ, "PYTHONPATH": paths, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    return subprocess.run(command(tool, *words), cwd=ROOT, env=environment, capture_output=True, text=True)


def check_that_it_sees() -> None:
    """A planted write must be reported."""
    done = run("memcheck", "-m", "reliability.sanitize_gpu", "planted")
    if done.returncode != FOUND or "Invalid __global__ write" not in done.stdout + done.stderr:
        raise AssertionError(f"a planted write was missed, exit {done.returncode}: {_tail(done)}")


def check(tool: str, chosen: str) -> str:
    """Run the tests whose names hold ``chosen``; what was found, or how many passed."""
    done = run(tool, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-W", "default", TESTS, "-k", chosen)
    passed = re.search(r"(\d+) passed", done.stdout)
    clean = re.search(r"ERROR SUMMARY: 0 errors|RACECHECK SUMMARY: 0 hazards", done.stdout + done.stderr)
    if done.returncode or passed is None or clean is None:
        raise AssertionError(f"{tool}, exit {done.returncode}: {_tail(done)}")
    return f"{tool}: {passed[1]} tests, nothing found"


def soak(count: int, seed: int) -> str:
    """Both tools, side by side, over the tests chosen by name; ``count`` and ``seed`` are the tests' own business."""
    del count, seed
    with ThreadPoolExecutor() as pool:
        planted = pool.submit(check_that_it_sees)
        found = [pool.submit(check, tool, chosen) for tool, chosen in TOOLS.items()]
        planted.result()
        return "; ".join(one.result() for one in found)


def _tail(done: subprocess.CompletedProcess[str]) -> str:
    return (done.stdout + done.stderr)[-3000:]


def planted() -> None:
    """Write one element behind the end of a tensor."""
    import torch
    import triton
    import triton.language as tl

    @triton.jit
    def write_kernel(to_ptr, at):  # type: ignore[no-untyped-def]
        tl.store(to_ptr + at, 1.0)

    to = torch.empty(512, device="cuda")
    write_kernel[(1,)](to, 512 + 128)
    torch.cuda.synchronize()


if __name__ == "__main__":
    planted()
