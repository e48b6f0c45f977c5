"""What scripts import by hand: data preparation and multi-task tools."""

from fastmtl.utils.data import DataGenerator
from fastmtl.utils.mtl import MetaBalance, shared_task_layers

__all__ = ["DataGenerator", "MetaBalance", "shared_task_layers"]
