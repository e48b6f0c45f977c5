"""torch-rechub's place for the Parquet reader."""

from .parquet import ParquetIterableDataset

__all__ = ["ParquetIterableDataset"]
