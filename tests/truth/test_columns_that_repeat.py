"""Columns that repeat or add up to others: what the data determine is given, as by the same fit without the column."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import statsmodels.api as sm
from sklearn.linear_model import (
    GammaRegressor,
    HuberRegressor,
    LinearRegression,
    LogisticRegression,
    PoissonRegressor,
    Ridge,
)

import upweight as uw
from redundant import FREE, REDUNDANT, N, Y
from upweight.errors import NotConverged, NotPositiveDefinite, TheoryWarning, Undefined

TIGHT = {"tol": 1e-12, "max_iter": 100_000}
MODELS = {
    "LinearRegression": (LinearRegression, {}, Y),
    "Ridge, alpha=0": (Ridge, {"alpha": 0.0}, Y),
    "LogisticRegression": (LogisticRegression, {"C": np.inf, **TIGHT}, (Y > 0).astype(int)),
    "LogisticRegression of three": (LogisticRegression, {"C": np.inf, **TIGHT}, np.digitize(Y, [-0.5, 0.5])),
    "PoissonRegressor": (PoissonRegressor, {"alpha": 0, "solver": "newton-cholesky", **TIGHT}, np.floor(np.exp(Y / 2))),
    "GammaRegressor": (GammaRegressor, {"alpha": 0, "solver": "newton-cholesky", **TIGHT}, np.exp(Y / 2)),
    "HuberRegressor": (HuberRegressor, {"alpha": 0.0, "tol": 1e-10, "max_iter": 10_000}, Y),
}


def explained(name, X):
    kind, settings, y = MODELS[name]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # singular systems of scikit-learn's own Newton
        model = kind(**settings).fit(X, y)
    return uw.explain(model, X, y), y


@pytest.mark.parametrize("columns", REDUNDANT)
@pytest.mark.parametrize("model", ["LinearRegression", "LogisticRegression"])
def test_values_are_those_without_the_column(model, columns):
    whole, reduced = REDUNDANT[columns]
    (ours, y), (plain, _) = explained(model, whole), explained(model, reduced)
    for question in (
        lambda influence, X: influence.on_loss(X[:5], y[:5]).values,
        lambda influence, X: influence.of_removing([[1], [7, 8], range(20, 40)], on=(X[:5], y[:5])).values,
        lambda influence, X: uw.leave_one_out(influence, (X[:5], y[:5]), [3, 4]).actual,
        lambda influence, _: influence.of_self().values,
    ):
        np.testing.assert_allclose(question(ours, whole), question(plain, reduced), rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("model", MODELS)
def test_every_loss_without_a_penalty(model):
    whole, reduced = REDUNDANT["all levels beside an intercept"]
    (ours, y), (plain, _) = explained(model, whole), explained(model, reduced)
    values, expected = (influence.on_loss(X[:5], y[:5]).values for influence, X in ((ours, whole), (plain, reduced)))
    np.testing.assert_allclose(values, expected, rtol=1e-3, atol=2e-5)
    assert np.abs(expected).max() > 1e-4


@pytest.mark.parametrize("columns", REDUNDANT)
def test_the_statisticians_set_is_that_of_statsmodels(columns):
    whole, reduced = REDUNDANT[columns]
    influence, y = explained("LinearRegression", whole)
    with pytest.warns(TheoryWarning, match="DFBETAS of .* are NaN"):
        frame = influence.summary_frame()
    theirs = sm.OLS(y, sm.add_constant(reduced)).fit().get_influence()
    np.testing.assert_allclose(frame.leverage, theirs.hat_matrix_diag, rtol=1e-8)
    np.testing.assert_allclose(frame.cooks_distance, theirs.cooks_distance[0], rtol=1e-8)
    np.testing.assert_allclose(frame.studentized_residual, theirs.resid_studentized_external, rtol=1e-8)
    np.testing.assert_allclose(frame.dffits, theirs.dffits[0], rtol=1e-7)
    np.testing.assert_allclose(frame.loo_residual, theirs.resid_press, rtol=1e-8)


def test_dfbetas_are_there_for_columns_that_are_determined_and_the_others_are_named():
    whole, reduced = REDUNDANT["all levels beside an intercept"]
    influence, y = explained("LinearRegression", whole)
    with pytest.warns(TheoryWarning, match=r"x3, x4, x5, x6, intercept are NaN"):
        frame = influence.summary_frame()
    theirs = sm.OLS(y, sm.add_constant(reduced)).fit().get_influence().dfbetas
    np.testing.assert_allclose(frame[["dfbetas_x0", "dfbetas_x1", "dfbetas_x2"]], theirs[:, 1:4], rtol=1e-7)
    assert frame[[f"dfbetas_x{j}" for j in range(3, 7)] + ["dfbetas_intercept"]].isna().all().all()
    with pytest.warns(TheoryWarning, match="Standard errors of x3"):
        errors = uw.diagnostics.ij_standard_errors(influence)
    assert np.isnan(errors).tolist() == [False] * 3 + [True] * 5


def test_a_query_that_no_row_resembles_has_no_value_and_the_others_have_theirs():
    whole, reduced = REDUNDANT["a column twice"]
    (influence, y), (plain, _) = explained("LinearRegression", whole), explained("LinearRegression", reduced)
    apart = whole[:3].copy()
    apart[1, 3] += 1.0
    with pytest.warns(TheoryWarning, match=r"1 of 3 systems \(first: number 1\).* columns x0, x3 repeat"):
        values = influence.on_loss(apart, y[:3]).values
    assert np.isnan(values[1]).all()
    np.testing.assert_allclose(values[[0, 2]], plain.on_loss(reduced[[0, 2]], y[[0, 2]]).values, rtol=1e-8)
    with pytest.warns(TheoryWarning, match="1 of 3 systems"):
        removed = influence.of_removing([4, 5], on=(apart, y[:3])).values
    assert np.isnan(removed).tolist() == [[False] * 2, [True] * 2, [False] * 2]
    with pytest.raises(NotPositiveDefinite, match="drop a column and fit again, or fit with a penalty"):
        influence.on_loss(apart[1:2], y[1:2])
    # what it says to type
    assert np.isfinite(plain.on_loss(apart[1:2, :3], y[1:2]).values).all()
    assert np.isfinite(uw.explain(Ridge(0.1).fit(whole, y), whole, y).on_loss(apart[1:2], y[1:2]).values).all()


def test_check_says_which_columns():
    influence, _ = explained("LinearRegression", REDUNDANT["a column twice"][0])
    report = influence.check()
    assert report.ok
    assert "the columns x0, x3 repeat or add up to others" in str(report)


@pytest.mark.parametrize("gap", [1e-8, 1e-10])
def test_columns_that_nearly_repeat_are_refused_and_never_taken_for_the_same(gap):
    noisy = np.c_[FREE, FREE[:, 0] + gap * np.random.default_rng(1).normal(size=N)]
    influence, y = explained("LinearRegression", noisy)
    with pytest.raises(NotPositiveDefinite, match="singular to rounding"):
        influence.on_loss(noisy[:2], y[:2])


def test_the_only_row_of_a_class_has_no_removal():
    X, y = FREE, (FREE[:, 0] > 0).astype(int)
    y[7] = 2
    influence = uw.explain(LogisticRegression(**TIGHT).fit(X, y), X, y)
    with pytest.warns(TheoryWarning, match="no row of class 2 is left"):
        values = influence.of_removing([6, 7, 8], on=(X[:2], y[:2])).values
    assert np.isnan(values[:, 1]).all()
    np.testing.assert_array_equal(values[:, [0, 2]], influence.of_removing([6, 8], on=(X[:2], y[:2])).values)
    with pytest.raises(Undefined, match="no row of class 2 is left"):
        influence.of_removing([7], on=(X[:2], y[:2]))
    for retrain in (None, uw.Refit()):
        with pytest.warns(TheoryWarning, match="no row of class 2 is left"):
            outcomes = uw.leave_one_out(influence, (X[:2], y[:2]), [6, 7, 8], retrain)
        assert np.isnan(outcomes.actual).tolist() == [[False, True, False]] * 2
    merged = np.where(y == 2, 1, y)  # what it says to do
    again = uw.explain(LogisticRegression(**TIGHT).fit(X, merged), X, merged)
    assert np.isfinite(again.of_removing([7], on=(X[:2], merged[:2])).values).all()


def test_leave_one_out_goes_on_where_one_training_fails():
    X = np.c_[FREE[:12, :1], np.eye(12)[:, -1]]
    y = FREE[:12, 1]
    influence = uw.explain(LinearRegression().fit(X, y), X, y)
    values = influence.of_removing([0, 1], on=(X[:1], y[:1])).values
    np.testing.assert_allclose(values, uw.leave_one_out(influence, (X[:1], y[:1]), [0, 1]).actual, rtol=1e-6)

    def fails_without_row_1(weights, _seed):
        if weights[1] == 0:
            message = "no minimum"
            raise NotConverged(message)
        return uw.Refit().bind(influence)(weights)

    with pytest.warns(TheoryWarning, match=r"Training without 1 of 2 rows \(first: \[1\]\).*no minimum"):
        actual = uw.leave_one_out(influence, (X[:1], y[:1]), [0, 1], fails_without_row_1).actual
    np.testing.assert_allclose(actual[0, 0], values[0, 0], rtol=1e-6)
    assert np.isnan(actual[0, 1])
    with pytest.raises(NotConverged, match="no minimum"):
        uw.leave_one_out(influence, (X[:1], y[:1]), [1], fails_without_row_1)
