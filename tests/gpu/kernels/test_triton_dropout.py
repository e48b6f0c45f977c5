"""Dropout without stored masks: the generator's statistics, and that forward and backward agree on every element."""

# ruff: noqa: N803 (the names of a kernel's arguments)
import pytest
import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from triton_cases import check_parts, eager_step, out_shape, random_layer

from fastmtl.backends import triton as backend
from fastmtl.backends.triton.activations import kept


@triton.jit
def mask_kernel(Seed_ptr, Out_ptr, first, n_units, n_columns, drop, LAYER: tl.constexpr, BLOCK: tl.constexpr):
    row = first + tl.arange(0, BLOCK)
    unit = tl.arange(0, BLOCK)
    for expert in range(n_columns // n_units):
        for start in range(0, n_units, BLOCK):
            keep = kept(Seed_ptr, row, expert, start, drop, LAYER, BLOCK)
            at = Out_ptr + row[:, None] * n_columns + (expert * n_units + start + unit)[None, :]
            tl.store(at, keep.to(tl.float32), mask=(start + unit < n_units)[None, :])


def masks(seed: torch.Tensor, n_rows: int, n_units: int, drop: float, layer: int, n_experts: int = 1) -> torch.Tensor:
    """1 where an element is kept, ``[n_rows, n_experts * n_units]``."""
    n_columns = n_experts * n_units
    padded = -(-n_rows // 16) * 16
    out = torch.empty(padded, n_columns, device=seed.device)
    for first in range(0, padded, 16):
        mask_kernel[(1,)](seed, out, first, n_units, n_columns, drop, LAYER=layer, BLOCK=16)
    return out[:n_rows].cpu()


def test_the_generator(device, seed):
    """Rate within 5 sigma; neighbours in rows, columns, layers and experts, and other seeds, are uncorrelated."""
    n, drop = 112, 0.3
    one, other = (torch.tensor(s, dtype=torch.int64, device=device) for s in (seed, -seed - 1))
    mask = masks(one, n, n, drop, 0)
    sigma = (drop * (1 - drop)) ** 0.5
    assert abs(float(mask.mean()) - (1 - drop)) < 5 * sigma / n
    assert torch.equal(mask, masks(one, n, n, drop, 0))
    centred = mask - mask.mean()
    second = masks(one, n, n, drop, 0, 2)[:, n:]
    near = [mask.roll(1, 0), mask.roll(1, 1), mask.roll(2, 1), mask.roll(4, 1), mask.T, second]
    for shifted in (*near, masks(one, n, n, drop, 1), masks(other, n, n, drop, 0)):
        assert abs(float((centred * (shifted - shifted.mean())).mean())) < 5 * sigma**2 / n


@pytest.mark.parametrize("kind", ["gates", "experts", "heads"])
@pytest.mark.parametrize("activation", ["relu", "dice"])
def test_forward_and_backward_drop_the_same(activation, kind, seed, device, monkeypatch):
    """Against eager given the masks that the kernels' generator says, layer by layer."""
    options = {"kind": kind, "batch": 21, "activation": activation, "dropout": 0.4}
    layer = random_layer(seed, **options)
    while not layer.spec.dims:  # nothing to drop
        seed += 100
        layer = random_layer(seed, **options)
    mine = layer.cast(torch.float32, device)
    torch.manual_seed(seed)
    out, saved = backend.expert_gate_fwd(mine.x, mine.params, mine.spec, True)
    drawn = saved[-1]
    assert drawn.dtype is torch.int64

    def dropped(one, dtype):
        depth = iter(range(len(layer.spec.dims)))

        def dropout(h, p, training):
            keep = masks(drawn, len(h), h.shape[-1], p, next(depth), h[0].numel() // h.shape[-1]).view(h.shape)
            return h * keep.to(h.dtype) / (1 - p)

        with monkeypatch.context() as patch:
            patch.setattr(F, "dropout", dropout)
            out, grads = eager_step(one.cast(dtype), True, grad)
        return [[out], grads]

    grad = torch.randn(out_shape(layer), dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    dx, grads = backend.expert_gate_bwd(
        grad.float().to(device), mine.x, mine.params, mine.spec, True, list(saved), True
    )
    check_parts([[out], [dx, *grads]], lambda one: (dropped(one, torch.float32), dropped(one, torch.float64)), layer)


def test_the_seed_comes_from_torch(seed, device):
    layer = random_layer(seed, kind="experts", batch=17, activation="linear", dropout=0.5)

    def run():
        mine = layer.cast(torch.float32, device)
        return backend.expert_gate_fwd(mine.x, mine.params, mine.spec, True)[0]

    torch.manual_seed(seed)
    first, second = run(), run()
    assert not torch.equal(first, second)
    torch.manual_seed(seed)
    assert torch.equal(run(), first)
    mine = layer.cast(torch.float32, device)
    assert len(backend.expert_gate_fwd(mine.x, mine.params, mine.spec, False)[1]) == 4 * len(layer.spec.dims) - 1
