"""Kernel machines, as linear ones on a factor of the Gram matrix: nothing special remains.

With K = U S Uᵀ the kernel of all training rows, a row x has the features φ(x) = k(x, X) U S^(−½), whose inner products
on training rows are K itself. A predictor Σ αⱼ k(x, xⱼ) is φ(x)·w with w = Σ αⱼ φ(xⱼ), and ‖w‖² its norm.

    KernelRidge     Σ sᵢ (ηᵢ − yᵢ)² + α‖w‖²         r = (α/n)‖w‖², no intercept
    SVC, SVR        C Σ wᵢ ℓᵢ + ½‖w‖²               r = ‖w‖²/(2Cn), free intercept

Directions with S ≤ n·2.2e-16 times the largest are rounding and left out.  Cost: 8n² bytes and O(n³) once.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import scipy.linalg
from numpy.typing import NDArray

from upweight.adapters.estimators.built import Again, Built, Fit, l2, linear_objective, read_linear
from upweight.adapters.estimators.inputs import Features
from upweight.adapters.estimators.labels import of_outputs
from upweight.adapters.estimators.margins import (
    linear_kernel,
    own_decision,
    pair_coefficients,
    unweighted,
    vector_loss,
    vector_penalty,
    vector_targets,
    vector_weights,
)
from upweight.errors import InvalidInput, TheoryWarning, UnsupportedModel, require
from upweight.model import losses
from upweight.model.objective import L2

_LARGEST = 12_000  # rows; their Gram matrix takes 1.2 GB, its eigenvectors as much again
_INDEFINITE = 1e-8


def kernel_ridge(fit: Fit) -> Built:
    """KernelRidge, with one output or several."""
    model = fit.estimator
    known = model.X_fit_
    features = _features(fit, lambda X, rows: _ridge_kernel(model, X, rows))

    def coef(fitted: Any) -> NDArray[np.float64]:
        dual = fitted.dual_coef_.reshape(known.shape[0], -1)
        return (features(fitted.X_fit_).T @ dual).T

    start = coef(model)
    alpha = np.asarray(model.alpha, dtype=np.float64).reshape(-1, 1)
    return Built(
        linear_objective(fit, losses.squared, start, None, l2(2 * alpha / fit.n)),
        of_outputs(len(start)),
        model.predict,
        inputs=features,
        again=Again(model, fit, lambda fitted: {"coef": coef(fitted)}, preferred=True),
    )


def support_vectors(fit: Fit) -> Built:
    """SVC or SVR with any kernel."""
    model = fit.estimator
    _refuse_fewer_rows(fit)
    if model.kernel == "linear":
        return linear_kernel(fit)
    if (callable(model.kernel) or model.kernel == "precomputed") and fit.sample_weight is not None:
        _name_other_vectors(fit)
    features = _features(fit, lambda X, rows: _vector_kernel(model, X, rows))

    def read(fitted: Any) -> dict[str, Any]:
        given = callable(fitted.kernel) or fitted.kernel == "precomputed"  # libsvm then keeps row numbers only
        at = features(fit.X[fitted.support_] if given else fitted.support_vectors_)
        coef = np.stack([dual @ at[place] for place, dual in pair_coefficients(fitted)])
        return {"coef": coef, "intercept": np.asarray(fitted.intercept_, dtype=np.float64)}

    loss, stretched = vector_loss(fit)

    def penalised(fit: Fit) -> tuple[L2, str]:
        fitted = read(fit.estimator)
        return vector_penalty(fit, loss, features(fit.X) @ fitted["coef"].T + fitted["intercept"])

    def penalised_linear(fit: Fit) -> tuple[L2, str]:
        return vector_penalty(fit, loss, fit.X @ fit.estimator.coef_.T + fit.estimator.intercept_)

    again = Again(_fixed_width(model), fit, read, preferred=True, strength="C", held=penalised)
    if callable(model.kernel) or model.kernel == "precomputed":  # these lose count of rows when one weighs nothing
        linear = unweighted(model).set_params(kernel="linear")
        inside = replace(fit, X=features(fit.X))
        again = replace(again, estimator=linear, fit=inside, read=read_linear(), held=penalised_linear, encoded=True)
    start = read(model)
    penalty, held = penalised(fit)
    return Built(
        linear_objective(fit, loss, start["coef"], start["intercept"], penalty),
        vector_targets(fit),
        own_decision(model),
        vector_weights(fit),
        inputs=features,
        stretched=stretched + held,
        again=again,
    )


def _refuse_fewer_rows(fit: Fit) -> None:
    """Raises where rows are missing that fit() had, to which support vectors point.

    Raises:
        InvalidInput: if there are fewer rows that weigh than support vectors count.
    """
    count = fit.n if fit.sample_weight is None else int((fit.sample_weight > 0).sum())
    last = int(fit.estimator.support_.max(initial=-1))
    if last >= count:
        message = (
            f"{fit.name} was fitted on more rows: its last support vector is row {last}, and X has {count} rows that "
            "weigh. Pass the X, y and sample_weight that fit() was given."
        )
        raise InvalidInput(message)


def _name_other_vectors(fit: Fit) -> None:
    """A TheoryWarning where libsvm numbers the rows that weigh, and its numbers are used among all rows."""
    weights = np.asarray(fit.sample_weight)
    support = fit.estimator.support_
    other = support[np.flatnonzero(weights > 0)[support] != support]
    if not len(other):
        return
    message = (
        f"{fit.name} with a kernel that is no name was fitted with {int((weights == 0).sum())} rows of weight 0. "
        "scikit-learn numbers its support vectors without them and looks the numbers up among all rows (row "
        f"{other[0]} is not the one that was meant), so its own predictions are wrong. Fit and explain the rows of "
        "positive weight: X[w > 0], y[w > 0], sample_weight=w[w > 0]."
    )
    warnings.warn(message, TheoryWarning, stacklevel=6)


def _fixed_width(model: Any) -> Any:
    """The same estimator with the kernel that it has: gamma="scale" would depend on the rows."""
    again = unweighted(model)
    return again.set_params(gamma=model._gamma) if isinstance(model.gamma, str) else again


def _features(fit: Fit, kernel: Callable[[Any, Any], Any]) -> Features:
    """φ, from the eigenvectors of the Gram matrix of `kernel`, a function of two sets of rows.

    Raises:
        UnsupportedModel: if there are too many rows, or the kernel is not positive.
    """
    if fit.n > _LARGEST:
        message = (
            f"{fit.name} with a kernel on {fit.n} rows needs a Gram matrix of {8e-9 * fit.n**2:.1f} GB; the limit is "
            f"{_LARGEST} rows. Fit on fewer rows, or use a linear model on Nystroem features in a Pipeline."
        )
        raise UnsupportedModel(message)
    gram = np.asarray(kernel(fit.X, fit.X), dtype=np.float64)
    if gram.shape != (fit.n, fit.n):
        message = (
            f"The kernel of {fit.name} gives a {gram.shape} matrix for {fit.n} rows. Pass the X that fit() was given."
        )
        raise UnsupportedModel(message)
    values, vectors = scipy.linalg.eigh((gram + gram.T) / 2, overwrite_a=True, check_finite=False)
    if values[0] < -_INDEFINITE * values[-1]:
        message = (
            f"The kernel of {fit.name} ({fit.estimator.kernel!r}) is not positive on these rows (eigenvalues from "
            f"{values[0]:.3g} to {values[-1]:.3g}), so there is no convex problem behind it. Use 'rbf' or 'poly'."
        )
        raise UnsupportedModel(message)
    kept = values > fit.n * np.finfo(np.float64).eps * values[-1]
    itself = None if fit.estimator.kernel == "precomputed" else lambda x: float(np.asarray(kernel(x, x))[0, 0])
    transform = vectors[:, kept] / np.sqrt(values[kept])
    return Features(lambda X: kernel(X, fit.X), transform, fit.name, itself)


def _ridge_kernel(model: Any, X: Any, rows: Any) -> Any:
    return X if model.kernel == "precomputed" else model._get_kernel(X, rows)


def _vector_kernel(model: Any, X: Any, rows: Any) -> Any:
    if model.kernel == "precomputed":
        return X
    if callable(model.kernel):
        return model.kernel(X, rows)
    settings = {"rbf": {}, "poly": {"degree": model.degree, "coef0": model.coef0}, "sigmoid": {"coef0": model.coef0}}
    pairwise = require("sklearn.metrics.pairwise", "sklearn").pairwise_kernels
    return pairwise(X, rows, metric=model.kernel, gamma=model._gamma, **settings[model.kernel])
