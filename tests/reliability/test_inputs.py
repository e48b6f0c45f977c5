"""Samples of rows 2, 9, 10 and 11: gradients and schemas, wrong calls, bad ids, large tables."""

import pytest
from devices import BACKENDS, KERNELS

from fastmtl import backend as backends

from . import bad_ids, gradients, large, sanitize

needs_native = pytest.mark.skipif("native" not in backends.available(), reason="needs the native library")


def test_finite_differences(seed):
    for i in range(6):
        gradients.check_finite_differences(seed + i)


def test_several_backwards(seed, backend):
    for i in range(10):
        gradients.check_several_backwards(seed + i, backend)


@needs_native
def test_schemas(seed):
    done = gradients.check_ops(seed)
    assert {"embedding_bag_fwd", "embedding_bag_bwd_sparse", "expert_gate_bwd", "table_step", "dense_step"} <= done


@needs_native
def test_wrong_calls_raise_or_work(seed):
    """Without the sanitizers only what ends a process is seen; `make sanitize` sees the rest."""
    worked, refused, findings = sanitize.run_fuzz(4000, seed, sanitized=False)
    assert findings == []
    assert worked + refused == 4000
    assert min(worked, refused) > 400


@pytest.mark.parametrize("oov", bad_ids.CHOICES)
@pytest.mark.parametrize("how", ["compiled", "exported", *BACKENDS])
def test_bad_ids(how, oov, seed):
    if how == "exported":
        pytest.importorskip("onnxruntime")
    bad_ids.check(how, oov, seed)


@pytest.mark.parametrize("name", KERNELS)
def test_tables_of_more_than_2_31_elements(name):
    """Only the rows that are looked up take memory, on a CPU."""
    large.check_table(16, name)
