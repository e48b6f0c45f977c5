"""Device and backend: asked for, checked, and told."""

from __future__ import annotations

import torch

from .. import backend
from ..errors import BackendError, ConfigError


def check_device(name: str) -> torch.device:
    """The device of that name.

    Raises:
        ConfigError: no such device, here or anywhere.
    """
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ConfigError(f"device {name!r} is not known; use cpu, cuda, or cuda:1 for the second GPU") from None
    if device.type == "cuda":
        n_gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if not n_gpus:
            raise ConfigError(f"device {name!r}: {why_no_gpu()}; use cpu")
        if (device.index or 0) >= n_gpus:
            raise ConfigError(f"device {name!r}: there are {n_gpus} GPUs here, numbered from 0")
    elif device.type != "cpu":
        raise ConfigError(f"device {name!r} is not supported; use cpu, cuda, or cuda:1 for the second GPU")
    return device


def why_no_gpu() -> str:
    """Why torch has no GPU here."""
    if torch.version.cuda is None:
        return f"torch {torch.__version__} was built without CUDA"
    return f"torch {torch.__version__} (CUDA {torch.version.cuda}) finds no NVIDIA GPU or driver"


def chosen_backend(name: str) -> str:
    """The backend to force, checked: the one named, else the environment's, else "auto".

    Raises:
        BackendError: an unknown backend, or one that can't run here.
    """
    if name == "auto":
        return backend.forced() or "auto"
    if name not in backend.PREFERENCE:
        raise BackendError(f"no backend {name!r}; use auto, {' or '.join(backend.PREFERENCE)}")
    with backend.use_backend(name):
        return name


def backends_of(device: torch.device, amp: str = "none") -> dict[str, str]:
    """For each op the backend that runs it.

    Args:
        device: where the tensors are.
        amp: "none", or "bf16" for a run in mixed precision.

    Raises:
        BackendError: the forced backend can't run so.
    """
    probe = torch.zeros(1, device=device)
    with torch.autocast(device.type, dtype=torch.bfloat16, enabled=amp != "none"):
        chosen = {op: backend.resolve(op, probe) for op in backend.TABLE}
    return {op: next(name for name, m in backend.TABLE[op].items() if m is module) for op, module in chosen.items()}


def listed(backends: dict[str, str]) -> str:
    """One line: for each op the backend that runs it."""
    return ", ".join(f"{op}: {name}" for op, name in backends.items())
