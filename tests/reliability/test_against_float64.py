"""A sample of row 1; `make soak ARGS="--row 1"` draws 20,000."""

import pytest

from . import against_float64


@pytest.mark.parametrize(("kind", "count"), [("lookups", 60), ("layers", 40), ("chains", 25)])
def test_random_configurations(kind, count, seed):
    check, _ = against_float64.KINDS[kind]
    for i in range(count):
        check(seed + i)
