"""A library into which the compiler has linked its own C++ runtime, as some are set up to: what it refuses is an error
of Python's, not the end of the process."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

COMPILER = shutil.which("g++")
SOURCES = Path(__file__).parents[2] / "csrc"
TORCH = Path(torch.__file__).parent
CALL = """
import sys, torch
torch.ops.load_library(sys.argv[1])
try:
    torch.ops.fastmtl.{call}
except RuntimeError as error:
    print("refused:", error)
"""


@pytest.mark.skipif(
    COMPILER is None or not (SOURCES / "boxed.h").exists(), reason="needs g++ and the sources of the native library"
)
def test_what_is_refused_is_an_error(tmp_path):
    library = tmp_path / "static.so"
    words = [COMPILER, "-std=c++20", "-O1", "-shared", "-fPIC", "-static-libgcc", "-static-libstdc++"]
    words += ["-DTORCH_TARGET_VERSION=0x020b000000000000", f"-I{SOURCES}", "-isystem", str(TORCH / "include")]
    words += [str(SOURCES / "cpu" / "shuffle.cpp"), "-o", str(library), str(TORCH / "lib" / "libtorch_cpu.so")]
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    call = CALL.format(call="shuffle_ahead(torch.arange(3), 9, torch.arange(1))")
    done = subprocess.run([sys.executable, "-c", call, str(library)], capture_output=True, text=True)
    assert done.returncode == 0, (done.returncode, done.stderr[-3000:])
    assert done.stdout.startswith("refused: "), done.stdout
