"""The corrected data set has the input's schema, types and bytes, but for what the reviews changed."""

from __future__ import annotations

import gzip
import random

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from upweight.data import rewritten
from upweight.errors import InvalidInput
from upweight.explore import corrected
from upweight.explore.labels import Labels
from upweight.explore.reviews import Reviews

n = 30
NAMES = ("no", "yes", "perhaps")


def labels(values=NAMES, ids=None):
    codes = (np.arange(n) % 2).astype(np.int32)
    none = np.full(n, -1, np.int32)
    return Labels("w", tuple(values), codes, none, {"loss": np.zeros(n)}, ids)


def verdicts(folder, known, new):
    reviews = Reviews(folder, known)
    reviews.decide(4, "relabel", new=known.classes[1])
    reviews.decide(6, "relabel", new=new)
    reviews.decide(9, "drop")
    reviews.decide(11, "keep")
    return reviews.verdicts()


def frame(values=NAMES):
    draw = np.random.default_rng(0)
    label = [values[row % 2] for row in range(n)]
    return pd.DataFrame(
        {
            "id": [f"p{row:03d}" for row in range(n)],
            "since": pd.date_range("2020-01-01", periods=n, tz="Europe/Berlin"),
            "count": pd.array([None if row == 3 else row for row in range(n)], dtype="Int16"),
            "small": np.arange(n, dtype=np.int8),
            "single": draw.normal(size=n).astype(np.float32),
            "kind": pd.Categorical(["a", "b", "c"] * 10, categories=["c", "b", "a", "unused"], ordered=True),
            "label": label,
            "note": [None if row % 7 == 0 else f"x{row}" for row in range(n)],
        }
    )


@pytest.mark.parametrize("kind", ["text", "category", "ordered", "Int8", "int32", "bool"])
def test_parquet_keeps_its_schema(tmp_path, kind):
    values = {"Int8": (3, 7, 9), "int32": (3, 7, 9), "bool": ("False", "True")}.get(kind, NAMES)
    whole = frame([False, True] if kind == "bool" else values)
    if kind in {"category", "ordered"}:
        whole["label"] = pd.Categorical(whole["label"], ["yes", "no", "never"], ordered=kind == "ordered")
    elif kind != "text":
        whole["label"] = whole["label"].astype(kind)
    file, out = tmp_path / "in.parquet", tmp_path / "new" / "out.parquet"
    whole.to_parquet(file, compression="zstd")
    before = file.read_bytes()
    known = labels(values)
    made = corrected.apply(file, "label", known, verdicts(tmp_path, known, values[-1]), out)
    assert (made.relabelled, made.dropped, made.rows) == (2, 1, n)
    assert file.read_bytes() == before
    assert pq.read_schema(out).equals(pq.read_schema(file), check_metadata=True)
    assert pq.ParquetFile(out).metadata.row_group(0).column(0).compression == "ZSTD"
    expected = whole.copy()
    new = [True, True] if kind == "bool" else [values[1], values[-1]]
    if kind in {"category", "ordered"}:
        expected["label"] = expected["label"].cat.add_categories(["perhaps"])
    expected.loc[4, "label"], expected.loc[6, "label"] = new
    expected = expected.drop(index=9).reset_index(drop=True)
    pd.testing.assert_frame_equal(pd.read_parquet(out), expected)


def test_csv_keeps_every_byte_of_the_other_records(tmp_path):
    draw, lines = random.Random(0), []
    for row in range(n):
        note = draw.choice(['"two\nlines, and ""quotes"""', "plain", "", ' "padded"', "é\t=1+1", "007"])
        lines.append(f"{row:03d},{NAMES[row % 2]},{note}{draw.choice([chr(10), chr(13) + chr(10)])}")
    content = ("\ufeff" + "id, label ,note\r\n" + "".join(lines)).encode()
    for name in ("a.csv", "a.csv.gz"):
        file = tmp_path / name
        file.write_bytes(gzip.compress(content) if name.endswith("gz") else content)
        known = labels()
        folder = tmp_path / f"log of {name}"
        folder.mkdir()
        out = tmp_path / f"out-{name}"
        corrected.apply(file, "label", known, verdicts(folder, known, "perhaps"), out)
        found = gzip.decompress(out.read_bytes()) if name.endswith("gz") else out.read_bytes()
        lines_out = list(lines)
        for row, old in ((4, "no"), (6, "no")):
            assert f",{old}," in lines[row]
            lines_out[row] = None
        rest = [line.encode() for row, line in enumerate(lines_out) if line is not None and row != 9]
        assert all(line in found for line in rest)
        assert found.startswith(content[: content.index(b"\r\n") + 2])
        before = pd.read_csv(file, dtype=str, keep_default_na=False, skipinitialspace=True)
        after = pd.read_csv(out, dtype=str, keep_default_na=False, skipinitialspace=True)
        before.loc[[4, 6], before.columns[1]] = ["yes", "perhaps"]
        pd.testing.assert_frame_equal(after, before.drop(index=9).reset_index(drop=True))


def test_bytes_that_are_no_utf8_and_cells_of_any_length_are_copied(tmp_path):
    file, out = tmp_path / "a.csv", tmp_path / "b.csv"
    content = b"x,label\n" + b"".join(b"caf\xe9%s,no\n" % (b"z" * 200_000 if k == 3 else b"") for k in range(5))
    file.write_bytes(content)
    rewritten.rewrite(file, "label", {1: "yes"}, {4}, out)
    expected = content.split(b"\n")
    expected[2] = expected[2].replace(b",no", b",yes")
    assert out.read_bytes() == b"\n".join([*expected[:5], b""])


