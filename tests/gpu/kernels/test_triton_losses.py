"""Losses and whole steps without autograd as Triton kernels, against float64."""

import copy

import pytest
import torch
from triton_cases import check, drawer, random_layer

from fastmtl import backend as backends
from fastmtl.backends import eager
from fastmtl.backends import triton as backend
from fastmtl.backends.triton import configs
from fastmtl.basic.features import DenseFeature, SequenceFeature, SparseFeature
from fastmtl.basic.loss_func import multi_task_loss
from fastmtl.models import MMOE, PLE, SharedBottom
from fastmtl.spec import ExpertGateParams
from fastmtl.trainers import MTLTrainer
from fastmtl.trainers.device_epoch import note_losses
from fastmtl.trainers.native_gradients import ChainGradients
from fastmtl.weighting import make_strategy


def reference(logits, labels, kinds, factors):
    """Losses and the logits' gradient as torch computes them one after the other."""
    z = logits.clone().requires_grad_()
    binary = torch.tensor([kind == "classification" for kind in kinds])
    losses = multi_task_loss(torch.where(binary, z.sigmoid(), z), labels, kinds)
    (grad,) = torch.autograd.grad((losses * factors).sum(), z)
    return losses.detach(), grad


def random_labels(rng, batch, kinds, missing):
    y = torch.rand(batch, len(kinds), generator=rng, dtype=torch.float64)
    y = torch.where(torch.tensor([kind == "classification" for kind in kinds]), y.round(), 3 * y)
    y[torch.rand(y.shape, generator=rng) < missing] = torch.nan
    return y


@pytest.mark.parametrize("case", range(8))
def test_random_losses(case, seed, device, monkeypatch):
    """Of logits up to +-25, where a probability of fp32 is 1; in rows that begin anywhere."""
    rng = torch.Generator().manual_seed(seed + case)
    draw = drawer(rng)
    many = 3000
    if device.type == "cpu":  # on the interpreter: still two blocks a program, and more programs than are added at once
        many = 600
        monkeypatch.setattr(configs, "PROGRAMS", 20)
    batch, n_tasks = (1, 7, 40, many)[draw(0, 4)], draw(1, 5)
    kinds = [("classification", "regression")[draw(0, 2)] for _ in range(n_tasks)]
    z = 8 * torch.randn(batch, n_tasks + 2, generator=rng, dtype=torch.float64).clamp(-3, 3)[:, 1:-1].float()
    y = random_labels(rng, batch, kinds, (0, 0.3, 1)[draw(0, 3)])
    factors = torch.rand(n_tasks, generator=rng, dtype=torch.float64)
    wanted = reference(z.double(), y, kinds, factors)
    eager32 = reference(z, y.float(), kinds, factors.float())
    binary = torch.tensor([kind == "classification" for kind in kinds], device=device)
    mine = backend.task_losses(z.to(device), y.float().to(device), binary, factors.float().to(device))
    check(mine, eager32, wanted)
    again = backend.task_losses(z.to(device), y.float().to(device), binary, factors.float().to(device))
    assert all(torch.equal(a, b) for a, b in zip(mine, again, strict=True))


def test_soft_labels_far_logits_and_no_row(device):
    """The loss is cut at 100, as torch's is; a logit that is not a number shows, unless its label is missing."""
    z = torch.tensor([[0.0], [60.0], [-60.0], [200.0], [-200.0], [30.0]], device=device)
    y = torch.tensor([[0.3], [0.0], [1.0], [0.0], [1.0], [1.0]], device=device)
    on, one = torch.tensor([True], device=device), torch.ones(1, device=device)
    losses, grad = backend.task_losses(z, y, on, one)
    wanted = (0.6931471805599453 + 60 + 60 + 100 + 100 + 9.3576229688401746e-14) / 6
    assert float(losses[0]) == pytest.approx(wanted, rel=1e-6)
    probabilities = torch.tensor([0.5 - 0.3, 1, -1, 1, -1, -9.3576229688401746e-14], dtype=torch.float64)
    torch.testing.assert_close(6 * grad[:, 0].cpu().double(), probabilities, rtol=1e-6, atol=1e-7)
    z[1] = torch.nan
    assert backend.task_losses(z, y, on, one)[0].isnan().all()
    y[1] = torch.nan
    losses, grad = backend.task_losses(z, y, on, one)
    assert losses.isfinite().all()
    assert float(grad[1]) == 0
    losses, grad = backend.task_losses(z[:0], y[:0], on, one)
    assert losses.tolist() == [0]
    assert grad.shape == (0, 1)


