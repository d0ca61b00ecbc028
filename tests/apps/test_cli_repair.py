"""`upweight repair`: a review out, corrections back, a patch that can be taken back."""

from __future__ import annotations

import csv
import json
from functools import partial

import pytest

SOURCE = """
import csv
from pathlib import Path

import numpy as np
from sklearn.datasets import load_iris
from sklearn.linear_model import LogisticRegression

import upweight as uw

X, y = load_iris(return_X_y=True)
names = np.array(["setosa", "versicolor", "virginica"])


def labels():
    spoilt = names[y]
    spoilt[[3, 70, 120]] = ["virginica", "setosa", "setosa"]
    if Path("new/labels.csv").exists():
        spoilt = np.array([line["label"] for line in csv.DictReader(Path("new/labels.csv").read_text().splitlines())])
    return spoilt


def flowers():
    model = LogisticRegression(tol=1e-10, max_iter=5000).fit(X, labels())
    influence = uw.explain(model, X, labels())
    return uw.Study(influence, (X, names[y]), describe=lambda row: f"flower {row}")
"""


@pytest.fixture
def repair(upweight):
    return partial(upweight, "repair", "cli_studies:flowers", "--by", "self-influence")


def test_from_review_to_corrected_labels_and_back(repair, tmp_path):
    code, out, _ = repair("--inspect", "4%", "--out", "review.csv")
    assert code == 0
    assert "6 of 150 rows" in out
    assert "review.csv" in out
    lines = list(csv.DictReader((tmp_path / "review.csv").read_text().splitlines()))
    assert {3, 70, 120} <= {int(line["row"]) for line in lines}
    assert lines[0]["description"] == f"flower {lines[0]['row']}"
    for line in lines:
        line["correction"] = {"3": "setosa", "70": "versicolor", "120": "virginica"}.get(line["row"], "")
    with (tmp_path / "review.csv").open("w", newline="") as stream:
        writer = csv.DictWriter(stream, lines[0].keys())
        writer.writeheader()
        writer.writerows(lines)
    code, _, err = repair("--inspect", "4%", "--out", "review.csv")
    assert code == 3
    assert "there already" in err
    code, out, _ = repair("--corrections", "review.csv", "--out", "new", "--json")
    assert code == 0
    told = json.loads(out)
    assert told["corrected"] == 3
    assert told["after"]["test loss"] < told["before"]["test loss"]
    assert told["control"] == pytest.approx(told["before"], rel=1e-5)
    first = (tmp_path / "new" / "patch.csv").read_text()
    (tmp_path / "new" / "labels.csv").rename(tmp_path / "labels.csv")  # the study reads new/labels.csv
    code, _, err = repair("--corrections", "review.csv", "--out", "new")
    assert code == 3
    assert "patch.csv is there already" in err
    assert (tmp_path / "new" / "patch.csv").read_text() == first
    assert not (tmp_path / "new" / "labels.csv").exists()
    assert repair("--corrections", "review.csv", "--out", "new", "--overwrite")[0] == 0
    code, out, _ = repair("--patch", "new/patch.csv", "--revert", "--out", "old")  # the study reads new/labels.csv
    assert code == 0
    assert "3 labels corrected" in out
    back = [line["label"] for line in csv.DictReader((tmp_path / "old" / "labels.csv").read_text().splitlines())]
    assert (back[3], back[70], back[120]) == ("virginica", "setosa", "setosa")


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (("--inspect", "many"), "no number"),
        (("--inspect", "120%"), "no share"),
        (("--inspect", "0%"), "no share"),
        (("--inspect", "2.0"), "whole number of rows"),
        (("--corrections", "none.csv"), "no file"),
        (("--corrections", "a.csv", "--patch", "b.csv"), "one of them"),
        (("--inspect", "3", "--revert"), "none was given"),
        (("--inspect", "3", "--out", "."), "is a folder"),
        (("--corrections", "a.csv", "--out", "cli_studies.py"), "is a file"),
    ],
)
def test_what_is_refused(repair, arguments, text):
    code, _, err = repair(*arguments)
    assert code == 3
    assert text in err


def test_shares_and_numbers(repair):
    for inspect in ("10%", "0.1", "15"):
        code, out, _ = repair("--inspect", inspect, "--json")
        assert code == 0
        assert json.loads(out)["inspected"] == 15
    for inspect, count in (("100%", 150), ("1.0", 150), ("1", 1)):
        code, out, _ = repair("--inspect", inspect, "--json")
        assert code == 0
        assert json.loads(out)["inspected"] == count


def test_planted_flips_choose_the_order(upweight):
    code, out, _ = upweight("repair", "cli_studies:flowers", "--inspect", "5")
    assert code == 0
    assert "labels flipped on purpose" in out
    assert "95 % interval" in out
    code, _, err = upweight("repair", "cli_studies:flowers", "--by", "luck")
    assert code == 3
    assert "self-influence, loss, margin, mean-rank" in err
