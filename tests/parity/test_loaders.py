"""The same batches in the same order for a seed, and the same random numbers left behind."""

import importlib

import numpy as np
import pytest
import torch

from parity.cases import OURS, THEIRS, base_seed, build, columns, random_case
from parity.training import loaders, problem

N_CASES = 20


def _walk(loader):
    """The loader's batches as arrays: ``[({column: array}, labels), ...]``."""
    return [({k: v.numpy() for k, v in dict(x).items()}, y.numpy()) for x, y in loader]


def _assert_same(ours, theirs):
    assert len(ours) == len(theirs)
    for (our_x, our_y), (their_x, their_y) in zip(ours, theirs, strict=True):
        assert list(our_x) == list(their_x)
        for name, column in their_x.items():
            assert our_x[name].dtype == column.dtype, name
            np.testing.assert_array_equal(our_x[name], column, err_msg=name)
        assert our_y.dtype == their_y.dtype
        np.testing.assert_array_equal(our_y, their_y)


@pytest.mark.parametrize("index", range(N_CASES))
def test_split_loaders_give_the_same_batches(index):
    case = random_case(index)
    rng = np.random.default_rng(case.seed)
    x, y = columns(case, int(rng.integers(30, 300)))
    ratio = [float(rng.uniform(0.3, 0.7)), float(rng.uniform(0.05, 0.25))]
    batch = int(rng.choice([1, 7, 16, 64, 1000]))
    walks, states = [], []
    for package in (THEIRS, OURS):
        generator = importlib.import_module(f"{package}.utils.data").DataGenerator(x, y)
        torch.manual_seed(case.seed)
        train, val, test = generator.generate_dataloader(split_ratio=ratio, batch_size=batch)
        # Two epochs as a trainer runs them, then the test rows.
        walks.append([_walk(loader) for loader in (train, val, train, val, test)])
        states.append(torch.get_rng_state())
    for theirs, ours in zip(*walks, strict=True):
        _assert_same(ours, theirs)
    assert torch.equal(*states)


def test_given_validation_and_test_columns():
    case = problem("MMOE")
    parts = [columns(case, n) for n in (130, 20, 33)]
    walks = []
    for package in (THEIRS, OURS):
        generator = importlib.import_module(f"{package}.utils.data").DataGenerator(*parts[0])
        torch.manual_seed(base_seed())
        loader = generator.generate_dataloader(
            x_val=parts[1][0], y_val=parts[1][1], x_test=parts[2][0], y_test=parts[2][1], batch_size=32
        )
        walks.append([_walk(part) for part in loader])
    for theirs, ours in zip(*walks, strict=True):
        _assert_same(ours, theirs)


def test_worker_processes_give_the_same_batches():
    case = problem("MMOE")
    x, y = columns(case, 100)
    walks = []
    for package in (THEIRS, OURS):
        generator = importlib.import_module(f"{package}.utils.data").DataGenerator(x, y)
        torch.manual_seed(base_seed())
        train, _, _ = generator.generate_dataloader(split_ratio=[0.8, 0.1], batch_size=16, num_workers=2)
        walks.append(_walk(train) + _walk(train))
    _assert_same(walks[1], walks[0])


def test_building_a_model_first_leaves_the_order_alone():
    """A script seeds once, builds the model, then the loaders: the model must consume torch-rechub's random numbers."""
    orders = []
    for package in (THEIRS, OURS):
        case = problem("PLE")
        build(case, package)
        train, _, _ = loaders(case, package)
        orders.append(_walk(train))
    _assert_same(orders[1], orders[0])
