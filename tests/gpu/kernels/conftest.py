"""The kernels' numbers, on a GPU or through Triton's interpreter: collected where one of them is there.

Where there is no GPU, `make gpu-check` runs this folder by itself, on the interpreter (TRITON_INTERPRET=1): Triton
decides for it once and for all when it is imported.
"""

import importlib.util
import os

import pytest
import torch

from fastmtl import backend as backends
from fastmtl.basic.embedding import EmbeddingLayer

RUNS = importlib.util.find_spec("triton") is not None and (
    os.environ.get("TRITON_INTERPRET") == "1" or torch.cuda.is_available()
)
collect_ignore_glob = [] if RUNS else ["*"]

#: Where the kernels' tensors live.
DEVICE = "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"


if DEVICE == "cpu" and RUNS:
    import interpreter

    interpreter.quicken()


def pytest_configure(config):
    """NumPy, which multiplies for the interpreter, warns of lanes too that nobody reads: what lies behind a matrix's
    end may be anything."""
    config.addinivalue_line("filterwarnings", "ignore:.* encountered in matmul:RuntimeWarning")


@pytest.fixture
def device():
    """The device whose tensors the backend takes."""
    return torch.device(DEVICE)


@pytest.fixture
def triton_backend():
    """Every op on the triton backend, whatever the table would choose."""
    with backends.use_backend("triton"):
        yield


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Blocks so small that tiny shapes have several of each, with parts left over. On a GPU the real ones are used."""
    if DEVICE == "cpu":
        from fastmtl.backends.triton import configs

        monkeypatch.setattr(configs, "DENSE_STEP", configs.Elements(64, configs.DENSE_STEP.warps))
        monkeypatch.setattr(configs, "OPERANDS", configs.Elements(256, configs.OPERANDS.warps))
        monkeypatch.setattr(configs, "EXPERT_GATE", configs.ExpertGateConfig(cap=16))
        sizes = {"indexed": 16, "most_runs": 4, "resident": 4, "multiprocessors": 1, "stitched": 2}
        blocks = {"tiny_vocab": 8, "sliced": 4, "looked_up": 64, "elements": 64, "max_block_d": 4}
        monkeypatch.setattr(configs, "EMBEDDING", configs.EmbeddingConfig(**blocks, **sizes))


@pytest.fixture(autouse=True)
def tape(monkeypatch):
    """Where there is no GPU, what stands in for CUDA graphs; dense values are not looked at, as on a GPU."""
    if DEVICE == "cpu":
        from tape import Tape

        monkeypatch.setattr("fastmtl.trainers.device_epoch.Rerun", Tape)
        check = EmbeddingLayer._check_dense
        monkeypatch.setattr(
            EmbeddingLayer, "_check_dense", lambda self, dense, x, group: check(self, dense.to("meta"), x, group)
        )
