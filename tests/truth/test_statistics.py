"""The statistician's set against statsmodels (unpenalised), against NumPy and against real refits (penalised)."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import statsmodels.api as sm
import torch
from sklearn.base import clone
from sklearn.datasets import load_breast_cancer, load_diabetes
from sklearn.linear_model import (
    GammaRegressor,
    LinearRegression,
    LogisticRegression,
    PoissonRegressor,
    Ridge,
    TweedieRegressor,
)
from statsmodels.stats.outliers_influence import OLSInfluence

import upweight as uw
from upweight import diagnostics
from upweight.influence import newton_step

GOLDEN = 1e-8


def near(ours, theirs, tolerance=GOLDEN):
    ours, theirs = np.asarray(ours), np.asarray(theirs)
    assert ours.shape == theirs.shape
    assert np.abs(ours - theirs).max() <= tolerance * np.abs(theirs).max()


def dfbetas(frame):
    return frame.filter(like="dfbetas_").to_numpy()


def weights(n, seed=0):
    return np.random.default_rng(seed).uniform(0.3, 3, n)


def with_ones(X):
    return np.column_stack([X, np.ones(len(X))])


def glm(loss, theta, X, y, w=None, **settings):
    """The Influence of a generalised linear model with an intercept, at parameters that something else has fitted."""
    d = X.shape[1]
    theta = torch.tensor(np.asarray(theta, dtype=np.float64))

    def of_example(params, example):
        return loss(params["coef"] @ example[0] + params["intercept"], example[1])

    objective = uw.Objective(
        of_example, {"coef": theta[None, :d], "intercept": theta[d:]}, linear=uw.Linear(loss, 1, d, True), **settings
    )
    return uw.Influence(objective, uw.Examples(X, y, sample_weight=w))


# ---- least squares -------------------------------------------------------------------------------


def check_least_squares(X, y, w):
    """All columns against OLSInfluence; with weights on √w X, √w y, which is what WLS is."""
    frame = uw.explain(LinearRegression().fit(X, y, sample_weight=w), X, y, sample_weight=w).summary_frame()
    root = np.ones(len(y)) if w is None else np.sqrt(w)
    fit = sm.OLS(root * y, root[:, None] * with_ones(X)).fit()
    theirs = OLSInfluence(fit)
    near(frame["leverage"], theirs.hat_matrix_diag)
    near(frame["cooks_distance"], theirs.cooks_distance[0])
    near(frame["studentized_residual"], theirs.resid_studentized_external)
    near(frame["dffits"], theirs.dffits[0])
    near(dfbetas(frame), theirs.dfbetas)
    near(frame["loo_residual"], theirs.resid_press / root)
    return frame


@pytest.mark.parametrize("w", [None, weights(442)], ids=["ols", "wls"])
def test_diabetes_is_golden(w):
    X, y = load_diabetes(return_X_y=True)
    frame = check_least_squares(X, y, w)
    assert frame["leverage"].sum() == pytest.approx(11, abs=1e-9)


@pytest.mark.data
@pytest.mark.parametrize("weighted", [False, True])
def test_concrete_is_golden(weighted):
    folder = uw.datasets.local("tabular")
    if folder is None:
        pytest.skip("no UPWEIGHT_DATA/tabular")
    sheet = pytest.importorskip("xlrd", reason="reading .xls needs xlrd").open_workbook(folder / "Concrete_Data.xls")[0]
    data = np.array([sheet.row_values(row) for row in range(1, sheet.nrows)], dtype=float)
    check_least_squares(data[:, :8], data[:, 8], weights(len(data)) if weighted else None)


def test_weights_are_those_of_statsmodels_wls():
    """WLS itself knows residuals and leverages; its OLSInfluence does not know the weights."""
    X, y = load_diabetes(return_X_y=True)
    w = weights(442)
    influence = uw.explain(LinearRegression().fit(X, y, sample_weight=w), X, y, sample_weight=w)
    frame = influence.summary_frame()
    gaussian = sm.GLM(y, with_ones(X), var_weights=w).fit().get_influence()
    near(frame["leverage"], gaussian.hat_matrix_diag)
    near(frame["cooks_distance"], gaussian.cooks_distance[0])
    residuals = sm.WLS(y, with_ones(X), weights=w).fit().resid
    near(frame["loo_residual"] * (1 - frame["leverage"]), residuals)
    near(diagnostics.ij_standard_errors(influence), sm.WLS(y, with_ones(X), weights=w).fit(cov_type="HC0").bse)


def test_the_published_numbers_of_stack_loss():
    """Cook (1979), Technometrics 21, and R's influence.measures(lm(stack.loss ~ .)): runs 1, 3, 4 and 21."""
    data = sm.datasets.stackloss.load_pandas()
    frame = uw.explain(LinearRegression().fit(data.exog, data.endog), data.exog, data.endog).summary_frame()
    rows = [0, 2, 3, 20]
    assert frame.loc[rows, "leverage"].round(3).tolist() == [0.302, 0.175, 0.129, 0.285]
    assert frame.loc[rows, "cooks_distance"].round(3).tolist() == [0.154, 0.126, 0.131, 0.692]
    assert frame.loc[rows, "studentized_residual"].round(2).tolist() == [1.21, 1.62, 2.05, -3.33]
    assert frame.loc[rows, "dffits"].round(3).tolist() == [0.795, 0.744, 0.788, -2.100]


