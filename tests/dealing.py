"""How tests are dealt out to several processes, and in which order one of them takes its own."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any

from fastmtl import backend as backends

#: Backends, as parameters of tests.
NAMES = ("eager", *backends.DEVICES)
#: How many times a process goes through the files when its time may be up before its tests are.
ROUNDS = 3


def group_of(item: Any) -> Hashable:
    """The same for tests that differ in the backend alone: what one of them has made, a reference or a compiled kernel,
    serves the next."""
    params = item.callspec.params if hasattr(item, "callspec") else {}
    others = (
        (name, item.callspec.indices[name])
        for name, value in params.items()
        if not (isinstance(value, str) and value in NAMES)
    )
    return item.nodeid.partition("[")[0], *others


def deal(items: Sequence[Any], part: int, n: int) -> list[Any]:
    """The ``part``-th of ``n`` parts: every n-th group, since neighbours take about as long."""
    groups: dict[Hashable, int] = {}
    return [item for item in items if groups.setdefault(group_of(item), len(groups)) % n == part - 1]


def in_rounds(items: Sequence[Any]) -> list[Any]:
    """A third of each file's groups, then another of each, then the rest: each file has its share early."""
    files: dict[str, dict[Hashable, int]] = {}
    for item in items:
        groups = files.setdefault(item.nodeid.partition("::")[0], {})
        groups.setdefault(group_of(item), len(groups))

    def turn(item: Any) -> int:
        groups = files[item.nodeid.partition("::")[0]]
        return groups[group_of(item)] * ROUNDS // len(groups)

    return sorted(items, key=turn)
