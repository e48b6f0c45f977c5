"""A model call against a model call in evaluation mode: one row, a few, a batch (median of the calls: p50)."""

from __future__ import annotations

from itertools import cycle

import pytest

from bench.contenders import PEER, PEER_BF16, Setting, check_predictions, contenders
from bench.floors import forward_floor
from bench.measure import Turns, figures, table
from bench.shapes import SHAPES

BATCHES = (1, 32, 512, 4096)
CASES = [("mmoe", "ali-ccp"), ("mmoe", "census")]


@pytest.mark.parametrize(("model", "shape"), CASES, ids=["-".join(case) for case in CASES])
def test_inference(model, shape, benchmark, report, machine, request):
    option = request.config.getoption
    setting = Setting(SHAPES[shape], model, max(BATCHES), n_batches=4)
    measure_inference(setting, BATCHES, option("--rounds"), option("--turn"), benchmark, report, machine)


def measure_inference(setting, batches, rounds, turn, benchmark, report, machine):
    """Check, then take turns at each size of batch; returns the figures by size.

    Compiled contenders are left out: a size of batch costs them a minute each.
    """
    runs, missing = contenders(False, setting.shape.embed_dim)
    runners = {one.name: one.make(setting) for one in runs}
    for runner in runners.values():
        runner.model.eval()
    distances = check_predictions(runs, runners, max(batches))
    turns = {}
    for batch in batches:
        calls = {}
        for name, runner in runners.items():
            inputs = cycle(runner.inputs(batch))
            calls[name] = lambda runner=runner, inputs=inputs: runner.predict(next(inputs))
            calls[name]()
        turns[batch] = Turns(calls, min(turn, 0.1))

    def one_round() -> None:
        for one in turns.values():
            one.round()

    benchmark.pedantic(one_round, rounds=rounds, iterations=1)
    shape, found = setting.shape, {}
    for batch in batches:
        floors = {one.name: forward_floor(machine, shape, setting.model, batch, one.precision) for one in runs}
        flops = shape.flops(setting.model) * batch
        found[batch] = figures(turns[batch].times, batch, flops, floors, (PEER, PEER_BF16))
        lines = table(found[batch], distances) + [f"not run: {name}: {why}" for name, why in missing.items()]
        title = f"inference, {setting.model} {shape.name}, B={batch}, p50"
        report.add(title, lines, kind="inference", model=setting.model, shape=shape.name, batch=batch,
                   figures=found[batch], distances=distances, missing=missing)  # fmt: skip
        benchmark.extra_info.update({f"{one['contender']} B={batch}": one["ms"] for one in found[batch]})
    for runner in runners.values():
        runner.close()
    return found
