"""scikit-learn estimators: what fit() minimised, read off the fitted estimator by its builder in `estimators/`.

Each builder's module states fit()'s objective and its r(θ) in R(θ) = (1/n) Σ wᵢ ℓ(ηᵢ, yᵢ) + r(θ). wᵢ is the sample
weight times the weight of the row's class. `penalty_per_example=None` means False for sum + penalty and True for mean +
penalty. A new estimator costs one builder and one line in BUILDERS.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
import scipy.sparse

from upweight.adapters.encoding import SklearnEncoder, refuse_encoded
from upweight.adapters.estimators import (
    descent,
    generalized,
    kernels,
    least_squares,
    logistic,
    margins,
    networks,
)
from upweight.adapters.estimators.built import Builder, Built, Fit
from upweight.data.arrays import as_tensor, checked_weights, refuse_sparse_targets
from upweight.data.examples import Examples
from upweight.data.ids import names_of
from upweight.errors import InvalidInput, NotFitted, TheoryWarning, UnsupportedModel, require
from upweight.influence.face import Influence
from upweight.influence.minimum import distance, rows_by_scale
from upweight.model.encoders import whole_examples
from upweight.model.per_row import rows_from_minimum
from upweight.operators.linear import LinearHessian

_COMPARED_ROWS = 64
_ROWS_MISSED_BY_ROUNDING = 1e-3
_ROWS_MISSED_BY_ITERATION = 0.3

BUILDERS: dict[str, Builder] = {
    "LinearRegression": least_squares.linear_regression,
    "LogisticRegression": logistic.logistic_regression,
    "LogisticRegressionCV": logistic.logistic_regression_cv,
    "Ridge": least_squares.ridge,
    "RidgeCV": least_squares.ridge_cv,
    "RidgeClassifier": least_squares.ridge_classifier,
    "RidgeClassifierCV": least_squares.ridge_classifier_cv,
    "ElasticNet": least_squares.elastic_net,
    "ElasticNetCV": least_squares.elastic_net_cv,
    "Lasso": least_squares.lasso,
    "LassoCV": least_squares.lasso_cv,
    "PoissonRegressor": generalized.poisson_regressor,
    "GammaRegressor": generalized.gamma_regressor,
    "TweedieRegressor": generalized.tweedie_regressor,
    "HuberRegressor": generalized.huber_regressor,
    "LinearSVC": margins.linear_svc,
    "LinearSVR": margins.linear_svr,
    "SVC": kernels.support_vectors,
    "SVR": kernels.support_vectors,
    "KernelRidge": kernels.kernel_ridge,
    "SGDClassifier": descent.sgd_classifier,
    "SGDRegressor": descent.sgd_regressor,
    "MLPClassifier": networks.mlp_classifier,
    "MLPRegressor": networks.mlp_regressor,
}

_ONE_PER_COLUMN = (
    "fits one model per output, each with its own objective. Explain each of its estimators_: "
    "explain({model}.estimators_[k], {X}, y[:, k])"
)
_SEARCH = "is a search over models. Explain the one it chose: explain({model}.best_estimator_, {X}, y)"
_SEVERAL = (
    "combines the predictions of several models, each with its own objective. Explain those that are supported: "
    "explain({model}.estimators_[k], {X}, y)"
)
_SEVERAL_CLASSIFIERS = _SEVERAL.replace(", y)", ", np.searchsorted({model}.classes_, y))")
# Models that were fitted before have seen the labels themselves, and perhaps other rows.
_PREFIT = _SEVERAL.replace("those that are supported", "those that are supported, on the rows that each was fitted on")
_THRESHOLD = (
    "moves the threshold of a classifier, which changes its labels but not its parameters. Explain the classifier: "
    "explain({model}.estimator_, {X}, y)"
)
# Why, and what to type instead; {model} and {X} stand for the refused estimator and for the rows that it saw.
REFUSED: dict[str, str] = {
    "CalibratedClassifierCV": (
        "averages models of several folds behind calibrators that saw other rows, so no single objective describes it. "
        "Explain the model itself, fitted on all rows, before calibration"
    ),
    "ClassifierChain": (
        "fits one model per output, each on the outputs before it as well. Explain a model of one output at a time"
    ),
    "FixedThresholdClassifier": _THRESHOLD,
    "FrozenEstimator": "wraps a fitted model. Explain that: explain({model}.estimator, {X}, y)",
    "GridSearchCV": _SEARCH,
    "HalvingGridSearchCV": _SEARCH,
    "HalvingRandomSearchCV": _SEARCH,
    "MultiOutputClassifier": _ONE_PER_COLUMN,
    "MultiOutputRegressor": _ONE_PER_COLUMN,
    "MultiTaskElasticNet": "has a penalty on whole rows of coefficients. Fit one ElasticNet per output",
    "MultiTaskElasticNetCV": "has a penalty on whole rows of coefficients. Fit one ElasticNetCV per output",
    "MultiTaskLasso": "has a penalty on whole rows of coefficients. Fit one Lasso per output",
    "MultiTaskLassoCV": "has a penalty on whole rows of coefficients. Fit one LassoCV per output",
    "NuSVC": "tunes its margin to ν, and has no loss of a single row. Refit as SVC with the C that suits",
    "NuSVR": "tunes its tube to ν, and has no loss of a single row. Refit as SVR with the epsilon that suits",
    "OneVsOneClassifier": (
        "fits one model per pair of classes, each on other rows. Explain each of its estimators_ on its own rows and "
        "labels, or use SVC, which is supported one-vs-one"
    ),
    "OneVsRestClassifier": (
        "fits one binary model per class. Explain each: explain({model}.estimators_[k], {X}, y == {model}.classes_[k]);"
        " of two classes the only one, explain({model}.estimators_[0], {X}, y == {model}.classes_[1]); or use "
        "LogisticRegression, whose multinomial loss is one problem"
    ),
    "Perceptron": "has a loss without curvature and no margin. Refit as SGDClassifier with loss='hinge' or 'log_loss'",
    "RandomizedSearchCV": _SEARCH,
    "StackingClassifier": _SEVERAL_CLASSIFIERS,
    "StackingRegressor": _SEVERAL,
    "TransformedTargetRegressor": (
        "changes y before its regressor sees it. Explain the regressor on the transformed y: "
        "explain({model}.regressor_, {X}, {model}.transformer_.transform(np.asarray(y).reshape(len(y), -1)).squeeze())"
    ),
    "TunedThresholdClassifierCV": _THRESHOLD,
    "VotingClassifier": _SEVERAL_CLASSIFIERS,
    "VotingRegressor": _SEVERAL,
}


def explain(
    model: Any,
    X: Any,
    y: Any,
    *,
    loss: Any = None,
    sample_weight: Any = None,
    ids: Any = None,
    penalty_per_example: bool | None = None,
    **settings: Any,
) -> Influence:
    """The Influence of a fitted estimator, or of a Pipeline of transformers around one, on its training data.

    Raises:
        UnsupportedModel: if the estimator's objective has no second derivatives, or is not known yet.
        NotFitted: if it was not fitted.
        InvalidInput: if X or y do not fit it, or it needs no other loss, or names are no names.
    """
    transformers, estimator = _split(model)
    builder = _builder(estimator, inside=hasattr(model, "steps"))
    _require_fitted(model, estimator)
    whole = whole_examples(X, y, sample_weight, ids)
    if whole is not None:
        refuse_encoded(whole)
        X, y, sample_weight = whole.x, whole.y, whole.sample_weight
    if X is None or y is None:
        message = f"{type(estimator).__name__} was fitted on arrays X and y; pass both: explain(model, X, y)."
        raise InvalidInput(message)
    plain = SklearnEncoder(transformers, estimator)
    X, y, ids = plain.columns(X, y, ids)
    refuse_sparse_targets(y)
    rows = plain.rows(X)
    if rows.shape[0] == 0:
        message = "There are no examples: X has 0 rows. Pass the X and y that fit() was given."
        raise InvalidInput(message)
    names = names_of(X, y, ids, rows.shape[0]) if whole is None else whole.names
    weights = checked_weights(sample_weight, rows.shape[0])
    fit = Fit(estimator, rows, y, None if sample_weight is None else weights, loss, penalty_per_example)
    built = builder(fit)
    if loss is not None and not built.stretched:
        message = (
            f"loss was given for {fit.name}, whose own has no kinks and is read off it. Omit it, or write "
            "Influence(Objective(…), (X, y))."
        )
        raise InvalidInput(message)
    examples = _examples(fit, built)
    examples.names = names
    encoder = SklearnEncoder(transformers, estimator, built)
    examples.encoded_by = encoder.mark
    _compare_predictors(fit, built)
    influence = Influence(built.objective, examples, encoder=encoder, **settings)
    _warn(influence, fit, built, transformers)
    return influence


def _examples(fit: Fit, built: Built) -> Examples:
    """The training rows as the objective takes them.

    Raises:
        InvalidInput: if X and y have different lengths.
    """
    targets = built.targets(fit.y)
    if len(targets) != fit.n:
        message = f"X has {fit.n} rows and y has {len(targets)}. Pass one label per row, in the order of the rows."
        raise InvalidInput(message)
    examples = Examples(built.inputs(fit.X), targets, sample_weight=fit.sample_weight)
    of_classes = built.class_weights(targets)
    if not (of_classes == 1).all():
        examples.weights = examples.sample_weight * of_classes
    return examples


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


def _builder(estimator: Any, *, inside: bool) -> Builder:
    """What reads the estimator; `inside` a Pipeline the advice for those that are refused names its last step.

    Raises:
        UnsupportedModel: if there is none.
    """
    name = type(estimator).__name__
    known = type(estimator).__module__.startswith("sklearn.")
    if known and name in BUILDERS:
        return BUILDERS[name]
    supported = ", ".join(BUILDERS)
    if known and name in REFUSED:
        rows = "model[:-1].transform(X)" if inside else "X"
        prefit = name == "StackingClassifier" and estimator.cv == "prefit"
        why = (_PREFIT if prefit else REFUSED[name]).format(model="model[-1]" if inside else "model", X=rows)
    elif any(word in name for word in ("Tree", "Forest", "Boost", "Bagging", "Neighbors")):
        why = (
            "is not fitted by minimising a smooth function of parameters, so influence functions do not apply to "
            "it. Retrain without the rows instead"
        )
    elif isinstance(estimator, type):
        name, why = estimator.__name__, "is a class, not a fitted estimator. Pass the object that fit() returned"
    elif hasattr(estimator, "transform") and not hasattr(estimator, "predict"):
        why = (
            "transforms X and predicts nothing, so there is no loss to explain. Pass the estimator after it, or a "
            "fitted Pipeline that ends in one"
        )
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


def _compare_predictors(fit: Fit, built: Built) -> None:
    """Our predictions must be the estimator's own: otherwise this is another model than the one that was read."""
    chosen = np.unique(np.linspace(0, fit.n - 1, _COMPARED_ROWS).astype(np.int64))
    X = fit.X[chosen]
    inputs = built.inputs(X)
    ours = built.predictor(built.objective, inputs if scipy.sparse.issparse(inputs) else as_tensor(inputs).double())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # scikit-learn warns about missing feature names
        theirs = np.asarray(built.own(X)).reshape(len(chosen), -1)
    gap = float(np.abs(ours.numpy() - theirs).max())
    single = any(str(dtype).rpartition(".")[2] in {"float16", "float32"} for dtype in (theirs.dtype, fit.X.dtype))
    tolerance = 1e-3 if single else 1e-8
    if not gap <= tolerance * (1 + float(np.abs(theirs).max())):
        message = (
            f"{fit.name} predicts values that differ by {gap:.3g} from those of its fitted parameters (coef_ · x + "
            "intercept_, or what stands for them). Was the estimator changed after fit()? Refit it."
        )
        raise UnsupportedModel(message)


