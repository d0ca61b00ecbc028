"""A row of leverage 1 among others: their removals have values, which are real refits, and its own is NaN."""

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


@pytest.fixture(scope="module")
def influence():
    return uw.explain(LinearRegression().fit(X, Y), X, Y)


def losses(keep):
    return (LinearRegression().fit(X[keep], Y[keep]).predict(ON[0]) - ON[1]) ** 2


def test_the_others_are_refits(influence):
    with pytest.warns(uw.errors.TheoryWarning, match=r"1 of 12 removals \(first: number 11\).*rows \[11\]"):
        values = influence.of_removing(range(12), on=ON).values
    everyone = np.arange(12)
    for row in range(11):
        np.testing.assert_allclose(values[:, row], losses(everyone != row) - losses(everyone >= 0), atol=1e-10)
    assert np.isnan(values[:, 11]).all()


def test_groups_too(influence):
    with pytest.warns(uw.errors.TheoryWarning, match="number 1"):
        values = influence.of_removing([[0, 1], [2, 11], [3]], on=ON).values
    expected = losses(~np.isin(np.arange(12), [0, 1])) - losses(np.ones(12, bool))
    np.testing.assert_allclose(values[:, 0], expected, atol=1e-10)
    assert np.isnan(values).tolist() == [[False, True, False]] * 2


def test_alone_it_is_refused(influence):
    with pytest.raises(uw.errors.NotPositiveDefinite, match="alone determine"):
        influence.of_removing([11], on=ON)
    with pytest.raises(uw.errors.NotPositiveDefinite, match="alone determine"):
        influence.of_removing([[11], [0, 11]], on=ON)


@pytest.mark.filterwarnings("ignore::upweight.errors.TheoryWarning")
def test_what_has_no_value_comes_last_and_is_compared_with_nothing(influence):
    scores = influence.of_removing(range(12), on=ON)
    for rows in (scores.helpful(12).rows, scores.harmful(12).rows):
        assert rows[:, -1].tolist() == [11, 11]
        assert sorted(rows[0]) == list(range(12))
    outcomes = uw.leave_one_out(influence, ON, range(12), uw.Refit())
    with pytest.raises(uw.errors.InvalidInput, match=r"row\(s\) \[11\] are NaN"):
        uw.agreement(scores, outcomes)
    others = uw.leave_one_out(influence, ON, range(11), uw.Refit())  # what it says to do
    assert uw.agreement(scores, others).slope == pytest.approx(1, abs=1e-8)


def test_one_group_costs_the_others_little(influence, monkeypatch):
    from upweight.influence import newton_step

    tried = []
    plain = newton_step._steps_of_all
    monkeypatch.setattr(
        newton_step, "_steps_of_all", lambda system, groups: tried.append(len(groups)) or plain(system, groups)
    )
    with pytest.warns(uw.errors.TheoryWarning):
        influence.of_removing(range(12), on=ON)
    assert len(tried) <= 2 * 4 + 1  # halves of halves, not one by one
