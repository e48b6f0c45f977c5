"""What a model reads: sparse ids, sequences of ids, dense values."""

from __future__ import annotations

import math
from collections.abc import Callable

from torch import nn

from ..errors import ConfigError
from .initializers import RandomNormal

#: torch-rechub's default start of a table.
SMALL_NORMAL = RandomNormal(0, 0.0001)
POOLINGS = ("mean", "sum", "max", "concat")
Initializer = Callable[..., nn.Embedding]


def get_auto_embedding_dim(num_classes: int) -> int:
    """Width of a table of ``num_classes`` rows: ``floor(6 * num_classes ** 0.25)``. Source: DCN, ADKDD'17."""
    return math.floor(6 * num_classes**0.25)


class _TableFeature:
    """A feature whose ids are rows of a table."""

    def __init__(
        self,
        name: str,
        vocab_size: int,
        embed_dim: int | None,
        shared_with: str | None,
        padding_idx: int | None,
        initializer: Initializer,
        oov: str | int,
    ) -> None:
        kind = type(self).__name__
        if int(vocab_size) != vocab_size or vocab_size < 1:
            raise ConfigError(f"{kind} {name!r}: vocab_size must be a whole number of at least 1, got {vocab_size!r}")
        if embed_dim is not None and (int(embed_dim) != embed_dim or embed_dim < 1):
            raise ConfigError(f"{kind} {name!r}: embed_dim must be a whole number of at least 1, got {embed_dim!r}")
        self.name = name
        self.vocab_size = int(vocab_size)
        self.embed_dim = get_auto_embedding_dim(self.vocab_size) if embed_dim is None else int(embed_dim)
        self.shared_with = shared_with
        self.padding_idx = None if padding_idx is None else int(padding_idx)
        self.initializer = initializer
        if self.padding_idx is not None and not 0 <= self.padding_idx < self.vocab_size:
            raise ConfigError(
                f"{kind} {name!r}: padding_idx {padding_idx} is no row of a table of {self.vocab_size}; "
                f"-1 is padding in every sequence without being named"
            )
        if oov not in ("raise", "zero") and not (isinstance(oov, int) and 0 <= oov < self.vocab_size):
            raise ConfigError(
                f"{kind} {name!r}: oov must be 'raise', 'zero' or a row from 0 to {self.vocab_size - 1}, got {oov!r}"
            )
        self.oov = oov

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.name} with Embedding shape ({self.vocab_size}, {self.embed_dim})>"

    def get_embedding_layer(self) -> nn.Embedding:
        """A new table. (torch-rechub caches it in the feature, so that two models share weights by accident.)"""
        return self.initializer(self.vocab_size, self.embed_dim, padding_idx=self.padding_idx)


class SparseFeature(_TableFeature):
    """One id a row.

    Args:
        name: column of the data.
        vocab_size: rows of the table; valid ids are 0 to ``vocab_size - 1``.
        embed_dim: width of the table; None: :func:`get_auto_embedding_dim`.
        shared_with: name of the feature whose table this one reads; it gets none of its own.
        padding_idx: id that means "nothing": its row is zero and stays zero.
        initializer: how the table starts, see :mod:`fastmtl.basic.initializers`.
        oov: what an id outside the vocabulary does: ``"raise"`` :class:`~fastmtl.errors.BadIdError`, ``"zero"`` for a
            zero vector, or the number of the row that stands for all unknown ids.
    """

    def __init__(
        self,
        name: str,
        vocab_size: int,
        embed_dim: int | None = None,
        shared_with: str | None = None,
        padding_idx: int | None = None,
        initializer: Initializer = SMALL_NORMAL,
        *,
        oov: str | int = "raise",
    ) -> None:
        super().__init__(name, vocab_size, embed_dim, shared_with, padding_idx, initializer, oov)


class SequenceFeature(_TableFeature):
    """A padded list of ids a row, ``[B, L]``.

    Args:
        name, vocab_size, embed_dim, shared_with, initializer, oov: as in :class:`SparseFeature`.
        pooling: ``"mean"``, ``"sum"`` or ``"max"`` over the ids that are no padding (of none: zeros); ``"concat"``: L
            vectors side by side.
        padding_idx: id that means "nothing", beside -1, which always does.
        max_len: L, for ``"concat"``; None: taken from the first data the model sees.
    """

    def __init__(
        self,
        name: str,
        vocab_size: int,
        embed_dim: int | None = None,
        pooling: str = "mean",
        shared_with: str | None = None,
        padding_idx: int | None = None,
        initializer: Initializer = SMALL_NORMAL,
        *,
        oov: str | int = "raise",
        max_len: int | None = None,
    ) -> None:
        super().__init__(name, vocab_size, embed_dim, shared_with, padding_idx, initializer, oov)
        if pooling not in POOLINGS:
            raise ConfigError(
                f"SequenceFeature {name!r}: pooling must be one of {', '.join(POOLINGS)}, got {pooling!r}"
            )
        self.pooling = pooling
        self.max_len = max_len


class DenseFeature:
    """A number a row, or a vector of ``embed_dim`` numbers."""

    def __init__(self, name: str, embed_dim: int = 1) -> None:
        self.name = name
        self.embed_dim = embed_dim

    def __repr__(self) -> str:
        return f"<DenseFeature {self.name}>"


Feature = SparseFeature | SequenceFeature | DenseFeature
