"""Serving needs the native library; skipped, with the reason, where there is none."""

import pytest
import torch

from fastmtl.backends import native


@pytest.fixture(autouse=True)
def _needs_the_library():
    if native.unavailable():
        pytest.skip(f"native backend: {native.unavailable()}")


@pytest.fixture
def threads():
    """A setter for torch's number of threads; the old number comes back after the test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)
