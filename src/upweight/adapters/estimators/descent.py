"""Linear models fitted by stochastic gradient descent.

    SGDClassifier, SGDRegressor    (1/n) Σ sᵢ ℓᵢ + ½α‖coef‖²      r = ½α‖coef‖²; ½(η − y)² is doubled to (η − y)²

SGD ends near the minimum, not at it, so ‖∇R‖ is reported. Every step of fit() shrinks coef, also one for a row with
sample_weight=0: to SGD such a row is no row left out, for its share of the penalty stays. `penalty_per_example=None` is
True here all the same, the sum without the row (a fit to n − 1 rows); False is what sample_weight=0 does.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from upweight.adapters.estimators.built import (
    Again,
    Built,
    Fit,
    l2,
    linear_objective,
    read_linear,
    refuse_early_stopping,
)
from upweight.adapters.estimators.labels import by_class, class_weight_vector, of_classes, of_outputs
from upweight.adapters.estimators.smoothing import held_intercepts, smooth_hinge, smooth_tube
from upweight.errors import UnsupportedModel, require
from upweight.model import losses
from upweight.model.losses import Loss
from upweight.model.objective import L2

_EXACT: dict[str, Callable[[float], Loss]] = {
    "huber": losses.huber,
    "log_loss": lambda _: losses.logistic,
    "modified_huber": lambda _: losses.modified_huber,
    "squared_epsilon_insensitive": losses.squared_epsilon_insensitive,
    "squared_error": lambda _: losses.squared,
    "squared_hinge": lambda _: losses.squared_hinge,
}


def sgd_classifier(fit: Fit) -> Built:
    """SGDClassifier of two classes."""
    model = fit.estimator
    if len(model.classes_) > 2:
        K = len(model.classes_)
        message = (
            f"SGDClassifier with {K} classes is {K} separate one-vs-rest problems. Explain one binary model per class, "
            "or use LogisticRegression, whose multinomial loss is one problem."
        )
        raise UnsupportedModel(message)
    if model.loss == "perceptron":
        message = (
            "SGDClassifier(loss='perceptron') has a loss without curvature and no margin that a smooth one could "
            "stand for. Refit with loss='hinge' or 'log_loss'."
        )
        raise UnsupportedModel(message)
    if model.loss in {"squared_error", "huber", "epsilon_insensitive", "squared_epsilon_insensitive"}:
        message = (
            f"SGDClassifier(loss={model.loss!r}) regresses on ±1. Use RidgeClassifier, or a loss for classes: "
            "'log_loss', 'hinge', 'squared_hinge', 'modified_huber'."
        )
        raise UnsupportedModel(message)
    return _descended(fit)


def sgd_regressor(fit: Fit) -> Built:
    """SGDRegressor."""
    return _descended(fit)


def _descended(fit: Fit) -> Built:
    model = fit.estimator
    _refuse(fit)
    exact = _EXACT.get(model.loss)
    if exact is not None:
        loss, stretched = exact(float(model.epsilon)), ""
    else:
        loss, stretched = smooth_hinge(fit) if model.loss == "hinge" else smooth_tube(fit)
    strength = 0.0 if model.penalty is None else model.alpha * (2 if model.loss == "squared_error" else 1)
    classes = hasattr(model, "classes_")
    targets, own = (of_classes(model), model.decision_function) if classes else (of_outputs(1), model.predict)
    loose = bool(stretched) and model.fit_intercept

    def penalised(fit: Fit) -> tuple[L2, str]:
        model = fit.estimator
        eta = np.asarray((model.decision_function if classes else model.predict)(fit.X), dtype=np.float64)
        strength = 0.0 if model.penalty is None else model.alpha
        return held_intercepts(fit, loss, strength, eta.reshape(fit.n, 1), targets(fit.y), np.array([True]))

    penalty, held = penalised(fit) if loose else (l2(strength), "")
    stretched += held
    objective = linear_objective(
        fit, loss, model.coef_, model.intercept_ if model.fit_intercept else None, penalty, folded=True
    )
    again = require("sklearn.base", "sklearn").clone(model)
    return Built(
        objective,
        targets,
        own,
        by_class(class_weight_vector(model, fit.y)) if classes else lambda targets: np.ones(len(targets)),
        stretched=stretched,
        again=Again(
            again.set_params(class_weight=None) if classes else again,
            fit,
            read_linear(intercept=model.fit_intercept),
            preferred=True,
            strength=None if model.penalty is None else "alpha",
            held=penalised if loose else None,
        ),
    )


def _refuse(fit: Fit) -> None:
    """Raises for l1 penalties and for rows that were held out of the fit.

    Raises:
        UnsupportedModel: if it is one of them.
    """
    model = fit.estimator
    if model.penalty not in {None, "l2"}:
        message = (
            f"{fit.name}(penalty={model.penalty!r}) has a penalty without second derivatives, and SGD leaves no exact "
            "zeros that would show its active set. Refit with penalty='l2', or use Lasso or ElasticNet."
        )
        raise UnsupportedModel(message)
    refuse_early_stopping(fit)
