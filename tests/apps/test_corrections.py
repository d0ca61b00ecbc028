"""Corrections: what training again does alone stands beside them; files keep blanks and are not overwritten."""

from __future__ import annotations

import csv
import json

import numpy as np
import pytest
from sklearn.datasets import load_digits, load_iris
from sklearn.linear_model import LogisticRegression, Ridge

import upweight as uw

TIGHT = {"tol": 1e-10, "max_iter": 5000}


@pytest.fixture(scope="module")
def flowers():
    X, y = load_iris(return_X_y=True)
    wrong = y.copy()
    wrong[[3, 70, 120]] = [2, 0, 0]
    return uw.explain(LogisticRegression(**TIGHT).fit(X, wrong), X, wrong), X, y


def two_classes(names, spoilt=3):
    X, y = load_iris(return_X_y=True)
    labels = np.array(names)[(y > 0).astype(int)]
    labels[:spoilt] = names[1]
    return uw.explain(LogisticRegression(**TIGHT).fit(X, labels), X, labels)


@pytest.mark.filterwarnings("ignore")  # training stopped early, which is the point
def test_what_training_again_does_alone_is_said_and_not_credited_to_corrections():
    X, y = load_digits(return_X_y=True)
    X = X / 16
    influence = uw.explain(LogisticRegression(max_iter=8).fit(X[:600], y[:600]), X[:600], y[:600])
    made = uw.apps.corrected(influence, {0: (y[0] + 1) % 10}, test=(X[600:], y[600:]))  # spoils a label
    again = LogisticRegression(**TIGHT).fit(X[:600], y[:600])
    assert made.after["test accuracy"] > made.before["test accuracy"] + 0.01
    assert made.control["test accuracy"] == again.score(X[600:], y[600:])
    assert made.control["train accuracy"] == again.score(X[:600], y[:600])
    own = -again.predict_log_proba(X[600:])[np.arange(len(y) - 600), y[600:]].mean()
    assert made.control["test loss"] == pytest.approx(own, rel=1e-5)
    assert made.effect["test loss"] == made.after["test loss"] - made.control["test loss"] > 0
    assert made.effect["test accuracy"] <= 0
    told = json.loads(json.dumps(made.to_dict()))
    assert told["control"] == dict(made.control)
    assert told["effect"] == dict(made.effect)
    assert "nothing changed" in str(made)
    assert f"{made.control['test accuracy']:.4f}" in str(made)


def test_at_a_minimum_the_control_is_the_model_before(flowers):
    influence, X, y = flowers
    made = uw.apps.corrected(influence, {3: 0, 70: 1}, test=(X, y))
    assert made.control == pytest.approx(dict(made.before), rel=1e-6)
    assert set(made.before) == set(made.control) == set(made.after) == set(made.effect)


def test_a_comparison_is_ready_for_json(flowers):
    influence, X, y = flowers
    told = json.loads(json.dumps(uw.apps.corrected(influence, {r: y[r] for r in (3, 70)}, test=(X, y)).to_dict()))
    assert told["patch"] == [{"row": 3, "old": 2, "new": 0}, {"row": 70, "old": 0, "new": 1}]
    for names in (["no", "yes"], [False, True], [-1.0, 2.0]):
        made = uw.apps.corrected(two_classes(names), {0: np.array(names)[0]})
        assert json.loads(json.dumps(made.to_dict()))["patch"] == [{"row": 0, "old": names[1], "new": names[0]}]


def filled(file, **corrections):
    lines = list(csv.DictReader(file.read_text().splitlines()))
    for line in lines:
        line["correction"] = corrections.get(f"row{line['row']}", "")
    with file.open("w", newline="") as stream:
        writer = csv.DictWriter(stream, lines[0].keys())
        writer.writeheader()
        writer.writerows(lines)
    return lines


def test_labels_with_blanks_at_their_ends_go_out_and_come_back(tmp_path):
    influence = two_classes([" <=50K", " >50K"])  # as Adult has them
    found = uw.apps.repair(influence, inspect=3, by="self-influence")
    file = uw.apps.write_review(found, tmp_path / "review.csv")
    filled(file, row0=" <=50K", row1="<=50K")
    assert uw.apps.read_review(influence, file) == {0: " <=50K", 1: " <=50K"}
    made = uw.apps.corrected(influence, uw.apps.read_review(influence, file))
    patch = uw.apps.write_patch(made.patch, tmp_path / "patch.csv")
    assert uw.apps.read_patch(influence, patch) == {0: " <=50K", 1: " <=50K"}
    assert uw.apps.read_patch(made.influence, patch, revert=True) == {0: " >50K", 1: " >50K"}
    patch.write_text(patch.read_text().replace(" ", ""))  # as a spreadsheet may leave it
    assert uw.apps.read_patch(influence, patch) == {0: " <=50K", 1: " <=50K"}


