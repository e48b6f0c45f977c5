"""fastmtl: multi-task recommender models with torch-rechub's API and batched, fused kernels."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .backend import use_backend
    from .models import from_pretrained

__version__ = "0.1.0"
__all__ = ["__version__", "from_pretrained", "use_backend"]

#: Where what `fastmtl.<name>` gives comes from. Imported when asked for: `fastmtl --help` must not wait for torch.
_HOMES = {"use_backend": "backend", "from_pretrained": "models"}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'fastmtl' has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
