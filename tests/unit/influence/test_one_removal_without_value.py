"""A row of leverage 1 among others: removals are real refits, its own too, but for queries that lean on what it had."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.linear_model import LinearRegression

import upweight as uw

DRAW = np.random.default_rng(0)
GROUP, SINGLE = np.r_[np.zeros(6), np.ones(5), 0], np.r_[np.zeros(11), 1]
X = np.c_[DRAW.normal(size=12), GROUP, SINGLE]
Y = 2 * X[:, 0] + GROUP + DRAW.normal(size=12)
ON = (X[:2], Y[:2])
ITS_OWN = (X[[11, 11]] + [[1, 0, 0], [2, 0, 0]], Y[[11, 11]])


@pytest.fixture(scope="module")
def influence():
    return uw.explain(LinearRegression().fit(X, Y), X, Y)


def losses(keep, on=ON):
    return (LinearRegression().fit(X[keep], Y[keep]).predict(on[0]) - on[1]) ** 2


def test_all_are_refits(influence):
    values = influence.of_removing(range(12), on=ON).values
    everyone = np.arange(12)
    for row in range(12):
        np.testing.assert_allclose(values[:, row], losses(everyone != row) - losses(everyone >= 0), atol=1e-10)


def test_but_for_its_own_query(influence):
    with pytest.warns(uw.errors.TheoryWarning, match=r"Removal number 1 \(of rows \[11\]\).* 1 of 2 queries"):
        values = influence.of_removing([2, 11, 3], on=(X[[0, 11]], Y[[0, 11]])).values
    assert np.isnan(values).tolist() == [[False] * 3, [False, True, False]]
    own = (X[11:], Y[11:])
    expected = losses(np.arange(12) != 2, own) - losses(np.ones(12, bool), own)
    np.testing.assert_allclose(values[1, 0], expected[0], atol=1e-10)


def test_groups_too(influence):
    groups = [[0, 1], [2, 11], [3]]
    with pytest.warns(uw.errors.TheoryWarning, match="Removal number 1"):
        values = influence.of_removing(groups, on=(X[[0, 1, 11]], Y[[0, 1, 11]])).values
    for j, group in enumerate(groups):
        expected = losses(~np.isin(np.arange(12), group)) - losses(np.ones(12, bool))
        np.testing.assert_allclose(values[:2, j], expected, atol=1e-10)
    assert np.isnan(values[2]).tolist() == [False, True, False]


def test_alone_it_is_refused(influence):
    with pytest.raises(uw.errors.NotPositiveDefinite, match="lean on it"):
        influence.of_removing([11], on=ITS_OWN)
    with pytest.raises(uw.errors.NotPositiveDefinite, match="lean on it"):
        influence.of_removing([[11], [0, 11]], on=ITS_OWN)


@pytest.mark.filterwarnings("ignore::upweight.errors.TheoryWarning")
def test_what_has_no_value_comes_last_and_is_compared_with_nothing(influence):
    scores = influence.of_removing(range(12), on=ITS_OWN)
    for rows in (scores.helpful(12).rows, scores.harmful(12).rows):
        assert rows[:, -1].tolist() == [11, 11]
        assert sorted(rows[0]) == list(range(12))
    outcomes = uw.leave_one_out(influence, ITS_OWN, range(12), uw.Refit())
    with pytest.raises(uw.errors.InvalidInput, match=r"row\(s\) \[11\] are NaN"):
        uw.agreement(scores, outcomes)
    others = uw.leave_one_out(influence, ITS_OWN, range(11), uw.Refit())  # what it says to do
    assert uw.agreement(scores, others).slope == pytest.approx(1, abs=1e-8)


def test_one_group_costs_the_others_little(influence, monkeypatch):
    from upweight.influence import newton_step

    tried = []
    plain = newton_step._steps_of_all
    monkeypatch.setattr(
        newton_step, "_steps_of_all", lambda system, groups: tried.append(len(groups)) or plain(system, groups)
    )
    with pytest.warns(uw.errors.TheoryWarning):
        influence.of_removing(range(12), on=ITS_OWN)
    assert len(tried) <= 2 * 4 + 1  # halves of halves, not one by one
