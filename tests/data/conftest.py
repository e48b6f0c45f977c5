"""Shared by the data tests: a seed for each test, from the run's base seed and the test's own name."""

import os
import zlib

import numpy as np
import pytest


@pytest.fixture
def seed(request):
    """A fresh seed each run; FASTMTL_TEST_SEED, printed at the start of the run, repeats it."""
    base = int(os.environ.setdefault("FASTMTL_TEST_SEED", str(int.from_bytes(os.urandom(4), "little"))))
    value = (base + zlib.crc32(request.node.name.encode())) % 2**31
    print(f"seed {value} of FASTMTL_TEST_SEED={base}")
    return value


@pytest.fixture
def rng(seed):
    """A generator on the test's seed."""
    return np.random.default_rng(seed)
