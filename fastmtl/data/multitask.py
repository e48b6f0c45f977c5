"""A data set ready to train on: encoded splits, their tasks, and the encoder that made them."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from ..basic.features import DenseFeature, SparseFeature
from .datasets import TorchDataset
from .encoder import Encoder, FeatureSpec
from .loader import ColumnLoader


@dataclass(frozen=True)
class Split:
    """Some rows of a data set.

    Args:
        x: feature -> ids (int64) or numbers (float32), [N] each.
        y: labels [N, T], float32.
        probabilities: the true probability of each label [N, T], float64, where the data was made from one.
    """

    x: dict[str, np.ndarray]
    y: np.ndarray
    probabilities: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.y)


@dataclass(frozen=True)
class MultiTaskData:
    """Training, validation and test rows of one data set.

    Args:
        name: what it is called, for example "census".
        train: the rows to learn from.
        valid: the rows to choose by.
        test: the rows to report.
        task_names: a name for each label column.
        task_types: "classification" or "regression" for each.
        encoder: from raw columns to ``x``.
        best_auc: task -> AUC of the true probabilities on the test rows, where they are known: no model does better
            but by luck.
        note: one line about where the rows came from.
    """

    name: str
    train: Split
    valid: Split
    test: Split
    task_names: tuple[str, ...]
    task_types: tuple[str, ...]
    encoder: Encoder
    best_auc: dict[str, float] = field(default_factory=dict)
    note: str = ""

    @property
    def features(self) -> tuple[FeatureSpec, ...]:
        """Name, kind and vocabulary of each feature, in the order of the columns."""
        return self.encoder.features

    def model_features(self, embed_dim: int | None = None) -> list[SparseFeature | DenseFeature]:
        """The features as a model's constructor takes them.

        Args:
            embed_dim: width of each table; None chooses by vocabulary.

        Returns:
            One SparseFeature or DenseFeature for each column; unseen values have the table's last row.
        """
        return [
            DenseFeature(spec.name)
            if spec.vocab is None
            else SparseFeature(spec.name, spec.vocab, embed_dim, oov="zero")
            for spec in self.features
        ]

    def loaders(self, batch_size: int, num_workers: int = 0) -> tuple[ColumnLoader, ColumnLoader, ColumnLoader]:
        """Loaders for the training (shuffled), validation and test rows.

        Args:
            batch_size: rows in a batch.
            num_workers: see ``ColumnLoader``.

        Returns:
            (train, validation, test), with one schema whose vocabularies are the encoder's.
        """
        vocabs = {spec.name: spec.vocab for spec in self.features}
        loaders: list[ColumnLoader] = []
        for split in (self.train, self.valid, self.test):
            names = dict(zip(self.task_names, split.y.T, strict=True))
            dataset = TorchDataset(split.x, names)
            schema = dataset.schema.with_vocabs(vocabs)
            loaders.append(
                ColumnLoader(dataset, batch_size, shuffle=not loaders, num_workers=num_workers, schema=schema)
            )
        train, valid, test = loaders
        return train, valid, test
