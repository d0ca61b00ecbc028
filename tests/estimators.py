"""Estimators for the law-book: textbook formulas of their losses, and scikit-learn itself as the oracle of refits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
from scipy.special import logsumexp
from sklearn.base import clone
from sklearn.kernel_ridge import KernelRidge
from sklearn.linear_model import (
    ElasticNet,
    ElasticNetCV,
    GammaRegressor,
    HuberRegressor,
    Lasso,
    LassoCV,
    LinearRegression,
    LogisticRegression,
    LogisticRegressionCV,
    PoissonRegressor,
    Ridge,
    RidgeClassifier,
    RidgeClassifierCV,
    RidgeCV,
    TweedieRegressor,
)
from sklearn.svm import LinearSVC, LinearSVR

import upweight as uw

N, D, QUERIES, ROWS = 60, 3, 4, [0, 17, 41]
TIGHT = {"tol": 1e-12, "max_iter": 20_000}
EXACT = {"tol": 1e-13, "max_iter": 200_000}


# ---- losses by their textbook formulas, from what scikit-learn itself predicts -----------------------------------


def numbered(model, y):
    return np.searchsorted(model.classes_, y)


def logistic(model, X, y):
    eta, number = model.decision_function(X), numbered(model, y)
    if eta.ndim == 1:
        return np.logaddexp(0, -(2 * number - 1) * eta)
    return logsumexp(eta, axis=1) - eta[np.arange(len(y)), number]


def signed_squares(model, X, y):
    eta, number = model.decision_function(X), numbered(model, y)
    target = 2 * number - 1 if eta.ndim == 1 else np.where(number[:, None] == np.arange(eta.shape[1]), 1, -1)
    return ((eta - target) ** 2).reshape(len(y), -1).sum(1)


def squares(model, X, y):
    return ((model.predict(X) - y) ** 2).reshape(len(y), -1).sum(1)


def hinge(model, X, y):
    return np.maximum(0, 1 - (2 * numbered(model, y) - 1) * model.decision_function(X))


def squared_hinge(model, X, y):
    return hinge(model, X, y) ** 2


def tube(model, X, y):
    return np.maximum(0, np.abs(y - model.predict(X)) - model.epsilon)


def squared_tube(model, X, y):
    return tube(model, X, y) ** 2


def poisson(model, X, y):
    mean = model.predict(X)
    return mean - y * np.log(mean)


def gamma(model, X, y):
    mean = model.predict(X)
    return np.log(mean) + y / mean


def tweedie(model, X, y):
    mean, p = model.predict(X), model.power
    return mean ** (2 - p) / (2 - p) - y * mean ** (1 - p) / (1 - p)


def robust(model, X, y):
    z = np.abs(y - model.predict(X)) / model.scale_
    bent = np.where(z <= model.epsilon, z**2, 2 * model.epsilon * z - model.epsilon**2)
    return model.scale_ * (1 + bent)


# ---- the table ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """One estimator: how it is built, what its labels are, its loss, and the class weights that a refit holds fixed.

    `mean` says that sample weights are normalised, so that a row of weight 0 takes its share of the penalty along.
    `step` is how far weights move in a stencil, for losses whose curvature jumps.
    """

    build: Callable
    task: str
    loss: Callable
    settings: dict = field(default_factory=dict)
    class_weight: dict | None = None
    rtol: float = 1e-4
    mean: bool = False
    step: float = 0.05

    def estimator(self):
        extra = {"class_weight": self.class_weight} if self.class_weight else {}
        return self.build(**self.settings, **extra)


THREE_WEIGHTS = {"a": 2.0, "b": 0.3, "c": 1.0}
NEW_CV = {"Cs": 3, "cv": 3, "scoring": "accuracy"}
if "use_legacy_attributes" in LogisticRegressionCV().get_params():  # since 1.8
    NEW_CV |= {"use_legacy_attributes": False, "l1_ratios": (0.0,)}

ESTIMATORS = {
    "logistic": Row(LogisticRegression, "binary", logistic, {"C": 0.7} | TIGHT),
    "logistic newton-cholesky": Row(LogisticRegression, "binary", logistic, {"solver": "newton-cholesky"} | TIGHT),
    "logistic liblinear": Row(
        LogisticRegression, "binary", logistic, {"solver": "liblinear", "intercept_scaling": 2.0} | TIGHT
    ),
    "logistic without intercept": Row(LogisticRegression, "binary", logistic, {"fit_intercept": False} | TIGHT),
    "logistic without penalty": Row(LogisticRegression, "binary", logistic, {"C": np.inf} | TIGHT),
    "logistic with class weights": Row(LogisticRegression, "binary", logistic, TIGHT, {"no": 3.0, "yes": 0.5}),
    "logistic cv": Row(LogisticRegressionCV, "binary", logistic, NEW_CV | TIGHT, {"no": 3.0, "yes": 0.5}),
    "multinomial": Row(LogisticRegression, "three", logistic, {"C": 0.7} | TIGHT),
    "multinomial without penalty": Row(LogisticRegression, "three", logistic, {"C": np.inf} | TIGHT),
    "multinomial without intercept": Row(LogisticRegression, "three", logistic, {"fit_intercept": False} | TIGHT),
    "multinomial with class weights": Row(LogisticRegression, "three", logistic, TIGHT, THREE_WEIGHTS),
    "multinomial cv": Row(LogisticRegressionCV, "three", logistic, NEW_CV | TIGHT),
    "linear regression": Row(LinearRegression, "number", squares),
    "linear regression without intercept": Row(LinearRegression, "number", squares, {"fit_intercept": False}),
    "linear regression with two outputs": Row(LinearRegression, "numbers", squares),
    "ridge": Row(Ridge, "number", squares, {"alpha": 3.0}, rtol=1e-6),
    "ridge with a penalty per output": Row(Ridge, "numbers", squares, {"alpha": np.array([0.5, 7.0])}),
    "ridge cv": Row(RidgeCV, "number", squares, {"alphas": (0.5, 5.0)}),
    "ridge classifier": Row(RidgeClassifier, "binary", signed_squares, {"alpha": 2.0}),
    "ridge classifier of three": Row(RidgeClassifier, "three", signed_squares, {"alpha": 2.0}, THREE_WEIGHTS),
    "ridge classifier cv": Row(RidgeClassifierCV, "binary", signed_squares, {}, {"no": 3.0, "yes": 0.5}),
    "lasso": Row(Lasso, "number", squares, {"alpha": 0.4} | EXACT, mean=True),
    "lasso cv": Row(LassoCV, "number", squares, {"cv": 3} | EXACT, mean=True),
    "elastic net": Row(ElasticNet, "number", squares, {"alpha": 0.4, "l1_ratio": 0.6} | EXACT, mean=True),
    "elastic net cv": Row(ElasticNetCV, "number", squares, {"cv": 3, "l1_ratio": 0.7} | EXACT, mean=True),
    "poisson": Row(PoissonRegressor, "count", poisson, {"alpha": 0.3} | TIGHT, mean=True),
    "gamma": Row(GammaRegressor, "positive", gamma, {"alpha": 0.3} | TIGHT, mean=True),
    "gamma without intercept": Row(GammaRegressor, "positive", gamma, {"fit_intercept": False} | TIGHT, mean=True),
    "tweedie 1.5": Row(TweedieRegressor, "count", tweedie, {"power": 1.5, "alpha": 0.2} | TIGHT, mean=True),
    "tweedie 0": Row(TweedieRegressor, "number", squares, {"power": 0, "alpha": 0.2} | TIGHT, mean=True),
    "tweedie 0 of a log": Row(TweedieRegressor, "count", squares, {"power": 0, "link": "log"} | TIGHT, mean=True),
    "tweedie 3": Row(TweedieRegressor, "positive", tweedie, {"power": 3, "alpha": 0.2} | TIGHT, mean=True),
    "huber": Row(
        HuberRegressor, "number", robust, {"alpha": 0.5, "tol": 1e-12, "max_iter": 5000}, rtol=3e-2, step=0.02
    ),
    "linear svc": Row(
        LinearSVC, "binary", squared_hinge, {"dual": False, "C": 0.3} | EXACT, {"no": 3.0, "yes": 0.5}, 1e-3, step=2e-3
    ),
    "linear svc with intercept scaling": Row(
        LinearSVC, "binary", squared_hinge, {"dual": False, "intercept_scaling": 3.0} | EXACT, rtol=1e-3, step=2e-3
    ),
    "linear svr": Row(
        LinearSVR,
        "number",
        squared_tube,
        {"loss": "squared_epsilon_insensitive", "dual": False, "epsilon": 0.2, "C": 0.3} | EXACT,
        rtol=1e-3,
        step=2e-3,
    ),
    "kernel ridge": Row(KernelRidge, "number", squares, {"kernel": "rbf", "alpha": 0.5, "gamma": 0.3}),
    "kernel ridge of two outputs": Row(
        KernelRidge, "numbers", squares, {"kernel": "poly", "alpha": np.array([0.5, 2])}
    ),
}


def plain(model):
    """An unfitted estimator that keeps what cross-validation chose."""
    if isinstance(model, LogisticRegressionCV):
        return LogisticRegression(
            C=float(np.ravel(model.C_)[0]), tol=model.tol, max_iter=model.max_iter, class_weight=model.class_weight
        )
    if isinstance(model, RidgeClassifierCV):
        return RidgeClassifier(alpha=model.alpha_, class_weight=model.class_weight)
    if isinstance(model, RidgeCV):
        return Ridge(alpha=model.alpha_)
    if isinstance(model, LassoCV):
        return Lasso(alpha=model.alpha_, tol=model.tol, max_iter=model.max_iter)
    if isinstance(model, ElasticNetCV):
        return ElasticNet(alpha=model.alpha_, l1_ratio=model.l1_ratio_, tol=model.tol, max_iter=model.max_iter)
    return clone(model)


@dataclass(frozen=True)
class Fit:
    row: Row
    model: object
    X: np.ndarray
    y: np.ndarray
    weights: np.ndarray
    Xq: np.ndarray
    yq: np.ndarray

    @property
    def on(self):
        return self.Xq, self.yq

    def influence(self, **settings):
        return uw.explain(self.model, self.X, self.y, sample_weight=self.weights, **settings)

    def losses(self, model=None):
        return self.row.loss(self.model if model is None else model, self.Xq, self.yq)

    def effective(self, weights):
        """wᵢ: sample weight times class weight; a row's share of the penalty goes by it."""
        table = self.row.class_weight
        return weights * np.array([table[label] for label in self.y]) if table else weights

    def refitted(self, weights, *, folded=None, X=None, y=None):
        """The queries' losses after a refit by scikit-learn; folded scales the penalty with the weight that is left."""
        again = plain(self.model)
        share = self.effective(weights).sum() / self.effective(self.weights).sum() if len(weights) == N else 1.0
        factor = 1.0 if folded in {None, self.row.mean} else (share if folded else 1 / share)
        if hasattr(again, "alpha"):
            again.set_params(alpha=again.alpha * factor)
        elif hasattr(again, "C"):
            again.set_params(C=again.C / factor)
        again.fit(self.X if X is None else X, self.y if y is None else y, sample_weight=weights)
        return self.losses(again)


