"""What a loader knows of its columns, and which labels it lets through."""

import json

import numpy as np
import pytest

from fastmtl.data import Schema, TorchDataset, validate_labels
from fastmtl.errors import BadDataError


def some_columns(rng, n=50):
    return {
        "id": rng.integers(3, 1000, n),
        "price": rng.random(n),
        "history": rng.integers(-1, 40, (n, 6)),
        "vector": rng.random((n, 4), dtype=np.float32),
        "flag": rng.integers(0, 2, n).astype(bool),
    }


def test_columns_are_described(rng):
    x = some_columns(rng)
    schema = TorchDataset(x, {"click": np.zeros(50), "buy": np.ones(50)}).schema
    assert schema.names == tuple(x)
    assert [c.kind for c in schema.columns] == ["int", "float", "sequence", "vector", "int"]
    assert (schema["id"].min_id, schema["id"].max_id) == (x["id"].min(), x["id"].max())
    assert schema["id"].vocab_size == x["id"].max() + 1
    assert (schema["history"].min_id, schema["history"].length) == (x["history"].min(), 6)
    assert (schema["price"].vocab_size, schema["vector"].length) == (None, 4)
    assert schema.task_names == ("click", "buy")
    assert "price" in schema
    assert "cost" not in schema
    assert Schema.from_dict(json.loads(json.dumps(schema.to_dict()))) == schema


def test_merged_ranges_cover_both(rng):
    x, other = some_columns(rng), some_columns(rng)
    merged = Schema.from_columns(x).merge(Schema.from_columns({"id": other["id"], "new": other["id"]}))
    assert merged.names == tuple(x)
    assert merged["id"].max_id == max(x["id"].max(), other["id"].max())
    assert merged["id"].min_id == min(x["id"].min(), other["id"].min())
    assert merged["history"] == Schema.from_columns(x)["history"]


def test_known_vocabularies_widen_and_never_narrow(rng):
    schema = Schema.from_columns(some_columns(rng))
    wider = schema.with_vocabs({"id": 5000, "history": 2, "price": None})
    assert wider["id"].vocab_size == 5000
    assert wider["history"] == schema["history"]
    assert wider["price"] == schema["price"]


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("name", ["price", "vector"])
def test_unusable_floats_are_found_and_only_matter_where_read(rng, name, bad):
    x = some_columns(rng)
    row = int(rng.integers(0, 50))
    x[name].reshape(50, -1)[row, -1] = bad
    schema = Schema.from_columns(x)
    schema.check(["id", "history"])
    with pytest.raises(BadDataError, match=f"feature '{name}' holds NaN or an infinity, first in row {row};"):
        schema.check(["id", name])


def test_a_sum_that_overflows_is_no_infinity():
    huge = np.full(4, np.finfo(np.float64).max)
    assert Schema.from_columns({"huge": huge})["huge"].bad_row is None


def test_missing_columns_are_named(rng):
    with pytest.raises(BadDataError, match="no column 'age'; it has id, price, history"):
        Schema.from_columns(some_columns(rng)).check(["age"])


def test_good_labels_pass(rng):
    y = rng.random((30, 3))
    y[:, 1] = rng.integers(0, 2, 30)
    y[:, 2] = rng.normal(size=30) * 1e6
    y[rng.random((30, 3)) < 0.2] = np.nan
    validate_labels(y, ["classification", "binary", "regression"], ["a", "b", "c"])
    validate_labels(rng.integers(0, 2, 30), ["classification"], ["a"])


@pytest.mark.parametrize(
    ("kind", "bad", "rule"),
    [
        ("classification", 1.5, "between 0 and 1"),
        ("classification", -0.25, "between 0 and 1"),
        ("binary", np.inf, "between 0 and 1"),
        ("regression", -np.inf, "a finite number"),
    ],
)
def test_bad_labels_are_named(rng, kind, bad, rule):
    y = rng.random((30, 2)).astype(np.float32)
    row = int(rng.integers(0, 30))
    y[row, 1] = bad
    with pytest.raises(BadDataError, match=f"label 'buy' is {bad} in row {row + 7}; a {kind} label is {rule}"):
        validate_labels(y, ["regression", kind], ["click", "buy"], first_row=7)


def test_a_label_column_for_each_task():
    with pytest.raises(BadDataError, match=r"2 columns \(click, buy\) and the model 1 tasks"):
        validate_labels(np.zeros((3, 2)), ["classification"], ["click", "buy"])
