"""Shared by the tests of the command line: a small census file, a run trained on it, and a way to call the command."""

import gzip
from typing import NamedTuple

import numpy as np
import pytest

from fastmtl.cli import main
from fastmtl.data import census

N_ROWS = 3000


class Result(NamedTuple):
    """What a command gave."""

    code: int
    out: str
    err: str


@pytest.fixture
def cli(capsys):
    """Call the command in this process."""

    def call(*words):
        capsys.readouterr()
        code = main([str(word) for word in words])
        out, err = capsys.readouterr()
        return Result(code, out, err)

    return call


@pytest.fixture(autouse=True)
def no_census_on_this_machine(monkeypatch, tmp_path):
    """What a test finds is what the test put there; its folder is its own."""
    monkeypatch.delenv("FASTMTL_DATA", raising=False)
    monkeypatch.delenv("FASTMTL_BACKEND", raising=False)
    monkeypatch.setattr("fastmtl.backend._told", True)  # said once a process, by whichever test comes first
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)


def people(seed, n):
    """Column -> raw texts [n] in the file's format, of people whose income and marital status depend on the rest."""
    rng = np.random.default_rng(seed)
    age = rng.integers(0, 90, n)
    columns = {}
    for name in census.COLUMNS:
        if name == "age":
            columns[name] = age.astype(str)
        elif name in census.DENSE:
            columns[name] = rng.integers(0, 50, n).astype(str)
        else:
            columns[name] = np.char.add("v ", rng.integers(0, 6, n).astype(str))
    columns["instance weight"] = rng.integers(1, 4000, n).astype(str)
    school = np.char.replace(columns["education"], "v ", "").astype(int)
    rich = rng.random(n) < 1 / (1 + np.exp(-(school - 4 + (age - 45) / 20)))
    single = rng.random(n) < 1 / (1 + np.exp((age - 30) / 8))
    columns["income"] = np.where(rich, "50000+.", "- 50000.")
    columns["marital status"] = np.where(single, "Never married", "Divorced")
    return columns


@pytest.fixture(scope="session")
def census_folder(tmp_path_factory):
    """A folder with a made-up training half, whose hash nobody knows."""
    folder = tmp_path_factory.mktemp("census")
    rows = zip(*people(1, N_ROWS).values(), strict=True)
    text = "\n".join(", ".join(row) for row in rows) + "\n"
    (folder / "census-income.data.gz").write_bytes(gzip.compress(text.encode()))
    return folder


@pytest.fixture(scope="session")
def run(census_folder, tmp_path_factory):
    """The folder of a finished run on the made-up census; read only."""
    folder = tmp_path_factory.mktemp("runs") / "first"
    words = ["census", "--data-path", census_folder, "--epochs", "3", "--batch-size", "256", "model.n_expert=3"]
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("FASTMTL_BACKEND", raising=False)
        assert main(["train", *map(str, words), "--run-dir", str(folder), "--quiet", "--json"]) == 0
    return folder


def write_csv(path, columns):
    """Columns of texts as a CSV file."""
    lines = [",".join(columns), *(",".join(row) for row in zip(*columns.values(), strict=True))]
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.fixture
def raw_columns():
    """Column -> raw texts of people whom training never saw, with labels as 0 and 1."""
    columns = people(2, 200)
    columns["income"] = (columns["income"] == "50000+.").astype(int).astype(str)
    columns["marital"] = (columns.pop("marital status") == "Never married").astype(int).astype(str)
    return columns


@pytest.fixture
def raw_file(tmp_path, raw_columns):
    """These people as a CSV file."""
    return write_csv(tmp_path / "people.csv", raw_columns)
