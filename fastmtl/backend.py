"""THE table: which implementation of which op runs, and why the others do not.

Order of choice: the backend forced by :func:`use_backend`, else the one named by ``FASTMTL_BACKEND``, else the first
of :data:`PREFERENCE` that can do the job: native on CPU tensors, triton on CUDA tensors, eager on the rest. (cuda runs
where it is forced, until it has been measured beside triton.) A forced
backend that is not available raises; an automatic fallback for want of the device's own backend says so once.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from .backends import cuda, eager, native, triton
from .backends.watched import watched
from .errors import BackendError

#: op -> backend -> module with the op's functions. The one place that knows.
TABLE: dict[str, dict[str, ModuleType]] = {
    "embedding_bag": {"native": native, "triton": triton, "cuda": cuda, "eager": eager},
    "expert_gate": {"native": native, "triton": triton, "cuda": cuda, "eager": eager},
}
PREFERENCE = ("native", "triton", "cuda", "eager")
#: The devices whose tensors a backend is made for: only there is it missed.
DEVICES = {"native": "cpu", "triton": "cuda", "cuda": "cuda"}

_forced: str | None = None
_told = False


class Row(NamedTuple):
    """One line of :func:`report`: the backend that runs ``op`` on CPU tensors in fp32, and why the others do not."""

    op: str
    runs: str
    others: dict[str, str]


def available() -> list[str]:
    """Names of the backends that can run on this machine, best first."""
    return [name for name in PREFERENCE if _module(name).unavailable() is None]


def _module(name: str) -> ModuleType:
    return TABLE["expert_gate"][name]


def _check(name: str, origin: str) -> str:
    if name not in PREFERENCE:
        raise BackendError(f"{origin}: no backend {name!r}; the backends are {', '.join(PREFERENCE)}")
    reason = _module(name).unavailable()
    if reason:
        raise BackendError(f"{origin}: backend {name!r} is not available: {reason}")
    return name


@contextlib.contextmanager
def _restore(previous: str | None) -> Iterator[None]:
    global _forced
    try:
        yield
    finally:
        _forced = previous


def use_backend(name: str | None) -> contextlib.AbstractContextManager[None]:
    """Force a backend for every op from here on; ``None`` goes back to the automatic choice.

    Works as a statement, ``fastmtl.use_backend("eager")``, and as a context, ``with fastmtl.use_backend("eager"):``.

    Raises:
        BackendError: an unknown backend, or one that can't run here (the message says why).
    """
    global _forced
    previous = _forced
    _forced = None if name is None else _check(name, "use_backend")
    return _restore(previous)


def forced() -> str | None:
    """The backend forced by :func:`use_backend` or ``FASTMTL_BACKEND``, or None."""
    if _forced is not None:
        return _forced
    name = os.environ.get("FASTMTL_BACKEND")
    return _check(name, "FASTMTL_BACKEND") if name else None


def _refusal(module: ModuleType, op: str, tensors: tuple[Tensor, ...]) -> str | None:
    """Why ``module`` can't run ``op`` on these tensors right now; None: it can."""
    if op == "expert_gate" and module is native and torch.is_autocast_enabled("cpu") and not native.computes_in_bf16():
        return f"autocast asks for {torch.get_autocast_dtype('cpu')}, and it follows only torch.bfloat16"
    return module.unsupported(op, *tensors)


def resolve(op: str, *tensors: Tensor) -> ModuleType:
    """The module whose implementation of ``op`` runs on these tensors.

    Raises:
        BackendError: the forced backend can't run here, or not on these tensors.
    """
    if watched():
        return eager
    name = forced()
    if name is not None:
        reason = _refusal(TABLE[op][name], op, tensors)
        if reason:
            raise BackendError(f"{op}: backend {name!r} was forced but {reason}")
        return TABLE[op][name]
    for candidate in PREFERENCE:
        module = TABLE[op][candidate]
        reason = module.unavailable()
        if reason is not None:
            if DEVICES[candidate] == tensors[0].device.type:
                _tell_once(candidate, reason)
        elif _refusal(module, op, tensors) is None:
            return module
    raise BackendError(f"{op}: no backend can run it")


def is_device(device: torch.device) -> bool:
    """Whether work on ``device`` runs behind the host's back: on a GPU, or on what stands in for one in tests."""
    return device.type == "cuda" or (device.type == "cpu" and triton.interpreting() and forced() == "triton")


def _tell_once(name: str, reason: str) -> None:
    global _told
    if not _told:
        _told = True
        print(f"fastmtl: backend {name!r} is not available ({reason}); running on 'eager'", file=sys.stderr)


def report() -> list[Row]:
    """For each op: the backend that runs it on this machine, and for each other backend why it does not."""
    probe = torch.zeros(1)
    rows = []
    for op, backends in TABLE.items():
        runs = next(name for name, module in backends.items() if module is resolve(op, probe))
        others = {}
        for name, module in backends.items():
            if name != runs:
                others[name] = (
                    module.unavailable()
                    or module.unsupported(op, probe)
                    or (f"{runs!r} is forced" if forced() else f"{runs!r} is preferred")
                )
        rows.append(Row(op, runs, others))
    return rows
