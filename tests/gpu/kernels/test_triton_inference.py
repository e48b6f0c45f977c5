"""Folded inference as Triton kernels against float64 eager: single layers, and models that take it by themselves."""

import copy

import pytest
import torch
from triton_cases import Layer, drawer, random_layer

from fastmtl import backend as backends
from fastmtl.backends import eager
from fastmtl.backends.triton import configs, folded, launch, packing
from fastmtl.backends.triton.precision import Precision
from fastmtl.basic.features import DenseFeature, SequenceFeature, SparseFeature
from fastmtl.errors import BadDataError, BadIdError
from fastmtl.models import AITM, ESMM, MMOE, PLE, SharedBottom
from fastmtl.serving import Predictor


def run(layer: Layer, dtype, device) -> torch.Tensor:
    mine = layer.cast(torch.float32, device)
    precision = Precision(dtype, "ieee")
    packed = packing.PackedLayer(mine.spec, mine.params, None, dtype)
    out = None
    if mine.spec.output_layer:
        out = torch.full((mine.x.shape[1], mine.spec.n_experts), torch.nan, device=device)
    return folded.run_folded(mine.x.to(dtype), packed, precision, out, None)


@pytest.mark.parametrize("kind", ["gates", "experts", "heads"])
@pytest.mark.parametrize("case", range(8))
def test_random_layers(case, kind, seed, device, monkeypatch):
    """Experts and mixture in one launch and in two, programs that share a tile's experts and that walk over tiles."""
    options = {"kind": kind, "depth": 2, "activation": ("relu", "prelu", "silu")[case % 3]}
    layer = random_layer(seed + case, **options)
    while packing.why_not(layer.spec):  # towers without hidden layers
        seed += 100
        layer = random_layer(seed + case, **options)
    if device.type == "cpu":
        draw = drawer(torch.Generator().manual_seed(seed))
        monkeypatch.setattr(configs, "PROGRAMS", (1, 2, 132)[draw(0, 3)])
        if draw(0, 2):  # the tile's input in one piece, as on a GPU in bf16
            chosen = configs.Folded(16, 32, 16, True, bool(draw(0, 2)), launch.Warps())
            monkeypatch.setattr(configs.ExpertGateConfig, "folded", lambda *_: chosen)
    wanted = eager.expert_gate(layer.x, layer.params, layer.spec, False)
    out = run(layer, torch.float32, device)
    assert out.shape == wanted.shape
    torch.testing.assert_close(out.cpu().double(), wanted, rtol=1e-5, atol=1e-5)
    if case < 2:
        out = run(layer, torch.bfloat16, device)
        atol = 0.1 * float(wanted.abs().max()) + 1e-30  # the interpreter makes 1e-38 of bf16's 0
        torch.testing.assert_close(out.cpu().double(), wanted, rtol=0.05, atol=atol)


@pytest.mark.parametrize("width", [1, 16, 17, 100, 139, 239, 376, 1000])
def test_pieces_of_an_input(width):
    """Powers of two that hold it, and little more."""
    found = [piece for piece in packing.pieces(width) if piece]
    assert all(piece >= 16 and piece & (piece - 1) == 0 for piece in found)
    assert found == sorted(found, reverse=True)
    assert width <= sum(found) <= max(1.15 * width, width + 15)


# ---------------------------------------------------------------------------------------------------- whole models

FEATURES = [
    SparseFeature("user", 30, embed_dim=5),
    SparseFeature("item", 7, embed_dim=3),
    SequenceFeature("seen", 7, embed_dim=3, pooling="mean", shared_with="item", padding_idx=0),
    DenseFeature("age"),
]
BINARY = ["classification"] * 2
MODELS = {
    "mmoe": lambda: MMOE(FEATURES, BINARY, 3, {"dims": [9, 6]}, [{"dims": [7, 5]}] * 2),
    "ple": lambda: PLE(FEATURES, ["regression", *BINARY], 2, 1, 2, {"dims": [8]}, [{"dims": [6]}] * 3),
    "shared bottom": lambda: SharedBottom(
        FEATURES, BINARY, {"dims": [9, 6], "activation": "prelu"}, [{"dims": [5]}] * 2
    ),
    "esmm": lambda: ESMM(FEATURES[:1], FEATURES[1:2], {"dims": [5]}, {"dims": [6, 4]}),
    "deep": lambda: MMOE(FEATURES, BINARY, 2, {"dims": [9, 8, 6], "activation": "gelu"}, [{"dims": [5]}] * 2),
    "dice": lambda: PLE(FEATURES, BINARY, 1, 1, 1, {"dims": [8], "activation": "dice"}, [{"dims": [4]}, {"dims": [6]}]),
    "linear towers": lambda: MMOE(FEATURES, BINARY, 3, {"dims": [6]}, [{"dims": []}] * 2),
}


