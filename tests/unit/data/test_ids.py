"""Where names of rows come from, what is refused with a remedy that works, and where they go with their rows."""

from __future__ import annotations

import json
import pickle
from typing import ClassVar

import numpy as np
import pandas as pd
import pytest
import torch

import upweight as uw
from small import Items, refuses
from upweight.data.ids import packed, unpacked

X = np.arange(8.0).reshape(4, 2)
Y = np.array([0, 1, 1, 0])
NAMES = ["d", "a", "c", "b"]
FRAME = pd.DataFrame(X, index=pd.Index(NAMES, name="patient"))
DAYS = pd.date_range("2024-01-01", periods=4)
LEVELS = pd.MultiIndex.from_tuples([("x", 2), ("x", 1), ("y", 2), ("y", 1)], names=["site", "bed"])


class Columns(Items):
    """What a Hugging Face dataset says of its columns."""

    column_names: ClassVar = ["idx", "label"]

    def __getitem__(self, row):
        return NAMES if row == "idx" else Items.__getitem__(self, row)


class Own(Items):
    ids = NAMES


ROWS = [torch.tensor([1.0, row]) for row in range(4)]


@pytest.mark.parametrize(
    ("made", "names", "called"),
    [
        (lambda: uw.Examples(FRAME, Y), NAMES, "patient"),
        (lambda: uw.Examples(X, pd.Series(Y, index=NAMES)), NAMES, None),
        (lambda: uw.Examples(FRAME.reset_index(drop=True), pd.Series(Y, index=NAMES)), NAMES, None),
        (lambda: uw.Examples(FRAME, pd.Series(Y)), NAMES, "patient"),
        (lambda: uw.Examples(FRAME.set_index(LEVELS), Y), LEVELS.tolist(), ("site", "bed")),
        (lambda: uw.Examples(FRAME.set_axis(range(10, 14)), Y), [10, 11, 12, 13], None),
        (lambda: uw.Examples(FRAME, Y, ids=[3, 1, 2, 0]), [3, 1, 2, 0], None),
        (lambda: uw.Examples(X, ids=FRAME.index), NAMES, "patient"),
        (lambda: uw.Examples(X, ids=np.array([0.5, 1, 2, 3])), [0.5, 1, 2, 3], None),
        (lambda: uw.Examples(X, ids=torch.arange(4)), [0, 1, 2, 3], None),
        (lambda: uw.Examples(X, ids=[1, "a", ("b", 2), 2.5]), [1, "a", ("b", 2), 2.5], None),
        (lambda: uw.Examples(X).named(NAMES), NAMES, None),
        (lambda: uw.Examples(Columns(ROWS)), NAMES, None),
        (lambda: uw.Examples(Own(ROWS)), NAMES, None),
        (lambda: uw.Examples(Own(ROWS), ids=range(4, 8)), [4, 5, 6, 7], None),
    ],
)
def test_names_come_from(made, names, called):
    examples = made()
    assert examples.ids.tolist() == names
    assert examples.names.name == called


def test_dates_find_their_rows():
    ids = uw.Examples(FRAME.set_index(DAYS), Y).ids
    assert [FRAME.set_index(DAYS).loc[day].tolist() for day in ids] == X.tolist()


@pytest.mark.parametrize(
    "index",
    [range(4), [0, 1, 2, 3], ["a", "a", "b", "c"], ["a", None, "b", "c"], [1.0, np.nan, 2.0, 3.0]],
    ids=["range", "numbers", "twice", "None", "NaN"],
)
def test_an_index_that_does_not_name_every_row_names_none(index):
    assert uw.Examples(FRAME.set_axis(index), Y).ids is None


def test_arrays_and_lists_have_no_names():
    assert uw.Examples(X, Y).ids is None
    assert uw.Examples(X.tolist(), Y.tolist()).ids is None
    assert uw.Examples(torch.from_numpy(X)).ids is None
    assert uw.Examples(Items(ROWS)).ids is None


@pytest.mark.parametrize(
    ("ids", "text"),
    [
        (["a", "b"], "2 names, and there are 4 rows"),
        (np.zeros((4, 2)), r"shape \(4, 2\)"),
        (["a", "b", "a", "c"], "gives 2 rows the name 'a', rows 0 and 2"),
        (["a", None, "b", "c"], r"no name for row 1 \(None\)"),
        (pd.Series([1.0, 2.0, np.nan, 3.0]), r"no name for row 2 \(nan\)"),
        (pd.array([1, 2, pd.NA, 3], dtype="Int64"), "no name for row 2"),
        (pd.DatetimeIndex([*DAYS[:3], pd.NaT]), "no name for row 3"),
        ([["a"], ["b"], ["c"], ["d"]], "holds a list, which is not hashable"),
        ("abcd", "is a str"),
        ({"a", "b", "c", "d"}, "is a set"),
        (4, "is a int"),
    ],
)
def test_ids_that_are_no_names_are_refused(ids, text):
    refuses(lambda: uw.Examples(X, Y, ids=ids), ValueError, text)


def test_examples_hold_their_own_names():
    examples = uw.Examples(X, Y)
    objective = uw.Objective(lambda params, example: (params @ example[0] - example[1]) ** 2, torch.zeros(2).double())
    refuses(lambda: uw.Influence(objective, examples, ids=NAMES), ValueError, "ids was given too")
    assert uw.Influence(objective, examples.named(NAMES)).examples.ids.tolist() == NAMES
    assert uw.Influence(objective, (X, Y), ids=NAMES).examples.ids.tolist() == NAMES


