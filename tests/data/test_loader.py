"""The loaders give torch-rechub's batches: the same values, dtypes, order and random state."""

import re

import numpy as np
import pandas as pd
import pytest
import torch
from torch.utils.data import DataLoader, Subset, default_collate

from fastmtl.backends import native
from fastmtl.data.loader import ColumnLoader, PredictDataset, TorchDataset
from fastmtl.errors import BadDataError, ConfigError
from fastmtl.utils.data import DataGenerator

peer = pytest.importorskip("torch_rechub.utils.data", reason="torch-rechub is not here: nothing to compare with")
PeerGenerator, PeerDataset = peer.DataGenerator, peer.TorchDataset

DTYPES = ["int8", "uint8", "int16", "int32", "int64", "float16", "float32", "float64", "bool"]


def random_data(rng, n, n_tasks=2):
    x = {f"c_{dtype}": rng.integers(0, 2 if dtype == "bool" else 100, n).astype(dtype) for dtype in DTYPES}
    x["second_int"] = rng.integers(0, 10**12, n)
    x["history"] = rng.integers(-1, 50, (n, 5))
    x["vector"] = rng.random((n, 3), dtype=np.float32)
    names = list(x)
    rng.shuffle(names)
    return {name: x[name] for name in names}, rng.random((n, n_tasks)).astype(rng.choice(["float32", "float64"]))


def drain(loaders, epochs=3):
    """Train and validation epochs as a trainer runs them, then the test rows: (batches, final random state)."""
    train, val, test = loaders
    batches = [batch for _ in range(epochs) for loader in (train, val) for batch in loader] + list(test)
    return batches, torch.get_rng_state()


def assert_same_batches(mine, theirs):
    assert len(mine) == len(theirs)
    for (x, y), (peer_x, peer_y) in zip(mine, theirs, strict=True):
        assert list(x) == list(peer_x)
        for name, column in peer_x.items():
            assert x[name].dtype == column.dtype, name
            assert torch.equal(x[name], column), name
        assert y.dtype == peer_y.dtype
        assert torch.equal(y, peer_y)