def targets(task, X, draw):
    if task == "binary":
        return np.where(X @ [1.0, -1.0, 0.5] + draw.normal(size=len(X)) > 0, "yes", "no")
    if task == "three":
        return np.array(["a", "b", "c"])[(X @ draw.normal(size=(D, 3)) + draw.normal(size=(len(X), 3))).argmax(1)]
    if task == "count":
        return draw.poisson(np.exp(X @ [0.4, -0.3, 0.2])).astype(float)
    if task == "positive":
        return draw.gamma(2.0, np.exp(X @ [0.4, -0.3, 0.2]))
    noise = draw.normal(size=(len(X), 2))
    return (X @ draw.normal(size=(D, 2)) + noise)[:, 0] if task == "number" else X @ draw.normal(size=(D, 2)) + noise


def made(row, seed=7):
    """The row's estimator, fitted with sample weights."""
    draw = np.random.default_rng(seed)
    X = draw.normal(size=(N + QUERIES, D))
    y = targets(row.task, X, draw)
    weights = draw.uniform(0.5, 2.0, size=N)
    model = row.estimator().fit(X[:N], y[:N], sample_weight=weights)
    return Fit(row, model, X[:N], y[:N], weights, X[N:], y[N:])


def close(ours, theirs, rtol):
    np.testing.assert_allclose(ours, theirs, rtol=rtol, atol=rtol * np.abs(theirs).max())
