"""What every test shares: the device, the `backend` fixture, and one base seed a run, printed and repeatable."""

import os
import zlib

import devices
import pytest
import torch

from fastmtl import backend as backends

#: Property tests derive their seeds from this one. Drawn fresh, so that CI sees new cases every time.
BASE_SEED = int(os.environ.setdefault("FASTMTL_TEST_SEED", str(int.from_bytes(os.urandom(4), "little"))))


def pytest_addoption(parser):
    """Parts of a run for several processes."""
    parser.addoption("--part", default="1/1", metavar="I/N", help="run the I-th of N parts of the tests")


def pytest_collection_modifyitems(config, items):
    """Every N-th test: neighbours, which take about as long, go to different parts."""
    part, n = map(int, config.getoption("--part").split("/"))
    if not 1 <= part <= n:
        raise pytest.UsageError(f"--part {part}/{n}: there is no such part")
    config.hook.pytest_deselected(items=[item for i, item in enumerate(items) if i % n != part - 1])
    items[:] = items[part - 1 :: n]


def pytest_report_header():
    """Name the seed, and every backend that will not be tested with the reason."""
    missing = [f"{row.op} not on {name}: {why}" for row in backends.report() for name, why in row.others.items()]
    return [
        f"FASTMTL_TEST_SEED={BASE_SEED} (set it to repeat this run's random cases)",
        f"fastmtl backends under test: {', '.join(backends.available())}",
        f"models on {devices.DEVICE}: {', '.join(devices.BACKENDS)}",
        *(f"  {line}" for line in missing),
    ]


def pytest_terminal_summary(terminalreporter, exitstatus):
    """Print the seed beside the failures too: CI logs are read from the end."""
    if exitstatus:
        terminalreporter.write_line(f"FASTMTL_TEST_SEED={BASE_SEED}")


@pytest.fixture(params=devices.BACKENDS)
def backend(request):
    """Run the test once on each backend that this machine has for the device under test (the others are named in the
    report's header)."""
    # the same bits for the same call are promised by our kernels; torch's own on a GPU have to be asked
    torch.use_deterministic_algorithms(devices.DEVICE.type == "cuda", warn_only=True)
    with backends.use_backend(request.param):
        yield request.param
    torch.use_deterministic_algorithms(False)


@pytest.fixture(params=devices.backends_on("cpu"))
def cpu_backend(request):
    """The same for what runs on the CPU whatever the device under test."""
    with backends.use_backend(request.param):
        yield request.param


@pytest.fixture(autouse=devices.NAME == "elsewhere")
def _device():
    """The made-up device, where it is asked for."""
    with devices.pretending():
        yield


@pytest.fixture
def seed(request):
    """A seed of the test's own, from the run's base seed; shown where the test fails."""
    value = (BASE_SEED + zlib.crc32(request.node.nodeid.encode())) % 2**31
    print(f"seed {value}")
    return value
