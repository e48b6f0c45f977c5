"""Parquet feeds the trainer: ids stay integers, and labels come with the rows."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from torch.utils.data import DataLoader

from behaviour.helpers import data, loader, model, same_state, trainer
from fastmtl.basic.features import DenseFeature, SparseFeature
from fastmtl.data import ParquetIterableDataset


def _write(path, columns):
    pq.write_table(pa.table({name: pa.array(column.tolist()) for name, column in columns.items()}), path)
    return str(path)


def test_ids_above_2_to_the_24_are_exact(tmp_path):
    """As float32, 2**24 + 1 is 2**24."""
    ids = np.array([2**24 + 1, 2**31 + 1, 2**53 + 1, 3])
    file = _write(tmp_path / "ids.parquet", {"item": ids, "click": np.array([0, 1, 0, 1])})
    ((x, y),) = list(ParquetIterableDataset([file], columns=["item"], labels=["click"]))
    assert not x["item"].is_floating_point()
    assert x["item"].tolist() == ids.tolist()
    assert y.tolist() == [[0.0], [1.0], [0.0], [1.0]]


@pytest.mark.parametrize("n_file", [1, 3])
def test_trainer_reads_files_as_it_reads_columns(n_file, backend, tmp_path):
    x, y = data(192)
    x = {name: x[name] for name in ("user", "item", "age")}
    parts = np.array_split(np.arange(192), n_file)
    files = [
        _write(
            tmp_path / f"{part[0]}.parquet",
            {**{name: column[part] for name, column in x.items()}, "click": y[part, 0], "buy": y[part, 1]},
        )
        for part in parts
    ]
    streamed = ParquetIterableDataset(files, batch_size=64, labels=["click", "buy"])
    listed = [SparseFeature("user", 50, 4), SparseFeature("item", 80, 4), DenseFeature("age")]
    losses, trained = [], []
    for rows in (loader(x, y), DataLoader(streamed, batch_size=None)):
        made = model(features=listed)
        runner = trainer(made, tmp_path)
        losses.append([runner.train_one_epoch(rows) for _ in range(2)])
        trained.append(made)
        assert np.isfinite(runner.evaluate(made, rows)).all()
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-6)
    assert same_state(*trained)


def test_fit_on_files(tmp_path):
    x, y = data(200)
    file = _write(
        tmp_path / "log.parquet", {**{k: x[k] for k in ("user", "item", "age")}, "click": y[:, 0], "buy": y[:, 1]}
    )
    rows = DataLoader(ParquetIterableDataset([file], batch_size=50, labels=["click", "buy"]), batch_size=None)
    made = model(features=[SparseFeature("user", 50, 4), SparseFeature("item", 80, 4), DenseFeature("age")])
    log = np.array(trainer(made, tmp_path, n_epoch=3).fit(rows, rows, mode="parquet"))
    assert log.shape == (3, 4)
    assert log[-1, 0] < log[0, 0]
    assert torch.load(tmp_path / "model_parquet_0.pth", weights_only=True).keys() == made.state_dict().keys()
