"""Tables from CSV and Parquet: the same cells by either reader, and one error that names file, row and column."""

import csv
import gzip
import io
import re
import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from fastmtl.data import read_table, table
from fastmtl.errors import BadDataError, MissingExtraError

CELLS = ["", "a", "7", "0.5", "a,b", 'say "hi"', "two\nlines", " pad ", "Ürümqi", "NA", "null", "1e5", "-"]


@pytest.fixture(params=["pyarrow", "csv module"])
def reader(request, monkeypatch):
    """Both CSV readers; files that pyarrow refuses are the csv module's in either case."""
    if request.param == "csv module":
        monkeypatch.setattr(table, "_read_csv_with_pyarrow", _decline)
    return request.param


def _decline(path, names):
    raise table._PyarrowDeclinesError


def write(path, text):
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


@pytest.mark.parametrize("suffix", [".csv", ".csv.gz"])
def test_any_cell_comes_back(rng, tmp_path, reader, suffix):
    n_rows, n_columns = int(rng.integers(1, 80)), int(rng.integers(2, 9))
    names = [f"c{i}" for i in range(n_columns - 1)] + ["Größe, cm"]
    rows = rng.choice(np.array(CELLS, dtype=object), (n_rows, n_columns)).tolist()
    path = tmp_path / f"t{suffix}"
    text = io.StringIO(newline="")
    csv.writer(text).writerows([names, *rows])
    content = text.getvalue().encode()
    write(path, gzip.compress(content) if suffix.endswith("gz") else content)
    got = read_table(path)
    assert list(got.columns) == names
    assert len(got) == n_rows
    for name, expected in zip(names, zip(*rows, strict=True), strict=True):
        assert got.columns[name].tolist() == list(expected)
    chosen = [names[-1], names[0]]
    assert list(read_table(path, chosen).columns) == chosen


def test_byte_order_mark_line_ends_and_blank_lines(tmp_path, reader):
    path = write(tmp_path / "t.csv", b"\xef\xbb\xbfa,b\r\n1,2\r\n\r\n3,4\r\n\r\n")
    columns = read_table(path).columns
    assert {name: column.tolist() for name, column in columns.items()} == {"a": ["1", "3"], "b": ["2", "4"]}


def test_ten_thousand_columns(tmp_path, reader):
    names = [f"c{i}" for i in range(10_000)]
    path = write(tmp_path / "t.csv", ",".join(names) + "\n" + ",".join(map(str, range(10_000))) + "\n")
    columns = read_table(path).columns
    assert len(columns) == 10_000
    assert columns["c9999"].tolist() == ["9999"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "the file is empty"),
        ("\n\n", "the file has a header and no row|column"),
        ("a,b\n", "the file has a header and no row"),
        ("a,b,a\n1,2,3\n", "column 'a' is in the header twice; give each column a name of its own"),
        (
            "a,b\n1,2\n3\n4,5\n",
            "row 2 has 1 values where the header names 2 columns (no value for 'b'); mend or remove",
        ),
        ("a,b\n1,2\n3,4\n4,5,6\n", "row 3 has 3 values where the header names 2 columns (one is '6'); mend or remove"),
        ('a,b\n1,2\n"3,4\n', "row 2 is no CSV (unexpected end of data); look for a stray quote"),
        (b"a,b\n1,\xff\n", "no UTF-8 text; save the file as UTF-8"),
        (b"\xff\xfea\x00,\x00b\x00", "the header or one soon after is no UTF-8 text"),
    ],
)
def test_a_bad_csv_is_one_error(tmp_path, reader, content, message):
    path = write(tmp_path / "t.csv", content)
    with pytest.raises(BadDataError) as error:
        read_table(path)
    assert str(error.value).startswith(f"{path}: ")
    assert any(part in str(error.value) for part in message.split("|"))


def test_missing_columns_and_files_are_named(tmp_path, reader):
    path = write(tmp_path / "t.csv", "a,b\n1,2\n")
    with pytest.raises(BadDataError, match=r"t.csv: column 'age' is missing; the file has a, b"):
        read_table(path, ["a", "age"])
    with pytest.raises(BadDataError, match=r"none.csv: there is no such file"):
        read_table(tmp_path / "none.csv")
    cut = write(tmp_path / "cut.csv.gz", gzip.compress(b"a,b\n" + b"1,2\n" * 5000)[:-30])
    with pytest.raises(BadDataError, match=r"cut.csv.gz: .*the file may be cut off"):
        read_table(cut)


def test_parquet_keeps_numbers_exact(rng, tmp_path):
    ids = rng.integers(-(2**62), 2**62, 40)
    path = tmp_path / "t.parquet"
    with_null = pa.array([2**60 + 1, None] * 20)
    texts = pa.array(["x", None] * 20)
    pq.write_table(
        pa.table({"id": ids, "null": with_null, "price": pa.array([0.5, None] * 20), "t": texts.dictionary_encode()}),
        path,
    )
    columns = read_table(path).columns
    np.testing.assert_array_equal(columns["id"], ids)
    assert columns["null"][:2].tolist() == [2**60 + 1, None]
    assert np.isnan(columns["price"][1])
    assert columns["t"][:2].tolist() == ["x", None]
    assert list(read_table(path, ["t", "id"]).columns) == ["t", "id"]
    with pytest.raises(BadDataError, match=r"t.parquet: column 'age' is missing; the file has id, null, price, t"):
        read_table(path, ["age"])


def test_a_damaged_parquet_file_is_one_error(rng, tmp_path):
    good = tmp_path / "good.parquet"
    pq.write_table(pa.table({"id": rng.integers(0, 2**60, 5000)}), good, write_page_checksum=True)
    content = good.read_bytes()
    cut = write(tmp_path / "cut.parquet", content[: len(content) // 2])
    with pytest.raises(BadDataError, match=r"^" + re.escape(str(cut)) + ": is no whole Parquet file"):
        read_table(cut)
    flipped = bytearray(content)
    flipped[len(content) // 3] ^= 1
    mangled = write(tmp_path / "mangled.parquet", bytes(flipped))
    with pytest.raises(BadDataError, match=r"^" + re.escape(str(mangled)) + ": "):
        read_table(mangled)


def test_parquet_without_pyarrow_names_the_extra(tmp_path, monkeypatch):
    path = tmp_path / "t.parquet"
    pq.write_table(pa.table({"a": [1]}), path)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(MissingExtraError, match=r"Reading Parquet files needs pyarrow.*fastmtl\[parquet\]"):
        read_table(path)
    csv_path = write(tmp_path / "t.csv", "a\n1\n")
    assert read_table(csv_path).columns["a"].tolist() == ["1"]
