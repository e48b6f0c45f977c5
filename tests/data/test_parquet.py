"""The Parquet stream: exact ids, every row once with any workers, padding, labels, and errors that name the cell."""

import re

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from torch.utils.data import DataLoader

from fastmtl.data import ParquetIterableDataset
from fastmtl.errors import BadDataError, ConfigError


def write(path, table, group_rows=None):
    pq.write_table(pa.table(table), path, row_group_size=group_rows)
    return path


def collect(batches, name):
    return np.concatenate([batch[name].numpy() for batch in batches])


def test_values_types_and_batches(rng, tmp_path):
    n = 1000
    table = {
        "id": rng.integers(-(2**62), 2**62, n),
        "small": rng.integers(0, 100, n).astype("uint8"),
        "flag": rng.random(n) < 0.5,
        "price": rng.random(n),
        "half": rng.random(n).astype("float16"),
        "coded": pa.array(rng.integers(0, 5, n)).dictionary_encode(),
        "pair": pa.FixedSizeListArray.from_arrays(pa.array(rng.random(2 * n)), 2),
        "three": pa.array(rng.integers(0, 9, (n, 3)).tolist()),
    }
    path = write(tmp_path / "a.parquet", table, group_rows=int(rng.integers(50, 400)))
    batches = list(ParquetIterableDataset([str(path)], batch_size=128))
    assert [len(batch["id"]) for batch in batches] == [128] * 7 + [104]
    assert list(batches[0]) == list(table)
    for name, column in table.items():
        column = pa.array(column)
        if name in ("pair", "three"):
            expected = np.array(column.to_pylist())
        else:
            expected = np.array(column.to_pylist()) if name != "half" else table["half"]
        got = collect(batches, name)
        assert got.dtype == (np.float32 if name in ("price", "half", "pair") else np.int64)
        np.testing.assert_array_equal(got, expected.astype(got.dtype))


def test_ragged_lists_are_padded_to_the_longest_of_the_batch(rng, tmp_path):
    lists = [rng.integers(0, 100, rng.integers(0, 9)).tolist() for _ in range(300)]
    path = write(tmp_path / "a.parquet", {"h": pa.array(lists, pa.list_(pa.int32()))}, group_rows=37)
    at = 0
    for batch in ParquetIterableDataset(path, batch_size=50):
        rows = lists[at : at + 50]
        longest = max(map(len, rows))
        assert batch["h"].dtype == torch.int64
        assert batch["h"].tolist() == [row + [-1] * (longest - len(row)) for row in rows]
        at += 50
    assert at == 300
    empty = write(tmp_path / "empty.parquet", {"h": pa.array([[], []], pa.list_(pa.int64()))})
    (batch,) = ParquetIterableDataset(empty)
    assert batch["h"].tolist() == [[-1], [-1]]


@pytest.mark.parametrize("workers", [0, 1, 2])
@pytest.mark.parametrize("n_files", [1, 3])
def test_every_row_once_and_workers_share_fairly(rng, tmp_path, workers, n_files):
    files, ids = [], []
    for i in range(n_files):
        n = int(rng.integers(1, 700))
        ids.append(rng.integers(0, 2**60, n))
        table = {"id": ids[-1], "label": rng.random(n)}
        files.append(write(tmp_path / f"{i}.parquet", table, group_rows=int(rng.integers(1, 300))))
    dataset = ParquetIterableDataset(files, batch_size=64, labels=["label"])
    batches = list(DataLoader(dataset, batch_size=None, num_workers=workers))
    got = np.concatenate([x["id"].numpy() for x, _ in batches])
    everything = np.concatenate(ids)
    assert dataset.n_rows == len(everything)
    if workers == 0:
        np.testing.assert_array_equal(got, everything)
    np.testing.assert_array_equal(np.sort(got), np.sort(everything))
    n_short = sum(len(y) < 64 for _, y in batches)
    assert n_short <= max(workers, 1)


def test_one_file_of_one_row_group_keeps_all_workers_busy(tmp_path, monkeypatch):
    path = write(tmp_path / "a.parquet", {"id": np.arange(1001)})
    dataset = ParquetIterableDataset(path, batch_size=10)
    shares = []
    for worker in range(4):
        info = type("Info", (), {"id": worker, "num_workers": 4})
        monkeypatch.setattr("fastmtl.data.parquet.get_worker_info", lambda info=info: info)
        shares.append(collect(list(dataset), "id"))
    assert [len(share) for share in shares] == [250, 250, 250, 251]
    np.testing.assert_array_equal(np.concatenate(shares), np.arange(1001))


