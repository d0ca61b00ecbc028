"""Rows that almost determine a coefficient by themselves: 1/(1 − h) multiplies a solver's error, whatever the solver.

The oracle is the fit without the rows, and OLS's own formulas from it.
"""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.linear_model import LinearRegression, Ridge

import upweight as uw
from upweight.solvers import CG, Cholesky

SOLVERS = [Cholesky(), CG(), CG(rtol=1e-3)]


def sparse_column(size):
    """A column that is `size` in all rows but the first, which has 1: 1 − h is about 60 size²."""
    draw = np.random.default_rng(0)
    X = draw.normal(size=(60, 4))
    X[:, 3] *= size
    X[0, 3] = 1.0
    return X, X @ [1, -1, 0.5, 2] + draw.normal(size=60), draw.normal(size=(2, 4))


@pytest.mark.parametrize("solver", SOLVERS, ids=repr)
@pytest.mark.parametrize("size", [1e-2, 1e-3])
def test_diagnostics_of_a_row_are_those_of_the_fit_without_it(size, solver):
    X, y, _ = sparse_column(size)
    model = LinearRegression(fit_intercept=False).fit(X, y)
    frame = uw.explain(model, X, y, solver=solver).summary_frame()
    without = np.linalg.lstsq(X[1:], y[1:], rcond=None)[0]
    change = model.coef_ - without
    left = 1 - X[0] @ np.linalg.pinv(X)[:, 0]
    scale = ((y - X @ model.coef_) ** 2).sum() / (60 - 4)
    scale_without = ((y[1:] - X[1:] @ without) ** 2).sum() / (59 - 4)
    np.testing.assert_allclose(frame["leverage"][0], 1 - left, rtol=1e-6)
    np.testing.assert_allclose(frame["cooks_distance"][0], ((X @ change) ** 2).sum() / 4 / scale, rtol=1e-4)
    errors = np.sqrt(scale_without * np.diag(np.linalg.inv(X.T @ X)))
    dfbetas = frame[[f"dfbetas_x{j}" for j in range(4)]].iloc[0].to_numpy()
    np.testing.assert_allclose(dfbetas, change / errors, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("solver", SOLVERS, ids=repr)
@pytest.mark.parametrize("size", [1e-2, 1e-3])
def test_removing_the_row_is_the_fit_without_it(size, solver):
    X, y, Xq = sparse_column(size)
    model = LinearRegression(fit_intercept=False).fit(X, y)
    values = uw.explain(model, X, y, solver=solver).of_removing([0], on=(Xq, np.zeros(2))).values[:, 0]
    without = np.linalg.lstsq(X[1:], y[1:], rcond=None)[0]
    np.testing.assert_allclose(values, (Xq @ without) ** 2 - (Xq @ model.coef_) ** 2, rtol=1e-4)


@pytest.mark.parametrize("solver", SOLVERS[:2], ids=repr)
@pytest.mark.parametrize("alpha", [1e-3, 1e-5, 1e-7])
def test_a_group_that_leaves_the_rest_to_a_small_penalty_is_the_refit(alpha, solver):
    X, y = np.random.default_rng(0).normal(size=(12, 4)), np.random.default_rng(1).normal(size=12)
    model, rest = Ridge(alpha, solver="svd").fit(X, y), Ridge(alpha, solver="svd").fit(X[10:], y[10:])
    expected = (rest.predict(X[:2]) - y[:2]) ** 2 - (model.predict(X[:2]) - y[:2]) ** 2
    values = uw.explain(model, X, y, solver=solver).of_removing([np.arange(10)], on=(X[:2], y[:2])).values[:, 0]
    np.testing.assert_allclose(values, expected, rtol=1e-4)
