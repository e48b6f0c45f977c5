"""Sparse gradients of the tables for optimizers that are not of this package."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from torch import Tensor, nn

from ..backends import native
from ..basic.embedding import EmbeddingLayer
from ..errors import BackendError
from ..spec import EmbeddingSpec


class _Indexes:
    """Stands where a :class:`fastmtl.optim.TableOptimizer` does, and asks for sparse gradients alone."""

    def before_lookup(
        self, weights: list[nn.Parameter], ids: Tensor, columns: tuple[int, ...], spec: EmbeddingSpec
    ) -> list[native.RowIndex | None]:
        wanted = [weight.requires_grad for weight in weights]
        return native.embedding_bag_index(ids, columns, spec, [weight.shape for weight in weights], wanted)

    def flush(self) -> None:
        """Every row is always current."""


@contextlib.contextmanager
def sparse_gradients(embedding: EmbeddingLayer) -> Iterator[None]:
    """While this lasts the gradients of a model's tables are sparse tensors ``[V, D]``, as ``torch.optim.SparseAdam``
    or an optimizer of one's own wants them.

    Args:
        embedding: ``model.embedding``; its tables on the CPU, in float32.

    Raises:
        BackendError: there is no native library.
    """
    missing = native.unavailable()
    if missing:
        raise BackendError(f"sparse_gradients needs the native backend: {missing}")
    before, embedding.updater = embedding.updater, _Indexes()
    try:
        yield
    finally:
        embedding.updater = before
