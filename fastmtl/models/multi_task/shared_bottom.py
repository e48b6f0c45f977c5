"""SharedBottom. Source: Caruana, Multitask Learning, Machine Learning 28 (1997)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from ...basic.bank import ExpertGate, TowerBank, bank_spec
from ...basic.features import Feature
from ...basic.layers import MLP
from .base import MTLModel
from .dialect import check_tower_list, mlp_config, translated


class SharedBottom(MTLModel):
    """One MLP for all tasks, one tower a task.

    Args:
        features: what the model reads.
        task_types: ``"classification"`` or ``"regression"`` for each task.
        bottom_params: ``{"dims": [...], "activation": ..., "dropout": ...}`` of the shared MLP.
        tower_params_list: the same for each task's tower.
    """

    @translated
    def __init__(
        self,
        features: Sequence[Feature | str],
        task_types: Sequence[str],
        bottom_params: dict[str, Any],
        tower_params_list: Sequence[dict[str, Any]],
        *,
        embedding_dim: int | None = None,
    ) -> None:
        config = {
            "bottom_params": mlp_config(bottom_params, "bottom_params"),
            "tower_params_list": check_tower_list(tower_params_list, len(task_types)),
        }
        super().__init__({"features": features}, task_types, config, embedding_dim)

    def _build(self) -> None:
        params = self.config["bottom_params"]
        bottom = MLP(self.input_dims, output_layer=False, **params)
        self.bank = ExpertGate(bank_spec(self.input_dims, params, (0,)), [bottom], (), ["bottom_mlp"])
        names = [f"towers.{task}" for task in range(self.n_task)]
        self.towers = TowerBank(params["dims"][-1], self.config["tower_params_list"], names, shared_input=True)

    def layers(self) -> list[nn.Module]:
        return [self.bank, self.towers]

    def shared_parameters(self) -> list[nn.Parameter]:
        return [*self.embedding.parameters(), *self.bank.parameters()]

    def last_shared_weight(self) -> nn.Parameter:
        return self.bank.get_parameter(f"weight{len(self.bank.spec.dims) - 1}")
