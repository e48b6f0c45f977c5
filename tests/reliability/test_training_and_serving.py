"""Samples of rows 4, 15 and 16: the same weights from fresh processes, many threads, no leaks."""

import pytest
from devices import DEVICE, KERNELS

from . import leaks, repeatability, threads


@pytest.mark.parametrize("name", [name for name in KERNELS if name != "triton" or DEVICE.type != "cpu"])
def test_the_same_weights_from_fresh_processes(name, seed):
    repeatability.check("PLE", "AdamW", "fp32", name, seed)


@pytest.mark.parametrize("name", ["MMOE", "PLE"])
def test_many_threads_predict_what_one_does(name, seed, cpu_backend):
    threads.check(name, 25, seed)


def test_memory_stays_flat(seed):
    leaks.check_steps(600, seed)
    leaks.check_predictions(1200, seed)
    leaks.check_saves(60, seed)
