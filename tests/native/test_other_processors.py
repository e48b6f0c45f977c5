"""The library for another processor: CMakeLists.txt makes of it the portable build of the kernels, and no other."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
COMPILER = shutil.which("aarch64-linux-gnu-g++")
CMAKE = shutil.which("cmake") or shutil.which("cmake", path=Path(sys.executable).parent)


@pytest.mark.skipif(COMPILER is None or CMAKE is None, reason="no compiler for aarch64 is here (g++-aarch64-linux-gnu)")
def test_it_builds_for_aarch64(tmp_path):
    # of torch's library the linker wants no more than that it is one
    torch_cpu = tmp_path / "libtorch_cpu.so"
    subprocess.run([COMPILER, "-shared", "-x", "c++", "/dev/null", "-o", torch_cpu], check=True)
    define = {
        "CMAKE_SYSTEM_NAME": "Linux",
        "CMAKE_SYSTEM_PROCESSOR": "aarch64",
        "CMAKE_CXX_COMPILER": COMPILER,
        "CMAKE_CXX_FLAGS": "-Werror",
        "Python_EXECUTABLE": sys.executable,
        "TORCH_CPU_LIBRARY": torch_cpu,
        "FASTMTL_CUDA": "OFF",
    }
    settings = [f"-D{name}={value}" for name, value in define.items()]
    for command in (["-S", ROOT, "-B", tmp_path / "build", *settings], ["--build", tmp_path / "build", "-j", "2"]):
        done = subprocess.run([CMAKE, *command], capture_output=True, text=True)
        assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    (library,) = (tmp_path / "build").rglob("_native.so")
    header = library.read_bytes()[:20]
    assert header[:5] == b"\x7fELF\x02"
    assert int.from_bytes(header[18:20], "little") == 0xB7  # EM_AARCH64
    built = {path.name for path in (tmp_path / "build").rglob("CMakeFiles/fastmtl_kernels_*.dir")}
    assert built == {"fastmtl_kernels_baseline.dir"}
