"""A sample of row 1; `make soak ARGS="--row 1"` draws 20,000."""

import pytest
import torch
from devices import KERNELS
from native import accuracy

from . import against_float64

COUNTS = {"lookups": 60, "general lookups": 30, "layers": 30, "folded layers": 10, "chains": 25}
#: What a planted error is, in terms of the rule's scale: five times the floor.
PLANTED = 1e-5


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize(("kind", "count"), [*COUNTS.items()])
def test_random_configurations(kind, count, backend, seed):
    if kind in against_float64.ON_NATIVE and backend != "native":
        pytest.skip("of the native backend alone")
    check, _ = against_float64.KINDS[kind]
    # a new configuration is a minute's worth of new kernels to compile
    for i in range(count if backend == "native" else count // 10):
        check(seed + i, backend)


@pytest.mark.parametrize(("kind", "count", "share"), [("lookups", 8, 0.8), ("layers", 14, 0.6), ("chains", 6, 0.3)])
def test_a_small_error_is_noticed(kind, count, share, seed, monkeypatch):
    """One element of one tensor of native's is off by 1e-5 of the largest: seen in every lookup, in nine of ten layers,
    in six of seven chains, of which few are drawn.

    Where rounding alone is as large, as in BN over two rows, it can't be.
    """
    planted = noticed = 0

    def judge(run, what, case_seed, backend):
        nonlocal planted, noticed
        generator = torch.Generator().manual_seed(case_seed)
        exact = run("eager", torch.float64, None)
        flat = [(part, i) for part in (0, 1) for i, one in enumerate(exact[part]) if one.count_nonzero()]
        if not flat:
            return
        part, i = flat[int(torch.randint(len(flat), (), generator=generator))]
        least = 0.1 * max(one.abs().max().item() for one in exact[1] if one.numel()) if part else 0.0
        error = PLANTED * max(exact[part][i].abs().max().item(), least)
        at = int(torch.randint(exact[part][i].numel(), (), generator=generator))

        def wrong(name, dtype, bits):
            found = run(name, dtype, bits)
            if name == "native":
                found[part][i] = found[part][i].clone(memory_format=torch.contiguous_format)
                found[part][i].view(-1)[at] += error
            return found

        planted += 1
        try:
            accuracy.judge(wrong, what, case_seed, backend)
        except AssertionError:
            noticed += 1

    monkeypatch.setattr(against_float64, "judge", judge)
    check, _ = against_float64.KINDS[kind]
    for i in range(count):
        check(seed + i)
    assert planted >= count / 2
    assert noticed >= share * planted, f"seed {seed}: {noticed} of {planted} planted errors were noticed"
