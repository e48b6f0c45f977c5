"""Compile every kernel launch of a workload for GPUs that are not here, and read what the compilers say of it.

The backend runs on meta tensors at real sizes while its launches are recorded instead of started; each distinct one is
compiled with the specialisation Triton's own launcher would choose. Run as a program, it prints the table as JSON:
``python ahead_of_time.py WORKLOAD... --arch 80 90 100``.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from fastmtl.backends.triton import launch as launching

_TYPES = {
    torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.int32: "*i32", torch.int64: "*i64",
    torch.bool: "*u1",
}  # fmt: skip
ARCHITECTURES = (80, 90, 100)
#: Kernels whose instructions are looked at.
DISASSEMBLED = re.compile("expert_gate_folded|expert_gate_wgrad|embedding_bag_fwd|dense_step|cut_rows")
#: The instructions that multiply matrices on tensor cores, in SASS: of a warp, of a warp group, of a multiprocessor.
_TENSOR_CORES = re.compile(r"\b(HMMA|HGMMA|UTC[A-Z]*MMA)\b")
#: What optimizer_quick.py makes quotients and square roots of.
_SEEDS = r"\b(rcp|rsqrt)\.approx\.ftz\.f32\b"
_TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


@dataclass(frozen=True)
class Launch:
    """One kernel as it would be started: what its compilation depends on."""

    kernel: Any
    warps: launching.Warps
    signature: tuple[tuple[str, Any], ...]
    constants: tuple[tuple[str, Any], ...]
    aligned: tuple[tuple[str, int], ...]  # a parameter, and which of a tuple's values, else -1
    programs: int

    def key(self) -> tuple:
        """Equal for launches that share one compiled kernel."""
        return self.kernel.fn.__name__, self.warps, self.signature, self.constants, self.aligned


@dataclass(frozen=True)
class Report:
    """What one compiled kernel needs.

    Args:
        registers: a thread.
        spills: bytes of local memory a thread, where registers are written that there is no room for.
        shared: bytes a program.
        dtype: of what it writes, or of what its products read.
        matrix: the instruction by which it multiplies matrices on tensor cores, if it does; '' for a kernel that is not
            disassembled, which takes as long as its compilation (DISASSEMBLED).
        wide: loads of 16 bytes over all loads from global memory; likewise 1.
        misplaced: reductions and scans that the program has in a loop and the compiled kernel before it.
        approximate: whether it rounds anything otherwise than IEEE 754 says, but for what the quick steps begin with.
    """

    workload: str
    kernel: str
    arch: int
    programs: int
    warps: int
    registers: int
    spills: int
    shared: int
    dtype: str
    matrix: str
    wide: float
    misplaced: int
    approximate: bool
    constants: str
    seconds: float


def record(run: Callable[[], Any]) -> list[Launch]:
    """The distinct launches of ``run``, in their order."""
    found: dict[tuple, Launch] = {}

    def note(kernel: Any, grid: tuple[int, ...], warps: launching.Warps, arguments: dict[str, Any]) -> None:
        launch = _describe(kernel, grid, warps, arguments)
        found.setdefault(launch.key(), launch)

    launching.recorder = note
    try:
        run()
    finally:
        launching.recorder = None
    return list(found.values())


def _describe(kernel: Any, grid: tuple[int, ...], warps: launching.Warps, arguments: dict[str, Any]) -> Launch:
    signature, constants, aligned = [], [], []
    for parameter in kernel.params:
        name, value = parameter.name, arguments[parameter.name]
        if isinstance(value, tuple) and not parameter.is_constexpr:
            signature.append((name, tuple(map(_type_of, value))))
            aligned += [(name, i) for i, one in enumerate(value) if _is_aligned(one)]
        elif isinstance(value, Tensor):
            signature.append((name, _TYPES[value.dtype]))
            aligned.append((name, -1))
        elif (
            parameter.is_constexpr
            or (value == 1 and not (isinstance(value, float) or parameter.do_not_specialize))
            or isinstance(value, bool)
        ):
            signature.append((name, "constexpr"))
            constants.append((name, value))
        elif parameter.do_not_specialize and isinstance(value, int):
            signature.append((name, "i32"))
        else:
            signature.append((name, _type_of(value)))
            if _is_aligned(value):
                aligned.append((name, -1))
    programs = 1
    for side in grid:
        programs *= side
    return Launch(kernel, warps, tuple(signature), tuple(constants), tuple(aligned), programs)


def _type_of(value: Tensor | float) -> str:
    if isinstance(value, Tensor):
        return _TYPES[value.dtype]
    if isinstance(value, float):
        return "fp32"
    return "i32" if -(2**31) <= value < 2**31 else "i64"


def _is_aligned(value: Tensor | float) -> bool:
    """torch's allocations are, and the views that are passed begin at multiples of 16."""
    return isinstance(value, Tensor) or (isinstance(value, int) and value % 16 == 0)


