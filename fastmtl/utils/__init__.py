"""What scripts import by hand: data preparation and multi-task tools."""

from .data import DataGenerator
from .mtl import MetaBalance, shared_task_layers

__all__ = ["DataGenerator", "MetaBalance", "shared_task_layers"]
