"""What may be done to a row starts from its weight as it is now: against scikit-learn fitted from scratch."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression

import upweight as uw
from upweight.apps import contrast, contrast_by_removal
from upweight.apps.changes import Relabelled, Removed

DRAW = np.random.default_rng(5)
N = 60
X = DRAW.normal(size=(N, 2))
Y = (X[:, 0] + 0.8 * DRAW.normal(size=N) > 0).astype(int)
XQ = DRAW.normal(size=(40, 2))
GONE = np.arange(12)
LEFT = np.arange(12, N)


def fitted(X=X, y=Y, weight=None, **settings):
    model = LogisticRegression(**{"C": 0.5, "tol": 1e-11, "max_iter": 5000} | settings)
    return model.fit(X, y, sample_weight=weight)


def outputs(model, Xq):
    return model.decision_function(Xq)


@pytest.fixture(scope="module")
def less():
    """The model without twelve rows, and with others at half their weight."""
    weights = np.ones(N)
    weights[GONE], weights[12:30] = 0, 0.5
    return uw.retrained(uw.explain(fitted(), X, Y), weights=weights), weights


def test_rows_that_were_left_out_are_no_candidates(less):
    influence, weights = less
    for change in (Relabelled(influence, 1), Removed(influence, 1)):
        assert not np.isin(GONE, change.candidates).any()
    np.testing.assert_array_equal(Relabelled(influence, 1).candidates, np.flatnonzero((Y == 0) & (weights > 0)))
    zero = uw.explain(fitted(weight=weights), X, Y, sample_weight=weights)
    np.testing.assert_array_equal(Relabelled(zero, 1).candidates, Relabelled(influence, 1).candidates)


@pytest.mark.parametrize("ask", [contrast, contrast_by_removal])
def test_sets_and_outcomes_are_those_of_the_rows_that_are_left(less, ask):
    influence, weights = less
    model = fitted(weight=weights)
    wanted = 1 - model.predict(XQ)
    near = np.argsort(np.abs(outputs(model, XQ)))[:5]
    found = ask(influence, (XQ[near], wanted[near]))
    assert found.corrected >= 4
    for answer in found.answers:
        assert not np.isin(answer.rows, GONE).any()
        y, left = Y.copy(), weights.copy()
        if ask is contrast:
            y[answer.rows] = answer.wanted
        else:
            left[answer.rows] = 0
        again = fitted(y=y, weight=left)
        sign = 1 if answer.wanted == 0 else -1
        query = XQ[near][[answer.query]]
        assert answer.actual == pytest.approx(sign * outputs(again, query)[0], abs=1e-6)
        assert answer.predicted == pytest.approx(answer.actual, abs=0.02)
        assert answer.margin == pytest.approx(sign * outputs(model, query)[0], abs=1e-6)
        assert answer.corrected == (again.predict(query)[0] == answer.wanted)


def weighed(y, weight, factors):
    """Sample weights that stand for class weights, and C for a penalty that follows the sum of the weights."""
    total = weight * np.where(y == 1, factors[1], factors[0])
    before = weight * np.where(Y == 1, factors[1], factors[0])
    return total, total.sum() / before.sum()


@pytest.mark.parametrize("folded", [True, False])
def test_a_new_label_brings_its_class_weight_and_its_share_of_the_penalty(folded):
    """First order against finite differences of fits from scratch, at a weight so small that nothing else is left."""
    factors, weight = {0: 1.0, 1: 6.0}, DRAW.uniform(0.5, 2, N)
    rows = np.flatnonzero(Y == 0)[:4]
    weight[rows] = 1e-4
    model = fitted(weight=weight, C=0.01, class_weight=factors)
    influence = uw.retrained(uw.explain(model, X, Y, sample_weight=weight, penalty_per_example=folded))
    change = Relabelled(influence, 1)
    query = np.append(XQ[0], 1.0)
    S = influence.prepared.solve(uw_vector(query)).x
    effects = change.effects(S)[np.searchsorted(change.candidates, rows), 0]
    now = outputs(fit_of(Y, weight, factors, folded), XQ[:1])[0]
    for row, effect in zip(rows, effects, strict=True):
        y = Y.copy()
        y[row] = 1
        assert effect == pytest.approx(outputs(fit_of(y, weight, factors, folded), XQ[:1])[0] - now, rel=5e-3)
    on = (XQ[:1], [1])
    told = influence.of_relabeling(rows, np.ones(4, dtype=int), on=on).values[0]
    gradient = -1 / (1 + np.exp(now))  # of the query's loss by its output
    np.testing.assert_allclose(told, gradient * effects, rtol=1e-6)


def uw_vector(query):
    import torch

    return torch.from_numpy(query[None])


def fit_of(y, weight, factors, folded):
    total, share = weighed(y, weight, factors)
    return fitted(y=y, weight=total, C=0.01 / share if folded else 0.01, tol=1e-13)


@pytest.mark.parametrize("folded", [True, False])
def test_contrast_of_class_weights_ends_where_scikit_learn_ends(folded):
    factors, weight = {0: 1.0, 1: 6.0}, DRAW.uniform(0.5, 2, N)
    model = fitted(weight=weight, C=0.05, class_weight=factors)
    influence = uw.explain(model, X, Y, sample_weight=weight, penalty_per_example=folded)
    near = np.argsort(np.abs(outputs(model, XQ)))[:6]
    wanted = 1 - model.predict(XQ[near])
    found = contrast(influence, (XQ[near], wanted))
    assert found.corrected >= 4
    for answer in found.answers:
        y = Y.copy()
        y[answer.rows] = answer.wanted
        total, share = weighed(y, weight, factors)
        again = fitted(y=y, weight=total, C=0.05 / share if folded else 0.05)
        sign = 1 if answer.wanted == 0 else -1
        assert answer.actual == pytest.approx(sign * outputs(again, XQ[near][[answer.query]])[0], abs=1e-5)
        assert answer.predicted == pytest.approx(answer.actual, abs=0.03)


def test_a_class_of_weight_zero_may_still_be_changed():
    """A row whose class weighs nothing does nothing now, and something with another label."""
    labels = np.where(X[:, 1] > 0.8, 2, Y)
    influence = uw.explain(fitted(y=labels, class_weight={0: 1.0, 1: 1.0, 2: 1e-9}), X, labels)
    assert np.isin(np.flatnonzero(labels == 2), Relabelled(influence, 1).candidates).all()


def test_no_row_that_could_be_changed():
    weights = np.where(Y == 1, 1.0, 0.0)
    weights[np.flatnonzero(Y == 0)[:1]] = 1.0
    influence = uw.explain(fitted(weight=weights), X, Y, sample_weight=weights)
    only = Relabelled(influence, 0)
    assert len(only.candidates) == (Y == 1).sum()
    import torch

    none = Relabelled(uw.explain(fitted(weight=weights), X, Y, sample_weight=weights), 0)
    none.candidates = none.candidates[:0]
    assert none.effects(torch.zeros(2, 3, dtype=torch.float64)).shape == (0, 2)
