"""Support vector machines with a linear predictor.

    LinearSVC, LinearSVR   C Σ wᵢ ℓᵢ + ½‖coef‖² + ½(intercept/intercept_scaling)²     r = the same / (Cn)
    SVC, SVR (linear)      C Σ wᵢ ℓᵢ + ½‖coef‖²                                       r = ‖coef‖²/(2Cn), free intercept

The hinge and the ε-insensitive loss are explained through smooth ones. SVC of more than two classes is one problem for
each pair of them (one-vs-one); the loss of a row is the sum over the pairs that contain its class.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import scipy.sparse
from numpy.typing import NDArray

from upweight.adapters.estimators.built import Again, Built, Fit, l2, linear_objective, matrix, read_linear
from upweight.adapters.estimators.labels import by_class, class_weight_vector, of_classes, of_outputs
from upweight.adapters.estimators.smoothing import held_intercepts, smooth_hinge, smooth_tube
from upweight.errors import UnsupportedModel, require
from upweight.model import losses
from upweight.model.losses import Loss
from upweight.model.objective import L2


def linear_svc(fit: Fit) -> Built:
    """LinearSVC of two classes."""
    model = fit.estimator
    K = len(model.classes_)
    if model.multi_class != "ovr":
        message = (
            f"LinearSVC(multi_class={model.multi_class!r}) fits all classes together, by a hinge on their differences "
            f"whatever loss={model.loss!r} says. Refit with multi_class='ovr'."
        )
        raise UnsupportedModel(message)
    if K > 2:
        message = (
            f"LinearSVC with {K} classes is {K} separate one-vs-rest problems. Explain one binary model per class, or "
            "use SVC(kernel='linear'), which is supported one-vs-one."
        )
        raise UnsupportedModel(message)
    if model.penalty != "l2":
        message = (
            f"LinearSVC(penalty={model.penalty!r}) has a penalty without second derivatives. Refit with penalty='l2'."
        )
        raise UnsupportedModel(message)
    loss, stretched = (losses.squared_hinge, "") if model.loss == "squared_hinge" else smooth_hinge(fit)
    weights = by_class(class_weight_vector(model, fit.y, fit.sample_weight))
    return _liblinear(fit, loss, stretched, of_classes(model), model.decision_function, weights)


def linear_svr(fit: Fit) -> Built:
    """LinearSVR."""
    model = fit.estimator
    if model.loss == "squared_epsilon_insensitive":
        loss, stretched = losses.squared_epsilon_insensitive(float(model.epsilon)), ""
    else:
        loss, stretched = smooth_tube(fit)
    return _liblinear(fit, loss, stretched, of_outputs(1), model.predict, lambda targets: np.ones(len(targets)))


def linear_kernel(fit: Fit) -> Built:
    """SVC or SVR with kernel="linear": the features are X itself."""
    model = fit.estimator
    loss, stretched = vector_loss(fit)

    def penalised(fit: Fit) -> tuple[L2, str]:
        return vector_penalty(fit, loss, fit.X @ matrix(fit.estimator.coef_).T + fit.estimator.intercept_)

    penalty, held = penalised(fit)
    objective = linear_objective(fit, loss, model.coef_, model.intercept_, penalty)
    return Built(
        objective,
        vector_targets(fit),
        own_decision(model),
        vector_weights(fit),
        stretched=stretched + held,
        again=Again(unweighted(model), fit, read_linear(), preferred=True, strength="C", held=penalised),
    )


def vector_loss(fit: Fit) -> tuple[Loss, str]:
    """The smooth loss of SVC or SVR, with the warning."""
    if not hasattr(fit.estimator, "classes_"):
        return smooth_tube(fit)
    loss, stretched = smooth_hinge(fit)
    K = len(fit.estimator.classes_)
    return (loss if K == 2 else losses.one_vs_one(loss, K)), stretched


def vector_targets(fit: Fit) -> Any:
    """Class numbers of SVC, numbers of SVR."""
    return of_classes(fit.estimator) if hasattr(fit.estimator, "classes_") else of_outputs(1)


def vector_weights(fit: Fit) -> Any:
    """The weights of SVC's classes."""
    if not hasattr(fit.estimator, "classes_"):
        return lambda targets: np.ones(len(targets))
    return by_class(np.asarray(fit.estimator.class_weight_, dtype=np.float64))


