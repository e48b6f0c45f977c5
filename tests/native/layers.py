"""Random expert-gate layers, and what both backends make of them."""

from __future__ import annotations

import random
from dataclasses import dataclass

import torch
from devices import fetch, home, place, run_on
from torch import Tensor

from fastmtl.backends import eager
from fastmtl.ops import expert_gate
from fastmtl.spec import ACTIVATIONS, LEARNED_ACTIVATIONS, ExpertGateParams, ExpertGateSpec, Gate, GateParams

WIDTHS = (1, 2, 3, 5, 8, 15, 16, 17, 31, 32, 33, 40, 64)
BATCHES = (1, 2, 3, 7, 16, 31, 33, 64, 100, 257, 300, 600)
#: Activations whose slope jumps: rounding may put an element on the other side, which is no error of either backend.
KINKED = ("relu", "leakyrelu", "prelu")


def random_spec(rng: random.Random) -> ExpertGateSpec:
    """Any number of inputs, experts, layers and gates; gates over subsets; sometimes an output layer."""
    n_inputs, n_experts = rng.choice((1, 1, 2, 3, 4)), rng.choice((1, 2, 3, 5, 8, 11))
    output_layer = rng.random() < 0.3
    depth = rng.choice((0, 1, 2, 3) if output_layer else (1, 1, 2, 3))
    gates = []
    if not output_layer and rng.random() < 0.7:
        for _ in range(rng.randint(1, 4)):
            some = sorted(rng.sample(range(n_experts), rng.randint(1, n_experts)))
            gates.append(Gate(rng.randrange(n_inputs), tuple(some if rng.random() < 0.5 else range(n_experts))))
        gates.sort(key=lambda gate: gate.input)
    return ExpertGateSpec(
        in_features=rng.choice((1, 2, 7, 16, 19, 48, 70)),
        expert_input=tuple(sorted(rng.randrange(n_inputs) for _ in range(n_experts))),
        dims=tuple(rng.choice(WIDTHS) for _ in range(depth)),
        activation=rng.choice(ACTIVATIONS),
        gates=tuple(gates),
        output_layer=output_layer,
    )


def new_params(spec: ExpertGateSpec, generator: torch.Generator) -> ExpertGateParams:
    """Parameters of the size training gives them."""

    def draw(*shape: int, mean: float = 0.0, std: float = 1.0) -> Tensor:
        return mean + std * torch.randn(*shape, generator=generator)

    def norm(columns: int) -> list[Tensor]:
        tensors = [draw(columns, std=0.1) for _ in range(4)]  # bias, gamma - 1, beta, running mean
        tensors[1] += 1
        return [*tensors, 0.5 + torch.rand(columns, generator=generator)]

    widths = [spec.in_features, *spec.dims]
    columns = [spec.n_experts * width for width in spec.dims]
    weight = [draw(c, fan_in, std=fan_in**-0.5) for c, fan_in in zip(columns, widths, strict=False)]
    norms = [norm(c) for c in columns]
    bias, gamma, beta, mean, var = (tuple(n[i] for n in norms) for i in range(5))
    alpha = tuple(draw(spec.n_experts) for _ in columns) if spec.activation in LEARNED_ACTIVATIONS else ()
    out = (draw(spec.n_experts, widths[-1]), draw(spec.n_experts)) if spec.output_layer else (None, None)
    gate = None
    if spec.gates:
        rows = spec.gate_rows
        gate = GateParams(draw(rows, spec.in_features, std=spec.in_features**-0.5), *norm(rows))
    return ExpertGateParams(tuple(weight), bias, gamma, beta, mean, var, alpha, *out, gate)


@dataclass
class Case:
    """One random call: the layer, its parameters, its input and the output's gradient."""

    spec: ExpertGateSpec
    params: ExpertGateParams
    x: Tensor
    grad: Tensor
    training: bool

    def copy_params(self, dtype: torch.dtype = torch.float32) -> ExpertGateParams:
        learned = [p.to(dtype, copy=True).requires_grad_() for p in self.params.learned()]
        return ExpertGateParams.of(learned, [p.to(dtype, copy=True) for p in self.params.running()], self.spec)


@dataclass
class Result:
    """What one backend makes of a case; ``gradients`` in the order of ``params.learned()``."""

    out: Tensor
    dx: Tensor
    gradients: list[Tensor]
    running: list[Tensor]

    def tensors(self) -> list[Tensor]:
        return [self.out, self.dx, *self.gradients, *self.running]

    def parts(self) -> tuple[list[Tensor], list[Tensor]]:
        """What is computed and what is its gradient."""
        return [self.out, *self.running], [self.dx, *self.gradients]


def in_any_layout(tensor: Tensor, rng: random.Random) -> Tensor:
    """The same numbers: contiguous, transposed, or a window of something wider."""
    kind = rng.randrange(4)
    if kind == 0 and tensor.ndim == 3:
        return tensor.transpose(0, 1).contiguous().transpose(0, 1)
    if kind == 1:
        return tensor.transpose(-1, -2).contiguous().transpose(-1, -2)
    if kind == 2:
        wide = tensor.new_zeros(*tensor.shape[:-1], tensor.shape[-1] + 3)
        wide[..., 2:-1] = tensor
        return wide[..., 2:-1]
    return tensor


def run(case: Case, backend: str, dtype: torch.dtype = torch.float32) -> Result:
    """Forward and backward on a backend, on copies of the parameters."""
    params = case.copy_params(dtype)
    x = case.x.to(dtype).detach().requires_grad_()
    there = place(params, home(backend))
    out = run_on(backend, expert_gate, x, there, case.spec, case.training)
    out.backward(case.grad.to(dtype))
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in params.learned()]
    return Result(out.detach(), torch.zeros_like(x) if x.grad is None else x.grad, gradients, fetch(there.running()))


def random_case(seed: int, spec: ExpertGateSpec | None = None, batch: int | None = None) -> Case:
    """A case by its seed, with no element so near to a kink that rounding decides its side."""
    rng = random.Random(seed)
    generator = torch.Generator().manual_seed(seed)
    spec = spec or random_spec(rng)
    batch = rng.choice(BATCHES) if batch is None else batch
    training = rng.random() < 0.6
    while True:
        x = torch.randn(spec.n_inputs, batch, spec.in_features, generator=generator) * rng.choice((0.1, 1.0, 5.0))
        case = Case(spec, new_params(spec, generator), in_any_layout(x, rng), torch.empty(0), training)
        if spec.activation not in KINKED or batch == 0 or _distance_to_kink(case) > 3e-6:
            break
    with torch.no_grad():
        shape = eager.expert_gate(case.x, case.copy_params(), spec, False).shape
    case.grad = in_any_layout(torch.randn(shape, generator=generator), rng)
    return case


def _distance_to_kink(case: Case) -> float:
    nearest = float("inf")
    activate = eager.activate

    def watch(z, activation, alpha):
        nonlocal nearest
        nearest = min(nearest, z.abs().min().item())
        return activate(z, activation, alpha)

    eager.activate = watch
    try:
        with torch.no_grad():
            eager.expert_gate(case.x.double(), case.copy_params(torch.float64), case.spec, case.training)
    finally:
        eager.activate = activate
    return nearest