@pytest.mark.parametrize("case", range(6))
def test_towers_with_their_losses(case, seed, device):
    """Layers of towers, forward, losses and backward at once; a batch of one row, and labels that are missing."""
    fixed = {"batch": (1, 9, 35)[case % 3], "activation": ("relu", "prelu", "dice")[case % 3]}
    layer = random_layer(seed + case, kind="heads", **fixed)
    while not layer.spec.dims:
        seed += 100
        layer = random_layer(seed + case, kind="heads", **fixed)
    rng = torch.Generator().manual_seed(seed)
    kinds = [("classification", "regression")[drawer(rng)(0, 2)] for _ in range(layer.spec.n_experts)]
    factors = torch.rand(len(kinds), generator=rng, dtype=torch.float64)
    y = random_labels(rng, layer.x.shape[1], kinds, 0.2)

    def eager_at(dtype):
        one = layer.cast(dtype)
        x = one.x.requires_grad_()
        learned = [tensor.requires_grad_() for tensor in one.params.learned()]
        out = eager.expert_gate(x, ExpertGateParams.of(learned, one.params.running(), one.spec), one.spec, True)
        losses, grad = reference(out.detach(), y.to(dtype), kinds, factors.to(dtype))
        grads = torch.autograd.grad(out, [x, *learned], grad, allow_unused=True)
        filled = [torch.zeros_like(t) if g is None else g for t, g in zip([x, *learned], grads, strict=True)]
        return [losses, out.detach(), *filled, *one.params.running()]

    mine = layer.cast(torch.float32, device)
    binary = torch.tensor([kind == "classification" for kind in kinds], device=device)
    labels = y.float().to(device)
    losses, logits, dx, grads = backend.tower_losses(
        mine.x, mine.params, mine.spec, labels, binary, factors.float().to(device), True
    )
    check([losses, logits, dx, *grads, *mine.params.running()], eager_at(torch.float32), eager_at(torch.float64))
    assert all(grad.is_contiguous() for grad in grads)


# ---------------------------------------------------------------------------------------------------- whole steps

FEATURES = [
    SparseFeature("user", 30, embed_dim=5),
    SparseFeature("item", 7, embed_dim=3),
    SequenceFeature("seen", 7, embed_dim=3, pooling="mean", shared_with="item", padding_idx=0),
    DenseFeature("age"),
]


def make(kind, task_types, **options):
    """A model of a few parameters, its tables as large as after some training."""
    torch.manual_seed(5)
    towers = [{"dims": [6, 4], **options}] * len(task_types)
    mlp = {"dims": [9, 8], "activation": "silu"}
    if kind is MMOE:
        model = MMOE(FEATURES, task_types, 3, mlp, towers)
    elif kind is PLE:
        model = PLE(FEATURES, task_types, 2, 1, 1, {"dims": [8]}, towers)
    else:
        model = SharedBottom(FEATURES, task_types, mlp, towers)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.3)
    return model.train()


def batch(seed, task_types, missing=0.2):
    rng = torch.Generator().manual_seed(seed)
    x = {
        "user": torch.randint(0, 30, (37,), generator=rng),
        "item": torch.randint(0, 7, (37,), generator=rng),
        "seen": torch.randint(0, 7, (37, 4), generator=rng),
        "age": torch.rand(37, generator=rng),
    }
    return x, random_labels(rng, 37, task_types, missing)


