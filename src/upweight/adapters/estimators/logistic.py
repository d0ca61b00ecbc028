"""Logistic regression.

LogisticRegression     C Σ sᵢ ℓᵢ + ½‖coef‖²      r = ‖coef‖²/(2Cn); liblinear penalises the intercept too
LogisticRegressionCV   the same at its C_         r = ‖coef‖²/(2 C_ n), with C_ fixed
"""

from __future__ import annotations

from typing import Any

import numpy as np

from upweight.adapters.estimators.built import Again, Built, Fit, l2, linear_objective, read_linear
from upweight.adapters.estimators.labels import by_class, class_weight_vector, of_classes
from upweight.errors import UnsupportedModel, require
from upweight.model import losses


def logistic_regression(fit: Fit) -> Built:
    """LogisticRegression: logistic loss for two classes, softmax cross-entropy for more."""
    model = fit.estimator
    share = _l1_share(model, getattr(model, "l1_ratio", 0.0))
    estimator = require("sklearn.base", "sklearn").clone(model).set_params(class_weight=None)
    return _logistic(fit, float(model.C), share, estimator)


def logistic_regression_cv(fit: Fit) -> Built:
    """LogisticRegressionCV: LogisticRegression at the C that cross-validation chose."""
    model = fit.estimator
    if not model.refit:
        message = (
            "LogisticRegressionCV(refit=False) averages the coefficients of its folds, which minimise no objective on "
            "all rows. Refit with refit=True."
        )
        raise UnsupportedModel(message)
    C = float(np.asarray(model.C_).reshape(-1)[0])
    ratio = np.asarray(model.l1_ratio_).reshape(-1)[0]
    settings = {name: getattr(model, name) for name in ("fit_intercept", "intercept_scaling", "max_iter", "tol")}
    plain = require("sklearn.linear_model", "sklearn").LogisticRegression
    return _logistic(fit, C, _l1_share(model, ratio), plain(C=C, solver=model.solver, **settings))


def _logistic(fit: Fit, C: float, l1_share: float, estimator: Any) -> Built:
    model = fit.estimator
    penalised = getattr(model, "penalty", "deprecated") not in {None, "none"} and np.isfinite(C)
    _refuse(model, l1_share if penalised else 0.0)
    strength = 1 / (C * fit.n) if penalised else 0.0
    K = len(model.classes_)
    liblinear = model.solver == "liblinear"
    objective = linear_objective(
        fit,
        losses.logistic if K == 2 else losses.cross_entropy,
        model.coef_,
        model.intercept_ if model.fit_intercept else None,
        l2(strength, strength / model.intercept_scaling**2 if liblinear and model.fit_intercept else 0.0),
        gauge="none" if K == 2 else ("intercept" if strength else "all"),
    )
    return Built(
        objective,
        of_classes(model),
        model.decision_function,
        by_class(class_weight_vector(model, fit.y, fit.sample_weight)),
        again=Again(estimator, fit, read_linear(intercept=model.fit_intercept), strength="C"),
    )


def _l1_share(model: Any, ratio: Any) -> float:
    """The share of l1 in the penalty, from the spelling before and after scikit-learn 1.8."""
    share = {"l1": 1.0, "l2": 0.0}.get(getattr(model, "penalty", "deprecated"))
    return float(ratio or 0.0) if share is None else share


def _refuse(model: Any, l1_share: float) -> None:
    """Raises for penalties without second derivatives, and for several problems in one estimator.

    Raises:
        UnsupportedModel: if it is one of them.
    """
    name, K = type(model).__name__, len(model.classes_)
    if l1_share:
        message = (
            f"{name} with an l1 share of {l1_share:g} has a penalty without second derivatives. Refit with "
            "l2 (l1_ratio=0), or without a penalty (C=inf)."
        )
        raise UnsupportedModel(message)
    if K > 2 and (getattr(model, "multi_class", "auto") == "ovr" or model.solver == "liblinear"):
        message = (
            f"One-vs-rest {name} with {K} classes is {K} separate problems. Refit as multinomial (the "
            "default), or explain each binary model."
        )
        raise UnsupportedModel(message)
    if K == 2 and getattr(model, "multi_class", "auto") == "multinomial":
        message = (
            f"{name}(multi_class='multinomial') on two classes penalises half of what its coefficients "
            "show. Refit without multi_class."
        )
        raise UnsupportedModel(message)