def make(name, device):
    """A model of a few parameters with the statistics of some training, in evaluation mode."""
    torch.manual_seed(5)
    model = MODELS[name]()
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            if tensor.is_floating_point():
                tensor.add_(torch.rand_like(tensor), alpha=0.3)
    return model.eval().to(device)


def batch(seed, rows, device):
    rng = torch.Generator().manual_seed(seed)
    x = {
        "user": torch.randint(0, 30, (rows,), generator=rng),
        "item": torch.randint(0, 7, (rows,), generator=rng),
        "seen": torch.randint(0, 7, (rows, 4), generator=rng),
        "age": torch.rand(rows, generator=rng),
    }
    return {name: column.to(device) for name, column in x.items()}


def in_float64(model, x):
    with backends.use_backend("eager"), torch.no_grad():
        return copy.deepcopy(model).cpu().double()({name: column.cpu() for name, column in x.items()})


@pytest.mark.usefixtures("triton_backend")
@pytest.mark.parametrize("name", MODELS)
def test_models_take_it_by_themselves(name, seed, device, monkeypatch):
    if device.type == "cpu" and seed % 2:  # as on a GPU in bf16: inputs in one piece, experts and mixture in one launch
        chosen = configs.Folded(16, 16, 16, True, True, launch.Warps())
        monkeypatch.setattr(configs.ExpertGateConfig, "folded", lambda *_: chosen)
        monkeypatch.setattr(configs, "PROGRAMS", 1)
    model = make(name, device)
    for rows in (37, 1, 0):
        x = batch(seed, rows, device)
        with torch.no_grad():
            out = model(x)
            with torch.autocast(device.type, torch.bfloat16):
                rounded = model(x)
        assert len(model._packs) == 2, "it was run layer by layer"
        wanted = in_float64(model, x)
        torch.testing.assert_close(out.cpu().double(), wanted, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(rounded.cpu().double(), wanted, rtol=0.05, atol=0.05)
        assert out.dtype is rounded.dtype is torch.float32


@pytest.mark.usefixtures("triton_backend")
def test_packed_again_when_a_weight_has_moved(seed, device):
    model, x = make("mmoe", device), batch(seed, 19, device)
    with torch.no_grad():
        before = model(x)
        model.towers.banks[0].out_bias[0] += 1.0
        after = model(x)
    torch.testing.assert_close(after[:, 0].logit(), before[:, 0].logit() + 1.0, rtol=1e-4, atol=1e-4)
    assert torch.equal(after[:, 1], before[:, 1])


@pytest.mark.usefixtures("triton_backend")
def test_a_row_is_predicted_alike_in_every_batch(seed, device):
    model, x = make("ple", device), batch(seed, 37, device)
    predict = Predictor(model)
    whole = predict(x)
    # the interpreter multiplies by NumPy, whose BLAS sums the rows at a tile's end in an order of their own on some
    # processors: there, parts begin where tiles begin
    cut = 16 if device.type == "cpu" else 18
    parts = [predict({name: column[a:b] for name, column in x.items()}) for a, b in ((0, cut), (cut, 37))]
    assert torch.equal(torch.cat(parts), whole)
    assert torch.equal(predict({name: column[:1] for name, column in x.items()}), whole[:1])


@pytest.mark.usefixtures("triton_backend")
def test_predictor(seed, device):
    """Matrices, both precisions, and errors as the model has them."""
    model, x = make("esmm", device), batch(seed, 19, device)
    exact, rounded = Predictor(model), Predictor(model, "bf16")
    with torch.no_grad():
        wanted = model(x)
    ids = torch.stack([x[name] for name in exact.id_columns], 1)
    assert torch.equal(exact(x), wanted)
    assert torch.equal(exact.run(ids), wanted)
    assert torch.equal(exact.run(ids.int()), wanted)
    torch.testing.assert_close(rounded.run(ids), wanted, rtol=0.05, atol=0.05)
    assert not torch.equal(rounded.run(ids), wanted)
    with pytest.raises(BadDataError, match="ids must be"):
        exact.run(ids[:, :1])
    ids[3, 1] = 7
    with pytest.raises(BadIdError, match="item"):
        exact.run(ids)


@pytest.mark.usefixtures("triton_backend")
def test_who_watches_sees_every_layer(seed, device):
    x = batch(seed, 9, device)
    aitm = AITM(FEATURES, 2, {"dims": [4]}, [{"dims": [4]}] * 2).eval().to(device)
    model, calls = make("mmoe", device), []
    model.towers.register_forward_hook(lambda *_: calls.append(1))
    with torch.no_grad():
        aitm(x)
        model(x)
        assert calls == [1]
        assert not any(aitm._packs.values())
