"""What every test shares: the `backend` fixture, and one base seed a run, printed and repeatable."""

import os
import zlib

import pytest

from fastmtl import backend as backends

#: Property tests derive their seeds from this one. Drawn fresh, so that CI sees new cases every time.
BASE_SEED = int(os.environ.setdefault("FASTMTL_TEST_SEED", str(int.from_bytes(os.urandom(4), "little"))))


def pytest_report_header():
    """Name the seed, and every backend that will not be tested with the reason."""
    missing = [f"{row.op} not on {name}: {why}" for row in backends.report() for name, why in row.others.items()]
    return [
        f"FASTMTL_TEST_SEED={BASE_SEED} (set it to repeat this run's random cases)",
        f"fastmtl backends under test: {', '.join(backends.available())}",
        *(f"  {line}" for line in missing),
    ]


def pytest_terminal_summary(terminalreporter, exitstatus):
    """Print the seed beside the failures too: CI logs are read from the end."""
    if exitstatus:
        terminalreporter.write_line(f"FASTMTL_TEST_SEED={BASE_SEED}")


@pytest.fixture(params=[name for name in backends.available() if backends.DEVICES.get(name, "cpu") == "cpu"])
def backend(request):
    """Run the test once on each backend for CPU tensors that this machine has (the others are named in the report's
    header; triton has tests/gpu/kernels)."""
    with backends.use_backend(request.param):
        yield request.param


@pytest.fixture
def seed(request):
    """A seed of the test's own, from the run's base seed; shown where the test fails."""
    value = (BASE_SEED + zlib.crc32(request.node.nodeid.encode())) % 2**31
    print(f"seed {value}")
    return value
