"""expert_gate, backward. With batch statistics dz depends on two sums over the whole batch, so each layer is met twice:

once when its D (the gradient of its BatchNorm's output) is written and summed, by what follows its activations; and
once when dz is made of D and z, which two products then read: with the activations below (kept) for the weight, and
with the weight for the gradient of these. Nothing that was saved is written to, so a graph can be walked several times.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...spec import LEARNED_ACTIVATIONS, ExpertGateParams, ExpertGateSpec
from .. import branches
from . import hopper, mixing_gradient, products
from .batch_norm import SUMS, GateSums, add_up
from .expert_gate_forward import Saved, as_input, hidden_layers
from .hidden import Hidden
from .launch import round_up
from .layer_plan import LayerPlan, layer_plan
from .linear_heads import linear_heads_bwd
from .losses import TaskLosses, count_labels, empty_counts
from .mixing_backward import activations_bwd, experts_bwd, head_bwd, losses_bwd, mix_bwd
from .passes import gates_gradient, gradient, sums
from .precision import of_dtype


class _Layers:
    """The hidden layers of a call in its backward: what each is, its D, and what its sums become.

    Attributes:
        d: ``[B, pitch]`` of each, in z's dtype; of the experts' units of layers below the last the gradient of their
            activations, where these look at each unit alone. Where D goes through no memory (hopper.py,
            mixing_gradient.py) it becomes dz at once.
        grads: ``[SUMS + 1, pitch]`` of each, fp32: of beta, gamma, alpha (by unit), the head's weight; last the bias.
        coef: ``[2, pitch]`` of each, fp32: what makes dz of D and z.
        weight: the gradient of each weight, filled in from the last to the first; the gates' in ``gate_weight``.
        gate_part: the pieces of the gates' sums, added up with those of the last layer's experts.
        mixed: the mixtures' gradient and the gates' softmax, where the last layer's D is not written.
    """

    def __init__(self, hidden: list[Hidden], plan: LayerPlan, batch_statistics: bool):
        self.hidden, self.plan, self.batch_statistics = hidden, plan, batch_statistics
        self.d = [plan.like(layer.z, layer.layer) for layer in hidden]
        self.grads = [layer.stat.new_empty(SUMS + 1, layer.pitch) for layer in hidden]
        self.coef = [plan.per_column(layer.layer, 2) for layer in hidden]
        self.weight: list[Tensor] = [layer.stat for layer in hidden]
        self.gate_weight: Tensor | None = None
        self.gate_part: Tensor | None = None
        self.mixed: tuple[Tensor, Tensor] | None = None

    def add_up(self, layer: int, part: Tensor, head: Tensor | None = None, losses: bool = False) -> None:
        """Add the pieces of the sums of a layer's experts up, and with the last layer's those of the gates."""
        grads, coef, gates = self.grads[layer], self.coef[layer], None
        if layer + 1 == len(self.hidden) and self.gate_part is not None:
            stat = self.hidden[0].stat
            gates = GateSums(self.gate_part, self.plan.gate_places, stat, self.grads[0], self.coef[0])
        columns = self.plan.columns[layer]
        add_up(part, self.hidden[layer], grads, coef, columns, self.batch_statistics, head, losses, gates)

    def add_up_heads(self, part: Tensor, losses: bool = False) -> tuple[list[Tensor], Tensor]:
        """The same of the last layer under heads; returns the gradients of their weight and bias, and the losses
        (of no meaning unless ``losses``)."""
        spec, at = self.plan.spec, len(self.hidden) - 1
        head = part.new_empty(2, spec.n_experts)
        self.add_up(at, part, head, losses)
        weight = self.grads[at][3, : self.plan.columns[at]].view(spec.n_experts, -1)
        return [weight, head[0]], head[1]

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
            gates = plan.of_gates(self.grads[0], 1)
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
    hidden = [Hidden.of(z, kept.stat[i], params, spec, kept.seed, i) for i, z in enumerate(kept.z)]
    layers = _Layers(hidden, plan, training and n_rows > 1)
    out = _last(grad, layers, kept, params)
    return _walk_down(x, layers, kept, needs_x), layers.gradients(out)


def tower_losses(
    x: Tensor,
    params: ExpertGateParams,
    spec: ExpertGateSpec,
    labels: Tensor,
    is_classification: Tensor,
    factors: Tensor,
    needs_x: bool,
    weights: tuple[Tensor, ...] | None = None,
) -> tuple[Tensor, Tensor, Tensor | None, list[Tensor]] | None:
    """Towers in training with the losses of their logits, forward and backward at once: last BatchNorm, activation,
    output, losses and the first pass back are one pass over the last z.

    Args:
        x, params, spec: as for :func:`fastmtl.ops.expert_gate`.
        labels, is_classification, factors: as for ``task_losses``.
        needs_x: whether the gradient of x is wanted.
        weights: see expert_gate_fwd.

    Returns:
        Losses ``[T]``, logits ``[B, T]``, the gradients of x (or None) and of ``params.learned()``; None where the
        towers' last layer is too wide for one block, or there is none, or no row.
    """
    n_rows = x.shape[1]
    if not spec.dims or spec.dims[-1] > 128 or n_rows == 0:
        return None
    assert params.out_bias is not None
    counts = empty_counts(labels)
    branches.beside(branches.LABELS, count_labels, labels, counts)
    hidden, kept = hidden_layers(x, params, spec, True, weights)
    layers = _Layers(hidden, layer_plan(spec, x.device), n_rows > 1)
    logits = torch.empty(n_rows, spec.n_experts, dtype=torch.float32, device=x.device)
    made = TaskLosses(labels, is_classification, factors, params.out_bias, counts, logits)
    branches.join(branches.LABELS)
    out, losses = layers.add_up_heads(losses_bwd(made, hidden[-1], layers.d[-1], params), losses=True)
    dx = _walk_down(x, layers, kept, needs_x)
    return losses, logits, dx, layers.gradients(out)


def _walk_down(x: Tensor, layers: _Layers, kept: Saved, needs_x: bool) -> Tensor | None:
    """From D of the last layer to the gradients of all weights and of x."""
    plan, first = layers.plan, layers.hidden[0]
    if len(layers.hidden) > 1 and hopper.takes(first):  # its experts' columns become dz by themselves, the gates' so
        branches.beside(branches.WEIGHTS, gates_gradient, layers.d[0], first, layers.coef[0])
    dz = layers.d[-1]  # of no meaning yet
    for hidden in reversed(layers.hidden):
        layer = hidden.layer
        dz = _gradient(dz, layers, kept, hidden)
        if not layer:
            break
        under = layers.hidden[layer - 1]
        if not hopper.takes(under):  # else it comes with dz
            _weight_gradient(dz, under.by_expert(kept.h[layer - 1]), layers, layer)
        _descend(dz, kept.weight[layer], layers, layer)
    # before the weights' gradient: the tables, who wait for this one, leave the tensor cores to that one
    dx = _input_gradient(x, dz, kept.weight[0], plan) if needs_x else None
    _weight_gradient(dz, as_input(x, of_dtype(dz.dtype)), layers, 0)
    return dx


def _gradient(above: Tensor, layers: _Layers, kept: Saved, hidden: Hidden) -> Tensor:
    """dz of a layer from its D, or from ``above``, dz of the layer above it, where D goes through no memory."""
    layer = hidden.layer
    d, coef, is_last = layers.d[layer], layers.coef[layer], layer + 1 == len(layers.hidden)
    if is_last and layers.mixed is not None:
        mixing_gradient.mixed_gradient(*layers.mixed, hidden, layers.plan, coef, d)
        return d
    if is_last or not hopper.takes(hidden):
        return gradient(d, hidden, coef, not is_last and not hidden.row_wise)
    parts = hopper.gradients(above, kept.weight[layer + 1], hidden, coef, d)
    branches.join(branches.WEIGHTS)  # the gates' columns
    layers.weight[layer + 1] = dw = parts.new_empty(layers.plan.columns[layer + 1], hidden.units)
    branches.beside(branches.WEIGHTS, hopper.add_parts, parts, dw)
    return d


def _weight_gradient(dz: Tensor, h: Tensor, layers: _Layers, layer: int) -> None:
    """The gradients of a layer's weights, beside the way down."""
    plan = layers.plan
    dw = torch.empty(plan.pitch[layer], h.shape[2], dtype=torch.float32, device=h.device)
    layers.weight[layer] = dw[: plan.columns[layer]]
    scattered = None
    if not layer and plan.spec.gates:
        if plan.gates_are_together:
            layers.gate_weight = plan.of_gates(dw, 0)
        else:
            layers.gate_weight = scattered = dw.new_empty(plan.spec.gate_rows, h.shape[2])
    branches.beside(branches.WEIGHTS, _multiply, dz, h, plan, layer, dw, scattered)


