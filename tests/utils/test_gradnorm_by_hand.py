"""gradnorm(), for training loops by hand, against the paper's formula written out with autograd."""

import pytest
import torch

from fastmtl.utils.mtl import gradnorm


def _losses(shared, heads, x, labels):
    hidden = x @ shared
    return [((hidden @ head - labels[:, task]) ** 2).mean() for task, head in enumerate(heads)]


@pytest.mark.parametrize("alpha", [0.0, 0.16, 1.5])
@pytest.mark.parametrize("shape", [(), (1,)], ids=["scalars", "one number each"])
def test_gradients_are_those_of_the_papers_loss(alpha, shape):
    generator = torch.Generator().manual_seed(3)

    def normal(*size):
        return torch.randn(*size, dtype=torch.float64, generator=generator)

    shared, heads = normal(5, 4).requires_grad_(), [normal(4).requires_grad_() for _ in range(3)]
    x, labels, initial = normal(20, 5), normal(20, 3) * torch.tensor([1.0, 3.0, 0.2]), [2.0, 9.0, 5.0]
    weights = [torch.full(shape, value, dtype=torch.float64, requires_grad=True) for value in (0.5, 1.5, 1.0)]

    losses = _losses(shared, heads, x, labels)
    norms = [
        torch.autograd.grad(w.sum() * loss, shared, create_graph=True)[0].norm()
        for w, loss in zip(weights, losses, strict=True)
    ]
    rates = [loss.item() / start for loss, start in zip(losses, initial, strict=True)]
    mean_norm, mean_rate = sum(n.item() for n in norms) / 3, sum(rates) / 3
    gradnorm_loss = sum(
        (n - mean_norm * (rate / mean_rate) ** alpha).abs() for n, rate in zip(norms, rates, strict=True)
    )
    expected = torch.autograd.grad(gradnorm_loss, weights, retain_graph=True)
    total = sum(w.detach().sum() * loss for w, loss in zip(weights, losses, strict=True))
    expected_shared = torch.autograd.grad(total, shared)[0]

    gradnorm(_losses(shared, heads, x, labels), weights, shared, initial, alpha)
    for weight, gradient in zip(weights, expected, strict=True):
        torch.testing.assert_close(weight.grad, gradient)
    torch.testing.assert_close(shared.grad, expected_shared)


def test_several_shared_weights_count_together():
    shared = [torch.tensor([3.0], requires_grad=True), torch.tensor([1.0], requires_grad=True)]
    weights = [torch.ones((), requires_grad=True) for _ in range(2)]
    losses = [3 * shared[0].sum() + 4 * shared[1].sum(), shared[0].sum()]
    gradnorm(losses, weights, shared, [13.0, 3.0], 0.16)
    assert [weight.grad.item() for weight in weights] == [5.0, -1.0]
