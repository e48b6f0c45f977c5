"""The table of backends: forcing, falling back, and saying why."""

import pytest
import torch

import fastmtl
from fastmtl import backend as backends
from fastmtl.backends import eager, native
from fastmtl.errors import BackendError


def test_forcing_as_a_context_and_as_a_statement():
    with fastmtl.use_backend("eager"):
        assert backends.resolve("expert_gate", torch.zeros(1)) is eager
        assert backends.forced() == "eager"
    assert backends.forced() is None
    fastmtl.use_backend("eager")
    try:
        assert backends.forced() == "eager"
    finally:
        fastmtl.use_backend(None)
    assert backends.forced() is None


def test_an_unknown_backend_is_refused_by_name(monkeypatch):
    with pytest.raises(BackendError, match=r"no backend 'cudnn'; the backends are native, triton, cuda, eager"):
        fastmtl.use_backend("cudnn")
    monkeypatch.setenv("FASTMTL_BACKEND", "cudnn")
    with pytest.raises(BackendError, match="FASTMTL_BACKEND: no backend 'cudnn'"):
        backends.resolve("expert_gate", torch.zeros(1))


def test_the_environment_forces(monkeypatch):
    monkeypatch.setenv("FASTMTL_BACKEND", "eager")
    assert backends.resolve("embedding_bag", torch.zeros(1)) is eager


def test_without_the_native_library_eager_runs_and_says_so_once(monkeypatch, capsys):
    monkeypatch.setattr(native, "unavailable", lambda: "it was not built")
    monkeypatch.setattr(backends, "_told", False)
    for _ in range(3):
        assert backends.resolve("expert_gate", torch.zeros(1)) is eager
    assert (
        capsys.readouterr().err == "fastmtl: backend 'native' is not available (it was not built); running on 'eager'\n"
    )
    with pytest.raises(BackendError, match="backend 'native' is not available: it was not built"):
        fastmtl.use_backend("native")
    assert {row.others["native"] for row in backends.report()} == {"it was not built"}


def test_a_forced_backend_that_cannot_run_the_tensors_raises(cpu_backend):
    if cpu_backend == "native":
        with fastmtl.use_backend("native"), pytest.raises(BackendError, match="'native' was forced but"):
            backends.resolve("expert_gate", torch.zeros(1, dtype=torch.float64))
    else:
        with fastmtl.use_backend(cpu_backend):
            assert backends.resolve("expert_gate", torch.zeros(1, dtype=torch.float64)) is eager


def test_native_follows_autocast_in_bf16_alone():
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert backends.resolve("expert_gate", torch.zeros(1)) is backends.TABLE["expert_gate"][backends.available()[0]]
    with torch.autocast("cpu", dtype=torch.float16):
        assert backends.resolve("expert_gate", torch.zeros(1)) is eager


def test_the_report_names_a_backend_for_each_op():
    rows = backends.report()
    assert [row.op for row in rows] == ["embedding_bag", "expert_gate"]
    for row in rows:
        assert row.runs == backends.available()[0]
        assert set(row.others) == set(backends.PREFERENCE) - {row.runs}
        assert all(row.others.values())
