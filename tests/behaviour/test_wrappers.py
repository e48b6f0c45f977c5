"""A wrapped model trains as the bare one, and evaluate and predict use the model they are given."""

import numpy as np
import pytest
import torch
from devices import call
from torch import nn

from behaviour.helpers import KINDS, data, loader, model, trainer
from fastmtl.data.loader import ColumnLoader, PredictDataset

# torch.compile looks at the .grad of whatever lives across a break of the graph.
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")


class Wrapper(nn.Module):
    """What DataParallel looks like from outside: the model under ``.module``."""

    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, x):
        return self.module(x)


WRAPPERS = {
    "wrapper": Wrapper,
    "DataParallel": nn.DataParallel,
    "compile": lambda module: torch.compile(module, backend="eager"),
}


def _task_types(kind):
    return ("classification",) * (3 if kind == "ESMM" else 2)


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_wrapped_esmm_trains_two_heads(wrapper, tmp_path):
    """torch-rechub asks isinstance of the wrapper, and so trains the CVR tower on its own biased loss as well."""
    x, y = data(256, n_task=3)
    types = _task_types("ESMM")
    bare, wrapped = model("ESMM"), model("ESMM")
    losses = []
    for trained in (bare, WRAPPERS[wrapper](wrapped)):
        runner = trainer(trained, tmp_path, types, optimizer_fn=torch.optim.SGD, optimizer_params={"lr": 0.1})
        losses.append([runner.train_one_epoch(loader(x, y)) for _ in range(2)])
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-5)
    for name, value in bare.state_dict().items():
        torch.testing.assert_close(wrapped.state_dict()[name], value, rtol=1e-4, atol=1e-6)


def test_esmm_minimises_ctr_and_ctcvr_alone(backend, tmp_path):
    """One step of SGD is the gradient of the losses of tasks 1 and 2, summed."""
    x, y = data(64, n_task=3)
    trained, expected = model("ESMM"), model("ESMM")
    (batch, labels) = next(iter(loader(x, y)))
    y_pred = call(expected.train(), batch)
    sum(nn.functional.binary_cross_entropy(y_pred[:, task], labels[:, task]) for task in (1, 2)).backward()
    gradients = {name: gradient.clone() for name, gradient in expected.named_gradients()}
    runner = trainer(trained, tmp_path, _task_types("ESMM"), optimizer_fn=torch.optim.SGD, optimizer_params={"lr": 1.0})
    runner.train_one_epoch(loader(x, y))
    start = model("ESMM").state_dict()
    for name, gradient in gradients.items():
        torch.testing.assert_close(trained.state_dict()[name], start[name] - gradient, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_wrapped_models_fit_save_and_predict(wrapper, tmp_path):
    x, y = data(200)
    inner = model("MMOE")
    runner = trainer(WRAPPERS[wrapper](inner), tmp_path, n_epoch=2)
    log = np.array(runner.fit(loader(x, y), loader(x, y), mode="wrapped"))
    assert np.isfinite(log).all()
    saved = torch.load(tmp_path / "model_wrapped_0.pth", weights_only=True)
    model("MMOE", seed=5).load_state_dict(saved, strict=True)
    assert len(runner.predict(runner.model, loader(x, y))) == 200


@pytest.mark.parametrize("kind", KINDS)
def test_evaluate_and_predict_use_the_model_they_are_given(kind, backend, tmp_path):
    types = _task_types(kind)
    x, y = data(300, n_task=len(types))
    mine, other = model(kind, seed=0), model(kind, seed=1)
    runner, its_own = trainer(mine, tmp_path, types), trainer(other, tmp_path, types)
    rows = loader(x, y)
    assert runner.evaluate(other, rows) == its_own.evaluate(other, rows) != runner.evaluate(mine, rows)
    predicted = np.array(runner.predict(other, rows))
    batch, _ = next(iter(loader(x, y, batch_size=300)))
    with torch.no_grad():
        np.testing.assert_allclose(predicted, call(other.eval(), batch).numpy(), rtol=1e-5, atol=1e-6)
    assert not np.allclose(predicted, runner.predict(mine, rows))


def test_predict_takes_labelled_and_unlabelled_rows(tmp_path):
    x, y = data(150)
    trained = model()
    runner = trainer(trained, tmp_path)
    labelled = runner.predict(trained, loader(x, y))
    unlabelled = runner.predict(trained, ColumnLoader(PredictDataset(x), batch_size=64))
    assert isinstance(labelled, list)
    assert np.shape(labelled) == (150, 2)
    assert labelled == unlabelled
