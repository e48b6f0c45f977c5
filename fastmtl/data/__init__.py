"""Data as columns: data sets, loaders, readers, encoders and a synthetic log."""

from .census import find_census, load_census
from .datasets import PredictDataset, TorchDataset
from .encoder import Encoder, FeatureSpec
from .loader import ColumnLoader
from .multitask import MultiTaskData, Split
from .parquet import ParquetIterableDataset
from .resident import ResidentLoader
from .schema import ColumnInfo, Schema, validate_labels
from .synthetic import SyntheticLog, load_synthetic
from .table import Table, read_table

__all__ = [
    "ColumnInfo",
    "ColumnLoader",
    "Encoder",
    "FeatureSpec",
    "MultiTaskData",
    "ParquetIterableDataset",
    "PredictDataset",
    "ResidentLoader",
    "Schema",
    "Split",
    "SyntheticLog",
    "Table",
    "TorchDataset",
    "find_census",
    "load_census",
    "load_synthetic",
    "read_table",
    "validate_labels",
]
