"""Folded inference as Triton kernels against float64 eager: single layers, and whole models that take it by themselves."""

import pytest
import torch
from triton_cases import Layer, drawer, random_layer

from fastmtl.backends import eager
from fastmtl.backends.triton import configs, folded, packing
from fastmtl.backends.triton.precision import Precision

IEEE = Precision(torch.float32, "ieee")


def run(layer: Layer, dtype, device) -> torch.Tensor:
    mine = layer.cast(torch.float32, device)
    precision = Precision(dtype, "ieee")
    packed = packing.PackedLayer(mine.spec, mine.params, None, dtype)
    out = None
    if mine.spec.output_layer:
        out = torch.full((mine.x.shape[1], mine.spec.n_experts), torch.nan, device=device)
    return folded.run_folded(mine.x.to(dtype), packed, precision, out, None)


@pytest.mark.parametrize("kind", ["gates", "experts", "heads"])
@pytest.mark.parametrize("case", range(6))
def test_random_layers(case, kind, seed, device, monkeypatch):
    """Experts and mixture in one launch and in two, programs that share a tile's experts and that walk over tiles."""
    layer = random_layer(seed + case, kind=kind, depth=2, activation=("relu", "prelu", "silu")[case % 3])
    if packing.why_not(layer.spec):
        pytest.skip(packing.why_not(layer.spec))
    if device.type == "cpu":
        monkeypatch.setattr(configs, "PROGRAMS", (1, 2, 132)[drawer(torch.Generator().manual_seed(seed))(0, 3)])
    wanted = eager.expert_gate(layer.x, layer.params, layer.spec, False)
    out = run(layer, torch.float32, device)
    assert out.shape == wanted.shape
    torch.testing.assert_close(out.cpu().double(), wanted, rtol=1e-5, atol=1e-5)
    if case < 2:
        out = run(layer, torch.bfloat16, device)
        torch.testing.assert_close(out.cpu().double(), wanted, rtol=0.05, atol=0.1 * float(wanted.abs().max()))
