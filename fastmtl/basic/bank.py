"""A bank of experts and gates (or of towers): many small MLPs stored and computed as one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .. import ops
from ..spec import ExpertGateParams, ExpertGateSpec, GateParams
from .activation import activation_name
from .batched import BatchedModule, View, stack_rows
from .layers import MLP


class ExpertGate(BatchedModule):
    """The parameters of a layer of E experts and G gates, see :func:`fastmtl.ops.expert_gate`.

    Args:
        spec: shapes, activation, and which expert and gate reads which input.
        experts: E freshly made MLPs, whose weights are taken over.
        gates: G freshly made gate MLPs.
        expert_names, gate_names: their names in the state_dict, e.g. ``"experts.0"``.
    """

    num_batches_tracked: Tensor

    def __init__(
        self,
        spec: ExpertGateSpec,
        experts: Sequence[MLP],
        gates: Sequence[MLP] = (),
        expert_names: Sequence[str] = (),
        gate_names: Sequence[str] = (),
    ) -> None:
        super().__init__()
        self.spec = spec
        self._views: list[View] = []
        self._batch_norms = 0
        self._count_steps(len(experts) * len(spec.dims) + len(gates))
        for layer in range(len(spec.dims)):
            self._adopt(experts, 4 * layer, f"{layer}")
            activations: list[Any] = [expert.mlp[4 * layer + 2] for expert in experts]
            if next(activations[0].parameters(), None) is not None:
                ((key, _),) = activations[0].named_parameters()
                self._store(f"alpha{layer}", [getattr(a, key) for a in activations], f"mlp.{4 * layer + 2}.{key}")
        if spec.output_layer:
            last: list[Any] = [expert.mlp[4 * len(spec.dims)] for expert in experts]
            self._store("out_weight", [linear.weight for linear in last], f"mlp.{4 * len(spec.dims)}.weight")
            self._store("out_bias", [linear.bias for linear in last], f"mlp.{4 * len(spec.dims)}.bias")
        self._name_views(expert_names)
        experts_views, self._views = self._views, []
        if gates:
            self._adopt(gates, 0, "_gate")
            self._name_views(gate_names)
        self.views = (*experts_views, *self._views)
        del self._views

    def _count_steps(self, n: int) -> None:
        self.register_buffer("num_batches_tracked", torch.zeros(n, dtype=torch.int64))

    def _adopt(self, mlps: Sequence[MLP], at: int, suffix: str) -> None:
        """Store one Linear and BatchNorm layer of all the MLPs."""
        linears: list[Any] = [mlp.mlp[at] for mlp in mlps]
        norms: list[Any] = [mlp.mlp[at + 1] for mlp in mlps]
        self._store(f"weight{suffix}", [linear.weight for linear in linears], f"mlp.{at}.weight")
        self._store(f"bias{suffix}", [linear.bias for linear in linears], f"mlp.{at}.bias")
        self._store(f"gamma{suffix}", [norm.weight for norm in norms], f"mlp.{at + 1}.weight")
        self._store(f"beta{suffix}", [norm.bias for norm in norms], f"mlp.{at + 1}.bias")
        self._store(f"running_mean{suffix}", [norm.running_mean for norm in norms], f"mlp.{at + 1}.running_mean")
        self._store(f"running_var{suffix}", [norm.running_var for norm in norms], f"mlp.{at + 1}.running_var")
        for member in range(len(mlps)):
            row = self._batch_norms + member
            self._views.append(
                View(f"{member}/mlp.{at + 1}.num_batches_tracked", "num_batches_tracked", row, row + 1, ())
            )
        self._batch_norms += len(mlps)

    def _store(self, storage: str, tensors: list[Tensor], key: str) -> None:
        stacked = stack_rows(tensors)
        if isinstance(tensors[0], nn.Parameter):
            self.register_parameter(storage, nn.Parameter(stacked))
        else:
            self.register_buffer(storage, stacked)
        at = 0
        for member, tensor in enumerate(tensors):
            self._views.append(View(f"{member}/{key}", storage, at, at + len(tensor), tuple(tensor.shape)))
            at += len(tensor)

    def _name_views(self, names: Sequence[str]) -> None:
        """Replace the member numbers by names, and bring the views into torch-rechub's order: MLP by MLP."""
        numbered: list[Any] = [(*view.name.split("/"), view) for view in self._views]
        self._views = [
            view._replace(name=".".join(filter(None, (names[int(member)], key))))
            for member, key, view in sorted(numbered, key=lambda item: (int(item[0]), int(item[1].split(".")[1])))
        ]

    def params(self) -> ExpertGateParams:
        """The parameters as the op takes them."""
        layers = range(len(self.spec.dims))

        def get(name: str) -> Any:
            for held in (self._parameters, self._buffers):
                if name in held:
                    return held[name]
            # the replicas of DataParallel keep their parameters as plain attributes
            return getattr(self, name, None)

        def each(name: str) -> tuple[Any, ...]:
            return tuple([get(f"{name}{layer}") for layer in layers])

        return ExpertGateParams(
            each("weight"), each("bias"), each("gamma"), each("beta"), each("running_mean"), each("running_var"),
            each("alpha") if get("alpha0") is not None else (),
            get("out_weight"), get("out_bias"),
            GateParams(*[get(f"{name}_gate") for name in GateParams._fields]) if self.spec.gates else None,
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        """``[N, B, I]`` inputs to ``[G, B, H]`` (``[E, B, H]`` without gates, ``[B, E]`` with an output layer)."""
        if self.training:
            self.count_step(x)
        return ops.expert_gate(x, self.params(), self.spec, self.training)

    def count_step(self, x: Tensor) -> None:
        """Count a batch ``[N, B, I]`` of training; one row has no statistics, and is not counted."""
        if x.shape[1] > 1:
            self.num_batches_tracked.add_(1)

    def expert_parameters(self) -> list[nn.Parameter]:
        """The parameters of the experts alone."""
        return [p for name, p in self.named_parameters() if not name.endswith("_gate")]

    def gate_parameters(self) -> list[nn.Parameter]:
        """The parameters of the gates alone."""
        return [p for name, p in self.named_parameters() if name.endswith("_gate")]

    def norm_parameters(self) -> list[nn.Parameter]:
        """Scales and shifts of the batch normalisations."""
        return [p for name, p in self.named_parameters() if name.startswith(("gamma", "beta"))]

    def extra_repr(self) -> str:
        s = self.spec
        tail = " -> 1" if s.output_layer else ""
        return (
            f"{s.n_experts} experts {s.in_features} -> {' -> '.join(map(str, s.dims))}{tail} ({s.activation}), "
            f"{len(s.gates)} gates, {s.n_inputs} inputs"
        )


def bank_spec(
    in_features: int,
    mlp_params: dict[str, Any],
    expert_input: Sequence[int],
    gates: Sequence = (),
    output_layer: bool = False,
) -> ExpertGateSpec:
    """The spec of a bank whose members are ``MLP(in_features, output_layer, **mlp_params)``."""
    return ExpertGateSpec(
        in_features,
        tuple(expert_input),
        tuple(mlp_params.get("dims") or ()),
        activation_name(mlp_params.get("activation", "relu")),
        float(mlp_params.get("dropout", 0)),
        tuple(gates),
        output_layer,
    )


class TowerBank(nn.Module):
    """One tower (MLP with a last Linear(., 1)) a task, each with an input of its own or one for all.

    Towers of equal shape are computed together.

    Args:
        in_features: width of the inputs.
        params_list: ``{"dims": [...], "activation": ..., "dropout": ...}`` for each task.
        names: the towers' names in the state_dict, e.g. ``"towers.0"``.
        shared_input: all towers read one input.
    """

    def __init__(
        self, in_features: int, params_list: Sequence[dict[str, Any]], names: Sequence[str], shared_input: bool = False
    ) -> None:
        super().__init__()
        towers = [MLP(in_features, **params) for params in params_list]
        groups: dict[ExpertGateSpec, list[int]] = {}
        for task, params in enumerate(params_list):
            groups.setdefault(bank_spec(in_features, params, (0,), output_layer=True), []).append(task)
        self.groups = list(groups.values())
        self.shared_input = shared_input
        self.banks = nn.ModuleList()
        for tasks in self.groups:
            inputs = [0] * len(tasks) if shared_input else range(len(tasks))
            bank = bank_spec(in_features, params_list[tasks[0]], inputs, output_layer=True)
            self.banks.append(ExpertGate(bank, [towers[t] for t in tasks], (), [names[t] for t in tasks]))
        order = [task for tasks in self.groups for task in tasks]
        self.order = None if order == sorted(order) else [order.index(task) for task in range(len(order))]

    def forward(self, x: Tensor) -> Tensor:
        """``[T, B, I]`` (``[1, B, I]`` with a shared input) to logits ``[B, T]``."""
        if len(self.banks) == 1:
            return self.banks[0](x)
        out = [bank(x if self.shared_input else x[tasks]) for bank, tasks in zip(self.banks, self.groups, strict=True)]
        logits = torch.cat(out, dim=1)
        return logits if self.order is None else logits[:, self.order]
