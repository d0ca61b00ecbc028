"""A loss that falls for ever has no minimum, however small its gradient: `Newton` says so, and takes none for it."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.linear_model import LinearRegression, LogisticRegression, PoissonRegressor

import upweight as uw
from redundant import FREE, KIND, REDUNDANT, N, Y
from upweight.errors import NotConverged, TheoryWarning

FREELY = {"C": np.inf, "tol": 1e-10, "max_iter": 10_000}
ODD = int(FREE[:, 0].argmax())
SIDE = (FREE[:, 0] > 0).astype(int)
SIDE[ODD] = 0  # without this row the classes are separable


def weights(*without):
    return (~np.isin(np.arange(N), without)).astype(float)


@pytest.mark.parametrize("y", [SIDE, np.where((FREE[:, 0] < 0) & (KIND == 1), 2, SIDE)], ids=["two", "three"])
def test_separable_classes(y):
    influence = uw.explain(LogisticRegression(**FREELY).fit(FREE, y), FREE, y)
    with pytest.raises(NotConverged, match=r"there is no minimum.*Fit with a penalty"):
        uw.Newton().bind(influence)(weights(ODD))
    with pytest.warns(TheoryWarning, match="there is no minimum"):
        actual = uw.leave_one_out(influence, (FREE[:2], y[:2]), [ODD, 1]).actual
    assert np.isnan(actual).tolist() == [[True, False]] * 2


def test_one_row_of_weight_keeps_a_minimum():
    """Far away, with a small gradient on the way, and yet a minimum: the same as scikit-learn's."""
    light = np.where(np.arange(N) == ODD, 1e-3, 1.0)
    influence = uw.explain(LogisticRegression(**FREELY).fit(FREE, SIDE), FREE, SIDE)
    theta = uw.Newton().bind(influence)(light)
    again = LogisticRegression(C=np.inf, solver="newton-cholesky", tol=1e-12).fit(FREE, SIDE, sample_weight=light)
    np.testing.assert_allclose(theta[:3], again.coef_[0], rtol=1e-4)
    assert abs(theta[0]) > 2 * abs(float(influence.objective.theta[0]))


def test_a_level_without_a_count():
    X, y = np.eye(4)[KIND], np.random.default_rng(0).poisson(2.0, N).astype(float)
    some = np.flatnonzero((KIND == 2) & (y > 0))
    model = PoissonRegressor(alpha=0, fit_intercept=False, solver="newton-cholesky", tol=1e-10).fit(X, y)
    with pytest.raises(NotConverged, match="a level has only one outcome"):
        uw.Newton().bind(uw.explain(model, X, y))(weights(*some))


@pytest.mark.parametrize("columns", REDUNDANT)
def test_columns_that_repeat_have_a_minimum(columns):
    X = REDUNDANT[columns][0]
    influence = uw.explain(LinearRegression().fit(X, Y), X, Y)
    theta = uw.Newton().bind(influence)(weights(3, 4)).numpy()
    again = LinearRegression().fit(np.delete(X, [3, 4], 0), np.delete(Y, [3, 4]))
    np.testing.assert_allclose(X @ theta[:-1] + theta[-1], again.predict(X), atol=1e-8)