# ---- ridge: real refits --------------------------------------------------------------------------


@pytest.mark.parametrize("intercept", [True, False])
@pytest.mark.parametrize("folded", [False, True], ids=["fixed penalty", "penalty per example"])
@pytest.mark.parametrize("w", [None, weights(30)], ids=["", "weighted"])
def test_ridge_is_exact_against_refits(w, folded, intercept):
    """Every column by fitting again without the row; with penalty_per_example α shrinks by the row's share."""
    X, y = (part[:30] for part in load_diabetes(return_X_y=True))
    X, alpha, n = 20 * X[:, :4], 3.0, 30
    if w is not None:
        w = np.where(np.arange(n) == 7, 0, w)  # a row that was not there
    ones = np.ones(n) if w is None else w
    model = Ridge(alpha=alpha, fit_intercept=intercept).fit(X, y, sample_weight=w)
    frame = uw.explain(model, X, y, sample_weight=w, penalty_per_example=folded).summary_frame()
    D = with_ones(X) if intercept else X
    P = np.diag([1.0] * 4 + [0.0] * intercept)

    def fit(v, a):
        """θ̂, M⁻¹, residual variance of a refit with weights v."""
        inverse = np.linalg.inv(D.T @ (v[:, None] * D) + a * P)
        theta = inverse @ D.T @ (v * y)
        df = np.count_nonzero(v) - np.trace(inverse @ D.T @ (v[:, None] * D))
        return theta, inverse, v @ (y - D @ theta) ** 2 / df

    theta, inverse, variance = fit(ones, alpha)
    h = ones * np.einsum("ij,jk,ik->i", D, inverse, D)
    near(frame["leverage"], h, 1e-10)
    assert frame["leverage"].sum() == pytest.approx(np.trace(inverse @ D.T @ (ones[:, None] * D)), abs=1e-9)
    e = y - D @ theta
    near(frame["cooks_distance"], ones * e**2 * h / (variance * h.sum() * (1 - h) ** 2), 1e-10)
    expected = []
    for i in range(n):
        v = np.where(np.arange(n) == i, 0, ones)
        without, _, s2 = fit(v, alpha * (1 - ones[i] / ones.sum()) if folded else alpha)
        change = theta - without
        expected.append(
            [
                y[i] - D[i] @ without,
                np.sqrt(ones[i] / s2 / (1 - h[i])) * e[i],
                D[i] @ change / np.sqrt(s2 * D[i] @ inverse @ D[i]),
                *(change / np.sqrt(s2 * np.diag(inverse))),
            ]
        )
    ours = np.column_stack([frame[["loo_residual", "studentized_residual", "dffits"]], dfbetas(frame)])
    near(ours, expected, 1e-10)


