"""torch's optimizers with embedding tables at sparse cost: the same numbers, state and arguments.

``Adam``, ``AdamW``, ``SGD`` and ``Adagrad`` are torch's classes, which they extend by ``tables``: the parameters whose
gradients come as rows and values. ``RowwiseAdagrad`` is a rule of its own; ``sparse_gradients`` is for optimizers of
others. See docs/optimizers.md.
"""

from .sparse import sparse_gradients
from .tables import SGD, Adagrad, Adam, AdamW, RowwiseAdagrad, TableOptimizer

__all__ = ["SGD", "Adagrad", "Adam", "AdamW", "RowwiseAdagrad", "TableOptimizer", "sparse_gradients"]
