"""Conjugate gradients on columns that repeat or add up to others: what the data determine, and NaN for the rest."""

from __future__ import annotations

import numpy as np
import pytest
import statsmodels.api as sm
from sklearn.linear_model import HuberRegressor, LinearRegression, LogisticRegression, PoissonRegressor

import upweight as uw
from redundant import FREE, KIND, REDUNDANT, N, Y
from upweight.errors import NotPositiveDefinite, TheoryWarning
from upweight.solvers import CG, Cholesky, Plain, TwoLevel

SOLVERS = {
    "default": CG(rtol=1e-8),
    "plain": CG(1e-8, preconditioner=Plain()),
    "a few rows": CG(1e-8, 1000, TwoLevel(10)),
}
PAIRS = [  # every kind of column, and every way to iterate
    *((columns, SOLVERS["default"]) for columns in REDUNDANT),
    ("a column twice in other units", SOLVERS["plain"]),
    ("a sum of others", SOLVERS["a few rows"]),
]
LOOSE = {"rtol": 1e-5, "atol": 1e-7}


def explained(X, solver, model=None, y=Y):
    return uw.explain((model or LinearRegression()).fit(X, y), X, y, solver=solver)


@pytest.mark.parametrize(("columns", "solver"), PAIRS, ids=str)
def test_the_statisticians_set_is_that_of_statsmodels(columns, solver):
    whole, reduced = REDUNDANT[columns]
    influence = explained(whole, solver)
    with pytest.warns(TheoryWarning, match="DFBETAS of .* are NaN"):
        frame = influence.summary_frame()
    theirs = sm.OLS(Y, sm.add_constant(reduced)).fit().get_influence()
    np.testing.assert_allclose(frame.leverage, theirs.hat_matrix_diag, **LOOSE)
    np.testing.assert_allclose(frame.cooks_distance, theirs.cooks_distance[0], **LOOSE)
    np.testing.assert_allclose(frame.loo_residual, theirs.resid_press, **LOOSE)
    with pytest.warns(TheoryWarning, match="DFBETAS of .* are NaN"):
        exact = explained(whole, Cholesky()).summary_frame()
    np.testing.assert_allclose(frame, exact, **LOOSE)  # NaN where its are
    assert frame.isna().any().any()


@pytest.mark.parametrize(("columns", "solver"), PAIRS, ids=str)
def test_values_are_those_without_the_column_and_single_coefficients_have_none(columns, solver):
    whole, reduced = REDUNDANT[columns]
    ours, plain = explained(whole, solver), explained(reduced, Cholesky())
    for question in (
        lambda influence, X: influence.on_loss(X[:5], Y[:5]).values,
        lambda influence, X: influence.of_removing([[1], [7, 8], range(20, 40)], on=(X[:5], Y[:5])).values,
        lambda influence, _: influence.of_self().values,
    ):
        np.testing.assert_allclose(question(ours, whole), question(plain, reduced), **LOOSE)
    with pytest.warns(TheoryWarning, match="Standard errors of"):
        errors = uw.diagnostics.ij_standard_errors(ours)
    with pytest.warns(TheoryWarning, match="Standard errors of"):
        exact = uw.diagnostics.ij_standard_errors(explained(whole, Cholesky()))
    np.testing.assert_allclose(errors, exact, **LOOSE)
    report = ours.check()
    assert report.ok
    assert "repeat or add up to others" in report.flat
    exact = explained(whole, Cholesky()).check()
    assert report.min_curvature > 0.9 * exact.min_curvature  # an upper bound


@pytest.mark.parametrize("solver", SOLVERS.values(), ids=SOLVERS)
def test_a_query_that_no_row_resembles_has_no_value_and_the_others_have_theirs(solver):
    whole, reduced = REDUNDANT["a column twice in other units"]
    ours, plain = explained(whole, solver), explained(reduced, Cholesky())
    apart = whole[:3].copy()
    apart[1, 3] += 1.0
    with pytest.warns(TheoryWarning, match=r"1 of 3 systems \(first: number 1\).* columns x0, x3 repeat"):
        scores = ours.on_loss(apart, Y[:3])
    assert np.isnan(scores.values[1]).all()
    assert np.flatnonzero(scores.certificate.residual > 1e-6).tolist() == [1]
    np.testing.assert_allclose(scores.values[[0, 2]], plain.on_loss(reduced[[0, 2]], Y[[0, 2]]).values, **LOOSE)
    with pytest.raises(NotPositiveDefinite, match="drop a column and fit again, or fit with a penalty"):
        ours.on_loss(apart[1:2], Y[1:2])


MODELS = {
    "binomial": (LogisticRegression(C=np.inf, tol=1e-10, max_iter=10_000), (Y > 0).astype(int)),
    "three classes": (LogisticRegression(C=np.inf, tol=1e-10, max_iter=10_000), np.digitize(Y, [-0.5, 0.5])),
    "poisson": (PoissonRegressor(alpha=0, solver="newton-cholesky", tol=1e-10), np.floor(np.exp(Y / 2))),
    "huber": (HuberRegressor(alpha=0, tol=1e-10, max_iter=10_000), Y),
}


@pytest.mark.filterwarnings("ignore:The inner solver")  # of scikit-learn's own Newton on a singular system
@pytest.mark.parametrize("name", MODELS)
def test_other_losses_know_the_same_directions_as_cholesky(name):
    model, y = MODELS[name]
    X = REDUNDANT["all levels beside an intercept"][0]
    ours, exact = explained(X, SOLVERS["default"], model, y), explained(X, Cholesky(), model, y)
    np.testing.assert_allclose(*(one.on_loss(X[:5], y[:5]).values for one in (ours, exact)), rtol=1e-4, atol=1e-6)
    assert ours.system.flat.plain.shape == exact.system.flat.plain.shape
    np.testing.assert_allclose(
        *(one.system.flat.plain @ one.system.flat.plain.T for one in (ours, exact)), atol=1e-7
    )  # the same space


@pytest.mark.parametrize("gap", [1e-6, 1e-8, 1e-10])
@pytest.mark.parametrize("beside", [FREE, np.c_[FREE, FREE[:, 1]]], ids=["alone", "beside one that repeats"])
def test_columns_that_nearly_repeat_are_refused(gap, beside):
    noisy = np.c_[beside, FREE[:, 0] + gap * np.random.default_rng(1).normal(size=N)]
    for solver in (*SOLVERS.values(), CG()):
        with pytest.raises(NotPositiveDefinite, match="singular to rounding"):
            explained(noisy, solver).on_loss(noisy[:2], Y[:2])


def test_more_directions_than_probes_are_found_in_the_matrix():
    draw = np.random.default_rng(0)
    X = draw.normal(size=(N, 12)) @ draw.normal(size=(12, 70))
    ours, exact = explained(X, CG(1e-8)), explained(X, Cholesky())
    assert ours.system.flat.plain.shape == (71, 58)
    np.testing.assert_allclose(ours.on_loss(X[:3], Y[:3]).values, exact.on_loss(X[:3], Y[:3]).values, **LOOSE)


def test_a_penalty_on_every_coefficient_costs_no_probe(monkeypatch):
    monkeypatch.setattr("upweight.solvers.cg.probed", lambda *_: pytest.fail("probed"))
    X = REDUNDANT["a column twice"][0]
    penalised = LogisticRegression(C=1.0, tol=1e-8)
    assert explained(X, CG(), penalised, KIND % 2).system.flat is None
