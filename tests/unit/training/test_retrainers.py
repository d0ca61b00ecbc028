"""Retrainers against scikit-learn's own refits and against the oracle's minimum."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.base import clone
from sklearn.linear_model import LogisticRegression, Ridge

import cases
import oracles
import upweight as uw
from small import NAMES, XQ, YQ, ZQ, N, X, Y, Z, classifier, net, refuses, ridge
from upweight.errors import NotConverged, Undefined
from upweight.training.retrainers import bound, reference, reweighted

THREE = np.arange(N) % 3
DRAW = np.random.default_rng(2)
OWN = DRAW.uniform(0.5, 2, size=N)
ESTIMATORS = {
    "binary": (LogisticRegression(C=0.5, tol=1e-12, max_iter=10_000), NAMES),
    "multinomial": (LogisticRegression(C=0.5, tol=1e-12, max_iter=10_000), THREE),
    "ridge": (Ridge(alpha=2.0), Z),
}
WEIGHTS = {
    "ones": np.ones(N),
    "one row gone": np.where(np.arange(N) == 7, 0.0, 1.0),
    "one row doubled": np.where(np.arange(N) == 7, 2.0, 1.0),
    "half gone": (np.arange(N) % 4 < 2).astype(float),
    "random": DRAW.uniform(0, 3, size=N),
}


def flat(model):
    theta = np.concatenate([np.ravel(model.coef_), np.ravel(model.intercept_)])
    if np.size(model.intercept_) == 3:
        theta[-3:] -= theta[-3:].mean()  # a common shift of the intercepts is free
    return theta


@pytest.mark.parametrize("folded", [False, True])
@pytest.mark.parametrize("weights", WEIGHTS.values(), ids=WEIGHTS)
@pytest.mark.parametrize("name", ESTIMATORS)
def test_newton_is_scikit_learns_refit(name, weights, folded):
    estimator, y = ESTIMATORS[name]
    model = clone(estimator).fit(X, y, sample_weight=OWN)
    influence = uw.explain(model, X, y, sample_weight=OWN, penalty_per_example=folded)
    again = clone(estimator)
    share = (OWN * weights).sum() / OWN.sum() if folded else 1.0
    again.set_params(**({"alpha": 2.0 * share} if name == "ridge" else {"C": 0.5 / share}))
    again.fit(X, y, sample_weight=OWN * weights)
    theta = uw.Newton().bind(influence)(weights, 0).numpy().copy()
    if name == "multinomial":
        theta[-3:] -= theta[-3:].mean()
    np.testing.assert_allclose(theta, flat(again), rtol=1e-5, atol=1e-5)


def test_newton_at_the_fit_stays_there():
    influence = ridge()
    assert torch.equal(uw.Newton(rtol=1e-6).bind(influence)(np.ones(N)), influence.objective.theta)


@pytest.mark.parametrize("folded", [False, True])
@pytest.mark.parametrize("rows", [[3], [0, 11, 20]])
def test_lbfgs_on_a_network_is_the_oracles_minimum(rows, folded):
    case = cases.make("mlp", folded=folded, weighted=True)
    weights = np.ones(case.n)
    weights[rows] = 0
    found = uw.LBFGS(rtol=1e-6).bind(case.influence())(weights, 0)
    truth = oracles.without_rows(case.problem, case.theta, rows)
    moved = float((truth - case.theta).norm())
    assert float((found - truth).norm()) < 1e-3 * moved


def test_lbfgs_is_deterministic_whatever_the_seed():
    train = uw.LBFGS().bind(cases.make("mlp").influence())
    weights = np.ones(30)
    weights[4] = 0
    assert torch.equal(train(weights, 0), train(weights, 1))


def test_the_weights_multiply_the_examples_own():
    influence = ridge()
    sweep = reweighted(influence.sweep, 2 * np.ones(N))
    assert np.array_equal(sweep.examples.weights, 2 * influence.examples.weights)
    assert np.array_equal(influence.examples.weights, np.ones(N))


@pytest.mark.parametrize("penalty", [0.1, uw.L2({"2.bias": 0.4}), lambda p: 3 * p["2.bias"].square().sum()])
def test_a_folded_penalty_loses_the_share_of_the_rows(penalty):
    influence = classifier(penalty=penalty, penalty_per_example=True)
    half = reweighted(influence.sweep, np.r_[np.ones(20), np.zeros(20)]).objective
    params = influence.objective.params
    assert float(half.penalty(params)) == pytest.approx(float(influence.objective.penalty(params)) / 2)
    fixed = classifier(penalty=penalty, penalty_per_example=False)
    same = reweighted(fixed.sweep, np.r_[np.ones(20), np.zeros(20)]).objective
    assert float(same.penalty(params)) == pytest.approx(float(fixed.objective.penalty(params)))


def test_retraining_that_does_not_arrive_raises_with_its_numbers():
    influence = cases.make("mlp").influence()
    refused = refuses(
        lambda: uw.LBFGS(max_steps=2).bind(influence)(np.r_[0, np.ones(29)]), ArithmeticError, "after 2 iterations"
    )
    assert isinstance(refused, NotConverged)


def test_newton_without_a_minimum_says_so():
    separable = (X[:, 0] > 0).astype(int)
    model = LogisticRegression(C=1.0, tol=1e-10).fit(X, separable)
    influence = uw.explain(model, X, separable, penalty_per_example=True)
    one = (np.arange(N) == 0).astype(float)
    refuses(lambda: uw.Newton().bind(influence)(one), Undefined, "no row of class")
    one[np.flatnonzero(separable != separable[0])[0]] = 1
    refuses(lambda: uw.Newton(max_steps=1).bind(influence)(one), ArithmeticError, "Newton's method left|curvature")


def test_the_reference_follows_the_model():
    assert reference(ridge().objective) == uw.Newton()
    assert reference(classifier().objective) == uw.LBFGS()


def test_a_function_is_a_retrainer():
    def train(weights, seed):
        return weights.sum() * np.ones(4)

    assert bound(train, ridge()) is train


def test_leave_one_out_hands_over_weights_and_seed():
    asked = []

    def train(weights, seed):
        asked.append((weights.copy(), seed))
        return ridge().objective.theta

    uw.leave_one_out(ridge(), (XQ, ZQ), [3, 8], train, seed=11)
    assert [seed for _, seed in asked] == [11, 11, 11]
    assert [np.flatnonzero(weights == 0).tolist() for weights, _ in asked] == [[], [3], [8]]


@pytest.mark.parametrize("form", ["flat", "dict", "numpy", "list"])
def test_parameters_in_any_form(form):
    influence = ridge()
    theta = influence.objective.theta
    made = {
        "flat": theta,
        "numpy": theta.numpy(),
        "list": theta.tolist(),
        "dict": {name: block.clone().requires_grad_() for name, block in influence.objective.params.items()},
    }[form]
    outcomes = uw.leave_one_out(influence, (XQ, ZQ), [3], lambda weights, seed: made)
    assert np.abs(outcomes.actual).max() == 0
    assert np.abs(outcomes.control).max() < 1e-15


def test_the_control_shows_what_no_row_caused():
    """Retraining that always ends a little elsewhere: the control says where, and no row is blamed."""
    influence = classifier(net())
    elsewhere = influence.objective.theta + 0.01
    outcomes = uw.leave_one_out(influence, (XQ, YQ), [3, 5], lambda weights, seed: elsewhere)
    assert np.abs(outcomes.control).min() > 0
    assert not outcomes.actual.any()
    assert len(Y) == N
