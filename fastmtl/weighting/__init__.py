"""How the losses of the tasks become one update: one strategy a file, listed here.

To add one: write a subclass of :class:`Strategy` in a file of its own and add a line to :data:`STRATEGIES`.
"""

from __future__ import annotations

from typing import Any

from ..errors import ConfigError
from .base import Strategy
from .gradnorm import GradNorm
from .mean import Mean
from .metabalance import MetaBalance, MetaBalanceStrategy
from .static import Static
from .uwl import UncertaintyWeighting

STRATEGIES: dict[str, type[Strategy]] = {
    "mean": Mean,
    "static": Static,
    "uwl": UncertaintyWeighting,
    "gradnorm": GradNorm,
    "metabalance": MetaBalanceStrategy,
}


def make_strategy(method: str, **params: Any) -> Strategy:
    """The strategy called ``method``.

    Raises:
        ConfigError: an unknown method or parameter; the message lists the known.
    """
    if method not in STRATEGIES:
        raise ConfigError(f"adaptive method {method!r} is not known; the methods are {', '.join(STRATEGIES)}")
    try:
        return STRATEGIES[method](**params)
    except TypeError as error:
        raise ConfigError(f"adaptive method {method!r}: {error}") from None


__all__ = ["STRATEGIES", "MetaBalance", "Strategy", "make_strategy"]
