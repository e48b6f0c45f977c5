"""Features from plain column names: what a column must tell before a table can be made for it."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from types import SimpleNamespace
from typing import Protocol

from torch import Tensor

from ...basic.features import DenseFeature, Feature, SequenceFeature, SparseFeature
from ...errors import BadDataError

#: Width of the tables of features given as column names.
DEFAULT_EMBEDDING_DIM = 16


class ColumnInfo(Protocol):
    """What is known of one column of a data set."""

    kind: str  # "int", "float", "sequence" or "vector"
    length: int | None  # L of a sequence or vector

    @property
    def min_id(self) -> int | None:
        """The least id; None for other numbers."""

    @property
    def vocab_size(self) -> int | None:
        """The greatest id + 1; None for other numbers."""


class Schema(Protocol):
    """The columns of a data set by name, e.g. ``loader.schema``."""

    def __getitem__(self, name: str) -> ColumnInfo: ...


class BatchSchema:
    """The lengths of the columns of one batch; it knows no vocabularies."""

    def __init__(self, x: Mapping[str, Tensor]) -> None:
        self.x = x

    def __getitem__(self, name: str) -> ColumnInfo:
        return SimpleNamespace(kind="sequence", length=self.x[name].shape[-1], min_id=None, vocab_size=None)


def resolve_feature(feature: Feature | str, schema: Schema, embedding_dim: int | None) -> Feature:
    """A complete feature from a column name, or from a concatenated sequence without a length.

    Whole numbers become ids (sequences are pooled by their mean), other numbers stay dense.

    Raises:
        BadDataError: the data has no such column, or its ids are negative.
    """
    if isinstance(feature, str):
        info = schema[feature]
        dim = embedding_dim or DEFAULT_EMBEDDING_DIM
        if info.kind in ("float", "vector"):
            return DenseFeature(feature, info.length or 1)
        if info.vocab_size is None or info.min_id is None or info.min_id < (-1 if info.kind == "sequence" else 0):
            raise BadDataError(
                f"feature {feature!r}: its least id is {info.min_id}, ids start at 0; encode the column, "
                f"or give a feature with oov='zero' instead of the column's name"
            )
        make = SequenceFeature if info.kind == "sequence" else SparseFeature
        return make(feature, info.vocab_size, dim)
    if isinstance(feature, SequenceFeature) and feature.pooling == "concat" and feature.max_len is None:
        feature = copy.copy(feature)
        feature.max_len = schema[feature.name].length
    return feature
