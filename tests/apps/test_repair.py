"""Labels to inspect, suggestions and corrections: against closed forms, real retraining and known flips."""

from __future__ import annotations

import csv

import numpy as np
import pytest
from scipy.special import expit
from sklearn.datasets import load_breast_cancer, load_digits, load_iris
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

import upweight as uw
from upweight.apps import pictures

TIGHT = {"tol": 1e-10, "max_iter": 5000}


def spoilt(y, share, classes, seed=0):
    draw = np.random.default_rng(seed)
    rows = draw.choice(len(y), size=round(share * len(y)), replace=False)
    wrong = y.copy()
    wrong[rows] = (wrong[rows] + draw.integers(1, classes, len(rows))) % classes
    return wrong, rows


@pytest.fixture(scope="module")
def digits():
    X, y = load_digits(return_X_y=True)
    wrong, rows = spoilt(y, 0.1, 10)
    influence = uw.explain(LogisticRegression(C=1.0, **TIGHT).fit(X / 16, wrong), X / 16, wrong)
    return influence, wrong, y, rows


@pytest.fixture(scope="module")
def flowers():
    X, y = load_iris(return_X_y=True)
    names = np.array(["setosa", "versicolor", "virginica"])
    wrong, rows = spoilt(y, 0.1, 3, seed=1)
    model = make_pipeline(StandardScaler(), LogisticRegression(**TIGHT)).fit(X, names[wrong])
    return uw.explain(model, X, names[wrong]), names[wrong], names[y], rows


def test_scores_are_those_of_the_closed_form():
    X, y = load_breast_cancer(return_X_y=True)
    X = StandardScaler().fit_transform(X)
    n, model = len(y), LogisticRegression(C=0.1, fit_intercept=False, **TIGHT).fit(X, y)
    found = uw.apps.repair(uw.explain(model, X, y), inspect=0.1, by="self-influence")
    margin = (2 * y - 1) * (X @ model.coef_[0])
    p = expit(X @ model.coef_[0])
    H = (X * (p * (1 - p))[:, None]).T @ X / n + np.eye(X.shape[1]) / (0.1 * n)
    own = expit(-margin) ** 2 * np.einsum("ij,ij->i", X @ np.linalg.inv(H), X) / n
    np.testing.assert_allclose(found.scores["self-influence"], own, rtol=1e-6)
    np.testing.assert_allclose(found.scores["loss"], np.logaddexp(0, -margin), rtol=1e-8)
    np.testing.assert_allclose(found.scores["margin"], -margin, atol=1e-8)
    assert found.rows.tolist() == np.argsort(-own)[:57].tolist()
    assert found.ranks("self-influence").tolist() == list(range(1, 58))
    order = np.argsort(-np.logaddexp(0, -margin), kind="stable").tolist()
    assert found.ranks("loss").tolist() == [order.index(row) + 1 for row in found.rows]


def test_flips_of_digits_are_found_and_the_suggestion_is_the_true_label(digits):
    influence, _, truth, rows = digits
    found = uw.apps.repair(influence, inspect=0.1, by="self-influence")
    told = found.found(truth)
    assert told.wrong == len(rows) == told.inspected
    assert told.by["self-influence"] >= 0.85 * len(rows)
    assert told.by["self-influence"] > told.by["random"] * 3
    assert told.suggested_right >= 0.92
    assert told.needed["random"] > told.inspected
    hit = np.isin(found.rows, rows)
    assert (found.suggested[hit] == truth[found.rows[hit]]).mean() == told.suggested_right


