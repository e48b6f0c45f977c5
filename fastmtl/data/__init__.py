"""Data as columns: data sets, loaders, readers, encoders and a synthetic log."""

from fastmtl.data.datasets import PredictDataset, TorchDataset
from fastmtl.data.loader import ColumnLoader
from fastmtl.data.schema import ColumnInfo, Schema, validate_labels

__all__ = [
    "ColumnInfo",
    "ColumnLoader",
    "PredictDataset",
    "Schema",
    "TorchDataset",
    "validate_labels",
]
