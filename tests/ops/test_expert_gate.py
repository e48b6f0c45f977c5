"""expert_gate on eager against one small MLP after the other, in float64."""

import pytest
import torch
from devices import call, place
from torch import nn

from fastmtl import backend as backends
from fastmtl.basic.bank import ExpertGate, bank_spec
from fastmtl.basic.layers import MLP
from fastmtl.spec import ACTIVATIONS, Gate


def random_bank(seed: int, activation: str, output_layer: bool = False):
    """A bank, and the MLPs it was made of."""
    rng = torch.Generator().manual_seed(seed)

    def draw(low, high):
        return int(torch.randint(low, high, (), generator=rng))

    torch.manual_seed(seed)
    n_inputs, width = draw(1, 4), draw(1, 7)
    dims = [draw(1, 7) for _ in range(draw(1, 4))]
    expert_input = sorted([*range(n_inputs), *(draw(0, n_inputs) for _ in range(draw(0, 5)))])
    gates = []
    if not output_layer:
        for source in sorted(draw(0, n_inputs) for _ in range(draw(0, 4))):
            members = [e for e in range(len(expert_input)) if draw(0, 2)] or [0]
            gates.append(Gate(source, tuple(members)))
    params = {"dims": dims, "activation": activation}
    experts = [MLP(width, output_layer, **params).double() for _ in expert_input]
    gate_mlps = [MLP(width, False, dims=[len(g.experts)], activation="softmax").double() for g in gates]
    bank = ExpertGate(
        bank_spec(width, params, expert_input, gates, output_layer),
        experts,
        gate_mlps,
        [f"experts.{e}" for e in range(len(experts))],
        [f"gates.{g}" for g in range(len(gates))],
    )
    x = torch.randn(n_inputs, 9, width, dtype=torch.float64)
    return bank, nn.ModuleList(experts), nn.ModuleList(gate_mlps), x


def one_by_one(bank, experts, gates, x):
    outs = [expert(x[source]) for expert, source in zip(experts, bank.spec.expert_input, strict=True)]
    if bank.spec.output_layer:
        return torch.cat(outs, 1)
    if not bank.spec.gates:
        return torch.stack(outs)
    mixed = []
    for gate, mlp in zip(bank.spec.gates, gates, strict=True):
        weights = mlp(x[gate.input])
        mixed.append(sum(weights[:, k : k + 1] * outs[e] for k, e in enumerate(gate.experts)))
    return torch.stack(mixed)


@pytest.mark.parametrize("output_layer", [False, True])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_matches_single_mlps(activation, output_layer, seed):
    """Outputs, input gradients, parameter gradients and running statistics, in training and in evaluation."""
    for case in range(4):
        bank, experts, gates, x = random_bank(seed + case, activation, output_layer)
        x_ref = x.clone().requires_grad_()
        x = x.clone().requires_grad_()
        with backends.use_backend("eager"):
            for training in (True, False):
                bank.train(training), experts.train(training), gates.train(training)
                out, ref = bank(x), one_by_one(bank, experts, gates, x_ref)
                torch.testing.assert_close(out, ref, rtol=1e-9, atol=1e-11)
                weight = torch.randn_like(ref)
                (out * weight).sum().backward()
                (ref * weight).sum().backward()
        torch.testing.assert_close(x.grad, x_ref.grad, rtol=1e-7, atol=1e-9)
        theirs = nn.ModuleDict({"experts": experts, "gates": gates})
        state = theirs.state_dict()
        assert list(bank.state_dict()) == list(state)
        for name, value in bank.state_dict().items():
            torch.testing.assert_close(value, state[name], rtol=1e-9, atol=1e-11)
        for name, stored, view in bank.named_views():
            if isinstance(stored, nn.Parameter):
                expected = theirs.get_parameter(name).grad
                if expected is None:  # an expert that no gate mixes
                    expected = torch.zeros_like(theirs.get_parameter(name))
                torch.testing.assert_close(view.of(stored.grad), expected, rtol=1e-7, atol=1e-8)


def test_one_row_in_training_uses_and_keeps_the_running_statistics(backend):
    torch.manual_seed(0)
    bank = place(ExpertGate(bank_spec(3, {"dims": [4]}, (0,)), [MLP(3, False, dims=[4])], (), ["expert"]))
    x = torch.randn(1, 1, 3)
    before = {name: value.clone() for name, value in bank.state_dict().items()}
    with backends.use_backend(backend):
        trained = call(bank.train(), x)
        torch.testing.assert_close(trained, call(bank.eval(), x))
    assert all(torch.equal(value, before[name]) for name, value in bank.state_dict().items())
