"""Values that torch-rechub answers with "all elements of input should be between 0 and 1", or not at all."""

import numpy as np
import pytest
import torch
from devices import call

from behaviour.helpers import KINDS, data, loader, model, trainer
from fastmtl.errors import FastMTLError


@pytest.mark.parametrize("kind", KINDS)
def test_no_weight_decay_and_no_dropout(kind, backend, tmp_path):
    n_task = 3 if kind == "ESMM" else 2
    name = {"SharedBottom": "bottom_params", "AITM": "bottom_params", "ESMM": "cvr_params"}.get(kind, "expert_params")
    x, y = data(256, n_task=n_task)
    trained = model(kind, **{name: {"dims": [8], "dropout": 0}})
    runner = trainer(
        trained, tmp_path, ("classification",) * n_task, n_epoch=3, optimizer_params={"lr": 1e-2, "weight_decay": 0}
    )
    log = np.array(runner.fit(loader(x, y), loader(x, y)))
    assert np.isfinite(log).all()
    assert log[-1, 1] < log[0, 1]


@pytest.mark.parametrize("dropout", [-0.1, 1.0, 1.5])
def test_a_dropout_out_of_range_is_named(dropout):
    with pytest.raises(FastMTLError, match=rf"dropout.*{dropout}"):
        model(bottom_params={"dims": [8], "dropout": dropout})


@pytest.mark.parametrize(("column", "place"), [("age", 70), ("profile", (70, 2))])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_bad_dense_value_names_feature_and_row(column, place, value, backend, tmp_path):
    x, y = data(100)
    x[column][place] = value
    with pytest.raises(FastMTLError, match=rf"'{column}'.*(NaN|inf)") as caught:
        trainer(model(), tmp_path).fit(loader(x, y), loader(*data(100)))
    assert "row 70" in str(caught.value)


def test_a_bad_dense_value_in_a_batch_of_ones_own(cpu_backend):
    """Of batches on a GPU only what a loader yields is looked at: anything else would have to wait for the device."""
    x, _ = data(32)
    batch = {name: torch.from_numpy(column) for name, column in x.items()}
    batch["age"][9] = np.nan
    with pytest.raises(FastMTLError, match=r"'age'.*row 9"):
        model().cpu()(batch)


def test_a_missing_column_is_named(backend):
    x, _ = data(32)
    batch = {name: torch.from_numpy(column) for name, column in x.items() if name != "item"}
    with pytest.raises(FastMTLError, match="'item'"):
        call(model(), batch)


@pytest.mark.parametrize("column", ["item", "history", "age"])
@pytest.mark.parametrize("train", [False, True], ids=["eval", "train"])
def test_a_column_of_another_length_is_named(column, train, backend):
    x, _ = data(32)
    batch = {name: torch.from_numpy(values) for name, values in x.items()}
    batch[column] = batch[column][:20]
    with pytest.raises(FastMTLError, match=rf"'{column}': its column has 20 rows, the others of the batch have 32"):
        call(model().train(train), batch)


def test_a_label_outside_0_and_1_is_named(tmp_path):
    x, y = data(100)
    y[33, 1] = 2
    with pytest.raises(FastMTLError, match=r"task_1.*2.*row 33"):
        trainer(model(), tmp_path).fit(loader(x, y), loader(*data(100)))


def test_labels_of_another_number_of_tasks_are_named(tmp_path):
    x, y = data(100, n_task=3)
    with pytest.raises(FastMTLError, match=r"3.*2"):
        trainer(model(), tmp_path).fit(loader(x, y), loader(x, y))