def eager_gradients(model, strategy, x, y):
    """Losses, gradients by name, and the statistics that a step leaves, by autograd on eager."""
    strategy.attach(model, model.task_types)
    with backends.use_backend("eager"):
        losses = multi_task_loss(model(x), y.to(next(model.parameters()).dtype), model.task_types)
        strategy.backward(losses, 0.0)
    return [losses.detach(), *(grad for _, grad in model.named_gradients()), *statistics(model)]


def statistics(model):
    return [value for name, value in model.state_dict().items() if "running" in name]


@pytest.mark.usefixtures("triton_backend")
@pytest.mark.parametrize("kind", [SharedBottom, MMOE, PLE])
def test_a_step_without_autograd(kind, seed, device):
    """Losses, every gradient and the running statistics."""
    task_types = ["classification", "regression", "classification"]
    x, y = batch(seed, task_types)
    model = make(kind, task_types)
    strategy = make_strategy("static", weights=[0.5, 1.5, 1.0])
    eager32 = eager_gradients(copy.deepcopy(model), strategy, x, y)
    wanted = eager_gradients(copy.deepcopy(model).double(), strategy, x, y)
    model.to(device)
    strategy.attach(model, task_types)
    gradients = ChainGradients.of(model, strategy)
    assert gradients is not None
    losses, logits = gradients({name: column.to(device) for name, column in x.items()}, y.float().to(device))
    assert logits.shape == y.shape
    check([losses, *(grad for _, grad in model.named_gradients()), *statistics(model)], eager32, wanted)


@pytest.mark.filterwarnings("ignore:invalid value encountered in matmul")  # in columns of padding, never written
@pytest.mark.usefixtures("triton_backend")
def test_training_takes_that_step(seed, device, tmp_path):
    """The trainer's epochs on triton are those of eager, bf16 included (to its precision)."""
    task_types = ["classification"] * 2
    x, y = batch(seed, task_types, 0.0)
    losses = {}
    for where, amp in (("triton", None), ("eager", None), ("triton", "bf16")):
        with backends.use_backend(where):
            model = make(MMOE, task_types)
            place = device if where == "triton" else "cpu"
            trainer = MTLTrainer(model, model_path=str(tmp_path), device=place, amp=amp, embedding_update="dense")
            assert (trainer._gradients() is not None) == (where == "triton")
            losses[where, amp] = [trainer.train_one_epoch([(x, y.float())]) for _ in range(3)]
    wanted = torch.tensor(losses["eager", None])
    torch.testing.assert_close(torch.tensor(losses["triton", None]), wanted, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(torch.tensor(losses["triton", "bf16"]), wanted, rtol=0.05, atol=0.02)


@pytest.mark.parametrize("n_tasks", [1, 3])
def test_what_is_noted_of_losses(n_tasks, device):
    """In one launch what torch's operations note: sums, the last ones, the first step whose loss is NaN, a veto."""

    def places():
        clock, now = (torch.tensor([number], dtype=torch.int32, device=device) for number in (7, 7))
        last, total = torch.zeros(2, n_tasks, device=device)
        first = torch.full((n_tasks,), -1, dtype=torch.int64, device=device)
        count = torch.zeros((), dtype=torch.int64, device=device)
        return [last, total, count, first, torch.zeros((), device=device), clock, now]

    mine, theirs = places(), places()
    for step in range(5):
        losses = torch.arange(1.0, n_tasks + 1, device=device) / (step + 1)
        if step in (2, 3):
            losses[-1] = torch.nan
        backend.note_losses(losses, *mine)
        note_losses(losses, *theirs)
        for one, other in zip(mine, theirs, strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True)
        assert mine[-1].tolist() == [-1 if step in (2, 3) else 7]
    assert mine[3].tolist() == [-1] * (n_tasks - 1) + [3]
    backend.note_losses(losses, *mine[:-2], None, None)
    assert int(mine[2]) == 6