def _cross_fitted(transformers: Any) -> str:
    """What to add about a TargetEncoder, whose fit_transform gives other columns than its transform, or ""."""
    if not any(type(part).__name__ == "TargetEncoder" for part in _parts(transformers)):
        return ""
    return (
        "; or it is the TargetEncoder, whose fit_transform encodes each row by other rows (cross-fitting), which "
        "transform does not, so the model was fitted on other columns than transform gives. Encode first, Z = "
        "encoder.fit(X, y).transform(X), and fit and explain the model on Z"
    )


def _parts(transformer: Any) -> Iterator[Any]:
    """A transformer, and those inside it where it is a Pipeline, ColumnTransformer or FeatureUnion."""
    yield transformer
    for listed in ("steps", "transformers_", "transformer_list"):
        for entry in getattr(transformer, listed, ()):
            yield from _parts(entry[1])


def _warn(influence: Influence, fit: Fit, built: Built, transformers: Any) -> None:
    """A TheoryWarning with the number, when θ̂ misses the minimum by more than the fit's own method explains.

    Of an iteration that stopped early by what the miss does to the values; of a closed form, which misses by rounding
    only, any miss says that these are not the data of the fit.
    """
    exact = built.closed_form and not scipy.sparse.issparse(influence.examples.x)
    missed = rows_from_minimum(influence.sweep, influence.risk_gradient)
    size = float(influence.risk_gradient.norm())
    if built.stretched:
        message = (
            f"{built.stretched}. There ‖∇R‖ = {size:.3g}, {distance(influence.system)}. Compare it with refits: "
            "agreement(scores, leave_one_out(influence, (Xq, yq), rows))."
        )
        warnings.warn(message, TheoryWarning, stacklevel=4)
        return
    operator = influence.operator
    hidden = rows_by_scale(influence.system, operator) if isinstance(operator, LinearHessian) else 0.0
    exact = exact and (missed >= _ROWS_MISSED_BY_ROUNDING or hidden >= _ROWS_MISSED_BY_ITERATION)
    if size < 1e-12 or not (exact or max(missed, hidden) >= _ROWS_MISSED_BY_ITERATION):
        return
    away = distance(influence.system)
    if away.kept and not exact and not np.isnan(away.values):  # what could not be worked out silences nothing
        return
    settings = [
        f"{name}={getattr(fit.estimator, name)}"
        for name in ("tol", "max_iter", "solver")
        if hasattr(fit.estimator, name)
    ]
    others = "X, y, sample_weight or a setting changed since fit() are not those of the fit"
    encoded = _cross_fitted(transformers)
    why = (
        f"Probably {others}: pass those{encoded}."
        if exact
        else f"Either it stopped early ({', '.join(settings)}): refit with a smaller tol and a larger max_iter; or "
        f"{others}: pass those{encoded}."
    )
    message = f"{fit.name} is not at a minimum of its objective on these data: ‖∇R‖ = {size:.3g}, {away}. {why}"
    warnings.warn(message, TheoryWarning, stacklevel=4)
