"""Whole models on the triton backend: the table of backends reaches it, and a step equals eager's."""

import pytest
import torch
from triton_cases import check

import fastmtl
from fastmtl import backend as backends
from fastmtl.basic.features import DenseFeature, SequenceFeature, SparseFeature
from fastmtl.models import MMOE, PLE


def make(name):
    """A model of a few parameters, its tables as large as after some training."""
    features = [
        SparseFeature("user", 30, embed_dim=5),
        SparseFeature("item", 7, embed_dim=3),
        SequenceFeature("seen", 7, embed_dim=3, pooling="mean", shared_with="item", padding_idx=0),
        DenseFeature("age"),
    ]
    towers = [{"dims": [6]}, {"dims": [6]}]
    torch.manual_seed(5)
    if name == "mmoe":
        model = MMOE(features, ["classification"] * 2, 3, {"dims": [9, 6]}, towers)
    else:
        model = PLE(features, ["classification", "regression"], 2, 1, 1, {"dims": [8]}, towers)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.3)
    return model


def step(name, batch, where, device, dtype):
    """Output and gradients in training, named."""
    model = make(name).to(device, dtype).train()
    with backends.use_backend(where):
        out = model({key: value.to(device) for key, value in batch.items()})
        out.square().sum().backward()
    return {"output": out.detach(), **{key: grad.clone() for key, grad in model.named_gradients()}}


@pytest.mark.parametrize("name", ["mmoe", "ple"])
def test_a_step_of_a_model(name, device):
    rng = torch.Generator().manual_seed(0)
    batch = {
        "user": torch.randint(0, 30, (19,), generator=rng),
        "item": torch.randint(0, 7, (19,), generator=rng),
        "seen": torch.randint(0, 7, (19, 4), generator=rng),
        "age": torch.rand(19, generator=rng),
    }
    mine = step(name, batch, "triton", device, torch.float32)
    eager32 = step(name, batch, "eager", "cpu", torch.float32)
    reference = step(name, batch, "eager", "cpu", torch.float64)
    assert mine.keys() == reference.keys()
    check(*(list(found.values()) for found in (mine, eager32, reference)))


def test_forcing_names_the_device(device):
    other = "meta"
    with (
        fastmtl.use_backend("triton"),
        pytest.raises(fastmtl.backend.BackendError, match=f"{device.type.upper()} tensors"),
    ):
        backends.resolve("expert_gate", torch.zeros(1, device=other))
