"""Least squares, with a quadratic penalty, or with l1 on the active set.

    LinearRegression    Σ sᵢ (ηᵢ − yᵢ)²                                  r = 0
    Ridge, RidgeCV      Σ sᵢ (ηᵢ − yᵢ)² + α‖coef‖²                       r = (α/n)‖coef‖²
    RidgeClassifier(CV) the same on targets ±1, summed over outputs      r = (α/n)‖coef‖²
    ElasticNet, Lasso   (1/2n) Σ wᵢ (ηᵢ − yᵢ)² + αρ‖coef‖₁ + ½α(1−ρ)‖coef‖²,  wᵢ = sᵢ n/Σs
                                                                         r = 2αρ sign(coef)·coef + α(1−ρ)‖coef‖²

An l1 penalty is linear where no coefficient changes its sign: influence moves the non-zero coefficients and keeps the
others at zero, which is the derivative of fit() as long as the active set stays.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from upweight.adapters.estimators.built import Again, Built, Fit, l2, linear_objective, matrix, read_linear
from upweight.adapters.estimators.inputs import Columns
from upweight.adapters.estimators.labels import (
    class_numbers,
    class_weight_vector,
    numbers,
    of_outputs,
    refuse_several_labels,
)
from upweight.errors import UnsupportedModel, require
from upweight.model import losses
from upweight.model.objective import L2

_DIRECT = {"auto", "cholesky", "svd"}  # Ridge's solvers that end at the minimum, not near it


def linear_regression(fit: Fit) -> Built:
    """LinearRegression, with one output or several."""
    return _squared(fit, 0.0, fit.estimator, strength=None)


def ridge(fit: Fit) -> Built:
    """Ridge; α may differ between outputs."""
    return _squared(fit, fit.estimator.alpha, fit.estimator)


def ridge_cv(fit: Fit) -> Built:
    """RidgeCV: Ridge at the α that cross-validation chose."""
    model = fit.estimator
    plain = require("sklearn.linear_model", "sklearn").Ridge
    return _squared(fit, model.alpha_, plain(alpha=model.alpha_, fit_intercept=model.fit_intercept))


def ridge_classifier(fit: Fit) -> Built:
    """RidgeClassifier: least squares on ±1, one output per class."""
    again = require("sklearn.base", "sklearn").clone(fit.estimator).set_params(class_weight=None)
    return _classified(fit, fit.estimator.alpha, again)


def ridge_classifier_cv(fit: Fit) -> Built:
    """RidgeClassifierCV: RidgeClassifier at the α that cross-validation chose."""
    model = fit.estimator
    plain = require("sklearn.linear_model", "sklearn").RidgeClassifier
    return _classified(fit, model.alpha_, plain(alpha=model.alpha_, fit_intercept=model.fit_intercept))


def elastic_net(fit: Fit) -> Built:
    """ElasticNet on its active set."""
    return _on_active_set(fit, fit.estimator.alpha, fit.estimator.l1_ratio, fit.estimator)


def lasso(fit: Fit) -> Built:
    """Lasso on its active set."""
    return _on_active_set(fit, fit.estimator.alpha, 1.0, fit.estimator)


def elastic_net_cv(fit: Fit) -> Built:
    """ElasticNetCV: ElasticNet at what cross-validation chose."""
    return _chosen(fit, fit.estimator.l1_ratio_)


def lasso_cv(fit: Fit) -> Built:
    """LassoCV: Lasso at the α that cross-validation chose."""
    return _chosen(fit, 1.0)


def _classified(fit: Fit, alpha: Any, again: Any) -> Built:
    model = fit.estimator
    refuse_several_labels(fit.y, fit.name)
    per_class = class_weight_vector(model, fit.y)

    def signs(labels: Any) -> NDArray[np.float64]:
        classes = class_numbers(labels, model.classes_)[:, None]
        which = np.array([1]) if len(model.classes_) == 2 else np.arange(len(model.classes_))
        return np.where(classes == which, 1.0, -1.0)

    def class_weights(targets: NDArray[Any]) -> NDArray[np.float64]:
        return per_class[(targets[:, 0] > 0).astype(int) if targets.shape[1] == 1 else targets.argmax(1)]

    return _squared(fit, alpha, again, signs, class_weights)


def _squared(
    fit: Fit, alpha: Any, again: Any, targets: Any = numbers, class_weights: Any = None, strength: str | None = "alpha"
) -> Built:
    model = fit.estimator
    if getattr(model, "positive", False):
        message = (
            f"{fit.name}(positive=True) is a constrained fit; at a bound θ̂ does not move smoothly. "
            "Refit with positive=False."
        )
        raise UnsupportedModel(message)
    objective = linear_objective(
        fit,
        losses.squared,
        model.coef_,
        model.intercept_ if model.fit_intercept else None,
        l2(2 * np.asarray(alpha, dtype=np.float64).reshape(-1, 1) / fit.n),
    )
    return Built(
        objective,
        of_outputs(len(matrix(model.coef_)), targets),
        getattr(model, "decision_function", model.predict),
        class_weights or (lambda values: np.ones(len(values))),
        closed_form=getattr(model, "solver_", getattr(model, "solver", "auto")) in _DIRECT,
        again=Again(again, fit, read_linear(intercept=model.fit_intercept), strength=strength),
    )


def _chosen(fit: Fit, l1_ratio: float) -> Built:
    model = fit.estimator
    settings = {name: getattr(model, name) for name in ("fit_intercept", "max_iter", "tol", "positive", "selection")}
    plain = require("sklearn.linear_model", "sklearn").ElasticNet
    return _on_active_set(
        fit, model.alpha_, l1_ratio, plain(alpha=model.alpha_, l1_ratio=l1_ratio, random_state=0, **settings)
    )


def _on_active_set(fit: Fit, alpha: float, l1_ratio: float, again: Any) -> Built:
    model = fit.estimator
    coef = matrix(model.coef_)
    if len(coef) > 1:
        message = (
            f"{fit.name} with {len(coef)} outputs has a separate active set for each. Fit and explain one model per "
            "output."
        )
        raise UnsupportedModel(message)
    active = np.flatnonzero(coef[0])
    if not active.size:
        message = (
            f"{fit.name}(alpha={alpha:g}) set all {coef.shape[1]} coefficients to zero, so no feature is in use and "
            "nothing moves. Refit with a smaller alpha."
        )
        raise UnsupportedModel(message)
    intercept = model.intercept_ if model.fit_intercept else None
    strengths = {"coef": 2 * alpha * (1 - l1_ratio)} if l1_ratio < 1 else {}
    tilt = {"coef": torch.from_numpy(2 * alpha * l1_ratio * np.sign(coef[:, active]))} if l1_ratio > 0 else {}
    objective = linear_objective(
        fit,
        losses.squared,
        coef[:, active],
        intercept,
        L2(strengths, tilt) if alpha else None,
        folded=True,
        name=f"{fit.name} on its active set ({active.size} of {coef.shape[1]} features)",
    )
    whole = linear_objective(fit, losses.squared, coef, intercept, None)  # a refit may take in other features
    factor = 1.0 if fit.sample_weight is None else fit.n / fit.sample_weight.sum()
    return Built(
        objective,
        of_outputs(1),
        model.predict,
        lambda targets: np.full(len(targets), factor),
        inputs=Columns(active, coef.shape[1]),
        again=Again(again, fit, read_linear(intercept=model.fit_intercept), preferred=True, shares=True, whole=whole),
    )