def test_the_suggested_label_really_costs_the_row_less(flowers):
    influence, labels, _, _ = flowers
    found = uw.apps.repair(influence, inspect=12, by="self-influence")
    names = uw.classes(influence)
    X = load_iris().data
    agreed = 0
    for place, row in enumerate(found.rows):
        costs = []
        for name in names:
            after = uw.retrained(uw.edited(influence, [row], y_new=[name])) if name != labels[row] else influence
            costs.append(after.on_loss(X[row : row + 1], [name]).query_values[0])
        agreed += names[int(np.argmin(costs))] == found.suggested[place]
        if found.suggested[place] != labels[row]:
            real = costs[names.index(labels[row])] - min(costs)
            assert found.gain[place] == pytest.approx(real, rel=0.05)
        else:
            assert found.gain[place] == 0
    assert agreed == len(found.rows)


def test_correcting_is_training_on_the_corrected_labels(flowers):
    influence, labels, truth, _ = flowers
    X = load_iris().data
    found = uw.apps.repair(influence, inspect=0.2, by="self-influence")
    made = uw.apps.corrected(influence, found.suggestions(), test=(X, truth))
    expected = labels.copy()
    for row, new in found.suggestions().items():
        expected[row] = new
    assert made.labels.tolist() == expected.tolist()
    model = make_pipeline(StandardScaler(), LogisticRegression(**TIGHT)).fit(X, expected)
    assert made.after["test accuracy"] == model.score(X, truth)
    assert made.before["test accuracy"] == uw.predict(influence, X).accuracy(truth)
    probability = model.predict_proba(X)[np.arange(len(X)), np.searchsorted(model.classes_, truth)]
    assert made.after["test loss"] == pytest.approx(-np.log(probability).mean(), rel=1e-4)
    assert made.after["test loss"] < made.before["test loss"]
    assert made.after["train accuracy"] == model.score(X, expected)
    assert {row: new for row, (_, new) in made.patch.items()} == found.suggestions()
    assert all(labels[row] == old for row, (old, _) in made.patch.items())


def test_a_review_goes_out_and_comes_back(flowers, tmp_path):
    influence, labels, _, _ = flowers
    found = uw.apps.repair(influence, inspect=5, by="self-influence")
    file = uw.apps.write_review(found, tmp_path / "new" / "review.csv", describe=lambda row: f'flower "{row}", small')
    lines = list(csv.DictReader(file.read_text().splitlines()))
    assert [int(line["row"]) for line in lines] == found.rows.tolist()
    np.testing.assert_allclose([float(line["gain"]) for line in lines], found.gain, rtol=1e-6)
    assert lines[0]["description"] == f'flower "{found.rows[0]}", small'
    assert uw.apps.read_review(influence, file) == {}
    for line, name in zip(lines, ("setosa", "", "virginica", "", ""), strict=True):
        line["correction"] = name
    for delimiter, encoding in ((",", "utf-8"), (";", "utf-8-sig")):
        with (tmp_path / "filled.csv").open("w", newline="", encoding=encoding) as stream:
            writer = csv.DictWriter(stream, lines[0].keys(), delimiter=delimiter)
            writer.writeheader()
            writer.writerows(lines)
        expected = {int(found.rows[0]): "setosa", int(found.rows[2]): "virginica"}
        assert uw.apps.read_review(influence, tmp_path / "filled.csv") == expected
    with pytest.raises(uw.errors.InvalidInput, match="there already"):
        uw.apps.write_review(found, file)
    uw.apps.write_review(found, file, overwrite=True)
    assert labels is not None


