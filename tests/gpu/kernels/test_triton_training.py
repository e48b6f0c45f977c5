"""Whole steps of training whose backward updates the tables, against torch.optim on eager's dense gradients."""

import pytest
import torch
from triton_cases import check

from fastmtl import backend as backends
from fastmtl.basic.features import DenseFeature, SequenceFeature, SparseFeature
from fastmtl.errors import ConfigError
from fastmtl.models import MMOE
from fastmtl.trainers.device_tables import DeviceTables

STEPS = 6
RULES = {
    "adam": (torch.optim.Adam, {"lr": 1e-2, "weight_decay": 1e-3}),
    "adamw": (torch.optim.AdamW, {"lr": 1e-2, "weight_decay": 1e-1}),
    "momentum": (torch.optim.SGD, {"lr": 1e-1, "momentum": 0.9}),
}


def make():
    features = [
        SparseFeature("user", 60, embed_dim=4),
        SparseFeature("item", 7, embed_dim=4),
        SequenceFeature("seen", 60, embed_dim=4, pooling="mean", shared_with="user", padding_idx=0),
        SparseFeature("shop", 20, embed_dim=3),
        DenseFeature("age"),
    ]
    torch.manual_seed(5)
    model = MMOE(features, ["classification"] * 2, 2, {"dims": [6]}, [{"dims": [4]}] * 2)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.3)
    return model


def batches(seed):
    rng = torch.Generator().manual_seed(seed)
    for _ in range(STEPS):
        x = {
            "user": torch.randint(0, 60, (9,), generator=rng),
            "item": torch.randint(0, 7, (9,), generator=rng),
            "seen": torch.randint(0, 60, (9, 3), generator=rng),
            "shop": torch.randint(0, 20, (9,), generator=rng),
            "age": torch.rand(9, generator=rng),
        }
        yield x, (torch.rand(9, 2, generator=rng) < 0.4).float()


def train(seed, rule, where, device, dtype, in_backward):
    """The model's weights after some steps."""
    optimizer_fn, settings = RULES[rule]
    model = make().to(device, dtype).train()
    tables = model.embedding.weights()
    others = [p for p in model.parameters() if all(p is not table for table in tables)]
    updates = DeviceTables(optimizer_fn, tables, **settings) if in_backward else None
    model.embedding.updater = updates
    optimizer = optimizer_fn(others if in_backward else model.parameters(), foreach=False, **settings)
    with backends.use_backend(where):
        for step, (x, y) in enumerate(batches(seed)):
            rate = settings["lr"] * (0.5 + 0.1 * step)
            for held in (optimizer, *([updates.optimizer] if updates else [])):
                held.param_groups[0]["lr"] = rate
            if updates:
                updates.advance()
            out = model({name: column.to(device) for name, column in x.items()})
            loss = (out - y.to(device, dtype)).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if updates:
                assert all(table.grad is None for table in tables)
                updates.sweep()
        state = {name: value.clone() for name, value in model.state_dict().items()}
    # a bias in front of a BatchNorm has no true gradient: what Adam makes of round-off there is noise
    return [state[name] for name in sorted(state) if name.startswith("embed") or "output" in name or "gate" in name]


@pytest.mark.usefixtures("triton_backend")
@pytest.mark.parametrize("rule", RULES)
def test_training_with_the_tables_step_in_the_backward(rule, seed, device):
    mine = train(seed, rule, "triton", device, torch.float32, True)
    eager32 = train(seed, rule, "eager", "cpu", torch.float32, False)
    reference = train(seed, rule, "eager", "cpu", torch.float64, False)
    assert len(mine) > 4
    check([t.float() for t in mine], [t.float() for t in eager32], [t.double() for t in reference], relative=2e-5)


@pytest.mark.usefixtures("triton_backend")
def test_a_forward_without_gradients_makes_every_row_current(seed, device):
    model = make().to(device).train()
    tables = model.embedding.weights()
    updates = DeviceTables(torch.optim.Adam, tables, lr=1e-2, weight_decay=1e-1)
    model.embedding.updater = updates
    x, _ = next(batches(seed))
    x = {name: column.to(device) for name, column in x.items()}
    updates.advance()
    model(x).sum().backward()
    waiting = [table.detach().clone() for table in tables]
    with torch.no_grad():
        model(x)
    for table, was in zip(tables, waiting, strict=True):
        moved = (table != was).any(1)
        assert moved.any()
        assert all(int(step) == 1 for step in updates._last[table].unique())
    assert {"exp_avg", "exp_avg_sq"} == set(updates.states(tables[0]))


def test_what_has_no_sparse_form_is_refused(device):
    table = torch.nn.Parameter(torch.zeros(3, 2, device=device))
    with pytest.raises(ConfigError, match="amsgrad"):
        DeviceTables(torch.optim.Adam, [table], lr=1e-3, amsgrad=True)
    with backends.use_backend("eager"), pytest.raises(ConfigError, match="eager takes no step in its backward"):
        DeviceTables(torch.optim.Adam, [table], lr=1e-3)
