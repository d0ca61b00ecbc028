"""Rows that lead, as they look: the cards are those of the rows, small, and nobody's markup."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression

import upweight as uw
from upweight.errors import InvalidInput

N = 40
DRAW = np.random.default_rng(0)
X = DRAW.normal(size=(N, 3))
Y = (X[:, 0] + DRAW.normal(size=N) > 0).astype(int)
HOSTILE = "<script>alert(1)</script>"
PICTURES = DRAW.normal(size=(N, 3, 50, 60))


@pytest.fixture(scope="module")
def influence():
    return uw.explain(LogisticRegression(tol=1e-8).fit(X, Y), X, Y)


@pytest.fixture(scope="module")
def scores(influence):
    return influence.on_loss(X[:7], Y[:7])


def test_texts_stand_beside_the_rows_that_they_are_of(influence, scores):
    texts = [f"{HOSTILE} text number {row}" for row in range(N)]
    page = uw.look(scores, texts, texts[:7])._repr_html_()
    assert "<script" not in page
    order = [int(row) for row in re.findall(r"row (\d+) <b", page)]
    helpful, harmful = scores.helpful(3).rows, scores.harmful(3).rows
    assert order == [row for q in range(5) for row in (*helpful[q], *harmful[q])]
    shown = [int(row) for row in re.findall(r"number</u> (\d+)", page)]
    assert shown == order
    assert "… and 2 more queries" in page
    assert f">{scores.helpful(1).values[0, 0]:+.3g}</b>" in page
    for found in (
        influence.of_self(),
        influence.leading(X[:2], Y[:2], k=3),
        scores.helpful(2),
        uw.extremes([scores], 2),
    ):
        shown = uw.look(found, texts)
        assert "text number" in shown._repr_html_()
        assert repr(shown).startswith("Look(")


@pytest.mark.parametrize(
    "pictures",
    [
        PICTURES,
        torch.tensor(PICTURES),
        PICTURES.transpose(0, 2, 3, 1),
        PICTURES[:, 0],
        (PICTURES * 99).astype(np.uint8),
    ],
    ids=["channels first", "tensor", "channels last", "grey", "bytes"],
)
def test_pictures_are_thumbnails_and_the_answer_stays_small(scores, pictures):
    page = uw.look(scores, pictures, pictures[:7])._repr_html_()
    assert page.count('<img src="data:image/png;base64,') == 5 * 7
    assert len(page) < 350_000
    assert 'alt="row ' in page


def test_columns_are_compared_with_those_of_the_query(scores):
    frame = pytest.importorskip("pandas").DataFrame(X, columns=[f"{HOSTILE}a", "b", "c"])
    page = uw.look(scores, frame, frame[:7])._repr_html_()
    assert "<script" not in page
    row = int(scores.helpful(1).rows[0, 0])
    assert f"{X[row, 1] - X[0, 1]:+.5g}" in page
    assert uw.look(scores, X)._repr_html_().count("uw-cell") > 30


def test_a_function_says_what_a_row_is_and_a_run_knows_it(influence, scores, tmp_path):
    page = uw.look(scores, lambda row: f"the {row}th" if row % 2 else None)._repr_html_()
    odd = [row for row in scores.helpful(3).rows[0] if row % 2]
    assert all(f"the {row}th" in page for row in odd)
    run = uw.write_run(influence, tmp_path / "run", X[:7], Y[:7], card=lambda row: f"card {row}")
    assert f"card {scores.helpful(1).rows[0, 0]}<" in run._repr_html_()
    (tmp_path / "run" / "scores.safetensors").unlink()
    assert "not finished" in uw.Run.open(tmp_path / "run")._repr_html_()


def test_what_is_no_row_is_refused(scores):
    with pytest.raises(InvalidInput, match=r"rows is a int\. Pass a DataFrame"):
        uw.look(scores, 3)
    with pytest.raises(InvalidInput, match=r"queries is a ndarray of float64, \(3,\)"):
        uw.look(scores, X, np.zeros(3))
