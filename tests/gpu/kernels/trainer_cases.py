"""A small model, its rows and its training, for tests of whole epochs."""

from __future__ import annotations

from typing import Any

import torch

from fastmtl import backend as backends
from fastmtl import optim
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
    "rowwise_adagrad": (optim.RowwiseAdagrad, {"lr": 3e-2, "weight_decay": 1e-3}),
}


def make_model(**mlp: Any) -> MMOE:
    """Tables of one width, shared, tiny and pooled ones among them; of a size as after some training."""
    torch.manual_seed(3)
    features = [
        SparseFeature("user", 50, embed_dim=4),
        SparseFeature("item", 6, embed_dim=4),
        SequenceFeature("seen", 50, embed_dim=4, pooling="mean", shared_with="user", padding_idx=0),
        DenseFeature("age"),
    ]
    model = MMOE(features, ["classification"] * 2, 2, {"dims": [6], **mlp}, [{"dims": [4]}] * 2)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.3)
    return model


def make_loader(seed: int, rows: int = ROWS) -> ColumnLoader:
    """Shuffled rows; the last batch is half a batch."""
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


def train(
    seed: int,
    where: str,
    device: Any,
    folder: Any,
    update: str | None,
    optimizer: str = "adam",
    epochs: int = 2,
    **mlp: Any,
) -> tuple[torch.Tensor, dict[str, torch.Tensor], MTLTrainer]:
    """Losses of each epoch, weights, the trainer; on a backend, with an ``embedding_update``."""
    fn, settings = SETTINGS[optimizer]
    with backends.use_backend(where):
        trainer = MTLTrainer(
            make_model(**mlp), optimizer_fn=fn, optimizer_params=settings, device=device, embedding_update=update,
            scheduler_fn=torch.optim.lr_scheduler.StepLR, scheduler_params={"step_size": 1, "gamma": 0.5},
            model_path=str(folder), progress=False,
        )  # fmt: skip
        loader, losses = make_loader(seed), []
        torch.manual_seed(seed)
        for _ in range(epochs):
            losses.append(trainer.train_one_epoch(loader))
            trainer.scheduler.step()
        return torch.tensor(losses), {k: v.cpu().clone() for k, v in trainer.model.state_dict().items()}, trainer
