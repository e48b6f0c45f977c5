"""Dropout by a counter-based generator: right in number, the same forward and backward, the same for every thread."""

import pytest
import torch

from fastmtl.backend import use_backend
from fastmtl.ops import expert_gate
from fastmtl.spec import ExpertGateSpec

from .layers import new_params


def mask_of(p: float, batch: int, width: int = 64, experts: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
    """The mask as the forward applied it and as the backward did, both [E, B, H] and scaled by 1 / (1 - p)."""
    spec = ExpertGateSpec(3, (0,) * experts, (width,), activation="sigmoid", dropout=p)
    params = new_params(spec, torch.Generator().manual_seed(0))
    x = torch.randn(1, batch, 3, generator=torch.Generator().manual_seed(0)).requires_grad_()
    seed = torch.get_rng_state()
    params.beta[0].requires_grad_()
    with use_backend("native"):
        out = expert_gate(x, params, spec, True)
        plain = expert_gate(x, params, ExpertGateSpec(3, (0,) * experts, (width,), activation="sigmoid"), True)
        torch.set_rng_state(seed)
        forward = (out / plain).detach()
        backward = []
        for b in range(min(batch, 3)):  # one row's gradient reaches beta through its mask alone
            one = torch.zeros_like(out)
            one[:, b] = 1
            (through,) = torch.autograd.grad(out, params.beta[0], one, retain_graph=True)
            (whole,) = torch.autograd.grad(plain, params.beta[0], one, retain_graph=True)
            backward.append((through / whole).view(experts, width))
    return forward, torch.stack(backward, dim=1)


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_share_scale_and_independence(p, base_seed):
    torch.manual_seed(base_seed)
    mask, _ = mask_of(p, 4000)
    kept = mask != 0
    n = kept.numel()
    assert torch.allclose(mask[kept], torch.tensor(1 / (1 - p)), rtol=1e-5)
    sigma = (p * (1 - p)) ** 0.5
    assert abs(kept.float().mean().item() - (1 - p)) < 5 * sigma / n**0.5
    # no column, row or pair of neighbours stands out
    for axis, size in (((0, 1), 4000 * 2), ((1, 2), 4000 * 64)):
        assert (kept.float().mean(dim=axis) - (1 - p)).abs().max() < 5.5 * sigma / size**0.5
    centred = kept.float() - (1 - p)
    for shifted in (centred.roll(1, 2), centred.roll(1, 1), centred.roll(1, 0)):
        assert abs((centred * shifted).mean().item()) < 5.5 * sigma**2 / n**0.5 + 1e-9 + 5 / n


def test_backward_uses_the_forward_mask(base_seed):
    torch.manual_seed(base_seed)
    forward, backward = mask_of(0.3, 200)
    torch.testing.assert_close(forward[:, :3], backward, rtol=1e-4, atol=1e-4)


def test_a_seed_gives_its_mask_and_the_next_call_another(threads, base_seed):
    masks = []
    for n in (1, 2, 1):
        threads(n)
        torch.manual_seed(base_seed)
        masks.append(mask_of(0.5, 500)[0])
    torch.manual_seed(base_seed + 1)
    masks.append(mask_of(0.5, 500)[0])
    assert torch.equal(masks[0], masks[1])
    assert torch.equal(masks[0], masks[2])
    assert not torch.equal(masks[0], masks[3])


def test_layers_have_masks_of_their_own(base_seed):
    """Two layers of equal width: were the masks equal, a unit kept in one would be kept in the other."""
    torch.manual_seed(base_seed)
    spec = ExpertGateSpec(3, (0,), (512,), activation="sigmoid", dropout=0.5)
    draws = []
    for _ in range(2):
        params = new_params(spec, torch.Generator().manual_seed(0))
        with use_backend("native"), torch.no_grad():
            draws.append(expert_gate(torch.ones(1, 100, 3), params, spec, True) != 0)
    agreement = (draws[0] == draws[1]).float().mean().item()
    assert abs(agreement - 0.5) < 0.02


def test_only_dropout_in_training_draws_a_seed():
    spec = ExpertGateSpec(3, (0,), (8,), dropout=0.5)
    params = new_params(spec, torch.Generator().manual_seed(0))
    x = torch.ones(1, 4, 3)
    for layer, training, draws in (
        (spec, False, False),
        (ExpertGateSpec(3, (0,), (8,)), True, False),
        (spec, True, True),
    ):
        before = torch.get_rng_state()
        with use_backend("native"), torch.no_grad():
            expert_gate(x, params, layer, training)
        assert torch.equal(before, torch.get_rng_state()) is not draws


def test_everything_dropped():
    spec = ExpertGateSpec(3, (0,), (8,), dropout=1.0)
    params = new_params(spec, torch.Generator().manual_seed(0))
    with use_backend("native"), torch.no_grad():
        assert not expert_gate(torch.ones(1, 40, 3), params, spec, True).any()