@pytest.mark.parametrize("split", [None, (0.7, 0.1), (0.5, 0.5)])
@pytest.mark.parametrize("workers", [0, 2])
def test_same_batches_and_random_state_as_torch_rechub(rng, seed, split, workers):
    n = int(rng.integers(30, 200)) if workers else int(rng.integers(30, 1500))
    batch_size = int(rng.integers(1, n // 2)) if workers == 0 else n // 3
    x, y = random_data(rng, n)
    given = {"split_ratio": split}
    if split is None:
        (x_val, y_val), (x_test, y_test) = random_data(rng, 20), random_data(rng, 7)
        y_val, y_test = y_val.astype(y.dtype), y_test.astype(y.dtype)
        x_val, x_test = ({name: other[name] for name in x} for other in (x_val, x_test))
        given = {"x_val": x_val, "y_val": y_val, "x_test": x_test, "y_test": y_test}
    results = []
    for generator in (DataGenerator, PeerGenerator):
        torch.manual_seed(seed)
        loaders = generator(x, y).generate_dataloader(**given, batch_size=batch_size, num_workers=workers)
        results.append(drain(loaders, epochs=1 if workers else 3))
    (mine, my_state), (theirs, their_state) = results
    assert_same_batches(mine, theirs)
    assert torch.equal(my_state, their_state)


@pytest.mark.filterwarnings("ignore:Length of split at index")  # torch-rechub's, for one row
@pytest.mark.parametrize("n", [1, 2, 5])
def test_splits_of_very_few_rows_match(rng, seed, n):
    x, y = random_data(rng, n)
    splits = []
    for generator in (DataGenerator, PeerGenerator):
        torch.manual_seed(seed)
        loaders = generator(x, y).generate_dataloader(split_ratio=(1.0, 0.0), batch_size=2)
        splits.append([list(loader) for loader in loaders])
    for mine, theirs in zip(*splits, strict=True):
        assert_same_batches(mine, theirs)


def test_a_loop_left_early_leaves_the_same_random_state(rng, seed):
    x, y = random_data(rng, 50)
    states = []
    for dataset, loader in ((TorchDataset(x, y), ColumnLoader), (PeerDataset(x, y), DataLoader)):
        torch.manual_seed(seed)
        batches = loader(dataset, batch_size=8, shuffle=True)
        next(iter(batches))
        states.append([torch.get_rng_state(), sum(len(y) for _, y in batches), torch.get_rng_state()])
    assert torch.equal(states[0][0], states[1][0])
    assert states[0][1] == 50
    assert torch.equal(states[0][2], states[1][2])


@pytest.mark.parametrize("options", [{"drop_last": True}, {"generator": 3}, {"sampler": [4, 4, 0, 2]}])
def test_torch_options_give_torchs_batches(rng, seed, options):
    x, y = random_data(rng, 23)
    results = []
    for dataset, loader in ((TorchDataset(x, y), ColumnLoader), (PeerDataset(x, y), DataLoader)):
        torch.manual_seed(seed)
        given = dict(options)
        if "generator" in given:
            given["generator"] = torch.Generator().manual_seed(given["generator"])
        batches = loader(dataset, batch_size=4, shuffle="sampler" not in given, **given)
        results.append([batch for _ in range(2) for batch in batches])
        assert len(batches) * 2 == len(results[-1])
        results.append(torch.get_rng_state())
    assert_same_batches(results[0], results[2])
    assert torch.equal(results[1], results[3])


def test_nested_subsets_pick_the_right_rows(rng):
    x, y = random_data(rng, 40)
    outer = rng.permutation(40)[:25]
    inner = rng.permutation(25)[:10].tolist()
    loader = ColumnLoader(Subset(Subset(TorchDataset(x, y), outer), inner), batch_size=4)
    rows = outer[inner]
    got = np.concatenate([batch["second_int"].numpy() for batch, _ in loader])
    np.testing.assert_array_equal(got, x["second_int"][rows])
    np.testing.assert_array_equal(loader.labels, y[rows])


def test_a_split_feeds_a_plain_torch_loader_too(rng, seed):
    x, y = random_data(rng, 40)
    torch.manual_seed(seed)
    mine, _, _ = DataGenerator(x, y).generate_dataloader(split_ratio=(0.6, 0.2), batch_size=7)
    plain = DataLoader(mine.dataset, batch_size=7)
    assert_same_batches(list(ColumnLoader(mine.dataset, batch_size=7)), list(plain))


def test_rows_for_a_plain_torch_loader(rng, seed):
    x, y = random_data(rng, 37)
    torch.manual_seed(seed)
    mine = list(DataLoader(TorchDataset(x, y), batch_size=8, shuffle=True))
    torch.manual_seed(seed)
    theirs = list(DataLoader(PeerDataset(x, y), batch_size=8, shuffle=True))
    assert_same_batches(mine, theirs)
    row, label = TorchDataset(x, y)[3]
    peer_row, peer_label = PeerDataset(x, y)[3]
    assert list(row) == list(peer_row)
    for name in row:
        assert np.array_equal(row[name], peer_row[name])
    np.testing.assert_array_equal(label, peer_label)
    predicted = default_collate(PredictDataset(x).__getitems__([5, 1]))
    np.testing.assert_array_equal(predicted["second_int"].numpy(), x["second_int"][[5, 1]])


def test_predict_dataset_yields_features_only(rng):
    x, _ = random_data(rng, 10)
    loader = ColumnLoader(PredictDataset(x), batch_size=4)
    assert [batch.n_rows for batch in loader] == [4, 4, 2]
    assert loader.labels is None
    assert loader.task_names == []


def test_batches_do_not_share_memory_with_the_data(rng):
    x, y = random_data(rng, 10)
    loader = ColumnLoader(TorchDataset(x, y), batch_size=10)
    for batch, labels in loader:
        batch["second_int"].zero_()
        batch["vector"].zero_()
        labels.zero_()
    ((batch, labels),) = list(loader)
    np.testing.assert_array_equal(batch["second_int"].numpy(), x["second_int"])
    np.testing.assert_array_equal(batch["vector"].numpy(), x["vector"])
    np.testing.assert_array_equal(labels.numpy(), y)


def test_frames_series_tensors_and_lists_are_columns(rng):
    n = 12
    ids, floats, labels = rng.integers(0, 9, n), rng.random(n), rng.integers(0, 2, (n, 2))
    expected = {"a": ids, "b": floats}
    frame = pd.DataFrame(expected)
    label_frame = pd.DataFrame(labels, columns=["click", "buy"])
    forms = [
        (frame, label_frame),
        ({"a": frame["a"], "b": frame["b"]}, {"click": labels[:, 0], "buy": labels[:, 1]}),
        ({"a": torch.from_numpy(ids), "b": floats.tolist()}, torch.from_numpy(labels)),
        ({"a": ids.astype(object), "b": floats[::-1][::-1]}, [labels[:, 0], labels[:, 1].tolist()]),
        ({"a": ids.astype(">i8"), "b": floats.astype(">f8")}, labels.tolist()),
    ]
    for x, y in forms:
        loader = ColumnLoader(TorchDataset(x, y), batch_size=n)
        ((batch, got),) = list(loader)
        for name, column in expected.items():
            np.testing.assert_array_equal(batch[name].numpy(), column)
            assert batch[name].numpy().dtype == column.dtype
        np.testing.assert_array_equal(got.numpy(), labels)
        named = isinstance(y, (dict, pd.DataFrame))
        assert loader.task_names == (["click", "buy"] if named else ["task_0", "task_1"])
    ((_, got),) = list(ColumnLoader(TorchDataset(frame, label_frame["buy"]), batch_size=n))
    assert got.shape == (n, 1)
    assert TorchDataset(frame, label_frame["buy"]).schema.task_names == ("buy",)


def test_validation_ids_widen_the_vocabulary(rng):
    x, y = {"a": np.arange(5)}, np.zeros((5, 1))
    train, val, test = DataGenerator(x, y).generate_dataloader(
        x_val={"a": np.array([7, 1])}, y_val=np.zeros((2, 1)), x_test={"a": np.array([-1, 9])}
    )
    assert [loader.schema["a"].vocab_size for loader in (train, val, test)] == [10, 10, 10]
    assert train.schema["a"].min_id == -1
    assert test.labels is None
    train, val, test = DataGenerator(x, y).generate_dataloader(split_ratio=(0.6, 0.2))
    assert [loader.schema["a"].vocab_size for loader in (train, val, test)] == [5, 5, 5]
    assert [len(loader.labels) for loader in (train, val, test)] == [3, 1, 1]
    assert DataGenerator(x, y).generate_dataloader()[1:] == (None, None)


@pytest.mark.parametrize(
    ("x", "y", "message"),
    [
        ({"a": [1, 2], "b": [1, 2, 3]}, [0, 1], "'a' has 2 rows and 'b' has 3"),
        ({"a": [1, 2]}, [0, 1, 1], "labels have 3 rows and the features 2"),
        ({"a": [1, 2]}, {"click": [0, 1, 1]}, "'click' have 3 rows and the features 2"),
        ({"city": ["Paris", "Rome"]}, [0, 1], "'city' holds text ('Paris' in row 0).*fastmtl.data.Encoder"),
        ({"city": np.array([1, "Rome"], dtype=object)}, [0, 1], "'city' holds text ('Rome' in row 1)"),
        ({"city": pd.Series(["Paris", "Rome"])}, [0, 1], "'city' holds text ('Paris' in row 0)"),
        ({"a": np.array([1, None], dtype=object)}, [0, 1], "'a' has no value in row 1"),
        ({"when": np.array(["2020-01-01", "2020-01-02"], dtype="M8[D]")}, [0, 1], "'when' holds datetime64"),
        ({"a": [[1, 2], [3]]}, [0, 1], "'a' holds lists of different lengths.*pad_sequences"),
        ({"a": np.array([1, {}], dtype=object)}, [0, 1], "'a' holds {} in row 1"),
        ({"a": np.zeros((2, 2, 2))}, [0, 1], r"'a' has shape (2, 2, 2)"),
        ({"a": np.array([1, 2**63], dtype="uint64")}, [0, 1], "'a' holds 9223372036854775808 in row 1"),
        ({"a": []}, [], "empty: its columns ('a') have no row"),
        ({}, [], "no column"),
        ([1, 2], [0, 1], "a list; give a dict"),
        ({"a": [1, 2]}, np.zeros((2, 0)), "no column; give one column per task"),
        ({"a": [1, 2]}, ["yes", "no"], "'labels' holds text ('yes' in row 0)"),
    ],
)
def test_bad_data_is_named(x, y, message):
    pattern = ".*".join(re.escape(part) for part in message.split(".*"))
    with pytest.raises(BadDataError, match=pattern):
        TorchDataset(x, y)


@pytest.mark.parametrize("wrong", [-1, 60, 2**40])
@pytest.mark.parametrize("native_library", [True, False])
def test_a_samplers_wrong_row_is_named(wrong, native_library, monkeypatch):
    if not native_library:
        monkeypatch.setattr(native, "unavailable", lambda: "it is left out")
    data = TorchDataset({"a": np.arange(60)}, np.zeros(60, np.float32))
    loader = ColumnLoader(data, 4, sampler=[3, 1, 2, 0, 5, wrong])
    batches = iter(loader)
    assert next(batches)[0]["a"].tolist() == [3, 1, 2, 0]
    with pytest.raises(BadDataError, match=f"row {wrong} was asked for of a data set of 60 rows"):
        next(batches)


def test_impossible_requests_are_named():
    data = TorchDataset({"a": np.arange(4)}, np.zeros(4))
    with pytest.raises(ConfigError, match="batch_size is 0"):
        ColumnLoader(data, batch_size=0)
    with pytest.raises(ConfigError, match="not list"):
        ColumnLoader([1, 2], batch_size=2)
    with pytest.raises(BadDataError, match="this split has no row"):
        DataGenerator({"a": np.arange(4)}, np.zeros(4)).generate_dataloader(split_ratio=(0.1, 0.1))
    with pytest.raises(ConfigError, match=r"split_ratio is \(0.9, 0.9\)"):
        DataGenerator({"a": np.arange(4)}, np.zeros(4)).generate_dataloader(split_ratio=(0.9, 0.9))
    with pytest.raises(ConfigError, match="exclude each other"):
        DataGenerator({"a": np.arange(4)}, np.zeros(4)).generate_dataloader(x_val={"a": [1]}, split_ratio=(0.5, 0.5))
    with pytest.raises(BadDataError, match="y_val is given without x_val"):
        DataGenerator({"a": np.arange(4)}, np.zeros(4)).generate_dataloader(y_val=[1])
