"""The CUDA library, compiled for sm_80 and sm_90 with warnings as errors, and what its kernels need."""

import importlib.util
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]


def tool(name):
    """Its path: on the PATH, beside Python, or among those that Triton brings."""
    spec = importlib.util.find_spec("triton")
    places = [Path(sys.executable).parent]
    if spec is not None and spec.origin is not None:
        places.append(Path(spec.origin).parent / "backends" / "nvidia" / "bin")
    return shutil.which(name) or next((str(place / name) for place in places if (place / name).exists()), None)


MISSING = [name for name in ("nvcc", "cuobjdump", "cmake", "ninja", "nm") if tool(name) is None]
pytestmark = pytest.mark.skipif(bool(MISSING), reason=f"the CUDA library is not compiled: {', '.join(MISSING)} missing")
#: kernel -> the most registers a thread may take, with any rule.
LIMITS = {
    "linearise_kernel": 64,
    "short_segments_kernel": 96,
    "long_segments_kernel": 96,
    "tiny_tables_kernel": 176,
    "tiny_tables_sum_kernel": 80,
    "table_rows_kernel": 96,
    "up_kernel": 255,  # one program a multiprocessor, of two warpgroups
    "down_sums_kernel": 255,
    "down_gradients_kernel": 255,
    "folded_kernel": 168,  # what a third of a program starts with: two of them take the third's
}


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    """The library as CMake builds it beside any torch."""
    folder = tmp_path_factory.mktemp("cuda")
    options = [
        "-DFASTMTL_CUDA=ON",
        "-DFASTMTL_WERROR=ON",
        f"-DPython_EXECUTABLE={sys.executable}",
        f"-DCMAKE_MAKE_PROGRAM={tool('ninja')}",
    ]
    for command in (
        [tool("cmake"), "-S", ROOT, "-B", folder, "-G", "Ninja", *options],
        [tool("cmake"), "--build", folder, "--target", "fastmtl_cuda"],
    ):
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]
        assert "warning" not in (done.stdout + done.stderr).lower(), done.stdout
    return folder / "_cuda.so"


@pytest.fixture(scope="module")
def usage(library):
    """``[(architecture, kernel, its mangled name, {"REG": .., "LOCAL": ..})]`` of this project's kernels."""
    done = subprocess.run([tool("cuobjdump"), "-res-usage", library], capture_output=True, text=True, check=True)
    found, arch = [], 0
    for line in (done.stdout + done.stderr).splitlines():
        if match := re.search(r"\barch = sm_(\d+)", line):
            arch = int(match[1])
        elif match := re.match(r"\s*Function (\S+):", line):
            name = match[1]
        elif "REG:" in line and (kernel := re.search(r"fastmtl4cuda\d+([a-z_]+_kernel)", name)):
            if name.startswith("_ZN3cub"):
                continue
            sizes = {key: int(value) for key, value in re.findall(r"([A-Z]+):(\d+)", line)}
            found.append((arch, kernel[1], name, sizes))
    return found


def test_every_kernel_is_there_for_every_architecture(usage):
    for arch in (80, 90):
        assert {kernel for where, kernel, _, _ in usage if where == arch} == set(LIMITS)


def test_registers(usage):
    over = [f"{name} sm_{arch}: {sizes}" for arch, kernel, name, sizes in usage if sizes["REG"] > LIMITS[kernel]]
    assert over == []


def test_nothing_is_spilled(usage):
    assert [f"{name} sm_{arch}: {sizes}" for arch, _, name, sizes in usage if sizes["STACK"] or sizes["LOCAL"]] == []


def test_what_it_takes_from_torch_is_there(library):
    """By the stable ABI: nothing of C++, and one function of torch's that only a torch for CUDA has."""

    def symbols(file, kind):
        done = subprocess.run([tool("nm"), "-D", kind, file], capture_output=True, text=True, check=True)
        return {line.split()[-1].split("@")[0] for line in done.stdout.splitlines()}

    taken = {name for name in symbols(library, "--undefined-only") if "torch" in name}
    given = symbols(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so", "--defined-only")
    assert taken - given <= {"aoti_torch_get_current_cuda_stream"}
    assert len(taken) > 10
    assert not [name for name in taken if name.startswith("_Z")]


@pytest.fixture(scope="module")
def hopper(library):
    """``{mangled name: its SASS}`` for sm_90a."""
    listing = subprocess.run(
        [tool("cuobjdump"), "-sass", "-arch", "sm_90a", library], capture_output=True, text=True, check=True
    ).stdout
    kernels = re.split(r"^\s*Function : ", listing, flags=re.MULTILINE)[1:]
    return dict(body.split("\n", 1) for body in kernels)


def test_rows_are_loaded_sixteen_bytes_at_a_time(hopper):
    """The kernels of tables whose width is a multiple of four; a gradient in bf16 is half as wide."""
    seen = 0
    for name, body in hopper.items():
        if re.search(r"fastmtl4cuda\d+(short_segments|table_rows)_kernelILi[0-5]ELi4E", name):
            seen += 1
            assert re.search(r"\bLDG\S*\.128", body), name
            assert re.search(r"\bSTG\S*\.128", body), name
    assert seen == 12


def test_predictions_multiply_by_warpgroups(hopper):
    """One kernel an activation; ptxas has not put the products one behind the other (it would say so, C7510)."""
    bodies = [body for name, body in hopper.items() if "folded_kernel" in name]
    assert len(bodies) == 3
    for body in bodies:
        assert len(re.findall(r"\bHGMMA\.64x256x16\.", body)) >= 4
        assert re.search(r"\bUBLKCP", body)


@pytest.mark.parametrize("kernel", ["up", "down_sums", "down_gradients"])
def test_hidden_layers_multiply_beside_other_work(kernel, hopper):
    """One kernel an activation. Products are waited for where the source says so: one behind the other (C7514), ptxas
    waits for each."""
    bodies = [body for name, body in hopper.items() if re.search(rf"cuda\d+{kernel}_kernel", name)]
    assert len(bodies) == 3
    for body in bodies:
        assert len(re.findall(r"\bHGMMA\.64x128x16\.", body)) in (16, 24)
        assert len(re.findall(r"\bWARPGROUP\.DEPBAR", body)) <= 4
