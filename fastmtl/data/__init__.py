"""Data as columns: data sets, loaders, readers, encoders and a synthetic log."""

from .datasets import PredictDataset, TorchDataset
from .loader import ColumnLoader
from .schema import ColumnInfo, Schema, validate_labels

__all__ = [
    "ColumnInfo",
    "ColumnLoader",
    "PredictDataset",
    "Schema",
    "TorchDataset",
    "validate_labels",
]
