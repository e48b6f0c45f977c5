"""Hundreds of random models: same weights for a seed, strict state dicts both ways, same outputs and gradients."""

import os

import pytest
import torch
from devices import DEVICE

from parity.cases import OURS, THEIRS, build, random_case
from parity.compare import Reference, assert_same_state, eval_numbers, gradient_complaints, train_numbers, verdict

#: On a GPU each has kernels of its own to be compiled; `make gpu` asks for fewer still.
N_CASES = int(os.environ.get("FASTMTL_TEST_MODELS", 300 if DEVICE.type == "cpu" else 60))


# Of the module's scope, so that pytest runs the backends of a case one after the other on one reference.
@pytest.fixture(scope="module", params=range(N_CASES), ids=lambda i: f"{i:03d}-{random_case(i).kind}")
def peer(request):
    """torch-rechub's side of a case, and the random state after building it."""
    theirs = build(random_case(request.param), THEIRS)
    return Reference(random_case(request.param), theirs), torch.get_rng_state()


def test_random_model(peer, backend):
    reference, rng_state = peer
    case = reference.case
    ours = build(case, OURS)
    assert torch.equal(torch.get_rng_state(), rng_state), "building consumed other random numbers than torch-rechub"
    assert_same_state(ours.state_dict(), reference.initial)

    ours.load_state_dict(reference.state, strict=True)
    assert_same_state(ours.state_dict(), reference.state)
    build(case, THEIRS).load_state_dict(ours.state_dict(), strict=True)

    complaints = [reference.complaint(*item, 1e-6) for item in eval_numbers(case, ours, reference.x).items()]
    if not case.has_dropout:
        values, gradients = train_numbers(case, ours, reference.x, reference.y)
        complaints += [reference.complaint(*item, 1e-5) for item in values.items()]
        complaints += gradient_complaints(reference, gradients, 1e-5)
    standing = verdict(complaints, len(complaints))
    assert not standing, "\n".join([f"{case}", *standing])
