"""The optimizers of the tables need the native library; without it torch's own run."""

import numpy as np
import pytest
import torch

from fastmtl.backends import native


@pytest.fixture(autouse=True)
def _needs_the_library():
    if native.unavailable():
        pytest.skip(f"native backend: {native.unavailable()}")


@pytest.fixture(autouse=True, scope="session")
def _sparse_gradients_are_not_checked():
    """Said aloud: torch 2.11 warns of every sparse tensor otherwise, even of those made with check_invariants=False."""
    torch.sparse.check_sparse_tensor_invariants.disable()


@pytest.fixture
def threads():
    """A setter for torch's number of threads; the old number comes back after the test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture
def correct_roots(monkeypatch):
    """torch's square roots rounded correctly: on MKL they are off by a unit in the last place here and there."""
    monkeypatch.setattr(torch.Tensor, "sqrt", lambda self: torch.from_numpy(np.asarray(np.sqrt(self.numpy()))))
