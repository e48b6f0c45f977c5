"""What every test shares: the device, the `backend` fixture, and one base seed a run, printed and repeatable."""

import faulthandler
import os
import zlib
from pathlib import Path

import devices
import pytest
import torch

from fastmtl import backend as backends

#: Property tests derive their seeds from this one. Drawn fresh, so that CI sees new cases every time.
BASE_SEED = int(os.environ.setdefault("FASTMTL_TEST_SEED", str(int.from_bytes(os.urandom(4), "little"))))


def pytest_addoption(parser):
    """Parts of a run for several processes."""
    parser.addoption("--part", default="1/1", metavar="I/N", help="run the I-th of N parts of the tests")
    parser.addoption(
        "--begun", type=Path, metavar="FILE", help="leave out the tests that FILE names, and add those that begin"
    )


def pytest_collection_modifyitems(config, items):
    """Every N-th test: neighbours, which take about as long, go to different parts."""
    part, n = map(int, config.getoption("--part").split("/"))
    if not 1 <= part <= n:
        raise pytest.UsageError(f"--part {part}/{n}: there is no such part")
    begun = config.getoption("--begun")
    known = set(begun.read_text().splitlines()) if begun and begun.exists() else set()
    chosen = [item for item in items[part - 1 :: n] if item.nodeid not in known]
    config.hook.pytest_deselected(items=list(set(items) - set(chosen)))
    items[:] = chosen


#: Seconds after which a test is taken for one that never ends, where its process may be lost (``--begun``).
NEVER_ENDS = 150


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item):
    """With ``--begun``, for whoever goes on behind a test that its process was lost to (bench/gpu_session.py): a kernel
    that reads where it must not takes the GPU away from the whole process, one that never ends its time."""
    begun = item.config.getoption("--begun")
    if begun is None:
        return (yield)
    with begun.open("a") as file:
        file.write(f"{item.nodeid}\n")
    faulthandler.dump_traceback_later(NEVER_ENDS, exit=True, file=item.config.stash[STDERR])
    done = yield
    faulthandler.cancel_dump_traceback_later()
    if devices.DEVICE.type == "cuda":
        try:
            torch.cuda.synchronize()
        except RuntimeError as error:
            item.session.shouldstop = f"LOST {item.nodeid} - {error}".partition("\n")[0]
    return done


#: What pytest does not capture.
STDERR = pytest.StashKey[int]()


def pytest_configure(config):
    """Keep the real stderr."""
    config.stash[STDERR] = os.dup(2)


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
