"""Only rows that help are helpful, distances are exact wherever the data lie, and each row is described once."""

from __future__ import annotations

import json

import numpy as np
import pytest
import scipy.sparse
from sklearn.datasets import load_iris
from sklearn.linear_model import LogisticRegression
from sklearn.svm import LinearSVC

import upweight as uw
from upweight.apps import pictures
from upweight.apps.distances import distances

DRAW = np.random.default_rng(0)
X = np.vstack([DRAW.normal(size=(60, 2)) - 2.5, DRAW.normal(size=(60, 2)) + 2.5])
Y = np.repeat(["dog", "fish"], 60)
ON = (np.array([[0.2, 0.2]]), ["fish"])


def machine(order=slice(None)):
    return uw.explain(LinearSVC(tol=1e-8, max_iter=10**6).fit(X[order], Y[order]), X[order], Y[order])


@pytest.mark.filterwarnings("ignore::upweight.errors.TheoryWarning")
def test_rows_that_do_nothing_are_neither_helpful_nor_harmful():
    found = uw.apps.understand(machine(), ON, k=8)
    values = found.scores.values[0]
    assert 0 < (values > 0).sum() < 8
    helpful, harmful = found.helpful(0, 20), found.harmful(0, 20)
    assert set(helpful.rows) == set(np.flatnonzero(values > 0))
    assert set(harmful.rows) == set(np.flatnonzero(values < 0))
    assert helpful.values.min() > 0
    assert len(helpful.labels) == len(helpful.distances) == len(helpful.feature_distances) == len(helpful.rows)
    assert found.same_class(0, 20)[0] == (Y[values > 0] == "fish").mean()
    assert [one["row"] for one in found.to_dict()["queries"][0]["helpful"]] == helpful.rows.tolist()
    reversed_ = uw.apps.understand(machine(np.arange(120)[::-1]), ON, k=8)
    assert reversed_.same_class(0, 20) == pytest.approx(found.same_class(0, 20), nan_ok=True)
    assert set(119 - reversed_.helpful(0, 20).rows) == set(helpful.rows)


@pytest.mark.filterwarnings("ignore::upweight.errors.TheoryWarning")
def test_a_query_that_no_row_helps_is_said():
    found = uw.apps.understand(machine(), (np.array([[9.0, 9.0]]), ["fish"]))
    assert not found.scores.values.any()
    assert len(found.helpful().rows) == len(found.harmful().rows) == 0
    assert np.isnan(found.same_class()).all()
    assert found.first_of_another_class() is None
    assert "helpful: no row" in str(found)
    assert json.dumps(found.to_dict()["queries"][0]["helpful"]) == "[]"
    ax = pictures.influence_against_distance(found)
    assert not any("helpful" in text.get_text() for text in ax.get_legend().get_texts())
    pair = uw.apps.side_by_side({"a": found, "b": found})
    assert np.isnan(pair.shared()).all()
    assert "a" in str(pair)


@pytest.mark.filterwarnings("ignore::upweight.errors.TheoryWarning")
def test_shared_rows_are_rows_that_help_both():
    few = np.r_[0:6, 60:66]
    line = uw.explain(LogisticRegression(tol=1e-8).fit(X[few], Y[few]), X[few], Y[few])
    hinge = uw.explain(LinearSVC(tol=1e-8, max_iter=10**6).fit(X[few], Y[few]), X[few], Y[few])
    pair = uw.apps.side_by_side({"line": uw.apps.understand(line, ON), "hinge": uw.apps.understand(hinge, ON)})
    a, b = (set(np.flatnonzero(found.scores.values[0] > 0)) for found in (pair.first, pair.second))
    assert pair.shared()[0] == len(a & b) / max(len(a), len(b))  # 12 rows, and k is 20
    assert pair.shared(500)[0] == pair.shared()[0]
    most = set(pair.first.helpful(0, 3).rows) & set(pair.second.helpful(0, 3).rows)
    assert pair.shared(3)[0] == len(most) / max(len(pair.first.helpful(0, 3).rows), len(pair.second.helpful(0, 3).rows))


def test_every_row_is_described_once():
    inputs, labels = load_iris(return_X_y=True)
    influence = uw.explain(LogisticRegression(tol=1e-8, max_iter=2000).fit(inputs, labels), inputs, labels)
    told = str(uw.apps.understand(influence, (inputs[:1], labels[:1]), k=2, describe=lambda row: f"<flower {row}>"))
    lines = [line for line in told.splitlines() if line.startswith("  row")]
    assert len(lines) == 4
    assert all(line.count("<flower") == 1 for line in lines)


def exact(a, b):
    return np.linalg.norm(a[:, None] - b[None], axis=2)


@pytest.mark.parametrize("form", [np.asarray, scipy.sparse.csr_matrix])
@pytest.mark.parametrize("offset", [0.0, 1e4, 1e6, 1.7e9])
def test_distances_far_from_zero(offset, form):
    """Also those of a column of seconds since 1970: ‖a‖² + ‖b‖² − 2ab has nothing left of them."""
    table = DRAW.normal(size=(40, 3)) + np.array([offset, 0.0, -offset])
    found = distances(form(table[:6]), form(table))
    np.testing.assert_allclose(found, exact(table[:6], table), rtol=1e-9)
    assert (np.flatnonzero(found == 0) == np.arange(6) * 41).all()


def test_distances_within_groups_that_lie_far_apart():
    table = np.vstack([DRAW.normal(size=(30, 4)) + 1e7, DRAW.normal(size=(30, 4)) - 1e7])
    table[5] = table[0]
    found = distances(table[:3], table)
    np.testing.assert_allclose(found, exact(table[:3], table), rtol=1e-9)
    assert found[0, 5] == found[0, 0] == 0


def test_distances_in_blocks_of_pairs_and_columns(monkeypatch):
    import sys

    table = np.round(DRAW.normal(size=(30, 7))) + 1e8
    whole = distances(table[:5], table)
    monkeypatch.setattr(sys.modules["upweight.apps.distances"], "_BLOCK", 20)
    np.testing.assert_allclose(distances(table[:5], table), whole)
    np.testing.assert_allclose(whole, exact(table[:5], table))
    sparse = scipy.sparse.csr_matrix(table)
    np.testing.assert_allclose(distances(sparse[:5], sparse), whole)
    np.testing.assert_allclose(distances(sparse[:5], table), whole)
    np.testing.assert_allclose(distances(table[:5].astype(np.uint32), table.astype(np.uint32)), whole)
