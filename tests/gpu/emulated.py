"""Programs of emulation/, which run CUDA kernels on the CPU: compiled once for each kind of check, fed with arrays."""

import shutil
import subprocess
from functools import cache
from pathlib import Path

import numpy as np

HERE = Path(__file__).parent
COMPILER = shutil.which("c++") or shutil.which("g++")
SANITIZERS = {"plain": (), "race": ("-fsanitize=thread",), "memory": ("-fsanitize=address,undefined",)}


def emulator(folder, source):
    """``emulate(arrays, kind="plain", **numbers)`` runs the program and gives the arrays that it wrote."""

    @cache
    def program(kind):
        flags = ["-std=c++20", "-O1", "-g", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas", "-pthread"]
        flags += ["-ffp-contract=off", *SANITIZERS[kind], *(["-fno-sanitize-recover=all"] * (kind != "plain"))]
        command = [COMPILER, *flags, "-I", HERE.parents[1] / "csrc", HERE / "emulation" / source]
        subprocess.run([*command, "-o", folder / kind], check=True)
        return folder / kind

    def run(arrays, kind="plain", **numbers):
        for file in folder.glob("*.bin"):
            file.unlink()
        for name, array in arrays.items():
            np.ascontiguousarray(array).tofile(folder / f"{name}.bin")
        command = [program(kind), folder, *(f"{name}={int(value)}" for name, value in numbers.items())]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr[-6000:]
        return lambda name, like: np.fromfile(folder / f"{name}.bin", like.dtype).reshape(like.shape)

    return run
