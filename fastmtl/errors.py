"""The errors fastmtl raises on purpose: each names the thing, where it is, and the remedy.

The command line turns every ``FastMTLError`` into one line on stderr and exit code 2; anything else is a bug.
"""

from __future__ import annotations

import importlib
from types import ModuleType


class FastMTLError(ValueError):
    """A mistake in what the user gave us, told in one message."""


class BadIdError(FastMTLError, IndexError):
    """An id outside the vocabulary of its feature."""

    @classmethod
    def at(cls, feature: str, value: int, row: int, vocab: int) -> BadIdError:
        """The error for id ``value`` in row ``row`` of a batch, for a feature with ``vocab`` ids."""
        return cls(
            f"feature {feature!r}: id {value} in row {row} of the batch is outside the vocabulary of {vocab} "
            f"(ids 0 to {vocab - 1}); raise vocab_size, mend the data, or give the feature oov='zero' or "
            f"oov=<the row that stands for unknown ids>"
        )


class BadDataError(FastMTLError):
    """A column, row, label or file that cannot be used as it is."""


class ConfigError(FastMTLError):
    """An option, name or configuration value that is not known or not possible."""


class BackendError(FastMTLError, RuntimeError):
    """A backend that was asked for and cannot run here."""


class NotBuiltError(FastMTLError, RuntimeError):
    """A model given as column names that has not yet seen data, and so has no parameters."""


class MissingExtraError(FastMTLError, ImportError):
    """An optional dependency that is not installed."""


def require(module: str, extra: str, purpose: str) -> ModuleType:
    """Import an optional dependency.

    Args:
        module: dotted name of the module, e.g. "pyarrow.parquet".
        extra: the extra of fastmtl that brings it, e.g. "parquet".
        purpose: what it is needed for, as the start of the message, e.g. "Reading Parquet files".

    Returns:
        The imported module.

    Raises:
        MissingExtraError: when it is not installed; the message names the extra.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.partition(".")[0]
        raise MissingExtraError(
            f"{purpose} needs {package}, which cannot be imported here ({error}). "
            f"Install it with: pip install 'fastmtl[{extra}]'"
        ) from error