def test_two_classes_that_differ_by_blanks_only_are_told_apart(tmp_path):
    influence = two_classes(["a", " a"])
    file = uw.apps.write_review(uw.apps.repair(influence, inspect=3, by="self-influence"), tmp_path / "review.csv")
    filled(file, row0="a")
    assert uw.apps.read_review(influence, file) == {0: "a"}
    filled(file, row0="a  ")
    with pytest.raises(uw.errors.InvalidInput, match="is no class"):
        uw.apps.read_review(influence, file)
    patch = tmp_path / "patch.csv"
    patch.write_text("row,old,new\n0,a,a\n")  # its label is ' a'
    with pytest.raises(uw.errors.InvalidInput, match="has the label ' a'"):
        uw.apps.read_patch(influence, patch)


def test_files_that_are_there_are_not_overwritten(flowers, tmp_path):
    influence, _, _ = flowers
    made = uw.apps.corrected(influence, {3: 0})
    writers = {
        "patch.csv": lambda file, **more: uw.apps.write_patch(made.patch, file, **more),
        "labels.csv": lambda file, **more: uw.apps.write_labels(made.labels, file, **more),
        "review.csv": lambda file, **more: uw.apps.write_review(
            uw.apps.repair(influence, inspect=2, by="self-influence"), file, **more
        ),
    }
    for name, write in writers.items():
        file = write(tmp_path / name)
        file.write_text("mine")
        with pytest.raises(uw.errors.InvalidInput, match="there already"):
            write(file)
        assert file.read_text() == "mine"
        assert write(file, overwrite=True).read_text() != "mine"
        with pytest.raises(uw.errors.InvalidInput, match="is a folder"):
            write(tmp_path, overwrite=True)


def test_what_corrected_refuses(flowers):
    influence, X, _ = flowers
    with pytest.raises(uw.errors.UnsupportedModel, match="no classes"):
        uw.apps.corrected(uw.explain(Ridge().fit(X, X[:, 0]), X, X[:, 0]), {0: 1.0})
    with pytest.raises(uw.errors.InvalidInput, match="a list"):
        uw.apps.corrected(influence, [0, 1])
    with pytest.raises(uw.errors.RowOutOfRange):
        uw.apps.corrected(influence, {150: 0})


def test_two_trainings_have_a_bar(flowers, capsys):
    influence, _, y = flowers
    uw.apps.corrected(influence, {3: y[3]}, progress=True)
    shown = capsys.readouterr().err
    assert "training again, without and with the corrections" in shown
    assert "0/2" in shown
    uw.apps.corrected(influence, {3: y[3]}, progress=False)
    uw.apps.corrected(influence, {3: y[3]})  # no terminal
    assert capsys.readouterr().err == ""


def test_rows_are_left_out_as_a_fit_without_them(flowers):
    influence, X, y = flowers
    kept = np.setdiff1d(np.arange(150), [70, 120])
    made = uw.apps.corrected(influence, {3: 0}, without=[120, 70, 70], test=(X, y))
    own = LogisticRegression(**TIGHT).fit(X[kept], y[kept])
    assert made.dropped.tolist() == [70, 120]
    assert made.after["train accuracy"] == own.score(X[kept], y[kept])
    assert made.after["test accuracy"] == own.score(X, y)
    np.testing.assert_allclose(uw.predict(made.influence, influence.queries((X, y))).labels, own.predict(X))
    only = uw.apps.corrected(influence, {}, without=[3])
    assert (dict(only.patch), only.to_dict()["dropped"]) == ({}, [3])
    assert "0 labels corrected, 1 rows dropped" in str(only)
    with pytest.raises(uw.errors.InvalidInput, match="Row 3 is to get another label and to be left out"):
        uw.apps.corrected(influence, {3: 0}, without=[3])


def test_no_cell_of_a_review_is_a_formula(tmp_path):
    names = np.array(["=no", "-yes"])
    X, y = load_iris(return_X_y=True)
    influence = uw.explain(LogisticRegression(**TIGHT).fit(X, names[(y > 0) * 1]), X, names[(y > 0) * 1])
    found = uw.apps.repair(influence, inspect=3, by="loss")
    file = uw.apps.write_review(found, tmp_path / "review.csv", describe=lambda row: "=HYPERLINK(1)")
    lines = list(csv.reader(file.read_text().splitlines()))
    assert not [cell for line in lines for cell in line if cell.startswith(("=", "-yes", "@"))]
    row = int(lines[1][0])
    other = {"=no": "-yes", "-yes": "=no"}[names[int(y[row] > 0)]]
    lines[1][lines[0].index("correction")] = other
    with file.open("w", newline="") as stream:
        csv.writer(stream).writerows(lines)
    assert uw.apps.read_review(influence, file) == {row: other}