def test_labels_columns_and_schema(rng, tmp_path):
    n = 90
    ids, click = rng.integers(5, 50, n), rng.integers(0, 2, n)
    value = pa.array([None if v < 0.3 else v for v in rng.random(n)])
    lists = [rng.integers(-1, 30, rng.integers(1, 5)).tolist() for _ in range(n)]
    table = {"id": ids, "x": rng.random(n), "click": click, "h": lists, "value": value, "v": [[0.5, 1.0]] * n}
    path = write(tmp_path / "a.parquet", table, group_rows=40)
    dataset = ParquetIterableDataset([path], batch_size=n, labels=["value", "click"])
    ((x, y),) = dataset
    assert list(x) == ["id", "x", "h", "v"]
    assert y.dtype == torch.float32
    np.testing.assert_array_equal(y[:, 1].numpy(), click)
    np.testing.assert_array_equal(torch.isnan(y[:, 0]).numpy(), value.is_null().to_numpy(zero_copy_only=False))
    assert dataset.task_names == ["value", "click"]
    schema = dataset.schema
    assert schema.task_names == ("value", "click")
    assert [c.kind for c in schema.columns] == ["int", "float", "sequence", "vector"]
    assert (schema["id"].min_id, schema["id"].max_id) == (ids.min(), ids.max())
    flat = [v for row in lists for v in row]
    assert (schema["h"].min_id, schema["h"].max_id, schema["h"].length) == (min(flat), max(flat), max(map(len, lists)))
    assert (schema["v"].length, schema["x"].vocab_size) == (2, None)
    (only,) = ParquetIterableDataset([path], columns=["x", "id"], batch_size=n)
    assert list(only) == ["x", "id"]


@pytest.mark.parametrize(
    ("column", "message"),
    [
        (
            pa.array([1] * 130 + [None] + [2] * 69),
            "column 'c' has no usable value in row 131 (missing, NaN or infinite)",
        ),
        (pa.array([0.5] * 77 + [np.nan] + [1.0] * 122), "column 'c' has no usable value in row 78"),
        (pa.array([[1]] * 199 + [None]), "column 'c' has no usable value in row 200"),
        (pa.array([[], [1, 2], [3, None]] + [[4]] * 197), "column 'c' has no usable value in row 3"),
        (
            pa.array([[0.5, 1.0]] * 99 + [[0.5, np.inf]] + [[0.0, 1.0]] * 100),
            "column 'c' has no usable value in row 100",
        ),
        (pa.array([1] * 199 + [2**63], pa.uint64()), "column 'c', rows 181 to 200, holds a number that no 64-bit id"),
        (pa.array([[0.5], [0.5, 1.0]] * 100), "lengths from 1 to 2"),
        (pa.array(["a"] * 200), "column 'c' holds string, which is no number; leave it out with columns=[...]"),
        (pa.array([{"a": 1}] * 200), "column 'c' holds struct<a: int64>, which is no number"),
    ],
)
def test_unusable_columns_are_named(tmp_path, column, message):
    path = write(tmp_path / "a.parquet", {"good": np.arange(200), "c": column}, group_rows=60)
    with pytest.raises(BadDataError, match=re.escape(message)) as error:
        list(ParquetIterableDataset(path, batch_size=32))
    assert str(path) in str(error.value) or "lengths" in message
    assert len(list(ParquetIterableDataset(path, columns=["good"], batch_size=100))) == 2


def test_unusable_files_are_named(rng, tmp_path):
    good = write(tmp_path / "good.parquet", {"id": rng.integers(0, 9, 10)})
    other = write(tmp_path / "other.parquet", {"user": [1]})
    (tmp_path / "empty.parquet").touch()
    (tmp_path / "text.parquet").write_text("id\n1\n")
    no_rows = write(tmp_path / "no_rows.parquet", {"id": np.array([], dtype=np.int64)})
    for name, message in (
        ("none.parquet", "there is no such file"),
        ("empty.parquet", "the file is empty"),
        ("text.parquet", "is no whole Parquet file"),
        (".", "this is a folder"),
    ):
        with pytest.raises(BadDataError, match=r"^" + re.escape(f"{tmp_path / name}: ") + f".*{message}"):
            ParquetIterableDataset([good, tmp_path / name])
    with pytest.raises(BadDataError, match=r"other.parquet: column 'id' is missing; the file has user"):
        ParquetIterableDataset([good, other])
    with pytest.raises(BadDataError, match=r"good.parquet: column 'click' is missing"):
        ParquetIterableDataset([good], labels=["click"])
    with pytest.raises(BadDataError, match=r"no_rows.parquet: no row in it"):
        ParquetIterableDataset([no_rows])
    with pytest.raises(ConfigError, match="no Parquet file is given"):
        ParquetIterableDataset([])
    with pytest.raises(ConfigError, match="batch_size is 0"):
        ParquetIterableDataset([good], batch_size=0)
