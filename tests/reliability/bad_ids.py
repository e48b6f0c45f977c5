"""Ids outside the vocabulary: refused by name, zeros, or a row of one's choice, however the model is run.

Models that were exported know no feature names: there an id that is to be refused must make the run fail, and the other
two choices hold as everywhere.
"""

from __future__ import annotations

import copy
import random
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from devices import BACKENDS, DEVICE, call, fetch, place
from torch import Tensor

from fastmtl import models
from fastmtl.backend import use_backend
from fastmtl.basic.features import SparseFeature
from fastmtl.basic.initializers import RandomNormal
from fastmtl.errors import BadIdError
from fastmtl.utils.onnx_export import export_onnx

VOCAB = 50
BAD = (-1, -(2**31), VOCAB, 2**63 - 1)
CHOICES = ("raise", "zero", 7)
ROWS = 12


def _batch(seed: int) -> dict[str, Tensor]:
    rng = torch.Generator().manual_seed(seed)
    return {
        "user": torch.randint(0, 9, (ROWS,), generator=rng),
        "item": torch.randint(0, VOCAB, (ROWS,), generator=rng),
    }


def _model(oov: str | int, seed: int) -> torch.nn.Module:
    torch.manual_seed(seed)
    start = RandomNormal(0, 0.5)
    features = [
        SparseFeature("user", 9, 4, initializer=start),
        SparseFeature("item", VOCAB, 4, initializer=start, oov=oov),
    ]
    return place(models.MMOE(features, ["classification"] * 2, 2, {"dims": [8]}, [{"dims": [4]}] * 2)).eval()


def runs(model: torch.nn.Module, how: str, seed: int) -> Callable[[dict[str, Tensor]], Tensor]:
    """The model as ``how`` says: a backend's name, ``compiled`` or ``exported`` (ONNX)."""
    if how == "compiled":
        torch._dynamo.reset()
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        return lambda x: call(compiled, x)
    if how == "exported":
        import onnxruntime

        with tempfile.TemporaryDirectory() as folder:
            path = f"{folder}/model.onnx"
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # the exporter's own deprecations
                export_onnx(fetch(copy.deepcopy(model)), path, _batch(seed), onnx_export_kwargs={"dynamo": False})
            content = Path(path).read_bytes()
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4  # what a run raises is enough
        session = onnxruntime.InferenceSession(content, options)
        return lambda x: torch.from_numpy(
            np.asarray(session.run(None, {name: column.numpy() for name, column in x.items()})[0])
        )

    def run(x: dict[str, Tensor]) -> Tensor:
        with use_backend(how):
            return call(model, x)

    return run


def check(how: str, oov: str | int, seed: int, bads: tuple[int, ...] = BAD) -> None:
    """Each bad id in a random row; the rows around it are what they were."""
    rng, model = random.Random(seed), _model(oov, seed)
    with torch.no_grad(), use_backend("eager"):
        run, batch = runs(model, how, seed), _batch(seed)
        whole = call(model, batch)
        for bad in bads:
            row = rng.randrange(ROWS)
            wrong = {name: column.clone() for name, column in batch.items()}
            wrong["item"][row] = bad
            if oov == "raise":
                _refused(run, wrong, how, f"'item': id {bad} in row {row} ")
                continue
            expected = whole.clone()
            expected[row] = _expected(model, wrong, row, oov)
            torch.testing.assert_close(run(wrong), expected, rtol=1e-5, atol=1e-6)


def _refused(run: Callable[[dict[str, Tensor]], Tensor], x: dict[str, Tensor], how: str, words: str) -> None:
    error: Exception | None = None
    try:
        run(x)
    except Exception as caught:
        error = caught
    assert error is not None, f"{how}: {words}was taken"
    if DEVICE.type == "cuda":  # a fault on the device would end every later call too
        torch.cuda.synchronize()
    if how != "exported":
        assert isinstance(error, BadIdError), repr(error)
        assert words in str(error)
        assert f"vocabulary of {VOCAB}" in str(error)


def _expected(model: torch.nn.Module, x: dict[str, Tensor], row: int, oov: str | int) -> Tensor:
    """The prediction of a row whose item is another row of the table, or zeros."""
    state = fetch(model.state_dict())
    table = state["embedding.embed_dict.item.weight"]
    looked = torch.cat([state["embedding.embed_dict.user.weight"][x["user"][row]],
                        torch.zeros(4) if oov == "zero" else table[oov]])  # fmt: skip
    return call(model._predict, looked.unsqueeze(0))[0]


def soak(count: int, seed: int) -> str:
    """``count`` models, with random bad ids beside the four."""
    rare, rng = ("compiled", "exported") if DEVICE.type == "cpu" else ("compiled",), random.Random(seed)
    done = dict.fromkeys((*BACKENDS, *rare), 0)
    for i in range(count):
        # a compiled or exported model takes a second to make
        how = BACKENDS[i % len(BACKENDS)] if i % 50 else rare[i // 50 % len(rare)]
        drawn = tuple(rng.choice((rng.randrange(-(2**63), 0), rng.randrange(VOCAB, 2**63))) for _ in range(4))
        check(how, rng.choice(CHOICES), seed + i, (*BAD, *drawn))
        done[how] += 1
    return ", ".join(f"{n:,} {how}" for how, n in done.items()) + " models, 8 bad ids each"
