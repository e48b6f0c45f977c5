"""The ops every model is made of: what they mean, their gradients, and nothing else. Backends do the work."""

from .embedding_bag import embedding_bag
from .expert_gate import expert_gate

__all__ = ["embedding_bag", "expert_gate"]
