"""A table as training rows: types, missing values, what is left out, what rows are called, and what is refused."""

from __future__ import annotations

import gzip
import shlex
import shutil
import subprocess

import numpy as np
import pytest

import upweight as uw
from upweight.cli import table

pd = pytest.importorskip("pandas")


@pytest.fixture
def frame():
    """One column of every kind; 60 rows with the labels yes and no."""
    draw = np.random.default_rng(0)
    return pd.DataFrame(
        {
            "id": range(1000, 1060),
            "age": draw.normal(40, 10, 60).round(1),
            "vip": draw.random(60) < 0.5,
            "city": draw.choice(["Bonn", "Rome, Lazio", "Oslo"], 60),
            "since": pd.date_range("2020-01-01", periods=60).strftime("%Y-%m-%d"),
            "paid": pd.date_range("2020-01-01", periods=60).strftime("%d.%m.%Y"),
            "note": [f"order {i} arrived late again" for i in range(60)],
            "token": [f"x{i:05d}" for i in range(60)],
            "unit": "kg",
            "blank": np.nan,
            "bought": np.where(draw.random(60) < 0.5, "yes", "no"),
        }
    )


KINDS = {
    "id": "dropped",
    "age": "number",
    "vip": "boolean",
    "city": "category",
    "since": "date",
    "paid": "date",
    "note": "text",
    "token": "dropped",
    "unit": "dropped",
    "blank": "dropped",
}


@pytest.mark.parametrize(
    ("name", "settings"), [("a.csv", {}), ("a.csv.gz", {}), ("a.tsv", {"sep": "\t"}), ("semi.csv", {"sep": ";"})]
)
def test_columns_are_typed(frame, tmp_path, name, settings):
    file = tmp_path / name
    frame.to_csv(file, index=False, **settings)
    read = table.read(file, "bought")
    assert {column.name: column.kind for column in read.columns} == KINDS
    assert read.labels.tolist() == frame["bought"].tolist()
    assert read.numbers.tolist() == list(range(2, 62))
    np.testing.assert_array_equal(read.frame["age"], frame["age"])
    np.testing.assert_array_equal(read.frame["vip"], frame["vip"].astype(float))
    for date in ("since", "paid"):
        np.testing.assert_array_equal(read.frame[date], 18262 + np.arange(60))  # 2020 began 18,262 days after 1970
    told = str(read)
    for words in ("numbers the rows", "60 different values", "the same in every row: kg", "empty", "3 values"):
        assert words in told
    assert "token: x00007" in read.describe(7)
    assert "blank" not in read.describe(7)


def test_missing_cells_and_rows_without_a_label(frame, tmp_path):
    frame = frame.astype(object)
    frame.loc[3, "age"], frame.loc[4, "age"], frame.loc[5, "city"], frame.loc[6, "vip"] = "", "?", "NA", ""
    frame.loc[[7, 9], "bought"] = ["", "?"]
    frame.loc[[11, 12], "bought"] = "yse"
    text = frame.to_csv(index=False).splitlines()
    text.insert(15, "")  # a blank line is a row: it moves no number
    file = tmp_path / "a.csv"
    file.write_text("\n".join(text) + "\n")
    read = table.read(file, "bought")
    gone = {9, 11, 16, 13, 14}  # rows 7, 9, the blank one, 11 and 12
    assert set(range(2, 63)) - set(read.numbers.tolist()) == gone
    assert read.left_out == (
        "rows 9, 11, 16 left out: no bought",
        "rows 13, 14 left out: fewer than 10 have the bought 'yse'",
    )
    lines = [line.split(",") for line in text]
    for number, label in zip(read.numbers, read.labels, strict=True):
        assert lines[number - 1][-1] == label
    assert read.frame["age"].isna().sum() == 2
    assert read.frame["city"].isna().sum() == 1
    assert {c.name: c.note for c in read.columns}["age"] == "4.9% missing"  # of the 61 rows that were read


def test_blanks_after_commas_and_numbers_as_labels(tmp_path):
    file = tmp_path / "a.csv"
    file.write_text("x, Y\n" + "".join(f"{i % 7}.5, {i % 2}\n" for i in range(40)))
    read = table.read(file, "Y")
    assert read.labels.tolist() == ["0", "1"] * 20


