"""Shared by the data tests."""

import numpy as np
import pytest


@pytest.fixture
def rng(seed):
    """A generator on the test's seed."""
    return np.random.default_rng(seed)
