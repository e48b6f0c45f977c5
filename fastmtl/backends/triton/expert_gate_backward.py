"""expert_gate, backward. With batch statistics dz depends on two sums over the whole batch, so each layer is met twice:

once when its D (the gradient of its BatchNorm's output) is summed and written, by what follows the last layer or by the
epilogue of the layer above's dgrad; and once when the dgrad and wgrad GEMMs rebuild dz from D and z in their prologues.
(Under gates the last layer's D is not written but rebuilt there too: rebuilt.py.)
Activations are rebuilt, z is kept. Nothing that was saved is written to, so a graph can be walked several times.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from ...spec import LEARNED_ACTIVATIONS, ExpertGateParams, ExpertGateSpec
from .batch_norm import SUMS, add_up
from .dgrad import dgrad, input_gradient
from .expert_gate_forward import Saved, below, hidden_layers
from .hidden import Hidden
from .layer_plan import LayerPlan, layer_plan
from .linear_heads import linear_heads_bwd
from .losses import TaskLosses, task_counts
from .mixing_backward import activations_bwd, experts_bwd, head_bwd, losses_bwd, mix_bwd
from .precision import Precision, of_dtype
from .rebuilt import Mixed
from .wgrad import wgrad


class _Layers:
    """The hidden layers of a call in its backward: what each is, its D, and what its sums become.

    Attributes:
        d: ``[B, pitch]`` of each, in z's dtype, or of the last what it is rebuilt from.
        grads: ``[SUMS + 1, pitch]`` of each, fp32: of beta, gamma, alpha (by unit), the head's weight; last the bias.
        coef: ``[2, pitch]`` of each, fp32: what rebuilds dz from D and z.
        weight: the gradient of each weight, filled in from the last to the first; the gates' in ``gate_weight``.
    """

    def __init__(self, hidden: list[Hidden], plan: LayerPlan, batch_statistics: bool):
        self.hidden, self.plan, self.batch_statistics = hidden, plan, batch_statistics
        self.d: list[Tensor | Mixed] = []
        self.d += [torch.empty_like(layer.z) for layer in hidden[:-1]]
        if not self.rebuilds:
            self.d.append(torch.empty_like(hidden[-1].z))
        self.grads = [layer.stat.new_empty(SUMS + 1, layer.pitch) for layer in hidden]
        self.coef = [plan.per_column(layer.layer, 2) for layer in hidden]
        self.weight: list[Tensor] = [layer.stat for layer in hidden]
        self.gate_weight: Tensor | None = None

    @property
    def rebuilds(self) -> bool:
        """Whether D of the last layer is not written."""
        return len(self.hidden) > 1 and bool(self.plan.spec.gates) and not self.hidden[-1].row_wise

    def written(self, layer: int) -> Tensor:
        """D of a layer that has it written."""
        d = self.d[layer]
        assert isinstance(d, Tensor)
        return d

    def add_up(self, layer: int, part: Tensor, head: Tensor | None = None, losses: bool = False) -> None:
        """Add the pieces of the sums of a layer's experts up."""
        grads, coef = self.grads[layer], self.coef[layer]
        add_up(part, self.hidden[layer], grads, coef, self.plan.columns[layer], self.batch_statistics, head, losses)

    def add_up_heads(self, part: Tensor, losses: bool = False) -> tuple[list[Tensor], Tensor]:
        """The same of the last layer under heads; returns the gradients of their weight and bias, and the losses
        (of no meaning unless ``losses``)."""
        spec, at = self.plan.spec, len(self.hidden) - 1
        head = part.new_empty(2, spec.n_experts)
        self.add_up(at, part, head, losses)
        weight = self.grads[at][3, : self.plan.columns[at]].view(spec.n_experts, -1)
        return [weight, head[0]], head[1]

    def add_up_gates(self, part: Tensor) -> None:
        """The same of the gates."""
        add_up(part, self.hidden[0], self.grads[0], self.coef[0], self.plan.gate_places, self.batch_statistics)

    def gradients(self, out: list[Tensor]) -> list[Tensor]:
        """In the order of ``params.learned()``; ``out``: those of the head."""
        plan, spec = self.plan, self.plan.spec
        experts = [grads[:, :n] for grads, n in zip(self.grads, plan.columns, strict=True)]
        flat = [*self.weight, *(rows[SUMS] for rows in experts), *(rows[1] for rows in experts)]
        flat += [rows[0] for rows in experts]
        if spec.activation in LEARNED_ACTIVATIONS:
            flat += [rows[2].view(spec.n_experts, -1).sum(1) for rows in experts]
        flat += out
        if self.gate_weight is not None:
            first, last = plan.gate_columns[0], plan.gate_columns[-1]
            in_one = last - first == spec.gate_rows - 1
            gates = self.grads[0][:, first : last + 1] if in_one else self.grads[0].index_select(1, plan.gate_places)
            flat += [self.gate_weight, gates[SUMS], gates[1], gates[0]]
        return flat


