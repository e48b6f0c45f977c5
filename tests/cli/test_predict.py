"""`fastmtl predict`: the model's own probabilities, whatever the order of the columns, whole files only."""

import gzip

import numpy as np
import pytest
import torch

import fastmtl
from fastmtl.data import Encoder, read_table

from .conftest import write_csv


@pytest.fixture
def expected(run, raw_file):
    """The model's probabilities [200, 2]."""
    x = Encoder.load(run / "best" / "encoder.json").transform(read_table(raw_file).columns)
    model = fastmtl.from_pretrained(run / "best")
    with torch.no_grad():
        return model({name: torch.from_numpy(column) for name, column in x.items()}).numpy()


def read(path):
    header, *rows = path.read_text().splitlines()
    return header, np.array([row.split(",") for row in rows], dtype=np.float32)


def test_a_csv_file_gets_the_models_probabilities(cli, run, raw_file, tmp_path, expected):
    code, out, err = cli("predict", run, raw_file, "--out", tmp_path / "p.csv")
    assert (code, out) == (0, ""), err
    header, got = read(tmp_path / "p.csv")
    assert header == "income,marital"
    np.testing.assert_allclose(got, expected, rtol=1e-6)
    (ignored,) = [line for line in err.splitlines() if line.startswith("ignored")]
    assert ignored.endswith("instance weight, income, marital")
    assert "200 rows" in err


def test_all_formats_hold_the_same_numbers(cli, run, raw_file, tmp_path):
    outs = [tmp_path / name for name in ("p.csv", "p.csv.gz", "p.parquet")]
    for out in outs:
        assert cli("predict", run, raw_file, "--out", out, "--quiet").code == 0
    code, text, err = cli("predict", run, raw_file, "--out", "-", "--quiet")
    assert (code, err) == (0, "")
    assert text == outs[0].read_text() == gzip.decompress(outs[1].read_bytes()).decode()
    parquet = read_table(outs[2]).columns
    assert {column.dtype for column in parquet.values()} == {np.dtype(np.float32)}
    np.testing.assert_array_equal(np.stack(list(parquet.values()), axis=1), read(outs[0])[1])


def test_parquet_is_read_and_columns_may_stand_in_any_order(cli, run, raw_columns, tmp_path, expected):
    import pyarrow as pa
    import pyarrow.parquet as pq

    del raw_columns["income"], raw_columns["instance weight"]
    numbers = {"age", "capital gains"}
    table = {n: c.astype(np.int64) if n in numbers else c.tolist() for n, c in reversed(raw_columns.items())}
    pq.write_table(pa.table(table), tmp_path / "people.parquet")
    assert cli("predict", run, tmp_path / "people.parquet", "--out", tmp_path / "p.csv").code == 0
    np.testing.assert_allclose(read(tmp_path / "p.csv")[1], expected, rtol=1e-6)


def test_values_that_training_never_saw_are_read_as_unknown(cli, run, raw_columns, tmp_path):
    raw_columns["race"][:3] = "v 99"
    file = write_csv(tmp_path / "people.csv", raw_columns)
    code, _, err = cli("predict", run, file, "--out", tmp_path / "p.csv")
    assert code == 0
    assert "never saw" in err
    assert "race (3 rows)" in err
    encoder = Encoder.load(run / "best" / "encoder.json")
    x = encoder.transform(read_table(file).columns)
    unknown = next(spec.vocab for spec in encoder.features if spec.name == "race")
    assert (x["race"][:4] == unknown).tolist() == [True, True, True, False]
    with torch.no_grad():
        p = fastmtl.from_pretrained(run / "best")({n: torch.from_numpy(c) for n, c in x.items()}).numpy()
    np.testing.assert_allclose(read(tmp_path / "p.csv")[1], p, rtol=1e-6)


def test_an_old_file_survives_a_failure(cli, run, raw_file, tmp_path, monkeypatch):
    out = tmp_path / "p.csv"
    out.write_text("old")

    def disk_full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "savetxt", disk_full)
    code, _, err = cli("predict", run, raw_file, "--out", out, "--quiet")
    assert (code, err.count("\n")) == (2, 1)
    assert "No space left" in err
    assert out.read_text() == "old"
    assert sorted(p.name for p in tmp_path.iterdir() if p.is_file()) == ["p.csv", "people.csv"]


@pytest.mark.parametrize(
    ("out", "named"), [("p.txt", ".parquet"), ("nowhere/p.csv", "No such file"), ("people.csv/p.csv", "Not a dir")]
)
def test_an_impossible_output_is_refused_before_anything_is_read(cli, run, raw_file, tmp_path, out, named):
    code, _, err = cli("predict", run, "no-such-file.csv", "--out", tmp_path / out)
    assert (code, err.count("\n")) == (2, 1)
    assert named in err
    assert "no-such-file" not in err
