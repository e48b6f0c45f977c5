"""Samples of rows 4, 15 and 16: the same weights from fresh processes, many threads, no leaks."""

import pytest

from fastmtl import backend

from . import leaks, repeatability, threads


def test_the_same_weights_from_fresh_processes(seed):
    if "native" not in backend.available():
        pytest.skip("sparse updates and results that do not depend on the threads are the native backend's")
    repeatability.check("PLE", "AdamW", "fp32", seed)


@pytest.mark.parametrize("name", ["MMOE", "PLE"])
def test_many_threads_predict_what_one_does(name, seed, backend):
    threads.check(name, 25, seed)


def test_memory_stays_flat(seed):
    leaks.check_steps(600, seed)
    leaks.check_predictions(1200, seed)
    leaks.check_saves(60, seed)