def test_x_and_y_in_another_order_are_refused_and_both_remedies_work():
    y = pd.Series(Y, index=NAMES).sort_index()
    text = r"same 4 rows in another order: row 0 is 'd' in X and 'a' in y \(3 rows differ\)"
    refuses(lambda: uw.Examples(FRAME, y), ValueError, text)
    assert uw.Examples(FRAME, y.loc[FRAME.index]).y.tolist() == Y.tolist()
    assert uw.Examples(FRAME, y.to_numpy()).ids.tolist() == NAMES


def test_a_frame_that_was_shuffled_beside_its_target_is_refused():
    """Also by index 0 … n−1, which is no name for a table."""
    frame = pd.DataFrame(X, columns=["a", "b"])
    y = pd.Series(Y)
    shuffled = frame.iloc[[2, 0, 3, 1]]
    text = r"same 4 rows in another order: row 0 is 2 in X and 0 in y \(4 rows differ\).* Pass y.loc\[X.index\]"
    refuses(lambda: uw.Examples(shuffled, y), ValueError, text)
    refuses(lambda: uw.Examples(shuffled, y.to_frame()), ValueError, text)
    refuses(lambda: uw.Examples(shuffled, y, ids=NAMES), ValueError, text)
    refuses(lambda: uw.Examples(frame, y.loc[shuffled.index]), ValueError, "row 0 is 0 in X and 2 in y")
    right = uw.Examples(shuffled, y.loc[shuffled.index])
    assert right.y.tolist() == [Y[2], Y[0], Y[3], Y[1]]
    assert right.ids.tolist() == [2, 0, 3, 1]
    assert uw.Examples(frame.reset_index(drop=True), y).ids is None


def test_what_is_in_one_order_or_has_no_index_is_taken():
    from sklearn.model_selection import train_test_split

    frame, y = pd.DataFrame(X, columns=["a", "b"]), pd.Series(Y)
    assert uw.Examples(frame, y).ids is None
    half = train_test_split(frame, y, test_size=0.5, random_state=0)
    for part, target in zip(half[:2], half[2:], strict=True):
        assert uw.Examples(part, target).ids.tolist() == part.index.tolist()
    shuffled = frame.iloc[[2, 0, 3, 1]]
    for target in (Y, list(Y), y.to_numpy(), torch.tensor(Y)):
        assert uw.Examples(shuffled, target).ids.tolist() == [2, 0, 3, 1]
    some = frame.iloc[[3, 1]].reset_index(drop=True)  # 0 and 1 are other names than 3 and 1
    assert uw.Examples(some, y.iloc[[3, 1]]).ids.tolist() == [3, 1]
    twice = shuffled.iloc[[0, 0, 1, 2]]
    assert uw.Examples(twice, y.loc[twice.index]).ids is None


def test_names_that_repeat_cannot_bring_targets_into_order():
    frame = pd.DataFrame({"a": X[:, 0], "y": Y}, index=["p", "q", "p", "r"])
    y = frame["y"].iloc[[1, 0, 2, 3]]
    text = r"2 rows are called 'p', so names cannot bring y into order: shuffle both as one frame"
    refuses(lambda: uw.Examples(frame[["a"]], y), ValueError, text)
    together = frame.iloc[[1, 0, 2, 3]]
    assert uw.Examples(together[["a"]], together["y"]).y.tolist() == y.tolist()
    assert uw.Examples(frame[["a"]], y.to_numpy()).y.tolist() == y.tolist()


def test_an_index_of_other_names_says_nothing_about_the_order():
    shifted = pd.Series(Y, index=["a", "c", "b", "e"])
    assert uw.Examples(FRAME, shifted).ids.tolist() == NAMES


def test_names_go_with_their_rows():
    examples = uw.Examples(FRAME, Y)
    rows = np.array([2, 0])
    assert examples.subset(rows).ids.tolist() == ["c", "d"]
    assert [block.ids.tolist() for block in examples.blocks(3)] == [["d", "a", "c"], ["b"]]
    assert examples.only(3).ids.tolist() == ["b"]
    assert examples.relabelled(rows, torch.tensor([0, 1])).ids.tolist() == ["c", "d"]
    assert examples.edited(rows, X[rows] + 1, None, np.ones(2)).ids.tolist() == NAMES
    assert pickle.loads(pickle.dumps(examples)).names.name == "patient"
    assert uw.Examples(Own(ROWS)).only(1).ids.tolist() == ["a"]
    assert uw.Examples(Own(ROWS)).subset(rows).ids.tolist() == ["c", "d"]


@pytest.mark.parametrize(
    "ids", [NAMES, [4, 2, 3, 1], [0.1, 0.2, 0.3, np.pi], LEVELS, DAYS, ["a", 1, 2.5, (1, ("b", 2))], np.array(NAMES)]
)
def test_names_survive_json(ids):
    kept = uw.Examples(X, ids=ids).ids
    found = unpacked(json.loads(json.dumps(packed(kept))))
    assert found.dtype == kept.dtype
    assert found.tolist() == kept.tolist()
    assert [type(name) for name in found] == [type(name) for name in kept]


def test_other_names_become_their_text():
    days = pd.date_range("2024-01-01", periods=4, tz="UTC")
    assert unpacked(packed(uw.Examples(X, ids=days).ids)).tolist() == [str(day) for day in days]


def test_a_frame_of_polars_is_named_by_ids():
    polars = pytest.importorskip("polars")
    frame = polars.DataFrame({"a": X[:, 0], "id": NAMES})
    assert uw.Examples(frame.select("a")).ids is None
    assert uw.Examples(frame.select("a"), ids=frame["id"]).ids.tolist() == NAMES
    assert uw.Examples(frame.select("a"), ids=frame["id"]).names.name == "id"
