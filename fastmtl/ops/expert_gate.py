"""expert_gate: a layer of experts and the gates that mix them; SharedBottom, MMoE, PLE's CGC and the towers alike."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import backend
from ..spec import ExpertGateParams, ExpertGateSpec


def _flatten(params: ExpertGateParams) -> list[Tensor]:
    """The learned tensors, in the order in which a backend's backward returns their gradients."""
    flat = [*params.weight, *params.bias, *params.gamma, *params.beta, *params.alpha]
    return flat if params.out_weight is None else [*flat, params.out_weight, params.out_bias]


class _ExpertGate(torch.autograd.Function):
    """Autograd around a backend that brings its own backward. The saved tensors are only read, so that a retained
    graph can be walked several times (GradNorm, MetaBalance)."""

    @staticmethod
    def forward(ctx, module, x, params, spec, training, *flat):
        out, saved = module.expert_gate_fwd(x, params, spec, training)
        ctx.module, ctx.spec, ctx.training = module, spec, training
        ctx.n_flat, ctx.layers = len(flat), len(spec.dims)
        ctx.save_for_backward(x, *flat, *params.running_mean, *params.running_var, *saved)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        x, *rest = ctx.saved_tensors
        flat, rest = rest[: ctx.n_flat], rest[ctx.n_flat :]
        n = ctx.layers
        alphas = ctx.n_flat - 4 * n - 2 * ctx.spec.output_layer
        params = ExpertGateParams(
            tuple(flat[:n]), tuple(flat[n : 2 * n]), tuple(flat[2 * n : 3 * n]), tuple(flat[3 * n : 4 * n]),
            tuple(rest[:n]), tuple(rest[n : 2 * n]), tuple(flat[4 * n : 4 * n + alphas]),
            *(flat[-2:] if ctx.spec.output_layer else ()),
        )  # fmt: skip
        dx, grads = ctx.module.expert_gate_bwd(
            grad, x, params, ctx.spec, ctx.training, rest[2 * n :], ctx.needs_input_grad[1]
        )
        return None, dx, None, None, None, *grads


def expert_gate(x: Tensor, params: ExpertGateParams, spec: ExpertGateSpec, training: bool) -> Tensor:
    """Run a layer of E experts and G gates.

    Args:
        x: ``[N, B, I]``, the inputs (one for SharedBottom, MMoE and the first level of PLE).
        params: the batched parameters; the running statistics are updated in place in training.
        spec: shapes, activation, dropout, which expert and gate reads which input.
        training: batch statistics and dropout, or running statistics. A batch of one row is always normalised by the
            running statistics and leaves them alone.

    Returns:
        ``[G, B, H]`` mixed experts; ``[E, B, H]`` without gates; ``[B, E]`` logits with an output layer.

    Source:
        MMoE: Ma et al., KDD'18, section 4; CGC: Tang et al., RecSys'20, section 4.
    """
    module = backend.resolve("expert_gate", x, *params.weight[:1])
    if module.DIFFERENTIABLE:
        return module.expert_gate(x, params, spec, training)
    flat = _flatten(params)
    if torch.is_grad_enabled() and (x.requires_grad or any(p.requires_grad for p in flat)):
        return _ExpertGate.apply(module, x, params, spec, training, *flat)
    return module.expert_gate_fwd(x, params, spec, training)[0]
