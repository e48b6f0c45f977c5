"""What lies between two hidden layers on Hopper (hopper.py), within whole layers: with its ops, or where there is no
such GPU with torch's operations in their place."""

from dataclasses import replace

import pytest
import torch
from torch.nn.functional import leaky_relu, relu, silu
from triton_cases import Layer, check_parts, eager_step, out_shape, random_params

from fastmtl.backends import triton as backend
from fastmtl.backends.triton import configs, hopper, launch
from fastmtl.backends.triton.hidden import Hidden
from fastmtl.spec import ExpertGateSpec, Gate

ACTIVATIONS = {"relu": relu, "leakyrelu": leaky_relu, "silu": silu}


def _normal(z, stat, n_experts, units):
    mean, _, scale, beta = stat[:, : n_experts * units].view(4, n_experts, units)
    centred = z[:, : n_experts * units].float().view(len(z), n_experts, units) - mean
    return centred, centred * scale + beta


def _act(activation):
    return list(ACTIVATIONS.values())[activation]


def _up(below, stat, weight, n_experts, n_below, n_units, activation, run_rows, z, part):
    h = _act(activation)(_normal(below, stat, n_experts, n_below)[1]).bfloat16().float()
    n = n_experts * n_units
    z[:, :n] = torch.einsum("bek,enk->ben", h, weight.float().view(n_experts, n_units, n_below)).flatten(1)
    for run, rows in enumerate(z[:, :n].float().split(run_rows)):
        part[run, 0, :n], part[run, 1, :n] = rows.mean(0), rows.var(0, correction=0) * len(rows)


def _d(dz, weight, z, stat, n_experts, n_units, n_above, activation):
    dz = dz[:, : n_experts * n_above].float().view(len(dz), n_experts, n_above)
    dh = torch.einsum("ben,enk->bek", dz, weight.float().view(n_experts, n_above, n_units))
    centred, y = _normal(z, stat, n_experts, n_units)
    with torch.enable_grad():
        y = y.detach().requires_grad_()
        (d,) = torch.autograd.grad(_act(activation)(y), y, dh)
    return dz, centred, _act(activation)(y.detach()).bfloat16().float(), d


def _down_sums(dz, weight, z, stat, n_experts, n_units, n_above, activation, run_rows, part):
    _, centred, _, d = _d(dz, weight, z, stat, n_experts, n_units, n_above, activation)
    n = n_experts * n_units
    for which, rows in enumerate((d.flatten(1), (d * centred).flatten(1) * stat[1, :n])):
        for run, of_run in enumerate(rows.split(run_rows)):
            part[run, which, :n] = of_run.sum(0)


def _down(dz, weight, z, stat, coef, n_experts, n_units, n_above, activation, run_rows, out, parts):
    dz, centred, h, d = _d(dz, weight, z, stat, n_experts, n_units, n_above, activation)
    n = n_experts * n_units
    slope, shift, scale = (row[:n].view(n_experts, n_units) for row in (coef[0], coef[1], stat[2]))
    out[:, :n] = (((d - shift) - centred * slope) * scale).flatten(1).bfloat16()
    for run, both in enumerate(zip(dz.split(run_rows), h.split(run_rows), strict=True)):
        parts[run] = torch.einsum("bem,bek->emk", *both)


@pytest.fixture
def taken(device, monkeypatch):
    """The calls of the ops, which stand-ins answer where this is no Hopper GPU."""
    made = []
    is_here = hopper._is_here(device)

    def call(operation, **arguments):
        made.append(operation.name)
        stand_in = {"expert_gate_up": _up, "expert_gate_down_sums": _down_sums, "expert_gate_down": _down}[
            operation.name
        ]
        if is_here:
            launch.call(operation, **arguments)
        else:
            stand_in(*(arguments[name] for name in operation.arg_names))

    monkeypatch.setattr(hopper, "call", call)
    monkeypatch.setattr(hopper, "LEAST_ROWS", 2)
    if not is_here:  # and the kernels around them in blocks that hold most of such a layer
        monkeypatch.setattr(hopper, "_is_here", lambda device: True)
        monkeypatch.setattr(configs, "EXPERT_GATE", configs.ExpertGateConfig(cap=64))
        monkeypatch.setattr(configs, "OPERANDS", configs.Elements(4096, configs.OPERANDS.warps))
    return made


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("case", range(4))
def test_layers(case, training, seed, device, taken):
    """Under gates, heads or neither, with one more layer below or above, with rows that end in padding: at most twice
    eager's own error under autocast, and a floor of bf16's spacing."""
    activation, kind = list(ACTIVATIONS)[case % 3], ("gates", "heads", "experts", "heads")[case]
    dims = ((144, 72), (136, 80, 8), (9, 136, 72), (136, 72))[case]
    n_experts = 3 if case == 3 else 2
    gates = (Gate(0, (0, 1)), Gate(0, (1,))) if kind == "gates" else ()
    rng = torch.Generator().manual_seed(seed)
    spec = ExpertGateSpec(12, (0,) * n_experts, dims, activation, 0.0, gates, kind == "heads")
    x = torch.randn(1, 45, 12, generator=rng, dtype=torch.float64)
    layer = Layer(spec, random_params(spec, rng), x)
    grad = torch.randn(out_shape(layer), dtype=torch.float64, generator=rng)

    def by_eager(one):
        exact, rounded = one.cast(torch.float64), one.cast(torch.float32)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found = eager_step(rounded, training, grad)
        right = eager_step(exact, training, grad)
        return [[found[0]], found[1]], [[right[0]], right[1]]

    mine = layer.cast(torch.float32, device)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        out, saved = backend.expert_gate_fwd(mine.x, mine.params, spec, training)
    before = [tensor.clone() for tensor in saved]
    grads: list[torch.Tensor] = []
    for needs_x in (True, False):  # nothing that was saved is written to
        dx, grads = backend.expert_gate_bwd(
            grad.to(device, out.dtype), mine.x, mine.params, spec, training, list(saved), needs_x
        )
        if needs_x:
            first = [dx, *grads]
    assert all(torch.equal(a, b) for a, b in zip(first[1:], grads, strict=True))
    assert all(torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in zip(before, saved, strict=True))
    check_parts([[out], first], by_eager, layer, relative=(2**-8, 2**-6), spacing=2.0**-8)
    down = ["expert_gate_down_sums", "expert_gate_down"]
    assert taken == ["expert_gate_up"] * training + 2 * down


def test_what_is_not_taken(device, taken):
    """Other widths, activations and precisions, and small batches."""
    spec = ExpertGateSpec(12, (0, 0), (144, 72), "relu")

    def hidden(z, spec=spec, seed=None):
        return Hidden(z, z, None, seed, spec, 0, spec.dims[0])

    z = torch.zeros(8, 288, dtype=torch.bfloat16, device=device)
    assert hopper.takes(hidden(z))
    for other in (
        hidden(z[:1]),
        hidden(z.float()),
        hidden(z, seed=z),
        hidden(z, replace(spec, dims=(144,))),
        hidden(z, replace(spec, dims=(128, 72))),
        hidden(z, replace(spec, dims=(144, 64))),
        hidden(z, replace(spec, dims=(144, 136))),
        hidden(z, replace(spec, dims=(260, 72))),
        hidden(z, replace(spec, dims=(148, 72))),
        hidden(z, replace(spec, activation="tanh")),
    ):
        assert not hopper.takes(other), other
