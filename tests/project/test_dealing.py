"""How tests are dealt out to processes (tests/dealing.py): each once, groups whole, each file early."""

import random
from types import SimpleNamespace

import dealing
import pytest


def make_items(rng):
    """Files of tests with parameters, the backend among them, in the order in which pytest collects."""
    items = []
    for f in range(rng.randrange(1, 6)):
        for t in range(rng.randrange(1, 5)):
            name = f"tests/test_{f}.py::test_{t}"
            if rng.random() < 0.3:
                items.append(SimpleNamespace(nodeid=name))
                continue
            for i in range(rng.randrange(1, 12)):
                for backend in rng.sample(dealing.NAMES, rng.randrange(1, 4)):
                    spec = SimpleNamespace(
                        params={"case": object(), "backend": backend}, indices={"case": i, "backend": 0}
                    )
                    items.append(SimpleNamespace(nodeid=f"{name}[{i}-{backend}]", callspec=spec))
    return items


@pytest.mark.parametrize("n", [1, 3, 10])
def test_each_test_is_in_one_part_beside_those_of_its_group(n, seed):
    items = make_items(random.Random(seed))
    parts = [dealing.deal(items, part, n) for part in range(1, n + 1)]
    assert sorted(item.nodeid for part in parts for item in part) == sorted(item.nodeid for item in items)
    groups = [{dealing.group_of(item) for item in part} for part in parts]
    assert sum(map(len, groups)) == len({dealing.group_of(item) for item in items})
    assert max(map(len, groups)) - min(map(len, groups)) <= 1


def test_a_group_differs_in_the_backend_alone(seed):
    items = make_items(random.Random(seed))
    for item in items:
        alike = [other for other in items if dealing.group_of(other) == dealing.group_of(item)]
        assert {other.nodeid.rpartition("-")[0] for other in alike} == {item.nodeid.rpartition("-")[0]}


def test_each_file_has_its_share_early(seed):
    """A third of its groups, rounded up, stands before the rest of any file."""
    items = make_items(random.Random(seed))
    ordered = dealing.in_rounds(items)
    assert sorted(item.nodeid for item in ordered) == sorted(item.nodeid for item in items)
    early = set()
    for file in {item.nodeid.partition("::")[0] for item in items}:
        groups = dict.fromkeys(dealing.group_of(item) for item in items if item.nodeid.startswith(file))
        early |= set(list(groups)[: -(-len(groups) // dealing.ROUNDS)])
    n_early = sum(dealing.group_of(item) in early for item in items)
    assert {dealing.group_of(item) for item in ordered[:n_early]} == early
