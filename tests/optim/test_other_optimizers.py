"""Optimizers that have no counterpart here train models all the same, on dense and on sparse gradients."""

import pytest
import torch

from fastmtl import backend
from fastmtl.optim import sparse_gradients
from fastmtl.trainers import MTLTrainer

from .test_trainer import batches, make_model

OTHERS = [torch.optim.RMSprop, torch.optim.NAdam, torch.optim.RAdam, torch.optim.Adamax, torch.optim.Adadelta]


@pytest.mark.parametrize("fn", OTHERS, ids=lambda fn: fn.__name__)
def test_dense_gradients(fn, seed, tmp_path):
    losses = []
    for name in ("native", "eager"):
        with backend.use_backend(name):
            model = make_model(seed)
            start = {key: value.clone() for key, value in model.state_dict().items()}
            trainer = MTLTrainer(model, optimizer_fn=fn, optimizer_params={"lr": 1e-3}, model_path=str(tmp_path))
            losses.append(trainer.train_one_epoch(batches(seed)))
        assert type(trainer.optimizer) is fn
        for key, value in model.state_dict().items():
            if key.startswith("embedding"):
                assert not torch.equal(value, start[key])
    # the first steps of RMSprop and Adamax are signs of gradients, rounding of those that cancel among them
    torch.testing.assert_close(torch.tensor(losses[0]), torch.tensor(losses[1]), rtol=1e-3, atol=0)


def test_sparse_gradients(seed):
    """SparseAdam for the tables and Adam for the rest: the same as from dense gradients made sparse by hand."""
    results = []
    for comes_sparse in (True, False):
        model = make_model(seed)
        tables = model.embedding.weights()
        rest = [p for p in model.parameters() if not any(p is table for table in tables)]
        optimizers = [torch.optim.SparseAdam(tables, lr=1e-2), torch.optim.Adam(rest, lr=1e-2)]
        losses = []
        for x, y in batches(seed):
            loss = torch.nn.functional.binary_cross_entropy(run(model, x, comes_sparse), y)
            loss.backward()
            for table in tables:
                assert table.grad.is_sparse is comes_sparse
                if not comes_sparse:
                    table.grad = table.grad.to_sparse(1)
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
            losses.append(loss.detach())
        assert model.embedding.updater is None
        results.append(torch.stack(losses))
    assert results[0][-1] != results[0][0]
    torch.testing.assert_close(*results, rtol=1e-4, atol=0)


def run(model, x, sparsely):
    if not sparsely:
        return model(x)
    with sparse_gradients(model.embedding):
        return model(x)