def test_leave_one_out_residuals_are_those_of_sklearn_refits():
    X, y = (part[:60] for part in load_diabetes(return_X_y=True))
    model = Ridge(alpha=0.1, solver="cholesky")
    frame = uw.explain(model.fit(X, y), X, y).summary_frame()
    refits = [
        y[i] - Ridge(alpha=0.1, solver="cholesky").fit(np.delete(X, i, 0), np.delete(y, i)).predict(X[i : i + 1])[0]
        for i in range(60)
    ]
    near(frame["loo_residual"], refits)


# ---- generalised linear models -------------------------------------------------------------------


def counts():
    X, y = load_diabetes(return_X_y=True)
    return X[:, :6] * 20, y


def shifted():
    """Targets within a factor two of their means, where every one of these losses is convex."""
    X, y = counts()
    return X, y + 400


def malignant():
    X, y = load_breast_cancer(return_X_y=True)
    X = X[:, [1, 4, 8, 9, 14]]
    return (X - X.mean(0)) / X.std(0), y.astype(float)


GLMS = {
    "logistic": (uw.losses.logistic, malignant, sm.families.Binomial()),
    "poisson": (uw.losses.poisson, counts, sm.families.Poisson()),
    "gamma": (uw.losses.gamma, counts, sm.families.Gamma(sm.families.links.Log())),
    "tweedie": (uw.losses.tweedie(1.51234567), counts, sm.families.Tweedie(var_power=1.51234567)),
    "poisson by power": (uw.losses.tweedie(1), counts, sm.families.Poisson()),
    "gamma by power": (uw.losses.tweedie(2), counts, sm.families.Gamma(sm.families.links.Log())),
    "gaussian, log link": (uw.losses.tweedie(0), shifted, sm.families.Gaussian(sm.families.links.Log())),
    "inverse gaussian": (uw.losses.tweedie(3), shifted, sm.families.InverseGaussian(sm.families.links.Log())),
    "poisson, identity": (uw.losses.tweedie(1, "identity"), counts, sm.families.Poisson(sm.families.links.Identity())),
}


@pytest.mark.filterwarnings("ignore:The Identity link:statsmodels.tools.sm_exceptions.DomainWarning")
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("name", GLMS)
def test_glms_are_golden(name, weighted):
    """All columns against GLMInfluence, whose weights are var_weights; standard errors against HC0."""
    loss, data, family = GLMS[name]
    X, y = data()
    w = weights(len(y)) if weighted else None
    model = sm.GLM(y, with_ones(X), family=family, var_weights=w)
    fit = model.fit(tol=1e-14, maxiter=200)
    theirs = fit.get_influence()
    influence = glm(loss, fit.params, X, y, w)
    near(diagnostics.ij_standard_errors(influence), model.fit(tol=1e-14, maxiter=200, cov_type="HC0").bse)
    frame = influence.summary_frame()
    near(frame["leverage"], theirs.hat_matrix_diag)
    near(frame["cooks_distance"], theirs.cooks_distance[0])
    near(frame["studentized_residual"], theirs.resid_studentized)
    near(frame["dffits"], theirs.d_fittedvalues_scaled)
    near(dfbetas(frame), theirs.dfbetas)
    assert frame["leverage"].sum() == pytest.approx(X.shape[1] + 1, abs=1e-8)
    assert frame["loo_residual"].isna().all()


def test_sklearn_logistic_regression_is_statsmodels_logit():
    X, y = malignant()
    model = LogisticRegression(C=np.inf, tol=1e-12, solver="newton-cholesky").fit(X, y)
    influence = uw.explain(model, X, y)
    frame = influence.summary_frame()
    fit = sm.Logit(y, with_ones(X)).fit(disp=0, tol=1e-14)
    theirs = fit.get_influence()  # MLEInfluence, the general definition, which agrees for canonical links
    near(frame["leverage"], theirs.hat_matrix_diag)
    near(frame["cooks_distance"], theirs.cooks_distance[0])
    near(frame["studentized_residual"], theirs.resid_studentized)
    near(dfbetas(frame), theirs.dfbetas)
    robust = sm.Logit(y, with_ones(X)).fit(disp=0, tol=1e-14, cov_type="HC0")
    near(diagnostics.ij_standard_errors(influence), robust.bse)