def compile_for(launch: Launch, arch: int, workload: str) -> Report:
    """Compile one launch for compute capability ``arch / 10`` and take its binary apart."""
    name = launch.kernel.fn.__name__
    names = [argument for argument, _ in launch.signature]
    source = ASTSource(
        fn=launch.kernel,
        signature=dict(launch.signature),
        constexprs={(names.index(constant),): value for constant, value in launch.constants},
        attrs={(names.index(name), *(() if i < 0 else (i,))): [["tt.divisibility", 16]] for name, i in launch.aligned},
    )
    start = time.perf_counter()
    compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=launch.warps.options())
    seconds = time.perf_counter() - start
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = _tool("-res-usage", file.name)
        sass = _tool("-sass", file.name) if DISASSEMBLED.match(name) else ""
    (numbers,) = re.findall(rf"Function {name}:\s*\n?\s*(REG:.*)", usage)
    sizes = {key: int(value) for key, value in re.findall(r"(\w+):(\d+)", numbers)}
    loads = re.findall(r"\b(LDG\S*|LDGSTS\S*)", sass)
    wide = sum("128" in load for load in loads) / len(loads) if loads else 1.0
    return Report(
        workload,
        name,
        arch,
        launch.programs,
        launch.warps.num_warps,
        sizes["REG"],
        sizes["STACK"],
        compiled.metadata.shared,
        next((type_[1:] for name_, type_ in launch.signature if name_ in ("Z_ptr", "X_ptr", "Out_ptr")), ""),
        "/".join(sorted(set(_TENSOR_CORES.findall(sass)))),
        round(wide, 2),
        _misplaced(compiled.asm["ttir"], compiled.asm["ttgir"]),
        bool(re.search(r"\.(approx|ftz)\b", re.sub(_SEEDS, "", compiled.asm["ptx"]))),
        ", ".join(f"{key}={value}" for key, value in launch.constants if key.isupper()),
        round(seconds, 2),
    )


def _misplaced(before: str, after: str) -> int:
    """What stood in a loop of Triton's own program, where all that could be moved out of it had been, and does no more
    where that has got its layouts: it is computed once then, of whatever the loop began with."""
    depths = [_depths(text) for text in (before, after)]
    deepest = max((depth for found in depths for depth in found), default=0)
    inside = [[sum(depth >= d for depth in found) for d in range(1, deepest + 1)] for found in depths]
    return max((was - now for was, now in zip(*inside, strict=True)), default=0)


def _depths(text: str) -> list[int]:
    """How many loops each reduction and scan of a program is in."""
    found, nested = [], []
    for line in text.splitlines():
        line = re.sub(r" loc\([^()]*\)", "", line).strip()
        if line.startswith("}"):
            nested.pop()
        if re.search(r'"tt\.(reduce|scan)"', line):
            found.append(sum(nested))
        if line.endswith("{"):
            nested.append("scf.for" in line or "scf.while" in line or line == "} do {")
    return found


def _tool(option: str, file: str) -> str:
    run = subprocess.run([_TOOLS / "cuobjdump", option, file], capture_output=True, text=True, check=True)
    return run.stdout + run.stderr


def main() -> None:
    """Print the reports of the workloads named on the command line."""
    from triton_workloads import WORKLOADS

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("workloads", nargs="*", default=sorted(WORKLOADS), metavar="WORKLOAD")
    parser.add_argument("--arch", type=int, nargs="+", default=ARCHITECTURES)
    parser.add_argument("--everywhere", action="store_true", help="also for architectures a workload leaves out")
    parser.add_argument("--kernel", default="", help="only kernels whose name holds this")
    parser.add_argument("--text", action="store_true", help="a table to read, not JSON")
    arguments = parser.parse_args()
    reports: list[Report] = []
    seen: set[tuple] = set()
    for workload in arguments.workloads:
        run, others = WORKLOADS[workload]
        for arch in arguments.arch:
            if not (arch == 90 or arch in others or arguments.everywhere):
                continue
            launching.compiling_for = arch // 10
            for launch in record(run):
                if arguments.kernel not in launch.kernel.fn.__name__ or (launch.key(), arch) in seen:
                    continue
                seen.add((launch.key(), arch))
                report = compile_for(launch, arch, workload)
                reports.append(report)
                if arguments.text:
                    print(*asdict(report).values(), sep=" | ", flush=True)
    if not arguments.text:
        json.dump([asdict(report) for report in reports], sys.stdout)


if __name__ == "__main__":
    main()
