"""df_to_dict and pad_sequences give what torch-rechub's give."""

import numpy as np
import pandas as pd
import pytest

from fastmtl.errors import BadDataError, ConfigError
from fastmtl.utils.data import df_to_dict, pad_sequences

peer = pytest.importorskip("torch_rechub.utils.data", reason="torch-rechub is not here: nothing to compare with")


def test_df_to_dict_matches(rng):
    n = 20
    frame = pd.DataFrame(
        {
            "i32": rng.integers(0, 9, n).astype("int32"),
            "i64": rng.integers(0, 2**60, n),
            "u8": rng.integers(0, 9, n).astype("uint8"),
            "f32": rng.random(n, dtype=np.float32),
            "f64": np.where(rng.random(n) < 0.3, np.nan, rng.random(n)),
            "flag": rng.random(n) < 0.5,
            "text": rng.choice(["a", "bcd"], n),
            "mixed": [1, "x"] * (n // 2),
            "lists": [[int(i), 2] for i in range(n)],
            "nullable": pd.array(rng.integers(0, 9, n), dtype="Int64"),
            3: np.arange(n),
        }
    )
    mine, theirs = df_to_dict(frame), peer.df_to_dict(frame)
    assert list(mine) == list(theirs)
    for name, column in theirs.items():
        assert mine[name].dtype == column.dtype, name
        np.testing.assert_array_equal(mine[name], column)
    mine["i64"][0] = -1
    assert frame["i64"][0] >= 0


@pytest.mark.parametrize("padding", ["pre", "post"])
@pytest.mark.parametrize("truncating", ["pre", "post"])
@pytest.mark.parametrize("dtype", ["int32", "int64", "float32"])
def test_pad_sequences_matches(rng, padding, truncating, dtype):
    for _ in range(20):
        lengths = rng.integers(0, 7, rng.integers(1, 12))
        sequences = [rng.integers(-5, 50, length).tolist() for length in lengths]
        if rng.random() < 0.5:
            sequences = [np.array(s, dtype=rng.choice(["int64", "float64"])) for s in sequences]
        options = {"padding": padding, "truncating": truncating, "dtype": dtype, "value": int(rng.integers(-1, 3))}
        options["maxlen"] = None if rng.random() < 0.4 else int(rng.integers(1, 9))
        mine, theirs = pad_sequences(sequences, **options), peer.pad_sequences(sequences, **options)
        assert mine.dtype == theirs.dtype
        np.testing.assert_array_equal(mine, theirs)


def test_pad_sequences_refuses_what_would_wrap_around():
    with pytest.raises(BadDataError, match=r"sequence 2 holds 4294967296, which int32 cannot hold.*'int64'"):
        pad_sequences([[1, 2], [], np.array([3, 2**32])])
    assert pad_sequences([[2**40]], dtype="int64").tolist() == [[2**40]]
    with pytest.raises(ConfigError, match="padding is 'left'"):
        pad_sequences([[1]], padding="left")
    assert pad_sequences([]).shape == (0, 0)
