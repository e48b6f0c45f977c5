"""The gradients of a chain of layers in one call: bit for bit those of its layers, whoever computes them."""

from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from fastmtl.backends import native
from fastmtl.spec import ExpertGateParams, ExpertGateSpec, Gate

from .folded_layers import random_case
from .layers import new_params


class Chain(NamedTuple):
    """Experts, mixed for each of two tasks once or twice, and towers."""

    x: Tensor
    specs: list[ExpertGateSpec]
    learned: list[list[Tensor]]
    running: list[list[Tensor]]
    labels: Tensor
    folded: native.Folded | None

    def layers(self):
        """Parameters whose running statistics are copies."""
        return [
            (ExpertGateParams.of(learned, [p.clone() for p in running], spec), spec)
            for spec, learned, running in zip(self.specs, self.learned, self.running, strict=True)
        ]


def new_chain(seed, n_rows=1500, levels=1, dropout=0.2, folds=False):
    generator = torch.Generator().manual_seed(seed)
    gates = (Gate(0, tuple(range(6))),) * 2
    spec = ExpertGateSpec(40, (0,) * 6, (64, 33), "prelu", dropout, gates)
    x, folded = torch.randn(1, n_rows, 40, generator=generator), None
    if folds:
        case = random_case(seed, spec, n_rows)
        spec, x, folded = case.spec, case.x[None], native.Folded(torch.tensor(case.places), case.table, case.picks)
    specs = [spec]
    for _ in range(levels - 1):
        specs.append(ExpertGateSpec(33, (0, 0, 1, 1), (33,), "tanh", dropout, (Gate(0, (0, 1)), Gate(1, (2, 3)))))
    specs.append(ExpertGateSpec(33, (0, 1), (16,), dropout=dropout, output_layer=True))
    params = [new_params(spec, generator) for spec in specs]
    labels = (torch.rand(n_rows, 2, generator=generator) < 0.3).float()
    labels[::7, 1] = torch.nan
    return Chain(x, specs, [p.learned() for p in params], [p.running() for p in params], labels, folded)


KINDS, FACTORS = torch.tensor([True, False]), torch.tensor([0.7, 0.3])


def at_once(chain, seed=0, x_columns=None):
    torch.manual_seed(seed)
    layers = chain.layers()
    wanted = chain.x.shape[2] if x_columns is None else x_columns
    losses, logits, grads, dx, of_small = native.chain_gradients(
        chain.x, layers, chain.labels, KINDS, FACTORS, chain.folded, wanted
    )
    flat = [losses, logits, *(g for one in grads for g in one), dx, of_small]
    return [t for t in flat if t is not None] + [p for params, _ in layers for p in params.running()]


def one_by_one(chain, seed=0):
    torch.manual_seed(seed)
    layers, inputs, taped = chain.layers(), [chain.x], []
    given = [{} if chain.folded is None else {"folded": chain.folded}] + [{}] * (len(layers) - 1)
    for (params, spec), more in zip(layers, given, strict=True):
        out, saved = native.expert_gate_fwd(inputs[-1], params, spec, True, **more)
        inputs.append(out)
        taped.append(list(saved))
    losses, grad = native.task_losses(inputs[-1], chain.labels, KINDS, FACTORS)
    found, of_small = [], []
    for (params, spec), x, saved, more in reversed(list(zip(layers, inputs, taped, given, strict=False))):
        grad, grads = native.expert_gate_bwd(grad, x, params, spec, True, saved, True, **more)
        of_small = [grads.pop()] if more else []
        found = [*grads, *found]
    return [losses, inputs[-1], *found, grad, *of_small, *(p for params, _ in layers for p in params.running())]


def same(a, b):
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("folds", [False, True])
def test_the_bits_of_its_layers_for_every_number_of_threads(folds, bf16, threads, base_seed):
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16):
        for case, rows in enumerate((2, 40, 700, 3000)):  # the last ones are worth waking threads for
            chain = new_chain(base_seed + case, rows, 1 + case % 2, folds=folds)
            threads(1)
            want = one_by_one(chain, case)
            for n in (1, 2, 3):
                threads(n)
                assert same(at_once(chain, case), want), (rows, n)
                assert same(one_by_one(chain, case), want), (rows, n)


def test_no_gradient_of_the_inputs(base_seed):
    chain = new_chain(base_seed, folds=True)
    n_running = sum(len(running) for running in chain.running)
    whole, without = at_once(chain), at_once(chain, x_columns=-1)
    assert same(without[:-n_running], whole[: -n_running - 2])
    some = at_once(chain, x_columns=1)
    assert torch.equal(some[-n_running - 2], whole[-n_running - 2][..., :1])


def test_several_callers_at_once(threads, base_seed):
    """Each holds threads of its own, or none where others have them."""
    threads(2)
    chains = [new_chain(base_seed + i, 1500, dropout=0) for i in range(4)]
    wants = [at_once(chain) for chain in chains]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(5):
            assert all(same(got, want) for got, want in zip(pool.map(at_once, chains), wants, strict=True))


@pytest.mark.parametrize("rows", [3, 3000])
def test_what_does_not_fit_is_refused_by_name(rows, threads, base_seed):
    threads(2)
    chain = new_chain(base_seed, rows)
    for wrong, message in (
        (chain._replace(labels=chain.labels[1:]), "labels must have the logits' shape"),
        (chain._replace(x=chain.x[..., 1:].contiguous()), "x must be"),
        (chain._replace(specs=chain.specs[:1], learned=chain.learned[:1], running=chain.running[:1]), "logits must"),
    ):
        with pytest.raises(RuntimeError, match=message):
            at_once(wrong)
    layers = chain.layers()
    arguments = chain.labels, KINDS, FACTORS, None, -1
    with pytest.raises(RuntimeError, match="one for each"):
        native.chain_gradients(chain.x, [], *arguments)
    short = layers[0][0]._replace(gamma=())
    with pytest.raises(RuntimeError, match="lacks tensors"):
        native.chain_gradients(chain.x, [(short, layers[0][1]), *layers[1:]], *arguments)
    assert same(at_once(chain), at_once(chain))
