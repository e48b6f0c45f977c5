"""Epochs whose batches another thread makes: the same run, bit for bit, and the same errors."""

import threading

import numpy as np
import pytest
import torch

from fastmtl.backends import native
from fastmtl.basic.features import DenseFeature, SparseFeature
from fastmtl.data.loader import ColumnLoader, TorchDataset
from fastmtl.errors import BadDataError, BadIdError
from fastmtl.models import MMOE
from fastmtl.trainers import MTLTrainer, batches

pytestmark = pytest.mark.skipif(native.unavailable() is not None, reason="needs the native library")


def problem(seed, tmp_path, n=300, update="exact"):
    rng = np.random.default_rng(seed)
    torch.manual_seed(seed)
    features = [SparseFeature("user", 500, 8), SparseFeature("kind", 5, 8), DenseFeature("price")]
    experts = {"dims": [12], "dropout": 0.3}  # which draws random numbers in each step
    model = MMOE(features, ["classification"], 3, experts, [{"dims": [6]}])
    x = {"user": rng.integers(0, 500, n), "kind": rng.integers(0, 5, n), "price": rng.random(n, dtype=np.float32)}
    loader = ColumnLoader(TorchDataset(x, rng.integers(0, 2, (n, 1)).astype(np.float32)), 64, shuffle=True)
    trainer = MTLTrainer(
        model, optimizer_params={"lr": 0.01, "weight_decay": 1e-4}, embedding_update=update, n_epoch=2,
        model_path=str(tmp_path), progress=False,
    )  # fmt: skip
    return trainer, loader, x


@pytest.fixture
def made_ahead(monkeypatch):
    """How many epochs had their batches made ahead."""
    epochs, ahead = [], batches.ahead

    def counted(loader, make):
        epochs.append(loader)
        return ahead(loader, make)

    monkeypatch.setattr(batches, "ahead", counted)
    return epochs


def test_a_seeded_run_does_not_depend_on_the_thread(seed, tmp_path, made_ahead, monkeypatch):
    runs = []
    for is_ahead in (True, False):
        if not is_ahead:
            monkeypatch.setattr(batches, "draws_at_once", lambda loader: False)
        trainer, loader, _ = problem(seed, tmp_path)
        losses = [trainer.train_one_epoch(loader) for _ in range(3)]
        runs.append((losses, trainer.model.state_dict(), torch.get_rng_state()))
        assert len(made_ahead) == 3
    assert runs[0][0] == runs[1][0]
    for name, value in runs[0][1].items():
        assert torch.equal(value, runs[1][1][name]), name
    assert torch.equal(runs[0][2], runs[1][2])


def test_tables_without_sorted_ids_need_no_thread(seed, tmp_path, made_ahead):
    trainer, loader, _ = problem(seed, tmp_path, update="dense")
    trainer.train_one_epoch(loader)
    assert not made_ahead


@pytest.mark.parametrize(("column", "value", "error"), [("price", np.nan, BadDataError), ("user", 500, BadIdError)])
def test_errors_of_a_batch_are_raised_and_leave_no_thread(seed, tmp_path, made_ahead, column, value, error):
    trainer, loader, x = problem(seed, tmp_path)
    x[column][int(np.random.default_rng(seed).integers(len(x[column])))] = value
    wrong = ColumnLoader(TorchDataset(x, loader.labels), 64, shuffle=True)
    with pytest.raises(error, match=f"'{column}'"):
        trainer.train_one_epoch(wrong)
    assert made_ahead
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("fastmtl-batches")]
    trainer.train_one_epoch(loader)  # rows that wait were not lost


def test_the_last_epochs_weights_are_copied_while_they_are_saved(seed, tmp_path):
    trainer, loader, _ = problem(seed, tmp_path)
    trainer.early_stopper.best_auc = -1.0
    trainer.n_epoch = 1
    trainer.fit(loader, loader)
    saved = torch.load(tmp_path / "model_base_0.pth", weights_only=True)
    best, now = trainer.early_stopper.best_weights, trainer.model.state_dict()
    assert list(best) == list(now) == list(saved)
    for name, value in now.items():
        assert torch.equal(best[name], value), name
        assert torch.equal(saved[name], value), name
    trainer.train_one_epoch(loader)
    assert any(not torch.equal(best[name], value) for name, value in trainer.model.state_dict().items())
