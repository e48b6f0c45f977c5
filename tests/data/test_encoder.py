"""The encoder: scikit-learn's ids, one more for the unseen, an exact round trip, and errors that name the cell."""

import json

import numpy as np
import pytest
from sklearn.preprocessing import LabelEncoder, MinMaxScaler

from fastmtl.data import Encoder
from fastmtl.errors import BadDataError, ConfigError


def raw_rows(rng, n=200):
    return {
        "city": rng.choice(np.array(["Rome", "Paris", " ", "Ürümqi", "a,b", '"q"'], dtype=object), n),
        "shop": rng.integers(-5, 2**60, n),
        "code": rng.choice(["7", "12", "03"], n).tolist(),
        "grade": rng.choice([0.5, 2.0, 1e30], n),
        "age": rng.integers(18, 90, n),
        "income": rng.normal(size=n) * 1e5,
        "always": np.full(n, 3.5),
    }


SPARSE, DENSE = ["city", "shop", "code", "grade"], ["age", "income", "always"]


def assert_same(a, b):
    assert list(a) == list(b)
    for name in a:
        assert a[name].dtype == b[name].dtype
        np.testing.assert_array_equal(a[name], b[name])


def test_ids_and_numbers_are_scikit_learns(rng):
    raw = raw_rows(rng)
    encoder = Encoder.fit(raw, SPARSE, DENSE)
    x = encoder.transform(raw)
    assert list(x) == [*SPARSE, *DENSE]
    for name in SPARSE:
        peer = LabelEncoder().fit(raw[name])
        np.testing.assert_array_equal(x[name], peer.transform(raw[name]))
        assert x[name].dtype == np.int64
        assert {spec.name: spec.vocab for spec in encoder.features}[name] == len(peer.classes_)
    for name in ("age", "income"):
        peer = MinMaxScaler().fit_transform(np.asarray(raw[name], dtype=np.float64)[:, None])[:, 0]
        np.testing.assert_allclose(x[name], peer, rtol=1e-6, atol=1e-7)
        assert x[name].dtype == np.float32
    assert (x["always"] == 0).all()
    assert [spec.kind for spec in encoder.features] == ["sparse"] * 4 + ["dense"] * 3


def test_round_trip_through_json_is_exact(rng, tmp_path):
    raw = raw_rows(rng)
    encoder = Encoder.fit(raw, SPARSE, DENSE)
    encoder.save(tmp_path / "encoder.json")
    loaded = Encoder.load(tmp_path / "encoder.json")
    assert loaded.to_dict() == encoder.to_dict()
    assert loaded.features == encoder.features
    fresh = raw_rows(rng)
    assert_same(loaded.transform(fresh), encoder.transform(fresh))
    assert json.loads((tmp_path / "encoder.json").read_text()) == encoder.to_dict()


def test_unseen_and_missing_values_get_the_id_after_the_last(rng):
    encoder = Encoder.fit(raw_rows(rng), SPARSE, [])
    n = {spec.name: spec.vocab for spec in encoder.features}
    x = encoder.transform(
        {
            "city": ["Oslo", None, "", "rome"],
            "shop": [2**61, None, float("nan"), "none"],
            "code": ["3", "", None, 99],
            "grade": np.array([np.nan, np.inf, 0.25, -1.0]),
        }
    )
    for name in SPARSE:
        np.testing.assert_array_equal(x[name], np.full(4, n[name]))


def test_texts_from_a_file_match_the_numbers_of_training(rng):
    raw = raw_rows(rng)
    encoder = Encoder.fit(raw, SPARSE, DENSE)
    as_text = {name: np.array([str(v) for v in np.asarray(column).tolist()], object) for name, column in raw.items()}
    assert_same(encoder.transform(as_text), encoder.transform(raw))
    shops = Encoder.fit({"s": ["1", "2", "x"]}, ["s"], []).transform({"s": np.array([2.0, 1.0, 3.0])})["s"]
    assert shops.tolist() == [1, 0, 3]
    assert Encoder.fit({"s": [1, 2]}, ["s"], []).transform({"s": ["2.0", " 1", "1.5"]})["s"].tolist() == [1, 0, 2]


def test_missing_values_in_training_are_no_class():
    encoder = Encoder.fit({"s": ["b", None, "a"], "f": np.array([1.0, np.nan, 3.0])}, ["s", "f"], [])
    assert [spec.vocab for spec in encoder.features] == [2, 2]
    x = encoder.transform({"s": [None, "a"], "f": [float("nan"), 3.0]})
    assert (x["s"].tolist(), x["f"].tolist()) == ([2, 0], [2, 1])


def test_data_that_is_encoded_already_is_left_alone(rng):
    encoder = Encoder.for_ids({"item": 100}, ["price"])
    x = {"item": rng.integers(0, 100, 50), "price": rng.random(50, dtype=np.float32)}
    assert_same(encoder.transform(x), x)
    assert Encoder.from_dict(encoder.to_dict()).transform({"item": ["99", "100", "-1", "x"], "price": [0] * 4})[
        "item"
    ].tolist() == [99, 100, 100, 100]
    assert encoder.features[0].vocab == 100


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("tall", "feature 'age' has 'tall' in row 13, which is no finite number"),
        ("", "feature 'age' has no value in row 13"),
        (None, "feature 'age' has no value in row 13"),
        (float("nan"), "feature 'age' has no value in row 13"),
        (float("inf"), "feature 'age' has inf in row 13, which is no finite number"),
    ],
)
def test_dense_values_that_are_no_number_are_named(value, message):
    encoder = Encoder.fit({"age": [1.0, 2.0]}, [], ["age"])
    forms = [[1, "2", value], np.array([1, 2, value], dtype=object)]
    if isinstance(value, float):
        forms.append(np.array([1, 2, value]))
    for column in forms:
        with pytest.raises(BadDataError, match=f"^people.csv: {message}; "):
            encoder.transform({"age": column}, source="people.csv", first_row=11)


def test_other_mistakes_are_named(tmp_path):
    encoder = Encoder.fit({"s": ["a"], "d": [1.0]}, ["s"], ["d"])
    with pytest.raises(BadDataError, match=r"^people.csv: column 's', 'd' is missing; the data has x, y"):
        encoder.transform({"x": [1], "y": [1]}, source="people.csv")
    with pytest.raises(BadDataError, match="column 'z' is missing"):
        Encoder.fit({"s": ["a"]}, ["z"], [])
    with pytest.raises(BadDataError, match="no row to learn the range of 'd'"):
        Encoder.fit({"d": []}, [], ["d"])
    with pytest.raises(ConfigError, match="format 99"):
        Encoder.from_dict({"format": 99})
    path = tmp_path / "encoder.json"
    with pytest.raises(BadDataError, match=r"encoder.json: cannot be read"):
        Encoder.load(path)
    for damaged in ("{", "[1]", '{"format": 1}'):
        path.write_text(damaged)
        with pytest.raises(BadDataError, match=r"encoder.json: is no encoder"):
            Encoder.load(path)
