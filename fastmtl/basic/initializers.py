"""How an embedding table starts. Each initializer draws from torch's default generator in torch-rechub's order."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import nn

from ..errors import ConfigError


class _Random:
    """A table drawn at random; the row ``padding_idx`` is zero."""

    def __call__(self, vocab_size: int, embed_dim: int, padding_idx: int | None = None) -> nn.Embedding:
        # nn.Embedding draws its own weights first; that draw is kept, so that a seed gives torch-rechub's tables
        embed = nn.Embedding(vocab_size, embed_dim, padding_idx=padding_idx)
        self._fill(embed.weight)
        if padding_idx is not None:
            with torch.no_grad():
                embed.weight[padding_idx].zero_()
        return embed

    def _fill(self, weight: torch.Tensor) -> None:
        raise NotImplementedError


class RandomNormal(_Random):
    """Normal with the given mean and standard deviation."""

    def __init__(self, mean: float = 0.0, std: float = 1.0) -> None:
        self.mean, self.std = mean, std

    def _fill(self, weight: torch.Tensor) -> None:
        nn.init.normal_(weight, self.mean, self.std)


class RandomUniform(_Random):
    """Uniform between ``minval`` and ``maxval``."""

    def __init__(self, minval: float = 0.0, maxval: float = 1.0) -> None:
        self.minval, self.maxval = minval, maxval

    def _fill(self, weight: torch.Tensor) -> None:
        nn.init.uniform_(weight, self.minval, self.maxval)


class XavierNormal(_Random):
    """Glorot and Bengio, AISTATS'10: normal with std ``gain * sqrt(2 / (fan_in + fan_out))``."""

    def __init__(self, gain: float = 1.0) -> None:
        self.gain = gain

    def _fill(self, weight: torch.Tensor) -> None:
        nn.init.xavier_normal_(weight, self.gain)


class XavierUniform(_Random):
    """Glorot and Bengio, AISTATS'10: uniform within ``gain * sqrt(6 / (fan_in + fan_out))``."""

    def __init__(self, gain: float = 1.0) -> None:
        self.gain = gain

    def _fill(self, weight: torch.Tensor) -> None:
        nn.init.xavier_uniform_(weight, self.gain)


class Pretrained:
    """A given table.

    Args:
        embedding_weight: ``[vocab_size, embed_dim]``, a tensor, an array or nested lists.
        freeze: keep it as it is in training.
    """

    def __init__(self, embedding_weight: torch.Tensor | np.ndarray | Sequence, freeze: bool = True) -> None:
        self.embedding_weight = torch.as_tensor(embedding_weight, dtype=torch.float32).clone()
        self.freeze = freeze

    def __call__(self, vocab_size: int, embed_dim: int, padding_idx: int | None = None) -> nn.Embedding:
        if tuple(self.embedding_weight.shape) != (vocab_size, embed_dim):
            raise ConfigError(
                f"Pretrained: the given table has shape {list(self.embedding_weight.shape)}, "
                f"but the feature says vocab_size={vocab_size}, embed_dim={embed_dim}"
            )
        return nn.Embedding.from_pretrained(self.embedding_weight.clone(), freeze=self.freeze, padding_idx=padding_idx)