def test_a_patch_is_made_again_and_taken_back(flowers, tmp_path):
    influence, labels, _, _ = flowers
    made = uw.apps.corrected(influence, uw.apps.repair(influence, inspect=0.2, by="self-influence").suggestions())
    file = uw.apps.write_patch(made.patch, tmp_path / "patch.csv")
    again = uw.apps.corrected(influence, uw.apps.read_patch(influence, file))
    assert again.labels.tolist() == made.labels.tolist()
    back = uw.apps.corrected(made.influence, uw.apps.read_patch(made.influence, file, revert=True))
    assert back.labels.tolist() == labels.tolist()
    np.testing.assert_allclose(back.influence.objective.theta, uw.retrained(influence).objective.theta, atol=1e-6)
    with pytest.raises(uw.errors.InvalidInput, match="labels changed since"):
        uw.apps.read_patch(made.influence, file)
    all_labels = list(
        csv.DictReader(uw.apps.write_labels(made.labels, tmp_path / "labels.csv").read_text().splitlines())
    )
    assert [line["label"] for line in all_labels] == made.labels.tolist()


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda lines: lines[0].update(row="999"), "does not exist"),
        (lambda lines: lines[1].update(row=lines[0]["row"], label=lines[0]["label"]), "comes twice"),
        (lambda lines: lines[0].update(label="rose"), "has the label"),
        (lambda lines: lines[0].update(correction="rose"), "is no class"),
    ],
    ids=["row", "twice", "label", "class"],
)
def test_a_review_of_another_study_is_refused(flowers, tmp_path, change, text):
    influence, _, _, _ = flowers
    file = uw.apps.write_review(uw.apps.repair(influence, inspect=3, by="self-influence"), tmp_path / "review.csv")
    lines = list(csv.DictReader(file.read_text().splitlines()))
    change(lines)
    with file.open("w", newline="") as stream:
        writer = csv.DictWriter(stream, lines[0].keys())
        writer.writeheader()
        writer.writerows(lines)
    with pytest.raises(uw.errors.InvalidInput, match=text):
        uw.apps.read_review(influence, file)


def test_what_is_refused(flowers, tmp_path):
    influence, _, truth, _ = flowers
    for inspect in (0, 0.0, 1.5, 2.0, 151, "10%", True, -0.1, float("nan")):
        with pytest.raises(uw.errors.InvalidInput, match="share of the rows"):
            uw.apps.repair(influence, inspect=inspect, by="self-influence")
    X = load_iris().data
    line = uw.explain(Ridge().fit(X, X[:, 0]), X, X[:, 0])
    with pytest.raises(uw.errors.UnsupportedModel, match="no classes"):
        uw.apps.repair(line)
    for inspect, count in ((1, 1), (1.0, 150), (np.float64(1), 150), (np.int64(150), 150), (0.5, 75), (1e-9, 1)):
        assert len(uw.apps.repair(influence, inspect=inspect, by="self-influence").rows) == count
    found = uw.apps.repair(influence, inspect=3, by="self-influence")
    with pytest.raises(uw.errors.InvalidInput, match="nothing to find"):
        found.found(found.labels)
    with pytest.raises(uw.errors.InvalidInput, match="one label for each"):
        found.found(truth[:3])
    with pytest.raises(uw.errors.InvalidInput, match="none in common"):
        found.found(np.unique(truth, return_inverse=True)[1])
    with pytest.raises(uw.errors.InvalidInput, match="no score"):
        found.order("luck")
    for corrections in ({}, {0: found.labels[0]}):
        with pytest.raises(uw.errors.InvalidInput, match="changes a label"):
            uw.apps.corrected(influence, corrections)
    with pytest.raises(uw.errors.InvalidInput, match="no class"):
        uw.apps.corrected(influence, {0: "rose"})
    with pytest.raises(uw.errors.PathNotFound, match="no file"):
        uw.apps.read_review(influence, tmp_path / "none.csv")
    (tmp_path / "odd.csv").write_text("row,label\n1,setosa\n")
    with pytest.raises(uw.errors.InvalidInput, match="no column correction"):
        uw.apps.read_review(influence, tmp_path / "odd.csv")


def test_words_and_the_picture(flowers):
    influence, _, truth, _ = flowers
    found = uw.apps.repair(influence, inspect=25, by="self-influence")
    assert "25 of 150 rows" in str(found)
    assert "more" in str(found)
    told = str(found.found(truth))
    assert "self-influence" in told
    assert "mean-rank" in told
    assert "random" in told
    ax = pictures.wrong_labels_found(found, truth)
    assert len(ax.lines) == 6
    assert found.to_dict()["inspected"] == 25
