"""Made-up batches that fit a model's features, for export and drawing."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..basic.features import DenseFeature, Feature, SequenceFeature


def dummy_columns(features: Sequence[Feature], batch_size: int, seq_length: int, device: str) -> dict[str, Tensor]:
    """``{name: column}`` of ``batch_size`` rows: ids drawn from each vocabulary, dense values from a normal."""
    columns = {}
    for feature in features:
        if isinstance(feature, DenseFeature):
            shape = (batch_size,) if feature.embed_dim == 1 else (batch_size, feature.embed_dim)
            columns[feature.name] = torch.randn(shape, device=device)
            continue
        shape = (batch_size,)
        if isinstance(feature, SequenceFeature):
            shape = (batch_size, feature.max_len or seq_length)
        columns[feature.name] = torch.randint(0, feature.vocab_size, shape, device=device)
    return columns