def vector_penalty(fit: Fit, loss: Loss, eta: NDArray[np.float64]) -> tuple[L2, str]:
    """r = ‖w‖²/(2Cn), and what holds the intercepts that no free support vector determines, with words about it."""
    model = fit.estimator
    targets = vector_targets(fit)(fit.y)
    return held_intercepts(fit, loss, 1 / (model.C * fit.n), eta, targets, _identified(fit, targets))


def own_decision(model: Any) -> Any:
    """The estimator's own predictor, one column per pair."""

    def decide(X: Any) -> Any:
        rows = (
            X.toarray() if scipy.sparse.issparse(X) and not model._sparse else X
        )  # libsvm takes what it was fitted on
        return _pairwise(model, rows) if hasattr(model, "classes_") else model.predict(rows)

    return decide


def unweighted(model: Any) -> Any:
    """The same estimator, weighing rows only by the weights it is given."""
    again = require("sklearn.base", "sklearn").clone(model)
    return again.set_params(class_weight=None) if hasattr(model, "classes_") else again


def pair_coefficients(model: Any) -> list[tuple[NDArray[np.int64], NDArray[np.float64]]]:
    """For each predictor of SVC or SVR: positions among the support vectors, and their dual coefficients there."""
    dual = matrix(model.dual_coef_)
    if not hasattr(model, "classes_") or len(model.classes_) == 2:
        return [(np.arange(dual.shape[1]), dual[0])]
    ends = np.concatenate([[0], np.cumsum(model.n_support_)])
    places = [np.arange(*ends[i : i + 2]) for i in range(len(model.classes_))]
    pairs = [(i, j) for i in range(len(places)) for j in range(i + 1, len(places))]
    return [
        (np.concatenate([places[i], places[j]]), np.concatenate([dual[j - 1, places[i]], dual[i, places[j]]]))
        for i, j in pairs
    ]


def _liblinear(fit: Fit, loss: Loss, stretched: str, targets: Any, own: Any, weights: Any) -> Built:
    model = fit.estimator
    strength = 1 / (model.C * fit.n)
    intercept = model.intercept_ if model.fit_intercept else None
    penalty = l2(strength, strength / model.intercept_scaling**2 if model.fit_intercept else 0.0)
    objective = linear_objective(fit, loss, model.coef_, intercept, penalty)
    read = read_linear(intercept=model.fit_intercept)
    again = Again(unweighted(model), fit, read, preferred=bool(stretched), strength="C")
    return Built(objective, targets, own, weights, stretched=stretched, again=again)


def _pairwise(model: Any, X: Any) -> NDArray[np.float64]:
    """decision_function of every pair; the setting that hides it is put back."""
    shape = model.decision_function_shape
    model.decision_function_shape = "ovo"
    try:
        return model.decision_function(X)
    finally:
        model.decision_function_shape = shape


def _identified(fit: Fit, targets: NDArray[Any]) -> NDArray[np.bool_]:
    """For each intercept, whether a support vector of it is strictly inside its bounds 0 and C wᵢ."""
    model = fit.estimator
    weights = np.ones(fit.n) if fit.sample_weight is None else fit.sample_weight
    rows = np.flatnonzero(weights > 0)[model.support_]  # support_ counts the rows that libsvm keeps
    bounds = model.C * (weights * vector_weights(fit)(targets))[rows]
    return np.array(
        [
            bool((np.abs(dual) < bounds[place] * (1 - 1e-6)).any() & (np.abs(dual) > 0).any())
            for place, dual in pair_coefficients(model)
        ]
    )
