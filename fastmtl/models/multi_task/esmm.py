"""ESMM. Source: Ma et al., Entire Space Multi-Task Model, SIGIR'18."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from ...basic.bank import TowerBank
from ...basic.features import Feature
from ...errors import BadDataError
from .base import MTLModel
from .dialect import mlp_config, translated
from .packed import Draft


class ESMM(MTLModel):
    """A CVR and a CTR tower over all features; their product is the CTCVR, and CTR and CTCVR are what is trained.

    Outputs and labels are in the order cvr, ctr, ctcvr; the loss is the sum of the second and the third. A loader with
    two label columns is taken as (click, conversion).

    Args:
        user_features, item_features: what the model reads.
        cvr_params, ctr_params: ``{"dims": [...], "activation": ..., "dropout": ...}`` of the towers.
    """

    SUMMED_TASKS: ClassVar[tuple[int, ...] | None] = (1, 2)

    @translated
    def __init__(
        self,
        user_features: Sequence[Feature | str],
        item_features: Sequence[Feature | str],
        cvr_params: dict[str, Any],
        ctr_params: dict[str, Any],
        *,
        embedding_dim: int | None = None,
    ) -> None:
        config = {
            "cvr_params": mlp_config(cvr_params, "cvr_params", may_be_empty=True, output_layer=True),
            "ctr_params": mlp_config(ctr_params, "ctr_params", may_be_empty=True, output_layer=True),
        }
        features = {"user_features": user_features, "item_features": item_features}
        super().__init__(features, ["classification"] * 3, config, embedding_dim)
        self.task_names = ["cvr", "ctr", "ctcvr"]

    @property
    def user_features(self) -> list[Feature | str]:
        """The first argument."""
        return self.feature_lists["user_features"]

    @property
    def item_features(self) -> list[Feature | str]:
        """The second argument."""
        return self.feature_lists["item_features"]

    def _build(self) -> None:
        params = [self.config["cvr_params"], self.config["ctr_params"]]
        self.towers = TowerBank(self.input_dims, params, ["tower_cvr", "tower_ctr"], shared_input=True)

    def _predict(self, row: Tensor) -> Tensor:
        cvr, ctr = torch.sigmoid(self.towers(row.unsqueeze(0))).unbind(1)
        return torch.stack([cvr, ctr, ctr * cvr], dim=1)

    def _describe(self, draft: Draft) -> list[int]:
        return draft.towers(self.towers, [0])

    def _describe_outputs(self, logits: list[int]) -> list[tuple[str, int, int]]:
        cvr, ctr = logits
        return [("probability", cvr, 0), ("probability", ctr, 0), ("product", ctr, cvr)]

    def task_of(self, name: str) -> int | None:
        return {"tower_cvr": 0, "tower_ctr": 1}.get(name.split(".", 1)[0])

    def adapt_labels(self, y: Tensor) -> Tensor:
        if y.shape[1] == 2:
            click, conversion = y.unbind(1)
            return torch.stack([conversion, click, click * conversion], dim=1)
        if y.shape[1] != 3:
            raise BadDataError(
                f"ESMM needs the label columns (cvr, ctr, ctcvr) or (click, conversion), the data has {y.shape[1]}"
            )
        return y
