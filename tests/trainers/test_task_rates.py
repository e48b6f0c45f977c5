"""Learning rates of single tasks: the same as parameter groups, for parameters that are stored batched."""

import pytest
import torch

from fastmtl.basic.features import SparseFeature
from fastmtl.errors import ConfigError
from fastmtl.models import PLE
from fastmtl.trainers import MTLTrainer


def make(seed: int) -> PLE:
    torch.manual_seed(seed)
    features = [SparseFeature("a", 10, 4), SparseFeature("b", 6, 4)]
    return PLE(features, ["classification"] * 2, 2, 2, 1, {"dims": [6]}, [{"dims": [4]}] * 2)


@pytest.mark.parametrize("optimizer", [torch.optim.Adam, torch.optim.AdamW, torch.optim.SGD, torch.optim.Adagrad])
def test_rows_of_a_task_move_at_its_rate(optimizer, seed, tmp_path):
    """What belongs to task 1 moves as in a run at its rate; all else as in a run at the base rate."""
    x = {"a": torch.randint(0, 10, (64,)), "b": torch.randint(0, 6, (64,))}
    y = torch.randint(0, 2, (64, 2))
    after = {}
    for name, base, rates in (("mixed", 1e-2, {"task_1": 3e-2}), ("base", 1e-2, None), ("high", 3e-2, None)):
        model = make(seed)
        params = {"lr": base, "weight_decay": 1e-3}
        trainer = MTLTrainer(
            model, optimizer_fn=optimizer, optimizer_params=params, task_specific_lr=rates, model_path=str(tmp_path)
        )
        trainer.train_one_epoch([(x, y)])
        after[name] = model.state_dict()
    own = [name for name in after["mixed"] if model.task_of(name) == 1]
    assert {name.split(".")[0] for name in own} == {"cgc_layers", "towers"}
    for name, value in after["mixed"].items():
        torch.testing.assert_close(value, after["high" if name in own else "base"][name], rtol=1e-5, atol=1e-7)


def test_an_unknown_task_is_named(seed, tmp_path):
    trainer = MTLTrainer(make(seed), task_specific_lr={"click": 1e-3}, model_path=str(tmp_path))
    with pytest.raises(ConfigError, match="no task 'click'; the tasks are task_0, task_1"):
        trainer.train_one_epoch([({"a": torch.zeros(2, dtype=int), "b": torch.zeros(2, dtype=int)}, torch.ones(2, 2))])
