"""Early stopping."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

from ..errors import ConfigError


class EarlyStopper:
    """Tells when a validation score has stopped improving, and keeps the best weights.

    Args:
        patience: epochs without improvement after which to stop.
        mode: ``"max"`` where larger is better, ``"min"`` where smaller is.
    """

    def __init__(self, patience: int, mode: str = "max") -> None:
        if mode not in ("max", "min"):
            raise ConfigError(f"EarlyStopper: mode must be 'max' or 'min', got {mode!r}")
        self.patience = patience
        self.mode = mode
        self.trial_counter = 0
        self.best_auc = 0.0 if mode == "max" else float("inf")
        self.best_weights: dict[str, Any] | None = None

    def improves(self, val_auc: float) -> bool:
        """Whether a score is better than all before; NaN is not."""
        return val_auc > self.best_auc if self.mode == "max" else val_auc < self.best_auc

    def stop_training(self, val_auc: float, weights: Mapping[str, Any]) -> bool:
        """Take note of an epoch's score.

        Args:
            val_auc: the score, whatever the metric; NaN is no improvement.
            weights: the model's state_dict, copied where the score is the best so far.

        Returns:
            Whether to stop.
        """
        if self.improves(val_auc):
            self.best_auc = val_auc
            self.trial_counter = 0
            self.best_weights = copy.deepcopy(dict(weights))
            return False
        self.trial_counter += 1
        return self.trial_counter >= self.patience
