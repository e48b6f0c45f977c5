"""PLE. Source: Tang et al., Progressive Layered Extraction, RecSys'20."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from torch import nn

from ...basic.bank import ExpertGate, TowerBank, bank_spec
from ...basic.features import Feature
from ...basic.layers import MLP
from ...spec import Gate
from .base import MTLModel
from .dialect import check_count, check_tower_list, mlp_config, translated


class PLE(MTLModel):
    """Levels of CGC: experts of each task's own and shared ones, a gate a task, and one for the next shared experts.

    Args:
        features: what the model reads.
        task_types: ``"classification"`` or ``"regression"`` for each task.
        n_level: levels.
        n_expert_specific: experts of each task's own, a level.
        n_expert_shared: shared experts a level.
        expert_params: ``{"dims": [...], "activation": ..., "dropout": ...}`` of every expert.
        tower_params_list: the same for each task's tower.
    """

    @translated
    def __init__(
        self,
        features: Sequence[Feature | str],
        task_types: Sequence[str],
        n_level: int,
        n_expert_specific: int,
        n_expert_shared: int,
        expert_params: dict[str, Any],
        tower_params_list: Sequence[dict[str, Any]],
        *,
        embedding_dim: int | None = None,
    ) -> None:
        config = {
            "n_level": check_count(n_level, "n_level"),
            "n_expert_specific": check_count(n_expert_specific, "n_expert_specific"),
            "n_expert_shared": check_count(n_expert_shared, "n_expert_shared"),
            "expert_params": mlp_config(expert_params, "expert_params"),
            "tower_params_list": check_tower_list(tower_params_list, len(task_types)),
        }
        super().__init__({"features": features}, task_types, config, embedding_dim)

    def _build(self) -> None:
        width = self.input_dims
        self.cgc_layers = nn.ModuleList()
        for level in range(self.config["n_level"]):
            self.cgc_layers.append(self._cgc(width, level))
            width = self.config["expert_params"]["dims"][-1]
        names = [f"towers.{task}" for task in range(self.n_task)]
        self.towers = TowerBank(width, self.config["tower_params_list"], names)

    def _cgc(self, width: int, level: int) -> ExpertGate:
        """One level. The first reads one input, the others T + 1: one a task and one for the shared experts."""
        params, n_task = self.config["expert_params"], self.n_task
        specific, shared = self.config["n_expert_specific"], self.config["n_expert_shared"]
        n_specific, n_all = n_task * specific, n_task * specific + shared
        shared_experts = tuple(range(n_specific, n_all))
        expert_input = [e // specific for e in range(n_specific)] + [n_task] * shared
        gates = [
            Gate(task, (*range(task * specific, (task + 1) * specific), *shared_experts)) for task in range(n_task)
        ]
        gate_names = [f"gates_specific.{task}" for task in range(n_task)]
        if level + 1 < self.config["n_level"]:
            gates.append(Gate(n_task, tuple(range(n_all))))
            gate_names.append("gate_shared")
        if level == 0:
            expert_input = [0] * n_all
            gates = [replace(gate, input=0) for gate in gates]
        experts = [MLP(width, output_layer=False, **params) for _ in range(n_all)]
        gate_mlps = [MLP(width, output_layer=False, dims=[len(gate.experts)], activation="softmax") for gate in gates]
        names = [f"experts_specific.{e}" for e in range(n_specific)] + [f"experts_shared.{e}" for e in range(shared)]
        return ExpertGate(bank_spec(width, params, expert_input, gates), experts, gate_mlps, names, gate_names)

    def layers(self) -> list[nn.Module]:
        return [*self.cgc_layers, self.towers]

    def task_of(self, name: str) -> int | None:
        if name.startswith("cgc_layers."):
            _, _, kind, number, _ = name.split(".", 4)
            per_task = {"gates_specific": 1, "experts_specific": self.config["n_expert_specific"]}
            return int(number) // per_task[kind] if kind in per_task else None
        return super().task_of(name)

    def shared_parameters(self) -> list[nn.Parameter]:
        return [*self.embedding.parameters(), *self.cgc_layers.parameters()]

    def last_shared_weight(self) -> nn.Parameter:
        bank: Any = self.cgc_layers[-1]
        return bank.get_parameter(f"weight{len(bank.spec.dims) - 1}")