def test_rows_are_found_by_their_names(tmp_path):
    whole = frame()
    shuffled = pd.concat([whole, whole.iloc[:3].assign(id=["z1", "z2", "z3"], label="never")]).sample(
        frac=1, random_state=0
    )
    file, out = tmp_path / "in.parquet", tmp_path / "out.parquet"
    shuffled.to_parquet(file, index=False)
    known = labels(ids=whole["id"].to_numpy())
    with pytest.raises(InvalidInput, match=r"Was the file changed|has 33 rows"):
        corrected.apply(file, "label", labels(), {}, out)  # rows without names go by their order
    made = corrected.apply(file, "label", known, verdicts(tmp_path, known, "perhaps"), out, "id")
    found = pd.read_parquet(out).set_index("id")["label"]
    assert (made.rows, len(found)) == (33, 32)
    assert (found["p004"], found["p006"], found["p011"]) == ("yes", "perhaps", "yes")
    assert "p009" not in found
    assert list(pd.read_parquet(out)["id"]) == [name for name in shuffled["id"] if name != "p009"]


def test_rows_without_a_label_of_the_run_are_passed_over(tmp_path):
    file, out = tmp_path / "a.csv", tmp_path / "b.csv"
    lines = [f"{NAMES[row % 2]}" for row in range(n)]
    file.write_text("label\n" + "\n".join([*lines[:5], "?", *lines[5:], "rare"]) + "\n")
    known = labels()
    corrected.apply(file, "label", known, verdicts(tmp_path, known, "perhaps"), out)
    assert out.read_text().split()[1:] == [*lines[:4], "yes", "?", "yes", "perhaps", *lines[7:9], *lines[10:], "rare"]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (
            lambda file: file.write_text(file.read_text().replace("no\n", "yes\n", 1)),
            "Row 0 of the run has the label 'no'",
        ),
        (lambda file: file.write_text(file.read_text() + "yes\n"), "has 31 rows, 31 of them with a label of the run"),
        (lambda file: file.write_text(file.read_text().replace("label", "target", 1)), "has no columns 'label'"),
    ],
)
def test_other_data_are_refused(tmp_path, change, says):
    file, out = tmp_path / "a.csv", tmp_path / "b.csv"
    file.write_text("label\n" + "".join(f"{NAMES[row % 2]}\n" for row in range(n)))
    change(file)
    with pytest.raises(InvalidInput) as refused:
        corrected.apply(file, "label", labels(), {}, out)
    assert says in str(refused.value)
    assert not out.exists()


def test_the_file_itself_is_never_written(tmp_path):
    file = tmp_path / "a.csv"
    file.write_text("label\n" + "".join(f"{NAMES[row % 2]}\n" for row in range(n)))
    (tmp_path / "link.csv").symlink_to(file)
    for out in (file, tmp_path / "link.csv"):
        with pytest.raises(InvalidInput, match="is the file itself"):
            corrected.apply(file, "label", labels(), {}, out)
    with pytest.raises(InvalidInput, match="of different kinds"):
        corrected.apply(file, "label", labels(), {}, tmp_path / "a.parquet")


def test_a_label_that_the_column_cannot_hold_is_refused(tmp_path):
    file = tmp_path / "a.parquet"
    pq.write_table(pa.table({"label": pa.array([3, 7], pa.int8())}), file)
    with pytest.raises(InvalidInput, match="holds int8, and 'x' does not fit"):
        rewritten.rewrite(file, "label", {0: "x"}, (), tmp_path / "b.parquet")


def test_a_file_in_another_order_is_read_by_the_names_of_the_rows(tmp_path):
    """Nobody says which column holds them; rows of one class that changed places are not noticed by their labels."""
    whole = frame()
    order = np.where(np.arange(n) % 2 == 0, n - 2 - np.arange(n), np.arange(n))  # labels stay in place
    moved = whole.iloc[order]
    assert moved["label"].tolist() == whole["label"].tolist()
    moved.to_csv(tmp_path / "moved.csv", index=False)
    known = labels(ids=np.array(whole["id"]))
    corrected.apply(tmp_path / "moved.csv", "label", known, verdicts(tmp_path, known, "perhaps"), tmp_path / "out.csv")
    out = pd.read_csv(tmp_path / "out.csv").set_index("id")["label"]
    assert (out["p004"], out["p006"], "p009" in out.index) == ("yes", "perhaps", False)
    unchanged = [name for name in out.index if name not in {"p004", "p006"}]
    assert out[unchanged].tolist() == whole.set_index("id")["label"][unchanged].tolist()


def test_a_class_without_rows_is_written_as_the_others_are(tmp_path):
    """Labels that a run keeps as 0.0 and 1.0 are whole numbers in the file, and so is a class that is new there."""
    for cells, expected in ((("0", "1"), "2"), (("0.0", "1.0"), "2.0")):
        file = tmp_path / "a.csv"
        file.write_text("x,label\n" + "".join(f"{row},{cells[row % 2]}\n" for row in range(n)))
        known = labels((0.0, 1.0, 2.0))
        folder = tmp_path / expected
        folder.mkdir()
        corrected.apply(file, "label", known, verdicts(folder, known, 2.0), tmp_path / "b.csv")
        assert (tmp_path / "b.csv").read_text().splitlines()[7] == f"6,{expected}"


def test_a_copy_is_of_the_kind_that_its_name_says(tmp_path):
    file = tmp_path / "a.csv"
    file.write_text("x,label\n1,no\n")
    for name in ("b.tsv", "b.tsv.gz", "b.parquet"):
        with pytest.raises(InvalidInput, match=r"of different kinds.* Name it b\.csv\."):
            rewritten.rewrite(file, "label", {0: "yes"}, (), tmp_path / name)
    assert rewritten.labels_in(rewritten.rewrite(file, "label", {0: "yes"}, (), tmp_path / "b.csv"), "label") == ["yes"]
