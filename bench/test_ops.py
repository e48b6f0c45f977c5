"""The two ops alone, forward and backward: torch-rechub's modules, fastmtl's plain PyTorch, its native kernels."""

from __future__ import annotations

import importlib

import pytest
import torch

from bench.contenders import PEER, Setting
from bench.floors import lookup_bytes
from bench.measure import Turns, figures, table
from bench.models import build
from bench.shapes import SHAPES
from fastmtl import backend
from fastmtl.backends import native
from fastmtl.basic.batch import ColumnBatch
from fastmtl.ops import embedding_bag


def _lookups(setting):
    """contender -> (forward, its parameters): every feature of a batch looked up."""
    x = setting.batches[0][0]
    theirs = build("torch_rechub", setting.model, setting.shape)
    ours = build("fastmtl", setting.model, setting.shape)
    ours.load_state_dict(setting.state)
    theirs.load_state_dict(setting.state)
    batch = ColumnBatch.from_columns(x)
    calls = {PEER: (lambda: theirs.embedding(x, theirs.features, squeeze_dim=True), theirs.embedding)}
    for name in _backends():
        calls[f"fastmtl {name}"] = (
            _on(name, lambda: ours.embedding(batch, ours.embedding.features, squeeze_dim=True)),
            ours.embedding,
        )
    if "native" in backend.available():
        calls["fastmtl native, sparse gradient"] = (_sparse(ours, batch), ours.embedding)
    return calls


def _sparse(model, batch):
    """The lookup as MTLTrainer does it where the tables are large: gradients of the batch's rows alone."""
    layer = model.embedding

    def run():
        ids, columns, dense = layer.inputs(batch, layer.features)
        weights, spec = layer.weights(), layer.spec_of(layer.features)
        index = None
        if torch.is_grad_enabled():
            index = native.embedding_bag_index(ids, columns, spec, [w.shape for w in weights], [True] * len(weights))
        with backend.use_backend("native"):
            return embedding_bag(weights, ids, columns, dense, spec, index)

    return run


def _layers(setting):
    """contender -> (forward, its parameters): experts, gates and towers of a looked-up batch."""
    row = torch.randn(setting.batch_size, setting.shape.input_width)
    theirs = build("torch_rechub", setting.model, setting.shape)
    ours = build("fastmtl", setting.model, setting.shape)
    ours.load_state_dict(setting.state)
    theirs.load_state_dict(setting.state)

    # the model is its own: only its lookup is replaced by one that is done
    class Looked(torch.nn.Module):
        def forward(self, x, features, squeeze_dim):
            return row

    theirs.embedding = Looked()
    calls = {PEER: (lambda: theirs({}), theirs)}
    for name in _backends():
        calls[f"fastmtl {name}"] = (_on(name, lambda: ours._predict(row)), ours)
    return calls


def _backends():
    return [name for name in ("eager", "native") if name in backend.available()]


def _on(name, call):
    def run():
        with backend.use_backend(name):
            return call()

    return run


def _both_ways(forward, module):
    """Forward and backward; the gradients are left in the parameters."""

    def run():
        module.zero_grad()
        out = forward()
        out.backward(torch.full_like(out, 1e-3))
        return out.detach()

    return run


@pytest.mark.parametrize("what", ["embedding_bag", "expert_gate"])
@pytest.mark.parametrize("shape", ["census", "ali-ccp", "aliexpress"])
def test_ops(what, shape, benchmark, report, machine, request):
    option = request.config.getoption
    setting = Setting(SHAPES[shape], "mmoe", SHAPES[shape].batch_size, n_batches=1)
    measure_op(what, setting, option("--rounds"), min(option("--turn"), 0.1), benchmark, report, machine)


def measure_op(what, setting, rounds, turn, benchmark, report, machine):
    """Check, take turns, report; returns the figures by direction."""
    importlib.import_module("torch_rechub")
    calls = _lookups(setting) if what == "embedding_bag" else _layers(setting)
    shape, batch = setting.shape, setting.batch_size
    ways = {
        "forward": {name: forward for name, (forward, _) in calls.items()},
        "forward + backward": {name: _both_ways(*pair) for name, pair in calls.items()},
    }
    found = {}
    turns = {}
    for way, runs in ways.items():
        out = {name: run().detach() for name, run in runs.items()}
        distances = {name: (got - out[PEER]).abs().max().item() for name, got in out.items()}
        assert max(distances.values()) <= 1e-4, (what, way, distances)
        turns[way] = (Turns(runs, turn), distances)

    def one_round() -> None:
        with torch.no_grad():
            turns["forward"][0].round()
        turns["forward + backward"][0].round()

    benchmark.pedantic(one_round, rounds=rounds, iterations=1)
    for way, (one, distances) in turns.items():
        times = 1 if way == "forward" else 3
        if what == "embedding_bag":
            # the backward reads the gradient once and writes every row of the tables' dense gradients
            moved = lookup_bytes(shape, batch)
            moved += 4 * shape.embed_dim * (batch * len(shape.vocabs) + sum(shape.vocabs)) if times == 3 else 0
            flops, floor = 0.0, moved / machine.copy
        else:
            flops = times * shape.flops(setting.model) * batch
            floor = flops / machine.fp32
        found[way] = figures(one.times, batch, flops, dict.fromkeys(one.times, floor), (PEER,))
        report.add(f"{what}, {way}, {setting.model} {shape.name}, B={batch}, fp32", table(found[way], distances),
                   kind=what, way=way, shape=shape.name, batch=batch, figures=found[way])  # fmt: skip
        benchmark.extra_info.update({f"{way} {figure['contender']}": figure["ms"] for figure in found[way]})
    return found
