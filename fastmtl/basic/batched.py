"""Modules whose parameters are stored batched and shown to the outside under torch-rechub's names."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn


class View(NamedTuple):
    """One tensor as the outside sees it: rows ``start:stop`` of a stored tensor, in the given shape.

    Args:
        name: outside name, relative to the module (``"experts.3.mlp.0.weight"``).
        storage: name of the stored parameter or buffer of the module.
        start, stop: rows of the stored tensor.
        shape: outside shape.
    """

    name: str
    storage: str
    start: int
    stop: int
    shape: tuple[int, ...]

    def of(self, stored: Tensor) -> Tensor:
        """The view; writing to it writes to the stored tensor."""
        return stored[self.start : self.stop].view(self.shape)


class BatchedModule(nn.Module):
    """A module that owns a few large tensors which stand for many small ones.

    A subclass registers its parameters and buffers and sets ``views``. ``state_dict`` and ``load_state_dict`` then
    speak of the views alone, strictly and in their order.
    """

    views: tuple[View, ...] = ()

    def named_views(self, prefix: str = "") -> Iterator[tuple[str, nn.Parameter | Tensor, View]]:
        """``(outside name, stored tensor, view)`` of each outside tensor, buffers included."""
        for view in self.views:
            yield prefix + view.name, getattr(self, view.storage), view

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        for name, stored, view in self.named_views(prefix):
            destination[name] = view.of(stored if keep_vars else stored.detach())

    def _load_from_state_dict(
        self,
        state_dict: Mapping[str, Any],
        prefix: str,
        local_metadata: dict,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        known = set()
        for name, stored, view in self.named_views(prefix):
            known.add(name)
            if name not in state_dict:
                if strict:
                    missing_keys.append(name)
                continue
            value = state_dict[name]
            # torch.nn.BatchNorm1d of old checkpoints keeps scalars as [1]
            if tuple(value.shape) != view.shape and not (value.numel() == 1 == math.prod(view.shape)):
                error_msgs.append(
                    f"size mismatch for {name}: the checkpoint has {list(value.shape)}, the model {list(view.shape)}."
                )
                continue
            with torch.no_grad():
                view.of(stored).copy_(value.reshape(view.shape))
        if strict:
            unexpected_keys += [key for key in state_dict if key.startswith(prefix) and key not in known]


def stack_rows(tensors: list[Tensor]) -> Tensor:
    """Tensors laid one below the other along their first dimension; scalars count as one row."""
    return torch.cat([t.detach().reshape(1) if t.ndim == 0 else t.detach() for t in tensors])
