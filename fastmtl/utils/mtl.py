"""Tools for multi-task training by hand."""

from __future__ import annotations

from torch import nn

from ..models.multi_task import MTLModel
from ..weighting import MetaBalance

__all__ = ["MetaBalance", "shared_task_layers"]


def shared_task_layers(model: MTLModel) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """The parameters all tasks train, and the parameters of the tasks' own.

    Args:
        model: SharedBottom, MMOE, PLE or AITM.

    Returns:
        ``(shared, task)``: disjoint, together all parameters but learned loss weights.

    Raises:
        ConfigError: a model without such a split (ESMM).
    """
    return model.shared_parameters(), model.task_parameters()
