"""A training step against a training step: forward, losses, backward, optimizer, on batches that lie ready."""

from __future__ import annotations

import pytest

from bench.contenders import PEER, PEER_BF16, Setting, check_steps, contenders
from bench.floors import Machine, step_floor, unique_rows
from bench.measure import Turns, figures, table
from bench.shapes import SHAPES

CASES = [("mmoe", "census"), ("mmoe", "ali-ccp"), ("mmoe", "aliexpress"), ("ple", "ali-ccp")]


@pytest.mark.parametrize(("model", "shape"), CASES, ids=["-".join(case) for case in CASES])
def test_steps(model, shape, benchmark, report, request):
    option = request.config.getoption
    setting = Setting(SHAPES[shape], model, SHAPES[shape].batch_size, n_batches=8)
    measure_steps(setting, not option("--no-compile"), option("--rounds"), option("--turn"), benchmark, report)


def measure_steps(setting, compiled, rounds, turn, benchmark, report):
    """Check, warm up, take turns, report; returns the figures. The machine's rates have a turn in each round too."""
    runs, missing = contenders(compiled, setting.shape.embed_dim)
    runners = {one.name: one.make(setting) for one in runs}
    try:
        distances = check_steps(runs, runners, setting)
        for one in runs:
            for _ in range(max(one.warm_steps - runners[one.name].count, 0)):
                runners[one.name].step()
        turns = Turns({name: runner.step for name, runner in runners.items()}, turn)
        rates: list[Machine] = []

        def take_turns() -> None:
            turns.round()
            rates.append(Machine.measured(0.1))

        benchmark.pedantic(take_turns, rounds=rounds, iterations=1)
    finally:
        for runner in runners.values():
            runner.close()
    shape, batch = setting.shape, setting.batch_size
    machine = Machine.median(rates)
    touched = unique_rows([setting.batches[0][0][f"s{i}"].numpy() for i in range(len(shape.vocabs))])
    floors = {
        one.name: step_floor(machine, shape, setting.model, batch, one.precision, touched, setting.dense_params)
        for one in runs
    }
    found = figures(turns.times, batch, 3 * shape.flops(setting.model) * batch, floors, (PEER, PEER_BF16))
    lines = [f"floor at {machine}", *table(found, distances)]
    lines += [f"not run: {name}: {why}" for name, why in missing.items()]
    title = f"training step, {setting.model} {shape.name}, B={batch}"
    report.add(title, lines, kind="step", model=setting.model, shape=shape.name, batch=batch, figures=found,
               machine=vars(machine), distances=distances, missing=missing)  # fmt: skip
    benchmark.extra_info.update({one["contender"]: one["ms"] for one in found})
    return found
