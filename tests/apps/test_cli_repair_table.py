"""`upweight repair data.csv --label bought`: no Python, from the file to a corrected copy and back."""

from __future__ import annotations

import csv
import json
from functools import partial

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression

import upweight as uw

pd = pytest.importorskip("pandas")

SOURCE = """
import upweight as uw
"""


@pytest.fixture
def bought(tmp_path):
    """300 rows, of which 15 have the wrong label, one none and some no age; the file and the wrong rows."""
    draw = np.random.default_rng(5)
    age, city = draw.normal(40, 10, 300), draw.choice(["Bonn", "Oslo", "Rome"], 300)
    score = (age - 40) / 4 + 3 * (city == "Oslo") - 1 + draw.logistic(size=300) / 2
    label = np.where(score > 0, "yes", "no")
    wrong = draw.choice(300, 15, replace=False)
    label[wrong] = np.where(label[wrong] == "yes", "no", "yes")
    frame = pd.DataFrame({"id": range(300), "age": age.round(2), "city": city, "bought": label})
    frame.loc[draw.choice(300, 20, replace=False), "age"] = np.nan
    wrong = np.setdiff1d(wrong, [4])
    frame.loc[4, "bought"] = np.nan
    frame.to_csv(tmp_path / "data.csv", index=False)
    return tmp_path / "data.csv", wrong


@pytest.fixture
def repair(upweight):
    return partial(upweight, "repair", "data.csv", "--label", "bought")


def test_from_a_file_to_its_corrected_copy_and_back(repair, bought, tmp_path):
    file, wrong = bought
    before = file.read_bytes()
    code, out, err = repair("--inspect", "10%", "--out", "review.csv")
    assert code == 0, err
    for words in ("299 rows", "row 6 left out: no bought", "numbers the rows", "6.7% missing", "cross-validation"):
        assert words in out
    assert "out-of-fold-loss" in out
    lines = list(csv.DictReader((tmp_path / "review.csv").read_text().splitlines()))
    assert len(lines) == 30
    text = before.decode().splitlines()
    for line in lines:
        identity = text[int(line["row"]) - 1].partition(",")[0]  # `row` is the line of the file
        assert f"id: {identity};" in line["description"]
        assert text[int(line["row"]) - 1].endswith(line["label"])
    hit = [line for line in lines if int(line["row"]) - 2 in wrong]
    assert len(hit) >= 10
    for line in hit:
        line["correction"] = {"yes": "no", "no": "yes"}[line["label"]]
    with (tmp_path / "review.csv").open("w", newline="") as stream:
        writer = csv.DictWriter(stream, lines[0].keys())
        writer.writeheader()
        writer.writerows(lines)
    code, out, err = repair("--corrections", "review.csv", "--out", "new", "--json")
    assert code == 0, err
    assert json.loads(out)["corrected"] == len(hit)
    changed = [
        number
        for number, (old, new) in enumerate(
            zip(text, (tmp_path / "new" / "data.csv").read_text().splitlines(), strict=True), start=1
        )
        if old != new
    ]
    assert changed == sorted(int(line["row"]) for line in hit)
    code, _, err = repair("--corrections", "review.csv", "--out", "new")
    assert code == 3
    assert "there already" in err
    (tmp_path / "data.csv").write_bytes((tmp_path / "new" / "data.csv").read_bytes())
    code, _, err = repair("--patch", "new/patch.csv", "--revert", "--out", "old")
    assert code == 0, err
    assert (tmp_path / "old" / "data.csv").read_bytes() == before


def test_the_model_is_at_its_minimum_and_rows_are_scored_by_models_that_did_not_see_them(bought):
    from upweight.cli import labelled, table

    file, _ = bought
    rows = labelled.of_table(table.read(file, "bought"))  # pytest turns explain's warnings into errors
    X, y = np.asarray(uw.training_inputs(rows.influence)), uw.training_labels(rows.influence)
    assert X.shape == (299, 5)  # age, whether it is missing, three cities
    C = rows.about[1]["model"]["C"]
    unseen = np.empty(299)
    for train, test in labelled._folds().split(X, y):
        model = LogisticRegression(C=C, tol=1e-8, max_iter=10_000).fit(X[train], y[train])
        P = model.predict_proba(X[test])
        unseen[test] = -np.log(P[np.arange(len(test)), np.searchsorted(model.classes_, y[test])])
    np.testing.assert_allclose(rows.scores(rows.influence)["out-of-fold-loss"], unseen, rtol=1e-5)


def test_json_names_rows_as_the_file_does(repair, bought):
    code, out, err = repair("--inspect", "5", "--by", "out-of-fold-loss", "--json")
    assert code == 0, err
    told = json.loads(out)
    assert told["order"] == "out-of-fold-loss"
    assert told["table"]["label"] == "bought"
    labels = bought[0].read_text().splitlines()
    assert all(labels[row - 1].endswith(label) for row, label in zip(told["rows"], told["labels"], strict=True))


def test_three_classes_and_a_text(upweight, tmp_path):
    draw = np.random.default_rng(2)
    kind = draw.integers(0, 3, 150)
    words = np.array([["ball", "goal", "team"], ["vote", "law", "party"], ["star", "moon", "orbit"]])
    text = [" ".join(draw.choice(words[one], 6)) for one in kind]
    label = np.array(["sport", "politics", "space"])[kind]
    label[:3] = np.array(["sport", "politics", "space"])[(kind[:3] + 1) % 3]
    pd.DataFrame({"text": text, "topic": label}).to_csv(tmp_path / "news.csv", index=False)
    code, out, err = upweight("repair", "news.csv", "--label", "topic", "--inspect", "3", "--json")
    assert code == 0, err
    told = json.loads(out)
    assert sorted(told["rows"]) == [2, 3, 4]
    assert "out-of-fold-margin" in told["ranks"]
    assert told["suggested"] == [["sport", "politics", "space"][kind[row - 2]] for row in told["rows"]]


def test_what_is_refused(upweight, bought):
    for arguments, text in (
        (("data.csv",), "no label was named"),
        (("data.csv", "--label", "buy"), "no column 'buy'"),
        (("cli_studies:flowers", "--label", "y"), "names a column of a table"),
        (("none.csv", "--label", "y"), "no file none.csv"),
        (("data.csv", "--label", "bought", "--by", "luck"), "out-of-fold-loss"),
    ):
        code, _, err = upweight("repair", *arguments)
        assert code == 3
        assert text in err
