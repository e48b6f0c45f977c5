"""Census-Income: found, read, split and encoded as told, and every damage named. Most rows are made up."""

import gzip
import os
import re

import numpy as np
import pytest

from fastmtl.data import census, find_census, load_census
from fastmtl.errors import BadDataError

real_file = find_census(os.environ.get("FASTMTL_DATA", "nowhere"))


def made_up_rows(rng, n):
    """Raw lines in the file's format."""
    rows = []
    for _ in range(n):
        row = [
            str(rng.integers(0, 90)) if name in census.DENSE else f"v {rng.integers(0, 5)}" for name in census.COLUMNS
        ]
        row[census.COLUMNS.index("marital status")] = rng.choice(["Never married", "Divorced", "Widowed"])
        row[census.COLUMNS.index("instance weight")] = f"{rng.random() * 4000:.2f}"
        row[-1] = rng.choice(["- 50000.", "50000+."])
        rows.append(", ".join(row))
    return rows


def write(path, rows):
    content = ("\n".join(rows) + "\n").encode()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path


@pytest.mark.parametrize("name", ["census-income.test", "census-income.data.gz", "census-income.test.gz"])
def test_rows_are_split_and_encoded_as_told(rng, tmp_path, name):
    rows = made_up_rows(rng, 997)
    data = load_census(write(tmp_path / name, rows), verify=False)
    order = np.random.default_rng(2022).permutation(997)
    n_train, n_valid = 997 * 60_000 // 99_762, 997 * 20_000 // 99_762
    assert [len(split) for split in (data.train, data.valid, data.test)] == [n_train, n_valid, 997 - n_train - n_valid]
    cells = np.array([row.split(", ") for row in rows], dtype=object)
    raw = dict(zip(census.COLUMNS, cells.T, strict=True))
    parts = np.split(order, [n_train, n_train + n_valid])
    for split, part in zip((data.train, data.valid, data.test), parts, strict=True):
        np.testing.assert_array_equal(split.y[:, 0], raw["income"][part] == "50000+.")
        np.testing.assert_array_equal(split.y[:, 1], raw["marital status"][part] == "Never married")
        assert split.y.dtype == np.float32
        assert list(split.x) == [spec.name for spec in data.features]
        city = np.unique(raw["race"][parts[0]].astype(str))
        np.testing.assert_array_equal(city[split.x["race"]], raw["race"][part])
        age, low, high = (
            f(raw["age"][p].astype(float)) for f, p in ((np.array, part), (np.min, parts[0]), (np.max, parts[0]))
        )
        np.testing.assert_allclose(split.x["age"], (age - low) / (high - low), rtol=1e-6, atol=1e-7)
    assert data.task_names == ("income", "marital")
    kinds = [spec.kind for spec in data.features]
    assert (kinds.count("sparse"), kinds.count("dense")) == (32, 7)
    assert not {"income", "marital status", "instance weight"} & set(data.train.x)
    assert "997 rows" in data.note


def test_both_halves_are_joined_the_training_half_first(rng, tmp_path):
    first, second = made_up_rows(rng, 300), made_up_rows(rng, 200)
    write(tmp_path / "census-income.test.gz", second)
    write(tmp_path / "census-income.data", first)
    joined = write(tmp_path / "joined", first + second)
    a, b = load_census(tmp_path, verify=False), load_census(joined)
    assert len(a.train) == 500 * 60_000 // 99_762
    for mine, theirs in ((a.train, b.train), (a.valid, b.valid), (a.test, b.test)):
        np.testing.assert_array_equal(mine.y, theirs.y)
        for name in mine.x:
            np.testing.assert_array_equal(mine.x[name], theirs.x[name])


