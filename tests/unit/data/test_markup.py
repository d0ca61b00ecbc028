"""What notebooks show: nothing that users name is markup, nothing is a script, and it stays short in light and dark."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression

import upweight as uw
from notebooks import HOSTILE, check_page
from upweight.data import markup


@pytest.fixture(scope="module")
def results():
    draw = np.random.default_rng(0)
    X = draw.normal(size=(40, 3))
    names = np.array([f"{HOSTILE}{row % 3}" for row in range(40)], dtype=object)
    y = np.where(X[:, 0] + draw.normal(size=40) > 0, HOSTILE, "no")
    influence = uw.explain(LogisticRegression(tol=1e-8).fit(X, y), X, y, ids=[f"{n}{k}" for k, n in enumerate(names)])
    on = (X[:6], y[:6])
    scores = influence.on_loss(*on)
    outcomes = uw.leave_one_out(influence, on, [0, 1, 2])
    subsets = uw.subset_retraining(influence, on, uw.random_subsets(40, 5, 0.5, seed=0))
    card = replace(scores.certificate, curvature=HOSTILE, solver=HOSTILE)
    hostile = replace(scores, measure=HOSTILE, counterfactual=HOSTILE, certificate=card)
    index = influence.of_self()
    return [
        influence,
        scores,
        hostile,
        card,
        uw.Certificate.averaged([card, card]),
        replace(index, certificate=card),
        replace(influence.check(on), solver=HOSTILE, problem=HOSTILE, flat=HOSTILE),
        uw.agreement(scores, outcomes),
        replace(outcomes, measure=HOSTILE),
        uw.lds(scores, subsets),
        replace(subsets, measure=HOSTILE),
        replace(influence.plan(*on), curvature=HOSTILE, advice=(HOSTILE,)),
        replace(influence.leading(*on, k=3), measure=HOSTILE),
        scores.helpful(3),
        uw.extremes([hostile], 3),
        influence.damping_path(*on, dampings=[0.1, 1.0]),
        uw.removal_curve(influence, {HOSTILE: scores}, on, counts=(1, 2)),
        uw.mislabel_auc(index, [3, 5]),
        uw.ensemble([influence, influence]),
    ]


def test_every_answer_of_a_notebook_is_escaped_short_and_told_in_tables(results):
    for result in results:
        check_page(result)


def test_answers_follow_the_theme_of_the_page_they_stand_in(results):
    page = results[0]._repr_html_()
    for theme in ("--jp-", "--vscode-", "prefers-color-scheme:dark", "data-jp-theme-light=false", "vscode-dark"):
        assert theme in page
    assert "background:#" not in page


def test_numbers_keep_their_sign_without_their_colour():
    assert ">+0.5<" in markup.signed(0.5)
    assert ">-0.5<" in markup.signed(-0.5)
    assert markup.signed(float("nan")) == "+nan"


def test_a_long_text_is_cut_and_says_so():
    assert markup.text("a" * 1000) == "a" * (markup.CUT - 1) + "…"
    assert markup.text("<", 1) == "&lt;"


def test_a_table_and_what_is_told_have_headers_of_lines_and_columns():
    page = markup.table("of <b>", ["", "value"], [["row", "1"]])
    assert "<caption>of &lt;b&gt;</caption>" in page
    assert '<th scope="col">value</th>' in page
    assert '<th scope="row">row</th>' in page
    assert page.count("<td>") == 2


def test_half_a_letter_is_a_sign_that_a_file_can_hold():
    told = markup.facts("half \ud800", [("\udcff", "whole \U0001f600")])
    assert "half \ufffd" in told
    assert "whole \U0001f600" in told
    told.encode()
