"""evaluate() and predict() of each package's trainer, over its own loader."""

from __future__ import annotations

import contextlib
import importlib
import io
import tempfile

import numpy as np
import pytest
import torch

from bench.contenders import PEER
from bench.floors import forward_floor
from bench.measure import Turns, figures, table
from bench.models import build
from bench.shapes import SHAPES
from fastmtl import backend
from fastmtl.data.loader import ColumnLoader

ROWS = {"census": 20_000, "ali-ccp": 16_384}


def _calls(package, shape, rows, state, name):
    """(evaluate, predict, the model's state_dict) of a package; silent."""
    utils = importlib.import_module(f"{package}.utils.data")
    # fastmtl's own loader, as DataGenerator makes it; torch-rechub's is torch's
    loader_of = ColumnLoader if package == "fastmtl" else torch.utils.data.DataLoader
    trainers = importlib.import_module(f"{package}.trainers")
    model = build(package, "mmoe", shape)
    if state is not None:
        model.load_state_dict(state)
    x, y = shape.rows(rows)
    _, loader, _ = utils.DataGenerator(x, y).generate_dataloader(
        x_val=x, y_val=y, x_test=x, y_test=y, batch_size=shape.batch_size
    )
    words = {} if package == "torch_rechub" else {"progress": False}
    kinds = ["classification"] * len(shape.task_names)
    with tempfile.TemporaryDirectory() as folder:  # nothing is written: nothing is trained
        trainer = trainers.MTLTrainer(model, kinds, model_path=folder, **words)

    def call(what, loader):
        def run():
            held = contextlib.nullcontext() if name is None else backend.use_backend(name)
            with held, contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
                return getattr(trainer, what)(model, loader)

        return run

    unlabelled = loader_of(utils.PredictDataset(x), batch_size=shape.batch_size)
    return call("evaluate", loader), call("predict", unlabelled), model.state_dict()


@pytest.mark.parametrize("shape", ["census", "ali-ccp"])
def test_evaluation(shape, benchmark, report, machine, request):
    measure_evaluation(SHAPES[shape], ROWS[shape], min(request.config.getoption("--rounds"), 5), benchmark, report,
                       machine)  # fmt: skip


def measure_evaluation(shape, rows, rounds, benchmark, report, machine):
    """Check, take turns, report; returns the figures by method."""
    torch.manual_seed(0)
    evaluate, predict, state = _calls("torch_rechub", shape, rows, None, None)
    calls = {"evaluate": {PEER: evaluate}, "predict": {PEER: predict}}
    for name in [one for one in ("eager", "native") if one in backend.available()]:
        evaluate, predict, _ = _calls("fastmtl", shape, rows, state, name)
        calls["evaluate"][f"fastmtl {name}"], calls["predict"][f"fastmtl {name}"] = evaluate, predict
    distances = {}
    for what, runs in calls.items():
        out = {name: np.asarray(run()) for name, run in runs.items()}
        distances[what] = {name: float(np.abs(got - out[PEER]).max()) for name, got in out.items()}
        limit = 1e-5 if what == "predict" else 1e-3  # an AUC moves by a whole pair where two predictions are that near
        assert max(distances[what].values()) <= limit, (what, distances[what])
    turns = {what: Turns(runs, 0) for what, runs in calls.items()}
    benchmark.pedantic(lambda: [one.round() for one in turns.values()], rounds=rounds, iterations=1)
    found = {}
    for what, one in turns.items():
        floors = dict.fromkeys(one.times, forward_floor(machine, shape, "mmoe", rows, "fp32"))
        found[what] = figures(one.times, rows, shape.flops() * rows, floors, (PEER,))
        report.add(f"{what}(), mmoe {shape.name}, {rows:,} rows", table(found[what], distances[what]),
                   kind=what, model="mmoe", shape=shape.name, rows=rows, figures=found[what])  # fmt: skip
        benchmark.extra_info.update({f"{what} {figure['contender']}": figure["ms"] for figure in found[what]})
    return found
