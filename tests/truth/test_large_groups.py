"""Groups of hundreds of rows: their Newton step against refits and dense algebra, whatever the solver."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression, Ridge

import upweight as uw
from upweight.errors import NotPositiveDefinite, TheoryWarning
from upweight.model import per_row
from upweight.solvers import CG, Approximate, Cholesky, TwoLevel

N, D = 2500, 12
SOLVERS = [
    Cholesky(),
    CG(rtol=1e-9),
    CG(rtol=1e-9, preconditioner=Approximate()),
    CG(rtol=1e-9, preconditioner=TwoLevel(300)),
]


@pytest.fixture(scope="module")
def data():
    draw = np.random.default_rng(0)
    X = draw.normal(size=(N + 5, D))
    return X[:N], X @ draw.normal(size=D) + draw.normal(size=N + 5), X[N:], draw.uniform(0.5, 2, size=N)


@pytest.mark.parametrize("solver", SOLVERS, ids=repr)
@pytest.mark.parametrize("folded", [False, True])
def test_a_large_group_of_a_ridge_is_its_refit(data, solver, folded):
    X, y, Xq, weights = data
    groups = [np.arange(0, N, 2), [3], np.arange(0, N, 3)]  # the last is small enough for Woodbury, with much penalty
    alpha = 300.0
    model = Ridge(alpha=alpha).fit(X, y[:N], sample_weight=weights)
    truth = []
    for group in groups:
        left = weights.copy()
        left[group] = 0
        again = Ridge(alpha=alpha * (left.sum() / weights.sum() if folded else 1.0)).fit(X, y[:N], sample_weight=left)
        truth.append((again.predict(Xq) - y[N:]) ** 2 - (model.predict(Xq) - y[N:]) ** 2)
    inf = uw.explain(model, X, y[:N], sample_weight=weights, solver=solver, penalty_per_example=folded)
    scores = inf.of_removing(groups, on=(Xq, y[N:]))
    np.testing.assert_allclose(scores.values, np.stack(truth, 1), rtol=1e-6, atol=1e-8)
    assert np.abs(scores.error).max() < 1e-6


def test_a_large_group_of_a_softmax_is_the_dense_newton_step_and_the_error_says_how_far_the_refit_is(data):
    X, y, Xq, weights = data
    labels = np.digitize(y, [-1.0, 1.0])
    group = np.flatnonzero(X[:, 0] > 0)[:600]  # 600 rows × 3 classes
    settings = {"C": 0.01, "tol": 1e-12, "max_iter": 5000}
    model = LogisticRegression(**settings).fit(X, labels[:N], sample_weight=weights)
    inf = uw.explain(model, X, labels[:N], sample_weight=weights)
    scores = inf.of_removing([group], on=(Xq, labels[N:]))

    rest = np.setdiff1d(np.arange(N), group)
    without = inf.operator.of_rows(rest).matrix() * len(rest) / N
    without += torch.diag(uw.penalties.diagonal(inf.objective)) * (1 - len(rest) / N)
    G = per_row.gradients(inf.sweep, group)
    side = (G * torch.from_numpy(weights[group])[:, None]).sum(0) / N
    step = inf.operator.project(torch.linalg.lstsq(without, side[:, None], driver="gelsd").solution.T)
    moved = inf.objective.at(inf.objective.theta + step[0])
    expected = uw.calculus.losses(moved, inf.queries((Xq, labels[N:])).batch(slice(None))).numpy() - scores.query_values
    np.testing.assert_allclose(scores.values[:, 0], expected, rtol=1e-6)

    left = weights.copy()
    left[group] = 0
    again = LogisticRegression(**settings).fit(X, labels[:N], sample_weight=left)
    truth = -again.predict_log_proba(Xq)[np.arange(5), labels[N:]] - scores.query_values
    first = inf.of_groups([group], on=(Xq, labels[N:])).values[:, 0]
    assert np.linalg.norm(scores.values[:, 0] - truth) < 0.5 * np.linalg.norm(first - truth)
    corrected = scores.values[:, 0] + scores.error[:, 0]
    assert np.linalg.norm(corrected - truth) < 0.7 * np.linalg.norm(scores.values[:, 0] - truth)


def test_a_group_that_alone_determines_a_parameter_leaves_what_does_not_need_it(data):
    X, y, Xq, _ = data
    inside = X.copy()
    inside[1200:, 0] = 0.0
    without = Xq.copy()
    without[1:, 0] = 0.0
    from sklearn.linear_model import LinearRegression

    model = LinearRegression().fit(inside, y[:N])
    inf = uw.explain(model, inside, y[:N])
    with pytest.warns(TheoryWarning, match=r"1 of \d+ queries \(first: number 0\)"):
        values = inf.of_removing([np.arange(1200)], on=(without, y[N:])).values[:, 0]
    assert np.isnan(values[0])
    again = LinearRegression().fit(inside[1200:], y[1200:N])
    expected = (again.predict(without) - y[N:]) ** 2 - (model.predict(without) - y[N:]) ** 2
    np.testing.assert_allclose(values[1:], expected[1:], rtol=1e-7, atol=1e-9)
    with pytest.raises(NotPositiveDefinite, match="lean on it"):
        inf.of_removing([np.arange(1200)], on=(Xq, y[N:]))
