"""MMoE. Source: Ma et al., Modeling Task Relationships with Multi-gate Mixture-of-Experts, KDD'18."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from ...basic.bank import ExpertGate, TowerBank, bank_spec
from ...basic.features import Feature
from ...basic.layers import MLP
from ...spec import Gate
from .base import MTLModel
from .dialect import check_count, check_tower_list, mlp_config, translated


class MMOE(MTLModel):
    """Experts shared by all tasks, a softmax gate and a tower a task.

    Args:
        features: what the model reads.
        task_types: ``"classification"`` or ``"regression"`` for each task.
        n_expert: E.
        expert_params: ``{"dims": [...], "activation": ..., "dropout": ...}`` of every expert.
        tower_params_list: the same for each task's tower.
    """

    @translated
    def __init__(
        self,
        features: Sequence[Feature | str],
        task_types: Sequence[str],
        n_expert: int,
        expert_params: dict[str, Any],
        tower_params_list: Sequence[dict[str, Any]],
        *,
        embedding_dim: int | None = None,
    ) -> None:
        config = {
            "n_expert": check_count(n_expert, "n_expert"),
            "expert_params": mlp_config(expert_params, "expert_params"),
            "tower_params_list": check_tower_list(tower_params_list, len(task_types)),
        }
        super().__init__({"features": features}, task_types, config, embedding_dim)

    def _build(self) -> None:
        n_expert, params = self.config["n_expert"], self.config["expert_params"]
        experts = [MLP(self.input_dims, output_layer=False, **params) for _ in range(n_expert)]
        gates = [
            MLP(self.input_dims, output_layer=False, dims=[n_expert], activation="softmax") for _ in self.task_types
        ]
        self.bank = ExpertGate(
            bank_spec(self.input_dims, params, [0] * n_expert, [Gate(0, tuple(range(n_expert)))] * self.n_task),
            experts,
            gates,
            [f"experts.{e}" for e in range(n_expert)],
            [f"gates.{task}" for task in range(self.n_task)],
        )
        names = [f"towers.{task}" for task in range(self.n_task)]
        self.towers = TowerBank(params["dims"][-1], self.config["tower_params_list"], names)

    def layers(self) -> list[nn.Module]:
        return [self.bank, self.towers]

    def shared_parameters(self) -> list[nn.Parameter]:
        return [*self.embedding.parameters(), *self.bank.expert_parameters()]

    def last_shared_weight(self) -> nn.Parameter:
        return self.bank.get_parameter(f"weight{len(self.bank.spec.dims) - 1}")
