"""Random cases for the kernels, the reference in float64, and the rule for errors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from fastmtl.backends import eager
from fastmtl.spec import (
    ACTIVATIONS,
    LEARNED_ACTIVATIONS,
    Bag,
    EmbeddingSpec,
    ExpertGateParams,
    ExpertGateSpec,
    Gate,
    GateParams,
)

if TYPE_CHECKING:
    from fastmtl.backends.triton.packing import PackedLayer, PackedTowers


def drawer(rng: torch.Generator) -> Callable[[int, int], int]:
    """``draw(low, high)`` gives an integer in ``[low, high)``."""
    return lambda low, high: int(torch.randint(low, high, (), generator=rng))


def check(
    mine: Sequence[Tensor],
    eager32: Sequence[Tensor],
    reference: Sequence[Tensor],
    relative: float = 1e-6,
    factor: float = 2.0,
    drawn: Sequence[tuple[Sequence[Tensor], Sequence[Tensor]]] = (),
) -> None:
    """Each tensor's error is at most ``factor`` times eager's at the same precision, plus a floor.

    Eager's is its own on that tensor, or its worst relative one on any of them: where round-off is amplified, which
    tensor shows it is luck. So is how much: ``drawn`` are eager's results and the exact ones on problems that are this
    one but for the last bits of their numbers, and the largest error counts. The floor is ``relative`` to the tensor
    and a fifth of that to the largest of all (sums that cancel to nearly 0 keep the round-off of their terms).
    """
    norms = [tensor.norm().item() for tensor in reference]
    largest = max(norms, default=0.0)
    theirs = [0.0] * len(norms)
    for results, exact in ((eager32, reference), *drawn):
        found = [(tensor.double() - want).norm().item() for tensor, want in zip(results, exact, strict=True)]
        theirs = [max(pair) for pair in zip(theirs, found, strict=True)]
    worst = max((e / n for e, n in zip(theirs, norms, strict=True) if n > 1e-3 * largest), default=0.0)
    for i, (got, want, own, norm) in enumerate(zip(mine, reference, theirs, norms, strict=True)):
        assert got.shape == want.shape, (i, got.shape, want.shape)
        error, allowed = (got.cpu().double() - want).norm().item(), factor * max(own, worst * norm)
        floor = relative * norm + 0.2 * relative * largest + 1e-30  # what is exactly 0 may be a number that underflows
        assert error <= allowed + floor, f"tensor {i} of norm {norm:.2e}: {error:.2e} > {allowed:.2e} + {floor:.2e}"


#: Problems like the one at hand on which eager's error is looked at, where its error on that one is not enough.
DRAWS = 16

#: What is computed of a layer: lists of tensors that are judged together, as the output, and the gradients.
Parts = Sequence[Sequence[Tensor]]


def check_parts(
    mine: Parts,
    by_eager: Callable[[Layer], tuple[Parts, Parts]],
    layer: Layer,
    relative: Sequence[float] = (1e-6, 1e-6, 1e-6),
    factor: float = 2.0,
    spacing: float = 2.0**-23,
) -> None:
    """``check`` each part of what was computed of a layer, by ``by_eager``: its parts at mine's precision, and exact.

    A BatchNorm amplifies rounding in a column whose values are nearly equal: how much, eager shows on problems that are
    nearly this one, whose numbers are moved by up to half of ``spacing``.
    """
    found = by_eager(layer)
    try:
        for part in zip(mine, *found, relative[: len(mine)], strict=True):
            check(*part, factor=factor)
    except AssertionError:
        near = [by_eager(layer.moved(draw, spacing)) for draw in range(DRAWS)]
        for i, part in enumerate(zip(mine, *found, relative[: len(mine)], strict=True)):
            check(*part, factor=factor, drawn=[(rounded[i], exact[i]) for rounded, exact in near])


# ------------------------------------------------------------------------------------------------------- lookups


class Lookup(NamedTuple):
    """Arguments of embedding_bag, weights in float64."""

    weights: list[Tensor]
    ids: Tensor
    columns: tuple[int, ...]
    dense: Tensor | None
    spec: EmbeddingSpec


def random_lookup(seed: int, batch: int | None = None) -> Lookup:
    """Several widths, poolings, paddings and ways with unknown ids; tables that two features share; hot rows."""
    rng = torch.Generator().manual_seed(seed)
    draw = drawer(rng)
    batch = (0, 1, 5, 23)[draw(0, 4)] if batch is None else batch
    dims = [draw(1, 10) for _ in range(draw(1, 4))]
    rows = [0] * len(dims)
    bags: list[Bag] = []
    columns, ids = [0], []
    for f in range(draw(len(dims), 8)):
        table, vocab = f if f < len(dims) else draw(0, len(dims)), draw(2, 40)
        offset = rows[table]
        shared = [bag for bag in bags if bag.table == table]
        if shared and draw(0, 3) == 0:
            offset, vocab = shared[0].offset, shared[0].vocab
        else:
            rows[table] += vocab
        length = draw(1, 6)
        padding = ((), (-1,), (0, -1))[draw(0, 3)]
        oov = ("raise", "zero", vocab - 1)[draw(0, 3)]
        bags.append(
            Bag(f"f{f}", table, offset, vocab, dims[table], ("sum", "mean", "concat")[draw(0, 3)], padding, oov)
        )
        low, high = (-1 if padding else 0, vocab) if oov == "raise" else (-3, vocab + 3)
        if draw(0, 3) == 0:
            low, high = 1, 2  # one row takes every lookup of the feature
        ids.append(torch.randint(low, high, (batch, length), generator=rng))
        columns.append(columns[-1] + length)
    weights = [torch.randn(n, d, generator=rng, dtype=torch.float64) for n, d in zip(rows, dims, strict=True)]
    n_dense = draw(0, 6)
    dense = torch.randn(batch, n_dense, generator=rng, dtype=torch.float64) if n_dense else None
    return Lookup(weights, torch.cat(ids, 1), tuple(columns), dense, EmbeddingSpec(tuple(bags), n_dense))


# -------------------------------------------------------------------------------------------------------- layers


class Layer(NamedTuple):
    """Arguments of expert_gate in float64."""

    spec: ExpertGateSpec
    params: ExpertGateParams
    x: Tensor

    def cast(self, dtype: torch.dtype, device: torch.device | str = "cpu") -> Layer:
        """A copy of its own."""
        learned, running = (
            [tensor.to(device, dtype, copy=True) for tensor in tensors]
            for tensors in (self.params.learned(), self.params.running())
        )
        return Layer(self.spec, ExpertGateParams.of(learned, running, self.spec), self.x.to(device, dtype, copy=True))

    def moved(self, seed: int, spacing: float = 2.0**-23) -> Layer:
        """The same but for the last bits, of numbers that are ``spacing`` apart (float32's), of all its numbers."""
        rng = torch.Generator().manual_seed(seed)

        def near(tensor: Tensor) -> Tensor:
            return tensor * (1 + spacing * (torch.rand(tensor.shape, generator=rng, dtype=torch.float64) - 0.5))

        learned, running = ([near(t) for t in part] for part in (self.params.learned(), self.params.running()))
        return Layer(self.spec, ExpertGateParams.of(learned, running, self.spec), near(self.x))


def random_layer(seed: int, **fixed: Any) -> Layer:
    """Any kind of layer: N inputs, gates over subsets or towers or neither, depths, widths, odd sizes.

    ``fixed`` may hold activation, kind ("gates", "experts", "heads"), batch, dropout, and the most hidden layers.
    """
    rng = torch.Generator().manual_seed(seed)
    draw = drawer(rng)
    n_inputs, width = draw(1, 4), draw(1, 36)
    dims = tuple(draw(1, 24) for _ in range(draw(1, 1 + fixed.get("depth", 3))))
    kind = fixed.get("kind") or ("gates", "experts", "heads")[draw(0, 3)]
    # every input has an expert, or the experts have any inputs
    experts = [*range(n_inputs)] if draw(0, 2) else [draw(0, n_inputs)]
    expert_input = tuple(sorted([*experts, *(draw(0, n_inputs) for _ in range(draw(0, 4)))]))
    gates: tuple[Gate, ...] = ()
    if kind == "gates":
        sources = sorted(draw(0, n_inputs) for _ in range(draw(1, 5)))
        everyone = range(len(expert_input))
        gates = tuple(Gate(n, tuple(e for e in everyone if draw(0, 2)) or (draw(0, len(everyone)),)) for n in sources)
    if kind == "heads" and draw(0, 5) == 0:
        dims = ()
    activation = fixed.get("activation") or ACTIVATIONS[draw(0, len(ACTIVATIONS))]
    dropout = fixed.get("dropout", 0.0)
    spec = ExpertGateSpec(width, expert_input, dims, activation, dropout, gates, kind == "heads")
    batch = fixed["batch"] if "batch" in fixed else (1, 9, 17, 35)[draw(0, 4)]
    return Layer(
        spec, random_params(spec, rng), torch.randn(spec.n_inputs, batch, width, generator=rng, dtype=torch.float64)
    )


def random_params(spec: ExpertGateSpec, rng: torch.Generator) -> ExpertGateParams:
    """Parameters and running statistics of the size training gives them."""

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=rng, dtype=torch.float64)

    n_experts, widths = spec.n_experts, (spec.in_features, *spec.dims)
    weight = tuple(normal(n_experts * h, i) / i**0.5 for i, h in zip(widths, spec.dims, strict=False))
    bias, gamma, beta, mean, var = (tuple(normal(n_experts * h) / 2 for h in spec.dims) for _ in range(5))
    gamma, var = tuple(g + 1 for g in gamma), tuple(v.abs() + 0.5 for v in var)
    alpha = tuple(normal(n_experts) for _ in spec.dims) if spec.activation in LEARNED_ACTIVATIONS else ()
    out = (normal(n_experts, widths[-1]), normal(n_experts)) if spec.output_layer else (None, None)
    gate = None
    if spec.gates:
        n = spec.gate_rows
        gate = GateParams(
            normal(n, spec.in_features) / spec.in_features**0.5, normal(n), normal(n), normal(n), normal(n),
            normal(n).abs() + 0.5,
        )  # fmt: skip
    return ExpertGateParams(weight, bias, gamma, beta, mean, var, alpha, *out, gate)


