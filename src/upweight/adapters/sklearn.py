"""scikit-learn estimators: what fit() minimised, read off the fitted estimator and never rebuilt as a torch model.

    estimator            fit() minimises                                as R(θ) = (1/n) Σ wᵢ ℓ(ηᵢ, yᵢ) + r(θ)
    LogisticRegression   C Σ sᵢ ℓᵢ + ½‖coef‖²                           r = ‖coef‖²/(2Cn); liblinear: intercept too
    LinearRegression     Σ sᵢ (ηᵢ − yᵢ)²                                r = 0
    Ridge                Σ sᵢ (ηᵢ − yᵢ)² + α‖coef‖²                     r = (α/n)‖coef‖²
    RidgeClassifier      the same on targets ±1, summed over outputs    r = (α/n)‖coef‖²

wᵢ is the sample weight times the weight of the row's class. sample_weight=0 leaves r as it is in all four, so
`penalty_per_example=None` means False. A new estimator costs one builder and one line in BUILDERS.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import scipy.sparse
import torch
from numpy.typing import NDArray
from torch import Tensor

from upweight import linear, losses
from upweight.checks import rows_from_minimum
from upweight.encoders import whole_examples
from upweight.errors import InvalidInput, NotFitted, TheoryWarning, UnsupportedModel, require
from upweight.examples import Examples, as_array, as_tensor, check_finite, checked_weights
from upweight.influence import Influence
from upweight.objective import L2, Linear, Objective

_COMPARED_ROWS = 64
_ROWS_MISSED_BY_ROUNDING = 1e-3
_ROWS_MISSED_BY_ITERATION = 0.3
_DIRECT = {"auto", "cholesky", "svd"}  # Ridge's solvers that end at the minimum, not near it


@dataclass(frozen=True)
class Built:
    """What a builder reads off an estimator.

    Args:
        loss: ℓ of the linear predictor.
        coef: (K, d).
        intercept: (K,), or None when there is none.
        coef_penalty: λ of (λ/2)‖coef‖²; a number or (K, 1).
        intercept_penalty: λ of (λ/2)‖intercept‖², 0 when it is free.
        targets: turns labels into what ℓ expects.
        class_weights: the weight of each encoded target.
        gauge: "none", "intercept" or "all": which blocks a common shift of all outputs leaves the loss unchanged and
            free.
        predictor: the estimator's own η, to compare with.
        closed_form: whether fit() ends at the minimum to rounding, on dense data.
    """

    loss: losses.Loss
    coef: NDArray[np.float64]
    intercept: NDArray[np.float64] | None
    coef_penalty: Any
    intercept_penalty: float
    targets: Callable[[Any], NDArray[Any]]
    class_weights: Callable[[NDArray[Any]], NDArray[np.float64]]
    gauge: str
    predictor: Callable[[Any], Any]
    closed_form: bool = False


Builder = Callable[[Any, Any, int, Any], Built]


def explain(
    model: Any,
    X: Any,
    y: Any,
    *,
    sample_weight: Any = None,
    penalty_per_example: bool | None = None,
    **settings: Any,
) -> Influence:
    """The Influence of a fitted estimator, or of a Pipeline of transformers around one, on its training data.

    Raises:
        UnsupportedModel: if the estimator's objective has no second derivatives, or is not known yet.
        NotFitted: if it was not fitted.
        InvalidInput: if X or y do not fit it.
    """
    transformers, estimator = _split(model)
    builder = _builder(estimator)
    _require_fitted(model, estimator)
    whole = whole_examples(X, y, sample_weight)
    if whole is not None:
        _refuse_encoded(whole)
        X, y, sample_weight = whole.x, whole.y, whole.sample_weight
    if X is None or y is None:
        message = f"{type(estimator).__name__} was fitted on arrays X and y; pass both: explain(model, X, y)."
        raise InvalidInput(message)
    encoder = SklearnEncoder(transformers, estimator)
    x = encoder.inputs(X)
    if x.shape[0] == 0:
        message = "There are no examples: X has 0 rows. Pass the X and y that fit() was given."
        raise InvalidInput(message)
    weights = checked_weights(sample_weight, x.shape[0])
    built = builder(estimator, y, x.shape[0], None if sample_weight is None else weights)
    encoder = SklearnEncoder(transformers, estimator, built)
    targets = built.targets(y)
    if len(targets) != x.shape[0]:
        message = (
            f"X has {x.shape[0]} rows and y has {len(targets)}. They must describe the same examples in the same order."
        )
        raise InvalidInput(message)
    examples = Examples(x, targets, sample_weight=weights)
    examples.weights = examples.sample_weight * built.class_weights(targets)
    examples.encoded_by = encoder
    objective = _objective(built, type(estimator).__name__, penalty_per_example)
    _compare_predictors(objective, examples, built, estimator)
    influence = Influence(objective, examples, encoder=encoder, **settings)
    _warn_if_not_at_minimum(influence, estimator, built.closed_form)
    return influence


class SklearnEncoder:
    """Queries go through the Pipeline's transformers, and labels through the estimator's classes."""

    refit = None
    feature_names = None

    def movable(self) -> Callable[[NDArray[np.float64]], NDArray[np.float64]]:
        """The derivatives as they are."""
        return lambda gradients: gradients

    def __init__(self, transformers: Any, estimator: Any, built: Built | None = None) -> None:
        self.transformers = transformers
        self.estimator = estimator
        self.built = built

    def inputs(self, X: Any) -> Any:
        """X as the final estimator sees it: a 2-d array or CSR matrix."""
        if self.transformers is not None:
            try:
                X = self.transformers.transform(X)
            except Exception as error:
                message = f"The pipeline's transformers refused X: {error}"
                raise InvalidInput(message) from error
        names = getattr(self.estimator, "feature_names_in_", None)
        if self.transformers is None and names is not None and hasattr(X, "columns") and list(X.columns) != list(names):
            message = (
                f"X has the columns {list(X.columns)[:8]}, and the model was fitted on {list(names)[:8]}. Pass the "
                "same columns in the same order."
            )
            raise InvalidInput(message)
        array = as_array(X, "X")
        if array.ndim != 2:
            message = (
                f"X has shape {tuple(array.shape)}; it needs two axes, (rows, features). Write X.reshape(1, -1) for "
                "a single row."
            )
            raise InvalidInput(message)
        expected = self.estimator.n_features_in_
        if array.shape[1] != expected:
            message = (
                f"X has {array.shape[1]} features, and the model was fitted on {expected}. Pass the same columns as "
                "in fit()."
            )
            raise InvalidInput(message)
        return array

    def examples(self, X: Any, y: Any = None) -> Examples:
        """Queries or new rows as examples."""
        whole = whole_examples(X, y)
        if whole is not None and whole.encoded_by is self:
            return whole
        if whole is not None:
            _refuse_encoded(whole)
            X, y = whole.x, whole.y
        if X is None:
            message = f"{type(self.estimator).__name__} takes arrays, not a Dataset. Pass (Xq, yq) as arrays."
            raise InvalidInput(message)
        weights = None if whole is None else whole.sample_weight
        made = Examples(self.inputs(X), None if y is None else self._encode(y), sample_weight=weights)
        made.encoded_by = self
        return made

    def targets(self, y: Any) -> Tensor:
        """Labels as the loss expects them."""
        return as_tensor(self._encode(y))

    def class_weights(self, y: Tensor) -> NDArray[np.float64]:
        """The class weight of each encoded target."""
        assert self.built is not None
        return self.built.class_weights(y.numpy())

    def _encode(self, y: Any) -> NDArray[Any]:
        assert self.built is not None
        return self.built.targets(y)


# ---- builders --------------------------------------------------------------------------------


def _logistic_regression(model: Any, y: Any, n: int, sample_weight: Any) -> Built:
    strength, ratio = _l2_strength(model, n)
    if ratio:
        message = (
            f"LogisticRegression with an l1 share of {ratio:g} has a penalty without second derivatives. Refit with "
            "l2 (l1_ratio=0), or without a penalty (C=inf)."
        )
        raise UnsupportedModel(message)
    K = len(model.classes_)
    if K > 2 and (getattr(model, "multi_class", "auto") == "ovr" or model.solver == "liblinear"):
        message = (
            f"One-vs-rest LogisticRegression with {K} classes is {K} separate problems. Refit as multinomial (the "
            "default), or explain each binary model."
        )
        raise UnsupportedModel(message)
    softmax_pair = K == 2 and getattr(model, "multi_class", "auto") == "multinomial"
    if softmax_pair:
        message = (
            "LogisticRegression(multi_class='multinomial') on two classes penalises half of what its coefficients "
            "show. Refit without multi_class."
        )
        raise UnsupportedModel(message)
    per_class = _class_weight_vector(model, model.classes_, y, sample_weight)
    liblinear = model.solver == "liblinear"
    return Built(
        losses.logistic if K == 2 else losses.cross_entropy,
        np.asarray(model.coef_, dtype=np.float64),
        np.asarray(model.intercept_, dtype=np.float64) if model.fit_intercept else None,
        strength,
        strength / model.intercept_scaling**2 if liblinear else 0.0,
        lambda labels: _class_numbers(labels, model.classes_),
        lambda numbers: per_class[np.asarray(numbers).astype(np.int64).reshape(-1)],
        "none" if K == 2 else ("intercept" if strength else "all"),
        model.decision_function,
    )


def _l2_strength(model: Any, n: int) -> tuple[float, float]:
    """λ = 1/(Cn) and the share of l1, from the spelling before and after scikit-learn 1.8."""
    penalty = getattr(model, "penalty", "deprecated")
    if penalty in (None, "none"):
        return 0.0, 0.0
    ratio = {"l1": 1.0, "l2": 0.0}.get(penalty)
    if ratio is None:
        ratio = float(getattr(model, "l1_ratio", 0.0) or 0.0)
    return (0.0 if np.isinf(model.C) else 1 / (model.C * n)), (0.0 if np.isinf(model.C) else ratio)


def _least_squares(model: Any, _y: Any, _n: int, _sample_weight: Any) -> Built:
    return _squared(model, 0.0, _numbers)


def _ridge(model: Any, _y: Any, n: int, _sample_weight: Any) -> Built:
    return _squared(model, 2 * np.asarray(model.alpha, dtype=np.float64).reshape(-1, 1) / n, _numbers)


def _ridge_classifier(model: Any, y: Any, n: int, _sample_weight: Any) -> Built:
    if model.coef_.shape[0] > 1 and np.ndim(y) > 1:
        message = "RidgeClassifier on several labels per row is not supported. Fit one model per label."
        raise UnsupportedModel(message)
    per_class = _class_weight_vector(model, model.classes_, y, None)

    def signs(labels: Any) -> NDArray[np.float64]:
        numbers = _class_numbers(labels, model.classes_)
        if len(model.classes_) == 2:
            return np.where(numbers[:, None] == 1, 1.0, -1.0)
        return np.where(numbers[:, None] == np.arange(len(model.classes_)), 1.0, -1.0)

    def class_weights(targets: NDArray[Any]) -> NDArray[np.float64]:
        numbers = (targets[:, 0] > 0).astype(int) if targets.shape[1] == 1 else targets.argmax(1)
        return per_class[numbers]

    return _squared(model, 2 * np.asarray(model.alpha, dtype=np.float64).reshape(-1, 1) / n, signs, class_weights)


def _squared(model: Any, coef_penalty: Any, targets: Callable[[Any], NDArray[Any]], class_weights: Any = None) -> Built:
    if getattr(model, "positive", False):
        message = (
            f"{type(model).__name__}(positive=True) is a constrained fit; at a bound θ̂ does not move smoothly. "
            "Refit with positive=False."
        )
        raise UnsupportedModel(message)
    coef = np.atleast_2d(np.asarray(model.coef_, dtype=np.float64))
    K = len(coef)

    def shaped(labels: Any) -> NDArray[Any]:
        values = targets(labels).astype(np.float64)
        if values.reshape(len(values), -1).shape[1] != K:
            message = f"y has shape {values.shape}, and the model was fitted with {K} output(s). Pass y as in fit()."
            raise InvalidInput(message)
        return values.reshape(len(values), K)

    return Built(
        losses.squared,
        coef,
        np.broadcast_to(np.asarray(model.intercept_, dtype=np.float64), (K,)).copy() if model.fit_intercept else None,
        coef_penalty,
        0.0,
        shaped,
        class_weights or (lambda values: np.ones(len(values))),
        "none",
        getattr(model, "decision_function", model.predict),
        closed_form=getattr(model, "solver_", getattr(model, "solver", "auto")) in _DIRECT,
    )


BUILDERS: dict[str, Builder] = {
    "LinearRegression": _least_squares,
    "LogisticRegression": _logistic_regression,
    "Ridge": _ridge,
    "RidgeClassifier": _ridge_classifier,
}


# ---- the parts --------------------------------------------------------------------------------


def _refuse_encoded(examples: Examples) -> None:
    """Encoding twice would scale inputs and number labels twice."""
    if examples.encoded_by is not None:
        message = "These Examples were prepared by another model's influence. Pass the original (X, y) instead."
        raise InvalidInput(message)


def _split(model: Any) -> tuple[Any, Any]:
    """The transformers of a Pipeline (or None) and the final estimator."""
    if not hasattr(model, "steps"):
        return None, model
    if not model.steps:
        message = (
            "The Pipeline has no steps, so there is no model in it. Pass a fitted Pipeline that ends in an estimator."
        )
        raise UnsupportedModel(message)
    return (model[:-1] if len(model.steps) > 1 else None), model.steps[-1][1]


def _builder(estimator: Any) -> Builder:
    name = type(estimator).__name__
    known = type(estimator).__module__.startswith("sklearn.")
    if known and name in BUILDERS:
        return BUILDERS[name]
    supported = ", ".join(BUILDERS)
    if any(word in name for word in ("Tree", "Forest", "Boosting", "Bagging", "Neighbors")):
        why = (
            "is not fitted by minimising a smooth function of parameters, so influence functions do not apply to "
            "it. Retrain without the rows instead"
        )
    elif isinstance(estimator, type):
        name, why = estimator.__name__, "is a class, not a fitted estimator. Pass the object that fit() returned"
    elif hasattr(estimator, "named_steps"):
        why = "inside a Pipeline is not supported. Put its steps into the outer Pipeline"
    else:
        why = (
            "is not supported. Write its objective yourself: upweight.Influence(upweight.Objective(loss, params, "
            "penalty=…), (X, y))"
        )
    message = f"{name} {why}. Supported estimators: {supported}, and a Pipeline of transformers around one of them."
    raise UnsupportedModel(message)


def _require_fitted(model: Any, estimator: Any) -> None:
    validation = require("sklearn.utils.validation", "sklearn")
    try:
        validation.check_is_fitted(estimator)
    except Exception as error:
        message = (
            f"{type(model).__name__} is not fitted, so it has no parameters to explain. Call model.fit(X, y) first."
        )
        raise NotFitted(message) from error


def _objective(built: Built, name: str, penalty_per_example: bool | None) -> Objective:
    K, d = built.coef.shape
    params = {"coef": torch.tensor(built.coef)}
    if built.intercept is not None:
        params["intercept"] = torch.tensor(built.intercept)
    strengths: dict[str, Any] = {}
    if np.any(built.coef_penalty):
        strengths["coef"] = (
            np.asarray(built.coef_penalty).item()
            if np.size(built.coef_penalty) == 1
            else torch.as_tensor(built.coef_penalty)
        )
    if built.intercept is not None and built.intercept_penalty:
        strengths["intercept"] = built.intercept_penalty
    structure = Linear(built.loss, K, d, built.intercept is not None)

    def outputs(params: dict[str, Tensor], example: Any) -> Tensor:
        eta = params["coef"] @ example[0].to(params["coef"])
        return eta + params["intercept"] if "intercept" in params else eta

    def loss(params: dict[str, Tensor], example: Any) -> Tensor:
        return built.loss(outputs(params, example), example[1])

    return Objective(
        loss,
        params,
        penalty=L2(strengths) if strengths else None,
        penalty_per_example=penalty_per_example,
        outputs=outputs,
        output_loss=lambda output, example: built.loss(output, example[1]),
        linear=structure,
        gauge=None
        if built.gauge == "none" or (built.gauge == "intercept" and built.intercept is None)
        else _shift_projector(structure, built.gauge),
        name=name,
    )


def _shift_projector(structure: Linear, gauge: str) -> Callable[[Tensor], Tensor]:
    """Removes a common shift of all outputs, from the intercepts only or from every parameter."""
    K, split = structure.n_outputs, structure.n_outputs * structure.n_features

    def project(V: Tensor) -> Tensor:
        out = V.clone()
        if gauge == "all":
            coef = out[:, :split].reshape(len(V), K, -1)
            out[:, :split] = (coef - coef.mean(1, keepdim=True)).reshape(len(V), -1)
        if structure.intercept:
            out[:, split:] -= out[:, split:].mean(1, keepdim=True)
        return out

    return project


def _class_numbers(labels: Any, classes: NDArray[Any]) -> NDArray[np.int64]:
    """Labels as numbers of `classes`.

    Raises:
        InvalidInput: if a label was never seen in fit().
    """
    array = np.asarray(labels.to_numpy() if hasattr(labels, "to_numpy") else labels)
    if array.ndim == 2 and array.shape[1] == 1:
        array = array[:, 0]
    if array.ndim != 1:
        message = f"y has shape {array.shape}; labels form one column. Pass one label per row."
        raise InvalidInput(message)
    if array.dtype.kind == "f":
        check_finite(array, "y")
    numbers = {label: number for number, label in enumerate(classes.tolist())}
    unseen = sorted({str(label) for label in array.tolist() if label not in numbers})
    if unseen:
        message = (
            f"y holds labels that fit() never saw: {', '.join(unseen[:5])}. The model knows "
            f"{', '.join(map(str, classes.tolist()[:10]))}."
        )
        raise InvalidInput(message)
    return np.array([numbers[label] for label in array.tolist()], dtype=np.int64)


def _numbers(labels: Any) -> NDArray[np.float64]:
    return np.asarray(as_array(labels, "y"), dtype=np.float64)


def _class_weight_vector(model: Any, classes: NDArray[Any], y: Any, sample_weight: Any) -> NDArray[np.float64]:
    """(K,) the weight that class_weight gives to each class, as fit() computed it."""
    if model.class_weight is None:
        return np.ones(len(classes))
    compute = require("sklearn.utils.class_weight", "sklearn").compute_class_weight
    labels = classes[_class_numbers(y, classes)]
    extra = (
        {"sample_weight": sample_weight}
        if sample_weight is not None and "sample_weight" in inspect.signature(compute).parameters
        else {}
    )
    return np.array(compute(model.class_weight, classes=classes, y=labels, **extra), dtype=np.float64)


def _compare_predictors(objective: Objective, examples: Examples, built: Built, estimator: Any) -> None:
    """Our η must be the estimator's own: otherwise this is another model than the one that was read."""
    rows = examples.spread(_COMPARED_ROWS)
    X = examples.x[rows]  # type: ignore[index]
    ours = linear.predictor(objective, X if scipy.sparse.issparse(X) else as_tensor(X).double()).numpy()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # scikit-learn warns about missing feature names
        theirs = np.asarray(built.predictor(X)).reshape(len(rows), -1)
    gap = float(np.abs(ours - theirs).max())
    tolerance = 1e-3 if theirs.dtype == np.float32 else 1e-8
    if gap > tolerance * (1 + float(np.abs(theirs).max())):
        message = (
            f"{type(estimator).__name__} predicts values that differ by {gap:.3g} from coef_ · x + intercept_. Was "
            "the estimator changed after fit(), "
            "or subclassed? Refit it."
        )
        raise UnsupportedModel(message)


def _warn_if_not_at_minimum(influence: Influence, estimator: Any, closed_form: bool) -> None:
    """A TheoryWarning with the number, when θ̂ misses the minimum by more than the fit's own method explains."""
    exact = closed_form and not scipy.sparse.issparse(influence.examples.x)
    missed = rows_from_minimum(influence)
    size = float(influence.risk_gradient.norm())
    if missed < (_ROWS_MISSED_BY_ROUNDING if exact else _ROWS_MISSED_BY_ITERATION) or size < 1e-12:
        return
    settings = [
        f"{name}={getattr(estimator, name)}" for name in ("tol", "max_iter", "solver") if hasattr(estimator, name)
    ]
    stopped = f"it stopped early ({', '.join(settings)}): refit with a smaller tol and a larger max_iter"
    others = "X, y, sample_weight or a setting changed since fit() are not those of the fit"
    message = (
        f"{type(estimator).__name__} is not at a minimum of its objective on these data: ‖∇R‖ = {size:.3g}, as much as "
        f"{missed:.3g} rows. " + (f"Probably {others}." if exact else f"Either {stopped}; or {others}.")
    )
    warnings.warn(message, TheoryWarning, stacklevel=4)
