"""AITM. Source: Xi et al., Modeling the Sequential Dependence among Audience Multi-step Conversions, KDD'21."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ...basic.bank import ExpertGate, TowerBank, bank_spec
from ...basic.batched import BatchedModule, View, stack_rows
from ...basic.features import Feature
from ...basic.layers import MLP
from .base import MTLModel
from .dialect import check_count, check_tower_list, mlp_config, translated
from .packed import Draft


class AIT(BatchedModule):
    """Adaptive information transfer: attention over a task's own vector and what the task before it hands on.

    Shape:
        own ``[B, D]``, info ``[B, D]`` to ``[B, D]``.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dim = dim
        projections = [nn.Linear(dim, dim, bias=False) for _ in "qkv"]
        self.qkv = nn.Parameter(stack_rows([linear.weight for linear in projections]))
        self.views = tuple(
            View(f"{name}_layer.weight", "qkv", k * dim, (k + 1) * dim, (dim, dim)) for k, name in enumerate("qkv")
        )

    def forward(self, own: Tensor, info: Tensor) -> Tensor:
        pair = torch.stack([own, info], dim=1)
        fixed = pair.device.type == "cpu" and torch.are_deterministic_algorithms_enabled()
        q, k, v = (_linear_by_pieces if fixed else nn.functional.linear)(pair, self.qkv).chunk(3, dim=-1)
        attention = torch.softmax((q * k).sum(dim=-1) / self.dim**0.5, dim=1)
        return (attention.unsqueeze(-1) * v).sum(dim=1)


def _linear_by_pieces(x: Tensor, weight: Tensor) -> Tensor:
    """``nn.functional.linear`` with the same bits for every number of threads, backward too: the library cuts the sums
    of one product by that number, but not those of a stack of small products."""
    rows, height = x.reshape(-1, x.shape[-1]), 64
    count = max(2, -(-len(rows) // height))
    pieces = nn.functional.pad(rows, (0, 0, 0, count * height - len(rows))).view(count, height, rows.shape[1])
    out = torch.bmm(pieces, weight.t().expand(len(pieces), *weight.t().shape))
    return out.view(-1, len(weight))[: len(rows)].view(*x.shape[:-1], len(weight))


class AITM(MTLModel):
    """A bottom and a tower a task; each task's bottom is joined with information from the task before it.

    The tasks follow each other (impression -> click -> conversion), all binary.

    Args:
        features: what the model reads.
        n_task: T.
        bottom_params: ``{"dims": [...], "activation": ..., "dropout": ...}`` of every bottom.
        tower_params_list: the same for each task's tower.
    """

    TASK_MODULES: ClassVar[dict[str, int]] = {"towers": 0, "bottoms": 0, "info_gates": 1, "aits": 1}

    @translated
    def __init__(
        self,
        features: Sequence[Feature | str],
        n_task: int,
        bottom_params: dict[str, Any],
        tower_params_list: Sequence[dict[str, Any]],
        *,
        embedding_dim: int | None = None,
    ) -> None:
        n_task = check_count(n_task, "n_task")
        config = {
            "bottom_params": mlp_config(bottom_params, "bottom_params"),
            "tower_params_list": check_tower_list(tower_params_list, n_task),
        }
        super().__init__({"features": features}, ["classification"] * n_task, config, embedding_dim)

    def _build(self) -> None:
        params, n_task = self.config["bottom_params"], self.n_task
        bottoms = [MLP(self.input_dims, output_layer=False, **params) for _ in range(n_task)]
        self.bank = ExpertGate(
            bank_spec(self.input_dims, params, [0] * n_task), bottoms, (), [f"bottoms.{t}" for t in range(n_task)]
        )
        dim = params["dims"][-1]
        self.towers = TowerBank(dim, self.config["tower_params_list"], [f"towers.{task}" for task in range(n_task)])
        # one after the other: each reads what the one before it made
        self.info_gates = nn.ModuleList()
        info: dict[str, Any] = {"dims": [dim]}
        for _ in range(n_task - 1):
            self.info_gates.append(
                ExpertGate(bank_spec(dim, info, (0,)), [MLP(dim, output_layer=False, **info)], (), [""])
            )
        self.aits = nn.ModuleList(AIT(dim) for _ in range(n_task - 1))

    def _logits(self, row: Tensor) -> Tensor:
        inputs = list(self.bank(row.unsqueeze(0)).unbind(0))
        for task, (gate, ait) in enumerate(zip(self.info_gates, self.aits, strict=True), start=1):
            info = gate(inputs[task - 1].unsqueeze(0)).squeeze(0)
            inputs[task] = ait(inputs[task], info)
        return self.towers(torch.stack(inputs))

    def _describe(self, draft: Draft) -> list[int]:
        matrices = draft.bank(self.bank, [0])
        for task, (gate, ait) in enumerate(zip(self.info_gates, self.aits, strict=True), start=1):
            (info,) = draft.bank(gate, [matrices[task - 1]])
            matrices[task] = draft.transfer(ait, AIT, matrices[task], info)
        return draft.towers(self.towers, matrices)

    def shared_parameters(self) -> list[nn.Parameter]:
        return [*self.embedding.parameters(), *self.bank.parameters()]

    def last_shared_weight(self) -> nn.Parameter:
        return self.bank.get_parameter(f"weight{len(self.bank.spec.dims) - 1}")
