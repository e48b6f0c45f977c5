"""Whole epochs as a GPU runs them: batches one ahead, their ids sorted ahead, steps replayed, nothing waited for.

On a GPU a replay is a CUDA graph; on the interpreter it is a tape of a step's operations, see tape.py.
"""

import pytest
import torch
from tape import Tape

from fastmtl import backend as backends
from fastmtl.basic.features import DenseFeature, SequenceFeature, SparseFeature
from fastmtl.data.datasets import TorchDataset
from fastmtl.data.loader import ColumnLoader
from fastmtl.models import MMOE
from fastmtl.trainers import MTLTrainer

ROWS, BATCH = 21, 6
SETTINGS = {
    "adam": (torch.optim.Adam, {"lr": 1e-2, "weight_decay": 1e-3}),
    "momentum": (torch.optim.SGD, {"lr": 1e-1, "momentum": 0.9}),
    "adagrad": (torch.optim.Adagrad, {"lr": 3e-2}),
}


@pytest.fixture(autouse=True)
def tape(monkeypatch):
    """Where there is no GPU, what stands in for graphs."""
    monkeypatch.setattr("fastmtl.trainers.device_epoch.Rerun", Tape)


def make_model(**tower):
    torch.manual_seed(3)
    features = [
        SparseFeature("user", 50, embed_dim=4),
        SparseFeature("item", 6, embed_dim=4),
        SequenceFeature("seen", 50, embed_dim=4, pooling="mean", shared_with="user", padding_idx=0),
        DenseFeature("age"),
    ]
    model = MMOE(features, ["classification"] * 2, 2, {"dims": [6], **tower}, [{"dims": [4]}] * 2)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.3)
    return model


def make_loader(seed, rows=ROWS):
    rng = torch.Generator().manual_seed(seed)
    x = {
        "user": torch.randint(0, 50, (rows,), generator=rng),
        "item": torch.randint(0, 6, (rows,), generator=rng),
        "seen": torch.randint(0, 50, (rows, 3), generator=rng),
        "age": torch.rand(rows, generator=rng),
    }
    return ColumnLoader(
        TorchDataset(x, (torch.rand(rows, 2, generator=rng) < 0.4).float().numpy()), BATCH, shuffle=True
    )


def train(seed, where, device, folder, update, optimizer="adam", epochs=2, **tower):
    """Losses of each epoch, weights, the trainer."""
    fn, settings = SETTINGS[optimizer]
    with backends.use_backend(where):
        trainer = MTLTrainer(
            make_model(**tower), optimizer_fn=fn, optimizer_params=settings, device=device, embedding_update=update,
            scheduler_fn=torch.optim.lr_scheduler.StepLR, scheduler_params={"step_size": 1, "gamma": 0.5},
            model_path=str(folder), progress=False,
        )  # fmt: skip
        loader, losses = make_loader(seed), []
        torch.manual_seed(seed)
        for _ in range(epochs):
            losses.append(trainer.train_one_epoch(loader))
            trainer.scheduler.step()
        return torch.tensor(losses), {k: v.cpu().clone() for k, v in trainer.model.state_dict().items()}, trainer


@pytest.mark.parametrize("optimizer", SETTINGS)
def test_replayed_epochs_train_what_plain_steps_train(optimizer, seed, device, tmp_path, monkeypatch):
    losses, weights, trainer = train(seed, "triton", device, tmp_path, "exact", optimizer)
    assert trainer._epochs._graphs.n_recorded == 3  # two places for whole batches, one for the last
    assert type(trainer.optimizer).__name__ == SETTINGS[optimizer][0].__name__
    with monkeypatch.context() as patch:
        patch.setattr("fastmtl.trainers.graph_step.WARM_UPS", (10**9, 1))
        plain, same, unrecorded = train(seed, "triton", device, tmp_path, "exact", optimizer)
    assert unrecorded._epochs._graphs.n_recorded == 0
    assert torch.equal(losses, plain)
    for name, value in weights.items():
        assert torch.equal(value, same[name]), name
    eager, _, _ = train(seed, "eager", "cpu", tmp_path, "dense", optimizer)
    torch.testing.assert_close(losses, eager, rtol=1e-5, atol=1e-6)