@pytest.mark.parametrize(
    ("estimator", "family"),
    [
        (PoissonRegressor, sm.families.Poisson()),
        (GammaRegressor, sm.families.Gamma(sm.families.links.Log())),
        (partial(TweedieRegressor, power=0, link="identity"), None),
    ],
    ids=["poisson", "gamma", "gaussian"],
)
def test_sklearn_generalised_linear_models_are_statsmodels(estimator, family):
    """sample_weight is var_weights, although scikit-learn divides by its sum; power 0 is least squares."""
    X, y = counts()
    w = 7 * weights(len(y))
    model = estimator(alpha=0, tol=1e-12, max_iter=1000, solver="newton-cholesky").fit(X, y, sample_weight=w)
    influence = uw.explain(model, X, y, sample_weight=w)
    frame = influence.summary_frame()
    if family is None:
        expected = uw.explain(LinearRegression().fit(X, y, sample_weight=w), X, y, sample_weight=w).summary_frame()
        near(frame, expected)
        return
    theirs = sm.GLM(y, with_ones(X), family=family, var_weights=w).fit(tol=1e-14, maxiter=200).get_influence()
    near(frame["leverage"], theirs.hat_matrix_diag)
    near(frame["cooks_distance"], theirs.cooks_distance[0])
    near(frame["studentized_residual"], theirs.resid_studentized)
    near(frame["dffits"], theirs.d_fittedvalues_scaled)
    near(dfbetas(frame), theirs.dfbetas)


def test_penalised_poisson_follows_the_newton_step_of_its_own_objective():
    """PoissonRegressor's α is a penalty on the mean loss, so a removed row takes its share along."""
    X, y = counts()
    model = PoissonRegressor(alpha=0.1, tol=1e-12, max_iter=1000, solver="newton-cholesky").fit(X, y)
    frame, D = uw.explain(model, X, y).summary_frame(), with_ones(X)
    inverse = np.linalg.inv(D.T @ (model.predict(X)[:, None] * D) + 442 * 0.1 * np.diag([1.0] * 6 + [0.0]))
    moved = []
    for row in range(5):
        refit = clone(model).fit(np.delete(X, row, 0), np.delete(y, row))
        moved.append(np.append(model.coef_ - refit.coef_, model.intercept_ - refit.intercept_))
    near(dfbetas(frame)[:5], np.array(moved) / np.sqrt(np.diag(inverse)), 0.05)


@pytest.mark.data
def test_adult_is_golden():
    folder = uw.datasets.local("tabular")
    if folder is None:
        pytest.skip("no UPWEIGHT_DATA/tabular")
    import pandas as pd

    data = pd.read_csv(folder / "adult.data.gz", skipinitialspace=True)
    X = data[["age", "education-num", "hours-per-week", "capital-loss"]]
    y = (data["Y"] == ">50K").to_numpy()
    model = LogisticRegression(C=np.inf, tol=1e-12, solver="newton-cholesky").fit(X, y)
    frame = uw.explain(model, X, y).summary_frame()
    theirs = sm.GLM(y.astype(float), with_ones(X), family=sm.families.Binomial()).fit(tol=1e-14).get_influence()
    near(frame["leverage"], theirs.hat_matrix_diag)
    near(frame["cooks_distance"], theirs.cooks_distance[0])
    near(frame["studentized_residual"], theirs.resid_studentized)
    near(dfbetas(frame), theirs.dfbetas)
    assert list(frame.columns[4:6]) == ["dfbetas_age", "dfbetas_education-num"]


