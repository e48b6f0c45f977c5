"""torch-rechub is what everything here is compared with; skipped, with the reason, without it."""

import pytest


@pytest.fixture(autouse=True, scope="module")
def _needs_torch_rechub():
    pytest.importorskip("torch_rechub", reason="torch-rechub is not here: nothing to compare with")