def test_a_corrected_copy_keeps_every_other_cell(frame, tmp_path):
    frame.loc[3, "age"] = np.nan
    frame["age"] = frame["age"].map(lambda age: "?" if np.isnan(age) else f"{age:07.3f}")
    for name, sep in (("a.csv", ","), ("a.tsv.gz", "\t")):
        file = tmp_path / name
        frame.to_csv(file, index=False, sep=sep)
        read = table.read(file, "bought")
        copy = table.write_corrected(read, {5: (read.labels[5], "maybe")}, tmp_path / "new" / name)
        opened = gzip.open if name.endswith(".gz") else open
        with opened(file, "rt") as before, opened(copy, "rt") as after:
            pairs = list(zip(before.read().splitlines(), after.read().splitlines(), strict=True))
        assert [number for number, (old, new) in enumerate(pairs, start=1) if old != new] == [7] == [read.numbers[5]]
        assert pairs[6][1] == pairs[6][0].removesuffix(read.labels[5]) + "maybe"
        assert [path.name for path in copy.parent.iterdir() if "unfinished" in path.name] == []


def test_parquet(frame, tmp_path):
    file = tmp_path / "a.parquet"
    try:
        import pyarrow  # noqa: F401 whether it is there decides what is tested
    except ImportError:
        file.write_bytes(b"PAR1")
        with pytest.raises(uw.errors.MissingExtra, match=r"upweight\[parquet\]"):
            table.read(file, "bought")
        return
    frame["bought"] = (frame["bought"] == "yes").astype(int)
    frame["since"] = pd.to_datetime(frame["since"])
    frame.to_parquet(file)
    read = table.read(file, "bought")
    assert {column.name: column.kind for column in read.columns} == KINDS
    assert read.numbers.tolist() == list(range(60))
    other = {"0": "1", "1": "0"}[read.labels[5]]
    copy = pd.read_parquet(table.write_corrected(read, {5: (read.labels[5], other)}, tmp_path / "new.parquet"))
    frame.loc[5, "bought"] = int(other)
    pd.testing.assert_frame_equal(copy, frame)


def refused(file, label, text):
    with pytest.raises(uw.errors.UpweightError, match=text) as refusal:
        table.read(file, label)
    return str(refusal.value)


def test_what_is_refused_says_what_to_type_and_that_works(frame, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    frame["price"] = np.arange(60) * 1.5
    frame = frame[[*(name for name in frame if name != "bought"), "bought"]]
    frame.to_csv("a.csv", index=False)
    for label, text in ((None, "no label was named"), ("buoght", "no column 'buoght'"), ("price", "60 different")):
        message = refused(tmp_path.__class__("a.csv"), label, text)
        words = shlex.split(message.partition("upweight repair ")[2].rstrip("."))
        assert words[:2] == ["a.csv", "--label"]
        assert len(table.read(tmp_path / words[0], words[2]).labels) == 60
    refused(tmp_path / "none.csv", "y", "no file")
    refused(tmp_path / "a.csv", "unit", "only 'kg'")
    refused(tmp_path / "a.csv", "blank", "none has 10 rows")
    frame[["unit", "blank", "bought"]].to_csv("empty.csv", index=False)
    refused(tmp_path / "empty.csv", "bought", "says anything")
    for text, said in (("a,b\n", "no rows"), ("", "cannot be read"), ("a,b\n1,2\n1,2,3\n", "cannot be read")):
        (tmp_path / "odd.csv").write_text(text)
        refused(tmp_path / "odd.csv", "b", said)


@pytest.mark.skipif(shutil.which("iconv") is None, reason="iconv is not installed")
def test_another_encoding_is_refused_and_the_way_out_works(frame, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    frame["city"] = "Zürich " + frame["city"]
    frame.to_csv("a.csv", index=False, encoding="latin1")
    message = refused(tmp_path.__class__("a.csv"), "bought", "UTF-8")
    subprocess.run(message.partition("with: ")[2], shell=True, check=True)
    assert table.read(tmp_path / "utf8-a.csv", "bought").frame["city"][0].startswith("Zürich")


def test_two_columns_of_the_labels_name_are_refused(tmp_path, frame):
    file = tmp_path / "twice.csv"
    twice = frame.assign(again=frame["bought"]).rename(columns={"again": "bought"})
    twice.to_csv(file, index=False)
    with pytest.raises(uw.errors.InvalidInput, match=r"2 columns called 'bought', columns 11, 12"):
        table.read(file, "bought")
    twice.loc[:, ~twice.columns.duplicated()].to_csv(file, index=False)  # what it says to do
    assert len(table.read(file, "bought").labels) == 60


@pytest.mark.parametrize("missing", ["N/A", "None", "#N/A", "?", "NA"])
def test_what_pandas_takes_for_missing_is_no_label(tmp_path, frame, missing):
    file = tmp_path / "some.csv"
    frame.assign(bought=np.where(np.arange(60) < 12, missing, frame["bought"])).to_csv(file, index=False)
    assert set(table.read(file, "bought").labels) == {"yes", "no"}