def test_places_are_searched_in_order(rng, tmp_path, monkeypatch):
    cache, given = tmp_path / "cache" / "fastmtl", tmp_path / "given"
    cache.mkdir(parents=True)
    given.mkdir()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("FASTMTL_DATA", raising=False)
    assert find_census() == ()
    with pytest.raises(BadDataError) as error:
        load_census()
    assert 'archive.ics.uci.edu), data set "Census-Income (KDD)"' in str(error.value)
    assert f"put it into {cache}, or into any folder that the environment variable FASTMTL_DATA names" in str(
        error.value
    )
    monkeypatch.setenv("FASTMTL_DATA", str(given))
    with pytest.raises(BadDataError, match=re.escape(f"put it into {given} or {cache}.")):
        load_census()
    in_cache = write(cache / "census-income.data", made_up_rows(rng, 3))
    assert find_census() == (in_cache,)
    in_given = write(given / "census-income.test.gz", made_up_rows(rng, 3))
    assert find_census() == (in_given,)
    plain = write(given / "census-income.test", made_up_rows(rng, 3))
    assert find_census() == (plain,)
    assert find_census(cache) == find_census(in_cache) == (in_cache,)
    with pytest.raises(BadDataError, match=f"^{re.escape(str(tmp_path))}: no Census-Income file is here"):
        load_census(tmp_path)


def changed(rows, row, column, value):
    cells = rows[row].split(", ")
    cells[census.COLUMNS.index(column)] = value
    return [*rows[:row], ", ".join(cells), *rows[row + 1 :]]


def test_damage_is_named(rng, tmp_path):
    rows = made_up_rows(rng, 40)
    row = int(rng.integers(0, 40))
    short, long = rows[row].rsplit(", ", 2)[0], rows[row] + ", more"
    cases = {
        f"row {row + 1} has 40 columns instead of 42 ('year' and what follows is missing)": [
            *rows[:row],
            short,
            *rows[row + 1 :],
        ],
        f"row {row + 1} has 43 columns instead of 42 (some are too many)": [*rows[:row], long, *rows[row + 1 :]],
        f"row {row + 1}, column 'age' holds 'old', where a number belongs": changed(rows, row, "age", "old"),
        f"row {row + 1}, column 'age' holds 'nan', where a number belongs": changed(rows, row, "age", "nan"),
        f"row {row + 1}, column 'income' holds 'rich', where '- 50000.' or '50000+.' belongs": changed(
            rows, row, "income", "rich"
        ),
        f"row {row + 1} holds bytes that are no text": changed(rows, row, "race", "\N{SNOWMAN}"),
    }
    for message, damaged in cases.items():
        path = write(tmp_path / "census-income.data", damaged)
        with pytest.raises(BadDataError, match=r"^" + re.escape(f"{path}: {message}")):
            load_census(path)


def test_unreadable_and_foreign_files_are_named(rng, tmp_path):
    path = tmp_path / "census-income.data.gz"
    path.write_bytes(gzip.compress("\n".join(made_up_rows(rng, 50)).encode())[:-20])
    with pytest.raises(BadDataError, match=r"census-income.data.gz: cannot be read"):
        load_census(path)
    (tmp_path / "census-income.data").touch()
    with pytest.raises(BadDataError, match=r"census-income.data: the file is empty"):
        load_census(tmp_path / "census-income.data")
    for name in ("census-income.test", "census-income.test.gz"):
        with pytest.raises(
            BadDataError, match=f"{name}: this is not the published census-income.test .sha256 .*expected 98402b1a"
        ):
            load_census(write(tmp_path / name, made_up_rows(rng, 3)))


@pytest.mark.skipif(not real_file, reason="Census-Income is not here; FASTMTL_DATA names its folder")
def test_the_real_file():
    data = load_census(os.environ["FASTMTL_DATA"])
    assert [len(split) for split in (data.train, data.valid, data.test)] == [60_000, 20_000, 19_762]
    everything = np.concatenate([data.train.y, data.valid.y, data.test.y])
    assert everything.sum(axis=0).tolist() == [6186, 43143]
    vocabs = {spec.name: spec.vocab for spec in data.features}
    assert (vocabs["sex"], vocabs["education"], vocabs["industry code"]) == (2, 17, 52)
    train, _, _ = data.loaders(1024)
    assert train.task_names == ["income", "marital"]
    assert train.schema["education"].vocab_size == 17