@pytest.mark.parametrize("folded", [False, True], ids=["fixed penalty", "penalty per example"])
def test_penalised_logistic_regression_follows_its_formulas(folded):
    """M = Σ wᵢpᵢ(1 − pᵢ)x̃x̃ᵀ + I/C by NumPy; the move of θ̂ is the Newton step of `of_removing`, another route to it."""
    X, y = malignant()
    X, y, w = X[:80], y[:80], weights(80)
    model = LogisticRegression(C=0.5, tol=1e-12, solver="newton-cholesky").fit(X, y, sample_weight=w)
    influence = uw.explain(model, X, y, sample_weight=w, penalty_per_example=folded)
    frame = influence.summary_frame()
    D, p = with_ones(X), model.predict_proba(X)[:, 1]
    v = w * p * (1 - p)
    inverse = np.linalg.inv(D.T @ (v[:, None] * D) + 2 * np.diag([1.0] * 5 + [0.0]))
    h = v * np.einsum("ij,jk,ik->i", D, inverse, D)
    r = np.sqrt(w / (p * (1 - p) * (1 - h))) * (y - p)
    near(frame["leverage"], h, 1e-9)
    near(diagnostics.leverage(influence), h, 1e-9)
    near(frame["studentized_residual"], r, 1e-9)
    near(frame["cooks_distance"], r**2 * h / (1 - h) / h.sum(), 1e-9)
    step = newton_step.newton_steps(influence.system, [np.array([row]) for row in range(80)]).theta_change.numpy()
    near(dfbetas(frame), -step / np.sqrt(np.diag(inverse)), 1e-6 if folded else 1e-8)
    near(frame["dffits"], -(D * step).sum(1) / np.sqrt(h / v), 1e-6 if folded else 1e-8)


def test_one_step_dfbetas_are_near_real_refits():
    X, y = malignant()
    model = LogisticRegression(C=1.0, tol=1e-12, solver="newton-cholesky").fit(X, y)
    frame = uw.explain(model, X, y).summary_frame()
    most = frame["cooks_distance"].nlargest(20).index
    D, p = with_ones(X), model.predict_proba(X)[:, 1]
    inverse = np.linalg.inv(D.T @ ((p * (1 - p))[:, None] * D) + np.diag([1.0] * 5 + [0.0]))
    ours = dfbetas(frame)[most] * np.sqrt(np.diag(inverse))
    actual = []
    for row in most:
        refit = clone(model).fit(np.delete(X, row, 0), np.delete(y, row))
        actual.append(np.append(model.coef_ - refit.coef_, model.intercept_ - refit.intercept_))
    actual = np.array(actual)
    slope = np.sum(ours * actual) / np.sum(ours * ours)
    assert np.corrcoef(ours.ravel(), actual.ravel())[0, 1] > 0.995
    assert 0.9 < slope < 1.1


def test_rows_where_the_loss_is_concave_are_nan_and_named():
    """Gaussian with a log link has φ″ ∝ μ(2μ − y): statsmodels fails as a whole, these rows alone are left out here."""
    X, y = counts()
    fit = sm.GLM(y, with_ones(X), family=sm.families.Gaussian(sm.families.links.Log())).fit(tol=1e-14, maxiter=200)
    mu = fit.mu
    concave = y > 2 * mu
    assert 0 < concave.sum() < 20
    influence = glm(uw.losses.tweedie(0), fit.params, X, y)
    with pytest.warns(uw.errors.TheoryWarning, match=f"{concave.sum()} rows .* have φ″ < 0"):
        frame = influence.summary_frame()
    v = mu * (2 * mu - y)
    D = with_ones(X)
    inverse = np.linalg.inv(D.T @ (v[:, None] * D))
    h = v * np.einsum("ij,jk,ik->i", D, inverse, D)
    near(frame["leverage"], h)
    scale = np.sum((y - mu) ** 2) / (len(y) - h.sum())
    assert frame.loc[concave, frame.columns != "leverage"].isna().all(axis=None)
    near(frame.loc[~concave, "studentized_residual"], ((y - mu) / np.sqrt(scale * (1 - h)))[~concave])