def eager_step(layer: Layer, training: bool, grad: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Output and gradients (of x and ``params.learned()``) on eager; running statistics are updated in place."""
    x = layer.x.clone().requires_grad_()
    learned = [tensor.clone().requires_grad_() for tensor in layer.params.learned()]
    params = ExpertGateParams.of(learned, layer.params.running(), layer.spec)
    out = eager.expert_gate(x, params, layer.spec, training)
    grads = torch.autograd.grad(out, [x, *learned], grad.to(out.dtype), allow_unused=True)
    filled = [torch.zeros_like(t) if g is None else g for t, g in zip([x, *learned], grads, strict=True)]
    return out.detach(), filled


def out_shape(layer: Layer) -> tuple[int, ...]:
    """Of the op's output."""
    spec, batch = layer.spec, layer.x.shape[1]
    return (batch, spec.n_experts) if spec.output_layer else (len(spec.gates) or spec.n_experts, batch, spec.dims[-1])


def staged_layer(
    rng: torch.Generator,
    n_experts: int,
    activation: str,
    device: torch.device | str = "cpu",
    n_in: int = 0,
    gates: tuple[Gate, ...] = (),
) -> tuple[PackedLayer, PackedTowers]:
    """A layer and its towers, packed, of random widths that the kernel for Hopper takes (csrc/cuda/folded.cuh); an
    expert that no gate mixes gives NaN."""
    from fastmtl.backends.triton.packing import PackedLayer, PackedTowers

    draw = drawer(rng)
    n_in = n_in or draw(65, 385)
    dims, tower_dims = (draw(129, 257), draw(65, 129)), (draw(33, 65), draw(17, 33))
    everyone = range(n_experts)
    gates = gates or tuple(
        Gate(0, tuple(e for e in everyone if draw(0, 2)) or (draw(0, n_experts),)) for _ in range(draw(1, 5))
    )
    spec = ExpertGateSpec(n_in, (0,) * n_experts, dims, activation, 0.0, gates, False)
    towers = ExpertGateSpec(dims[1], tuple(range(len(gates))), tower_dims, activation, 0.0, (), True)
    nothing = torch.empty(0)
    params, tower_params = (
        Layer(one, random_params(one, rng), nothing).cast(torch.float32, device).params for one in (spec, towers)
    )
    for e in set(everyone) - {e for gate in gates for e in gate.experts}:
        params.bias[1][e * dims[1] : (e + 1) * dims[1]] = torch.nan
    layer = PackedLayer(spec, params, None, torch.bfloat16)
    return layer, PackedTowers(towers, tower_params, layer.h2, None, torch.bfloat16)


def staged_logits(x: Tensor, layer: PackedLayer, towers: PackedTowers) -> Tensor:
    """Logits ``[B, G]`` in float64 of ``x [B, I]``, rounded to bf16 where the kernel rounds."""
    activation = {"relu": functional.relu, "leakyrelu": functional.leaky_relu, "silu": functional.silu}[
        layer.spec.activation
    ]

    def rounded(value: Tensor) -> Tensor:
        return activation(value).bfloat16().double()

    w = {name: value.double() for name, value in layer.arguments().items() if isinstance(value, Tensor)}
    t = {name: value.double() for name, value in towers.tower_arguments().items() if isinstance(value, Tensor)}
    n = x.shape[1]
    logits = x @ w["Wg_ptr"][0, :, :n].T + w["Bg_ptr"]
    first = rounded(x @ w["W1_ptr"][:, :, :n].mT + w["B1_ptr"][:, None])
    h = rounded(first @ w["W2_ptr"].mT + w["B2_ptr"][:, None])
    found = []
    for g, (gate, span) in enumerate(zip(layer.spec.gates, layer.spec.gate_spans, strict=True)):
        share = logits[:, slice(*span)].softmax(1)
        y = sum(share[:, [i]] * h[e] for i, e in enumerate(gate.experts))
        z = rounded(y.bfloat16().double() @ t["T1_ptr"][g].T + t["Tb1_ptr"][g])
        z = activation(z @ t["T2_ptr"][g].T + t["Tb2_ptr"][g])
        found.append(z @ t["Head_ptr"][g] + t["Headb_ptr"].flatten()[g])
    return torch.stack(found, 1)


def check_staged(found: Tensor, wanted: Tensor) -> None:
    """Sums in another order: now and then a number is rounded to its other neighbour in bf16, which moves a row by more
    than all others are off."""
    error = (found.double() - wanted).norm().item()
    assert error <= 2e-3 * wanted.norm().item(), (error, wanted.norm().item())
    torch.testing.assert_close(found.double(), wanted, rtol=0.02, atol=0.02)
