"""Whole epochs as a GPU runs them: batches one ahead, their ids sorted ahead, steps replayed, nothing waited for.

On a GPU a replay is a CUDA graph; on the interpreter it is a tape of a step's operations, see tape.py.
"""

import pytest
import torch
from trainer_cases import SETTINGS, train


@pytest.mark.parametrize("optimizer", ["adam", "momentum", "adagrad"])
def test_replayed_epochs_train_what_plain_steps_train(optimizer, seed, device, tmp_path, monkeypatch):
    losses, weights, trainer = train(seed, "triton", device, tmp_path, "exact", optimizer)
    assert trainer._epochs._graphs.n_recorded == 3  # two places for whole batches, one for the last
    whole, _ = trainer._epochs._slots._shapes.values()
    assert all(slot._replay is not None for slot in whole.slots)
    assert type(trainer.optimizer).__name__ == SETTINGS[optimizer][0].__name__
    with monkeypatch.context() as patch:
        patch.setattr("fastmtl.trainers.graph_step.WARM_UPS", (10**9, 1))
        patch.setattr("fastmtl.trainers.recorders.Recordings.record", lambda *_: None)
        plain, same, unrecorded = train(seed, "triton", device, tmp_path, "exact", optimizer)
    assert unrecorded._epochs._graphs.n_recorded == 0
    assert torch.equal(losses, plain)
    for name, value in weights.items():
        assert torch.equal(value, same[name]), name
    eager, _, _ = train(seed, "eager", "cpu", tmp_path, "dense", optimizer)
    torch.testing.assert_close(losses, eager, rtol=1e-5, atol=1e-6)
