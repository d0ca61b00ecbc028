"""What changes of rows do to the mean loss of queries: one system and sweeps give what of_* gives by gradients."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression, RidgeClassifier
from sklearn.svm import SVC, LinearSVC
from torch import nn

import upweight as uw
from upweight.apps.mean_loss import MeanLoss, losses_of

TIGHT = {"tol": 1e-10, "max_iter": 20_000}


def rows_of(classes, n=50, d=4):
    draw = np.random.default_rng(3)
    X = draw.normal(size=(n, d))
    y = np.argmax(X[:, :classes] + 0.7 * draw.normal(size=(n, classes)), 1)
    return X, np.array(["ash", "oak", "yew"])[y]


def logistic(classes=3, **settings):
    X, y = rows_of(classes)
    weights = np.random.default_rng(1).uniform(0.2, 2.0, len(y))
    weights[[4, 8]] = 0
    model = LogisticRegression(C=0.5, class_weight="balanced", **TIGHT).fit(X, y, sample_weight=weights)
    return uw.explain(model, X, y, sample_weight=weights, **settings)


def machine(model, classes):
    X, y = rows_of(classes)
    return uw.explain(model.fit(X, y), X, y)


def module(parameters):
    torch.manual_seed(0)
    X, y = rows_of(3)
    net = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double().eval()
    codes = np.unique(y, return_inverse=True)[1]
    settings = {"loss": nn.functional.cross_entropy, "penalty": 0.05, "parameters": parameters}
    return uw.retrained(uw.explain(net, torch.from_numpy(X), torch.from_numpy(codes), **settings))


CASES = {
    "logistic": logistic,
    "two classes": lambda: logistic(2),
    "folded penalty": lambda: logistic(penalty_per_example=True),
    "conjugate gradients": lambda: logistic(solver=uw.solvers.CG(rtol=1e-12)),
    "least squares": lambda: machine(RidgeClassifier(alpha=2.0, class_weight="balanced"), 3),
    "squared hinge": lambda: machine(LinearSVC(C=0.3, tol=1e-10, max_iter=100_000), 2),
    "head": lambda: module(["2.weight", "2.bias"]),
    "network": lambda: module(None),
}


@pytest.fixture(params=CASES.values(), ids=CASES.keys())
def asked(request):
    influence = request.param()
    names = uw.classes(influence)
    X = np.random.default_rng(9).normal(size=(3, 4))
    return influence, names, influence.queries((X, np.array([names[0], names[1], names[0]])))


def test_labels_are_those_of_relabelling(asked):
    influence, names, queries = asked
    found = MeanLoss(influence, queries).of_labels(names)
    for place, name in enumerate(names):
        expected = influence.of_relabeling(np.arange(influence.n), np.full(influence.n, name), on=queries).values
        np.testing.assert_allclose(found[:, place], expected.mean(0), atol=1e-9 + 1e-6 * np.abs(expected).max())


def test_replacements_are_the_best_of_all_pairs(asked):
    influence, names, queries = asked
    X = np.random.default_rng(4).normal(size=(7, 4))
    y = np.array([names[k % 2] for k in range(7)])
    pairs = np.array([(row, j) for row in range(influence.n) for j in range(7)])
    every = influence.of_replacing(pairs[:, 0], X[pairs[:, 1]], y[pairs[:, 1]], on=queries).values.mean(0)
    found, best = MeanLoss(influence, queries).of_replacing_each(influence.queries((X, y)))
    expected = every.reshape(influence.n, 7)
    np.testing.assert_allclose(found, expected.max(1), atol=1e-9 + 1e-6 * np.abs(expected).max())
    assert best == expected.argmax(1)[int(np.argmax(expected.max(1)))]


def test_derivatives_by_inputs_are_those_of_perturbing(asked):
    influence, _, queries = asked
    rows = np.array([9, 2, 30])
    expected = influence.of_perturbing(rows, on=queries).mean(0)
    np.testing.assert_allclose(MeanLoss(influence, queries).by_inputs(rows), expected, rtol=1e-6, atol=1e-12)


def test_losses_are_those_that_scores_report(asked):
    influence, _, queries = asked
    np.testing.assert_allclose(losses_of(influence, queries), influence.on_loss(queries).query_values, rtol=1e-12)


def test_losses_of_a_smoothed_hinge_are_those_of_the_hinge():
    X, y = rows_of(2)
    model = SVC(kernel="linear", C=1.0).fit(X, y)
    with pytest.warns(uw.errors.TheoryWarning, match="smooth_hinge"):
        influence = uw.explain(model, X, y, loss=uw.losses.smooth_hinge(0.1))
    margins = np.where(y == model.classes_[1], 1, -1) * model.decision_function(X)
    np.testing.assert_allclose(losses_of(influence, influence.queries((X, y))), np.maximum(0, 1 - margins), atol=1e-8)


def test_no_gradients_of_all_rows_are_formed():
    draw = np.random.default_rng(0)
    X, y = draw.normal(size=(6000, 60)), draw.integers(0, 8, 6000)
    influence = uw.explain(LogisticRegression(C=1e-3, **TIGHT).fit(X, y), X, y)
    queries = influence.queries((X[:2], y[:2]))
    influence.on_loss(queries)
    gradients = 6000 * influence.objective.size * 8  # 23 MB
    tracemalloc.start()
    MeanLoss(influence, queries).of_labels(uw.classes(influence))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < gradients / 8


def test_a_stochastic_solver_that_has_not_settled_says_so():
    influence = logistic(2, solver=uw.solvers.LiSSA(depth=3, repeats=4))
    X = np.random.default_rng(9).normal(size=(3, 4))
    queries = influence.queries((X, np.array(["ash", "oak", "ash"])))
    with pytest.warns(uw.errors.TheoryWarning, match="has not settled"):
        found = MeanLoss(influence, queries).of_labels(["ash", "oak"])
    assert np.isfinite(found).all()