def _multiply(dz: Tensor, h: Tensor, plan: LayerPlan, layer: int, dw: Tensor, gates: Tensor | None) -> None:
    """dW into ``dw``; the gates' rows of it into ``gates``, where these lie apart."""
    products.weight_gradient(dz, h, plan, layer, dw)
    if gates is not None:
        torch.index_select(dw, 0, plan.gate_places, out=gates)


def _descend(dz: Tensor, weight: Tensor, layers: _Layers, layer: int) -> None:
    """From dz of a layer to the gradient of the activations below and its sums."""
    under = layers.hidden[layer - 1]
    d = layers.d[layer - 1]
    if hopper.takes(under):
        part = hopper.sums(dz, weight, under)
    elif under.row_wise:  # D is made of whole rows, once
        dh = torch.empty_like(d)
        products.input_gradient(dz, weight, under.by_expert(dh), layers.plan, layer)
        part = activations_bwd(dh, under, d)
    else:
        products.input_gradient(dz, weight, under.by_expert(d), layers.plan, layer)
        part = sums(d, under)
    layers.add_up(layer - 1, part)


def _input_gradient(x: Tensor, dz: Tensor, weight: Tensor, plan: LayerPlan) -> Tensor:
    """The gradient of ``x [N, B, I]``, whose rows begin on 16 bytes."""
    n_inputs, n_rows, width = x.shape
    pitch = round_up(width, 16 // dz.dtype.itemsize)
    dx = torch.empty(n_inputs, n_rows, pitch, dtype=dz.dtype, device=x.device)[..., :width]
    return products.input_gradient(dz, weight, dx, plan, 0).to(x.dtype)


def _last(grad: Tensor, layers: _Layers, kept: Saved, params: ExpertGateParams) -> list[Tensor]:
    """From the gradient of the layer's output to D of the last hidden layer; returns the gradients of the head."""
    spec, last = layers.plan.spec, layers.hidden[-1]
    d, at = layers.d[-1], last.layer
    if spec.output_layer:
        return layers.add_up_heads(head_bwd(grad, last, d, params))[0]
    grad = grad if grad.stride(2) == 1 else grad.contiguous()
    if kept.share is None:
        layers.add_up(at, experts_bwd(grad, last, d))
        return []
    writes = not mixing_gradient.takes(last)
    part, layers.gate_part = mix_bwd(grad, last, d, layers.hidden[0], layers.d[0], layers.plan, kept.share, writes)
    layers.mixed = None if writes else (grad, kept.share)
    layers.add_up(at, part)
    return []
