"""`fastmtl evaluate`: the numbers of the run again, the same numbers from a file, and wrong files named."""

import json
import shutil

import numpy as np
import pytest
import torch

import fastmtl
from fastmtl.basic.metric import auc, log_loss
from fastmtl.data import Encoder, load_synthetic, read_table

from .conftest import write_csv


def test_the_run_is_scored_as_when_it_was_trained(cli, run):
    code, out, _ = cli("evaluate", run, "--json")
    assert code == 0
    assert json.loads(out)["metrics"] == json.loads((run / "metrics.json").read_text())["metrics"]


def test_a_model_folder_by_itself_needs_to_be_told_the_data(cli, run, census_folder, tmp_path, monkeypatch):
    shutil.copytree(run / "best", tmp_path / "model")
    code, _, err = cli("evaluate", tmp_path / "model")
    assert code == 2
    assert "census, synthetic, or a file" in err
    monkeypatch.setenv("FASTMTL_DATA", str(census_folder))
    code, out, _ = cli("evaluate", tmp_path / "model", "census", "--batch-size", 256, "--json")
    assert code == 0
    assert json.loads(out)["metrics"] == json.loads((run / "metrics.json").read_text())["metrics"]


def test_a_file_is_scored_as_by_hand(cli, run, raw_file, raw_columns):
    code, out, err = cli("evaluate", run, raw_file, "--json")
    assert code == 0, err
    x = Encoder.load(run / "best" / "encoder.json").transform(read_table(raw_file).columns)
    model = fastmtl.from_pretrained(run / "best")
    p = model({name: torch.from_numpy(column) for name, column in x.items()}).detach().numpy()
    for task, name in enumerate(("income", "marital")):
        labels = raw_columns[name].astype(float)
        scores = json.loads(out)["metrics"]["file"][name]
        assert scores["auc"] == pytest.approx(auc(labels, p[:, task]), abs=1e-6)
        assert scores["logloss"] == pytest.approx(log_loss(labels, p[:, task]), rel=1e-5)


def test_a_label_that_is_unknown_is_left_out(cli, run, tmp_path, raw_columns):
    known = np.arange(200) % 3 > 0
    some = {name: column[known] for name, column in raw_columns.items()}
    raw_columns["income"] = np.where(known, raw_columns["income"], "")
    all_rows = cli("evaluate", run, write_csv(tmp_path / "a.csv", raw_columns), "--json")
    known_rows = cli("evaluate", run, write_csv(tmp_path / "b.csv", some), "--json")
    a, b = (json.loads(result.out)["metrics"]["file"]["income"] for result in (all_rows, known_rows))
    assert a["auc"] == pytest.approx(b["auc"], abs=1e-6)
    assert a["logloss"] == pytest.approx(b["logloss"], rel=1e-5)


@pytest.mark.filterwarnings("default")
def test_one_class_gives_null_and_a_warning_that_says_why(cli, run, tmp_path, raw_columns):
    raw_columns["income"][:] = "0"
    file = write_csv(tmp_path / "people.csv", raw_columns)
    code, out, err = cli("evaluate", run, file, "--json", "--quiet")
    assert code == 0
    assert json.loads(out)["metrics"]["file"]["income"]["auc"] is None
    assert err.startswith("fastmtl: warning: task 'income': AUC is undefined: only the class 0")
    assert err.count("\n") == 1
    assert "undefined" in cli("evaluate", run, file).out


def test_esmm_reads_clicks_and_purchases(cli, tmp_path):
    words = ("synthetic", "--model", "esmm", "--rows", 3000, "--epochs", 1, "--quiet", "--run-dir", tmp_path / "run")
    assert cli("train", *words).code == 0
    data = load_synthetic(3000)
    columns = {name: column.astype(str) for name, column in data.test.x.items()}
    columns |= {"click": data.test.y[:, 0].astype(str), "purchase": data.test.y[:, 1].astype(str)}
    file = write_csv(tmp_path / "log.csv", columns)
    of_file = json.loads(cli("evaluate", tmp_path / "run", file, "--json").out)["metrics"]["file"]
    of_test = json.loads((tmp_path / "run" / "metrics.json").read_text())["metrics"]["test"]
    for task in ("cvr", "ctr", "ctcvr"):
        assert of_file[task] == pytest.approx(of_test[task], abs=1e-5)


def test_data_encoded_otherwise_is_refused(cli, run, tmp_path):
    code, _, err = cli("evaluate", run, "synthetic")
    assert (code, err.count("\n")) == (2, 1)
    assert "encoded otherwise" in err


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda c: c.pop("marital"), ["people.csv", "'marital'", "is missing"]),
        (lambda c: c.pop("age"), ["people.csv", "'age'", "is missing"]),
        (lambda c: c["income"].__setitem__(4, "7"), ["people.csv", "'income'", "7.0", "row 5"]),
        (lambda c: c["income"].__setitem__(6, "x"), ["people.csv", "'income'", "'x'", "row 7"]),
        (lambda c: c["age"].__setitem__(9, "x"), ["people.csv", "'age'", "'x'", "row 10"]),
    ],
)
def test_what_is_wrong_with_a_file_is_named(cli, run, tmp_path, raw_columns, change, named):
    change(raw_columns)
    code, out, err = cli("evaluate", run, write_csv(tmp_path / "people.csv", raw_columns), "--quiet")
    assert (code, out, err.count("\n")) == (2, "", 1)
    for part in named:
        assert part in err
