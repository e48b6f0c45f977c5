"""The progress bar: loss, samples a second, time left; on a terminal's stderr only."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator
from typing import Any

from tqdm import tqdm

REFRESH_SECONDS = 0.5


class Progress:
    """Iterates over a loader's batches and shows how far it is.

    Args:
        loader: yields batches.
        description: shown in front of the bar.
        enabled: None: where stderr is a terminal.
        batches: what to iterate over instead, for example what is made of the loader's.
    """

    def __init__(
        self, loader: Iterable, description: str, enabled: bool | None = None, batches: Iterable | None = None
    ) -> None:
        self.batches = loader if batches is None else batches
        enabled = sys.stderr.isatty() if enabled is None else enabled
        rows = self._n_rows(loader)
        self.bar = tqdm(
            total=rows, desc=description, unit=" samples", unit_scale=True, disable=not enabled, leave=False
        )
        self._shown = 0.0

    @staticmethod
    def _n_rows(loader: Iterable) -> int | None:
        try:
            return len(loader.dataset)  # type: ignore[attr-defined]
        except (AttributeError, TypeError):
            return None

    def __iter__(self) -> Iterator[Any]:
        with self.bar:
            yield from self.batches

    def update(self, rows: int, loss: Any = None) -> None:
        """Count ``rows``; ``loss`` (a tensor ``[T]``) is read only when the bar is due for a refresh."""
        if self.bar.disable:
            return
        self.bar.update(rows)
        now = time.monotonic()
        if loss is not None and now - self._shown > REFRESH_SECONDS:
            self._shown = now
            self.bar.set_postfix(loss=f"{float(loss.mean()):.4f}")