def expert_gate_bwd(
    grad: Tensor,
    x: Tensor,
    params: ExpertGateParams,
    spec: ExpertGateSpec,
    training: bool,
    saved: list[Tensor],
    needs_x: bool,
) -> tuple[Tensor | None, list[Tensor]]:
    """The gradients of x (None where it needs none) and of ``params.learned()``, fp32."""
    n_rows = x.shape[1]
    if n_rows == 0:
        return (torch.zeros_like(x) if needs_x else None), [torch.zeros_like(tensor) for tensor in params.learned()]
    if not spec.dims:
        return linear_heads_bwd(grad, x if x.stride(2) == 1 else x.contiguous(), params, spec, needs_x)
    kept = Saved.of(saved, spec, training)
    plan = layer_plan(spec, x.device)
    precision = of_dtype(kept.z[0].dtype)
    x = x if x.stride(2) == 1 else x.contiguous()
    hidden = [Hidden.of(z, kept.stat[i], params, spec, kept.seed, i) for i, z in enumerate(kept.z)]
    layers = _Layers(hidden, plan, training and n_rows > 1)
    out = _last(grad, layers, kept, params)
    return _walk_down(x, layers, kept, precision, needs_x), layers.gradients(out)


def tower_losses(
    x: Tensor,
    params: ExpertGateParams,
    spec: ExpertGateSpec,
    labels: Tensor,
    is_classification: Tensor,
    factors: Tensor,
    needs_x: bool,
) -> tuple[Tensor, Tensor, Tensor | None, list[Tensor]] | None:
    """Towers in training with the losses of their logits, forward and backward at once: last BatchNorm, activation,
    output, losses and the first pass back are one pass over the last z.

    Args:
        x, params, spec: as for :func:`fastmtl.ops.expert_gate`.
        labels, is_classification, factors: as for ``task_losses``.
        needs_x: whether the gradient of x is wanted.

    Returns:
        Losses ``[T]``, logits ``[B, T]``, the gradients of x (or None) and of ``params.learned()``; None where the
        towers' last layer is too wide for one block, or there is none, or no row.
    """
    n_rows = x.shape[1]
    if not spec.dims or spec.dims[-1] > 128 or n_rows == 0:
        return None
    assert params.out_bias is not None
    hidden, kept = hidden_layers(x, params, spec, True)
    x = x if x.stride(2) == 1 else x.contiguous()
    layers = _Layers(hidden, layer_plan(spec, x.device), n_rows > 1)
    logits = torch.empty(n_rows, spec.n_experts, dtype=torch.float32, device=x.device)
    made = TaskLosses(labels, is_classification, factors, params.out_bias, task_counts(labels), logits)
    out, losses = layers.add_up_heads(losses_bwd(made, hidden[-1], layers.written(-1), params), losses=True)
    dx = _walk_down(x, layers, kept, of_dtype(kept.z[0].dtype), needs_x)
    return losses, logits, dx, layers.gradients(out)


def _walk_down(x: Tensor, layers: _Layers, kept: Saved, precision: Precision, needs_x: bool) -> Tensor | None:
    """From D of the last layer to the gradients of all weights and of x."""
    hidden, plan = layers.hidden, layers.plan
    dx = None
    for layer in reversed(range(len(hidden))):
        dw, dw_gates = wgrad(
            below(hidden[layer - 1] if layer else None, x), layers.d[layer], hidden[layer], layers.coef[layer], plan,
            precision,
        )  # fmt: skip
        layers.weight[layer] = dw
        if layer:
            _descend(layer, layers, kept, precision)
            continue
        if plan.spec.gates:
            layers.gate_weight = dw_gates
        if needs_x:
            dx = input_gradient(
                x, layers.written(0), hidden[0], layers.coef[0], kept.weight[0], kept.gate_weight, plan, precision
            )
    return dx


def _last(grad: Tensor, layers: _Layers, kept: Saved, params: ExpertGateParams) -> list[Tensor]:
    """From the gradient of the layer's output to D of the last hidden layer; returns the gradients of the head."""
    spec, last = layers.plan.spec, layers.hidden[-1]
    d = None if layers.rebuilds else layers.written(-1)
    at = last.layer
    if spec.output_layer:
        assert d is not None
        return layers.add_up_heads(head_bwd(grad, last, d, params))[0]
    grad = grad if grad.stride(2) == 1 else grad.contiguous()
    if kept.soft is None:
        assert d is not None
        layers.add_up(at, experts_bwd(grad, last, d))
        return []
    mixed, part, gate_part = mix_bwd(grad, last, d, layers.hidden[0], layers.written(0), layers.plan, kept.soft)
    if layers.rebuilds:
        layers.d.append(mixed)
    layers.add_up(at, part)
    layers.add_up_gates(gate_part)
    return []


def _descend(layer: int, layers: _Layers, kept: Saved, precision: Precision) -> None:
    """From D of a layer to D of the one below."""
    hidden, under = layers.hidden[layer], layers.hidden[layer - 1]
    strides = (under.units, under.pitch)
    carry = functools.partial(
        dgrad, layers.d[layer], hidden, layers.coef[layer], kept.weight[layer], None, strides=strides,
        plan=layers.plan, precision=precision,
    )  # fmt: skip
    if under.row_wise:  # an epilogue sees only some units of a row
        dh = torch.empty_like(under.z)
        carry(out=dh, below=None)
        part = activations_bwd(dh, under, layers.written(layer - 1))
    else:
        part = carry(out=layers.written(layer - 1), below=under)
    layers.add_up(layer - 1, part)
