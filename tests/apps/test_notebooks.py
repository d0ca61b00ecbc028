"""Results of the apps show themselves in a notebook, with the numbers that their text tells, and escaped."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from sklearn.linear_model import LogisticRegression

import upweight as uw
from notebooks import HOSTILE, check_page

YES, NO = f"yes{HOSTILE}", f"no{HOSTILE}"
COUNT = 60


@pytest.fixture(scope="module")
def explained():
    draw = np.random.default_rng(0)
    index = [f"{HOSTILE}{row}" for row in range(COUNT)]
    columns = [f"{HOSTILE}{column}" for column in range(3)]
    X = pd.DataFrame(draw.normal(size=(COUNT, 3)), columns=columns, index=index)
    y = np.where(X.iloc[:, 0] + draw.normal(size=COUNT) > 0, YES, NO)
    return uw.explain(LogisticRegression(tol=1e-9).fit(X, y), X, y), X, y


def wrong_of(influence, X, y):
    return np.flatnonzero(uw.predict(influence, influence.examples).labels != y)[:4]


def test_repair_and_what_it_finds(explained):
    influence, X, y = explained
    found = uw.apps.repair(influence, inspect=0.3, plantings=1)
    page = check_page(found)
    assert f"{len(found.rows)} of {COUNT} rows to inspect" in page
    assert page.count('scope="row"') == 12 + len(found.planted.hits)
    assert f"and {len(found.rows) - 12} more" in page
    assert f"<td>{found.gain[0]:.3g}</td>" in page
    assert "planted flips found" in check_page(found.planted)
    truth = y.copy()
    truth[found.rows[:2]] = np.where(y[found.rows[:2]] == YES, NO, YES)
    result = found.found(truth)
    assert f"{result.by[found.chosen]} (100%)" in check_page(result)
    patched = uw.apps.corrected(influence, {int(found.rows[0]): truth[found.rows[0]]}, test=(X[:20], y[:20]))
    assert f"<td>{patched.effect['test loss']:+.4f}</td>" in check_page(patched)


def test_mismatch_its_features_and_its_sources(explained):
    influence, X, y = explained
    wrong = wrong_of(influence, X, y)
    sources = np.array([f"{HOSTILE}{row % 3}" for row in range(COUNT)])
    found = uw.apps.mismatch(influence, (X.iloc[wrong], y[wrong]), groups=sources, k=15)
    page = check_page(found)
    assert f">{found.harmful.values[0]:+.3g}</b>" in page
    assert page.count("<td>stands out</td>") == found.harmful.stand_out + found.helpful.stand_out
    assert "and 3 more" in page
    assert check_page(found.features).count('scope="row"') == 3
    assert f">{found.groups.first_order[0]:+.3g}</b>" in check_page(found.groups)
    none = replace(found, features=None, no_features="<b>none</b>", groups=None)
    assert "no features: &lt;b&gt;none&lt;/b&gt;" in check_page(none)
    alone = replace(found.groups, newton=None, refused=HOSTILE, without={HOSTILE: HOSTILE})
    assert "no Newton step" in check_page(alone)


def test_understand_and_two_models_side_by_side(explained):
    influence, X, y = explained
    found = uw.apps.understand(influence, (X[:5], y[:5]), k=3, describe=lambda row: f"<i>{row}</i>")
    page = check_page(found)
    assert page.count("<table>") == 3
    assert "and 2 more queries" in page
    assert f">{found.helpful(0).values[0]:+.3g}</b>" in page
    assert "<i>" not in page
    both = uw.apps.side_by_side({HOSTILE: found, "again": found})
    assert "rank correlation of their values +1.000" in check_page(both)


def test_contrast_edits_attack_and_vulnerability(explained):
    influence, X, y = explained
    wrong = wrong_of(influence, X, y)
    on = X.iloc[wrong], y[wrong]
    answers = uw.apps.contrast(influence, on)
    page = check_page(answers)
    assert page.count('scope="row"') == len(answers.answers)
    assert f"<td>{answers.answers[0].margin:+.3g}</td>" in page
    right = np.setdiff1d(np.arange(COUNT), wrong_of(influence, X, y))[:2]
    edits = uw.apps.flip_labels(influence, (X.iloc[right], y[right]), 2)
    assert f"<td>{edits.predicted[0]:+.3g}</td>" in check_page(edits)
    weak = uw.apps.vulnerability(influence, on)
    assert f"<td>{weak.by_row.max():.3g}</td>" in check_page(weak)
    found = uw.apps.attack(influence, (X.iloc[right], y[right]), rows=[0, 1], iterations=2)
    assert f"<td>{found.losses[0]:.4g}</td>" in check_page(found)
