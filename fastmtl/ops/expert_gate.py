"""expert_gate: a layer of experts and the gates that mix them; SharedBottom, MMoE, PLE's CGC and the towers alike."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from .. import backend
from ..spec import ExpertGateParams, ExpertGateSpec


class _ExpertGate(torch.autograd.Function):
    """Autograd around a backend that brings its own backward. The saved tensors are only read, so that a retained
    graph can be walked several times (GradNorm, MetaBalance)."""

    @staticmethod
    def forward(
        ctx: Any,
        module: ModuleType,
        x: Tensor,
        params: ExpertGateParams,
        spec: ExpertGateSpec,
        training: bool,
        *learned: Tensor,
    ) -> Tensor:
        out, saved = module.expert_gate_fwd(x, params, spec, training)
        ctx.module, ctx.spec, ctx.training = module, spec, training
        running = params.running()
        ctx.cuts = len(learned), len(learned) + len(running)
        ctx.save_for_backward(x, *learned, *running, *saved)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, *rest = ctx.saved_tensors
        a, b = ctx.cuts
        params = ExpertGateParams.of(rest[:a], rest[a:b], ctx.spec)
        dx, grads = ctx.module.expert_gate_bwd(
            grad, x, params, ctx.spec, ctx.training, rest[b:], ctx.needs_input_grad[1]
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
    learned = params.learned()
    if torch.is_grad_enabled() and (x.requires_grad or any(p.requires_grad for p in learned)):
        return _ExpertGate.apply(module, x, params, spec, training, *learned)
    return module.expert_gate_fwd(x, params, spec, training)[0]
