"""Estimators whose optimum is not smooth, or not reached: hinges, tubes, SGD, networks. They report ‖∇R‖ instead."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import pytest
import scipy.sparse
import torch
from sklearn.base import clone
from sklearn.linear_model import SGDClassifier, SGDRegressor
from sklearn.metrics.pairwise import rbf_kernel
from sklearn.neural_network import MLPClassifier, MLPRegressor
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.svm import SVC, SVR, LinearSVC, LinearSVR

import upweight as uw
from estimators import (
    QUERIES,
    N,
    close,
    hinge,
    logistic,
    numbered,
    poisson,
    squared_hinge,
    squared_tube,
    squares,
    targets,
    tube,
)
from upweight import calculus, penalties


def pairs(model, X, y):
    """One-vs-one: the hinge of every pair that contains the row's class."""
    eta, number = clone(model).set_params(decision_function_shape="ovo"), numbered(model, y)
    eta.__dict__.update(model.__dict__ | {"decision_function_shape": "ovo"})
    eta = eta.decision_function(X)
    total, column = np.zeros(len(y)), 0
    for i in range(len(model.classes_)):
        for j in range(i + 1, len(model.classes_)):
            sign = np.where(number == i, 1, -1)
            total += np.isin(number, [i, j]) * np.maximum(0, 1 - sign * eta[:, column])
            column += 1
    return total


def modified_huber(model, X, y):
    z = (2 * numbered(model, y) - 1) * model.decision_function(X)
    return np.where(z >= -1, np.maximum(0, 1 - z) ** 2, -4 * z)


def huber(model, X, y):
    r = np.abs(model.predict(X) - y)
    return np.where(r <= model.epsilon, r**2 / 2, model.epsilon * (r - model.epsilon / 2))


def log_probability(model, X, y):
    return -model.predict_log_proba(X)[np.arange(len(y)), numbered(model, y)]


@dataclass(frozen=True)
class Row:
    build: Callable
    task: str
    loss: Callable
    settings: dict = field(default_factory=dict)
    class_weight: dict | None = None
    kinks: str = ""  # the loss that is reported, where a smooth one stands for it

    def estimator(self):
        extra = {"class_weight": self.class_weight} if self.class_weight else {}
        return self.build(**self.settings, **extra)


UNEVEN = {"no": 3.0, "yes": 0.5}
SURE = {"tol": 1e-9}
LONG = {"tol": 1e-9, "max_iter": 1_000_000}
SGD = {"random_state": 0, "max_iter": 2000, "tol": 1e-6, "alpha": 0.01}
NET = {"random_state": 0, "hidden_layer_sizes": (4,), "activation": "tanh", "alpha": 0.5}
ADAM = NET | {"max_iter": 30, "batch_size": 16}
LBFGS = NET | {"solver": "lbfgs", "max_iter": 20_000, "max_fun": 10**6, "tol": 1e-12}
TUBE = "epsilon_insensitive(0.1)"

STRETCHED = {
    "linear svc": Row(LinearSVC, "binary", hinge, {"loss": "hinge", "random_state": 0} | LONG, UNEVEN, "hinge"),
    "linear svr": Row(LinearSVR, "number", tube, {"epsilon": 0.1, "random_state": 0} | LONG, kinks=TUBE),
    "svc": Row(SVC, "binary", hinge, {"kernel": "linear"} | SURE, UNEVEN, "hinge"),
    "svc rbf": Row(SVC, "binary", hinge, SURE, UNEVEN, "hinge"),
    "svc poly": Row(SVC, "binary", hinge, {"kernel": "poly", "degree": 2, "coef0": 1.0} | SURE, kinks="hinge"),
    "svc of three": Row(SVC, "three", pairs, {"kernel": "linear"} | SURE, kinks="hinge, one-vs-one"),
    "svc rbf of three": Row(
        SVC, "three", pairs, {"C": 0.5} | SURE, {"a": 2.0, "b": 0.3, "c": 1.0}, kinks="hinge, one-vs-one"
    ),
    "svc of a function": Row(SVC, "binary", hinge, {"kernel": rbf_kernel} | SURE, kinks="hinge"),
    "svr": Row(SVR, "number", tube, {"kernel": "linear"} | SURE, kinks=TUBE),
    "svr rbf": Row(SVR, "number", tube, SURE, kinks=TUBE),
    "sgd hinge": Row(SGDClassifier, "binary", hinge, SGD, UNEVEN, "hinge"),
    "sgd log": Row(SGDClassifier, "binary", logistic, SGD | {"loss": "log_loss"}, UNEVEN),
    "sgd squared hinge": Row(SGDClassifier, "binary", squared_hinge, SGD | {"loss": "squared_hinge"}),
    "sgd modified huber": Row(SGDClassifier, "binary", modified_huber, SGD | {"loss": "modified_huber"}),
    "sgd squares": Row(SGDRegressor, "number", squares, SGD),
    "sgd huber": Row(SGDRegressor, "number", huber, SGD | {"loss": "huber", "epsilon": 0.4}),
    "sgd tube": Row(SGDRegressor, "number", tube, SGD | {"loss": "epsilon_insensitive"}, kinks=TUBE),
    "sgd squared tube": Row(SGDRegressor, "number", squared_tube, SGD | {"loss": "squared_epsilon_insensitive"}),
    "network": Row(MLPClassifier, "binary", log_probability, ADAM),
    "network of three": Row(MLPClassifier, "three", log_probability, LBFGS),
    "network of numbers": Row(MLPRegressor, "numbers", squares, LBFGS),
    "network with relu": Row(MLPRegressor, "number", squares, ADAM | {"activation": "relu", "solver": "sgd"}),
    "deep network": Row(
        MLPRegressor, "number", squares, LBFGS | {"hidden_layer_sizes": (3, 2), "activation": "logistic"}
    ),
}


@dataclass(frozen=True)
class Fit:
    row: Row
    model: object
    X: np.ndarray
    y: np.ndarray
    weights: np.ndarray
    on: tuple

    def explain(self, model=None, X=None, **settings):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", uw.errors.TheoryWarning)
            return uw.explain(
                self.model if model is None else model,
                self.X if X is None else X,
                self.y,
                sample_weight=self.weights,
                **settings,
            )


@pytest.fixture(scope="module", params=STRETCHED)
def fit(request):
    row = STRETCHED[request.param]
    draw = np.random.default_rng(3)
    X = draw.normal(size=(N + QUERIES, 3))
    y = targets(row.task, X, draw)
    weights = draw.uniform(0.5, 2.0, size=N)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # not converged, on purpose
        model = row.estimator().fit(X[:N], y[:N], sample_weight=weights)
    return Fit(row, model, X[:N], y[:N], weights, (X[N:], y[N:]))


def test_the_loss_is_the_estimators_own(fit):
    scores = fit.explain().on_loss(*fit.on)
    close(scores.query_values, fit.row.loss(fit.model, *fit.on), 1e-8)
    assert scores.measure == (fit.row.kinks or "loss")
    assert scores.certificate.gradient_norm > 0


def test_one_warning_names_the_width_and_the_gradient(fit):
    if not fit.row.kinks:
        pytest.skip("its loss is smooth")
    with pytest.warns(uw.errors.TheoryWarning) as told:
        uw.explain(fit.model, fit.X, fit.y, sample_weight=fit.weights)
    assert len(told) == 1
    text = str(told[0].message)
    assert "0.001" in text
    assert fit.row.kinks.split(",")[0] in text
    assert "‖∇R‖ = " in text


def test_the_risk_is_what_fit_minimised(fit):
    """No small weighted change of all parameters lowers a converged, exactly stated objective by more than rounding."""
    objective = fit.explain().objective
    if isinstance(fit.model, SVC | SVR):
        at = objective.blocks["coef"]
        assert penalties.value(objective) - held(objective) == pytest.approx(
            float((at**2).sum()) / (2 * fit.model.C * N), rel=1e-9
        )
        return
    model = fit.model
    if isinstance(model, MLPClassifier | MLPRegressor):
        squares_of_weights = sum((coef**2).sum() for coef in model.coefs_)
        batch = N if model.solver == "lbfgs" else model.batch_size
        doubled = 2 if isinstance(model, MLPRegressor) else 1
        expected = doubled * model.alpha * squares_of_weights / (2 * batch)
    elif isinstance(model, SGDClassifier | SGDRegressor):
        expected = (2 if model.loss == "squared_error" else 1) * model.alpha * (model.coef_**2).sum() / 2
    else:
        expected = ((model.coef_**2).sum() + float(np.squeeze(model.intercept_)) ** 2) / (2 * model.C * N)
    assert penalties.value(objective) - held(objective) == pytest.approx(float(expected), rel=1e-9)


def held(objective):
    """The part of the penalty that holds an unidentified intercept: −½ strength · intercept²."""
    tilt = objective.penalty.tilt.get("intercept")
    return 0.0 if tilt is None else float((tilt * objective.blocks["intercept"]).sum()) / 2


def test_networks_that_converged_are_at_a_minimum(fit):
    if getattr(fit.model, "solver", "") != "lbfgs":
        pytest.skip("not a network that converged")
    # with several outputs scikit-learn's L-BFGS stalls: its loss is a mean over them, its gradient that of the sum
    assert fit.explain().check().rows_from_minimum < (0.5 if fit.row.task == "numbers" else 0.05)


def test_the_smoother_the_nearer_is_the_gradient_to_zero(fit):
    """A hinge's own optimum has slopes between 0 and 1 at its kink, so the miss is that of its few rows there."""
    if not fit.row.kinks or isinstance(fit.model, SGDClassifier | SGDRegressor):
        pytest.skip("not a converged fit with kinks")
    assert fit.explain().check().rows_from_minimum < 8


def test_sparse_and_plain_rows_give_the_same(fit):
    if callable(getattr(fit.model, "kernel", None)):
        pytest.skip("the function takes dense rows")
    mine, other = fit.explain(), fit.explain(X=scipy.sparse.csr_array(fit.X))
    queries = (scipy.sparse.csr_matrix(fit.on[0]), fit.on[1])
    close(other.on_loss(*queries).values, mine.on_loss(*fit.on).values, 1e-9)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        sparse = clone(fit.model).fit(scipy.sparse.csr_matrix(fit.X), fit.y, sample_weight=fit.weights)
    fitted_on_sparse = fit.explain(sparse, scipy.sparse.csc_matrix(fit.X)).on_loss(*queries)
    close(fitted_on_sparse.query_values, fit.row.loss(sparse, *queries), 1e-8)


def test_a_pipeline_is_its_estimator_on_transformed_rows(fit):
    scaler = StandardScaler().fit(3 * fit.X + 1)
    pipeline = make_pipeline(scaler, clone(fit.model))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pipeline.fit(3 * fit.X + 1, fit.y, **{f"{pipeline.steps[-1][0]}__sample_weight": fit.weights})
    whole = fit.explain(pipeline, 3 * fit.X + 1).on_loss(3 * fit.on[0] + 1, fit.on[1])
    part = fit.explain(pipeline[-1], pipeline[:-1].transform(3 * fit.X + 1))
    close(whole.values, part.on_loss(pipeline[:-1].transform(3 * fit.on[0] + 1), fit.on[1]).values, 1e-12)


def test_a_row_of_weight_zero_has_no_value(fit):
    weights = fit.weights.copy()
    weights[4] = 0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = clone(fit.model).fit(fit.X, fit.y, sample_weight=weights)
        influence = uw.explain(model, fit.X, fit.y, sample_weight=weights)
    scores = influence.on_loss(*fit.on)
    close(scores.query_values, fit.row.loss(model, *fit.on), 1e-8)
    assert not scores.values[:, 4].any()


def test_a_new_label_is_a_replaced_row_and_brings_its_class_weight(fit):
    if not hasattr(fit.model, "classes_"):
        pytest.skip("numbers have no classes")
    influence = fit.explain()
    other = next(label for label in fit.model.classes_ if label != fit.y[0])
    relabelled = influence.of_relabeling([0], [other], on=fit.on)
    close(relabelled.values, influence.of_replacing([0], fit.X[:1], [other], on=fit.on).values, 1e-12)
    if fit.row.class_weight is None:
        return
    gradients = calculus.gradients(
        influence.objective, influence.encoder.examples(fit.X[[0, 0]], [fit.y[0], other]).batch([0, 1])
    )
    weights = torch.tensor([fit.row.class_weight[label] for label in (fit.y[0], other)], dtype=torch.float64)
    gradients = gradients + influence.penalty_share
    change = fit.weights[0] * (weights[1] * gradients[1] - weights[0] * gradients[0])
    S = influence.prepared.solve(scored(influence, fit.on)).x
    close(relabelled.values[:, 0], -(S @ change).numpy() / N, 1e-9)


def scored(influence, on):
    return calculus.gradients(influence.objective, influence.encoder.examples(*on).batch(slice(None)))


def test_leave_one_out_is_fit_without_the_row(fit):
    """Class weights stay, the kernel stays, and a share of the penalty goes with the row where it does by default."""
    influence = fit.explain()
    row = int(np.abs(influence.on_loss(*fit.on).values).max(0).argmax())
    outcomes = uw.leave_one_out(influence, fit.on, [row], progress=False)
    assert np.abs(outcomes.control).max() < 1e-5
    assert outcomes.measure == (fit.row.kinks or "loss")
    weights = fit.weights.copy()
    weights[row] = 0
    again = clone(fit.model)
    if getattr(again, "gamma", None) == "scale":
        again.set_params(gamma=fit.model._gamma)
    if isinstance(again, SGDClassifier | SGDRegressor):
        table = fit.row.class_weight or {}
        total = fit.weights * np.array([table.get(label, 1.0) for label in fit.y])
        again.set_params(alpha=again.alpha * (1 - total[row] / total.sum()))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        # libsvm loses count of its rows when one of a function's kernel weighs nothing, so the row is dropped here
        keep = weights > 0 if callable(getattr(again, "kernel", None)) else np.full(N, True)
        again.fit(fit.X[keep], fit.y[keep], sample_weight=weights[keep])
    truth = fit.row.loss(again, *fit.on) - fit.row.loss(fit.model, *fit.on)
    close(outcomes.actual[:, 0], truth, 1e-4)


def test_another_width_can_be_named_and_only_a_fitting_one(fit):
    if not fit.row.kinks:
        with pytest.raises(uw.errors.InvalidInput, match="loss was given"):
            fit.explain(loss=uw.losses.smooth_hinge(0.1))
        return
    tube = fit.row.kinks == TUBE
    wide = uw.losses.smooth_epsilon_insensitive(0.1, 0.5) if tube else uw.losses.smooth_hinge(0.5)
    sharp = uw.losses.epsilon_insensitive(0.1) if tube else uw.losses.hinge
    wrong = uw.losses.smooth_hinge(0.5) if tube else uw.losses.squared_hinge
    with pytest.warns(uw.errors.TheoryWarning, match="0.5"):
        influence = uw.explain(fit.model, fit.X, fit.y, sample_weight=fit.weights, loss=wide)
    scores = influence.on_loss(*fit.on)
    close(scores.query_values, fit.row.loss(fit.model, *fit.on), 1e-8)
    assert not np.allclose(scores.values, fit.explain().on_loss(*fit.on).values, rtol=1e-2)
    with pytest.warns(uw.errors.TheoryWarning, match="t = 0"):
        flat = uw.explain(fit.model, fit.X, fit.y, sample_weight=fit.weights, loss=sharp)
    close(flat.on_loss(*fit.on).query_values, scores.query_values, 1e-12)
    assert np.isfinite(flat.on_loss(*fit.on).values).all()
    with pytest.raises(uw.errors.InvalidInput, match="which minimises"):
        fit.explain(loss=wrong)


def test_kernels_predict_with_their_features(fit):
    influence = fit.explain()
    if getattr(fit.model, "kernel", "linear") == "linear":
        assert influence.of_perturbing([0, 1], on=fit.on).shape == (QUERIES, 2, 3)
        return
    with pytest.raises(uw.errors.UnsupportedModel, match="features of its kernel"):
        influence.of_perturbing([0], on=fit.on)
    draw = np.random.default_rng(0).normal(size=(50, 3))
    ours = influence.encoder.built.predictor(
        influence.objective, torch.from_numpy(influence.encoder.built.inputs(draw))
    )
    theirs = influence.encoder.built.own(draw).reshape(50, -1)
    close(ours.numpy(), theirs, 1e-8)


@pytest.mark.parametrize("kind", ["class", "number"])
def test_smoothed_svms_predict_what_refits_do(kind):
    """Pearson over .9, and the right size, on a problem where most rows are support vectors."""
    draw = np.random.default_rng(1)
    X = draw.normal(size=(140, 40))
    score = X @ draw.normal(size=40) / np.sqrt(40)
    if kind == "class":
        model, y = SVC(C=0.3, tol=1e-9), np.where(score + draw.normal(size=140) > 0, "a", "b")
    else:
        model, y = SVR(C=0.3, tol=1e-9), 1.6 * score + 0.5 * draw.normal(size=140)
    model.fit(X[:120], y[:120])
    with pytest.warns(uw.errors.TheoryWarning, match=r"\(.*0\.001\)"):
        influence = uw.explain(model, X[:120], y[:120])
    outcomes = uw.leave_one_out(influence, (X[120:], y[120:]), range(0, 120, 3), progress=False)
    agreement = uw.agreement(influence.on_loss(X[120:], y[120:]), outcomes)
    assert agreement.pearson > 0.9
    assert 0.8 < agreement.slope < 1.25


def test_without_free_support_vectors_the_intercept_is_said_to_be_unidentified():
    X = np.array([[-1.0], [-3.0], [2.0], [4.0]])
    y = np.array(["a", "a", "b", "b"])
    model = SVC(kernel="linear", C=0.01, tol=1e-9).fit(X, y)
    assert np.allclose(np.abs(model.dual_coef_), 0.01)
    assert model.intercept_[0]
    with pytest.warns(uw.errors.TheoryWarning, match="intercept is unidentified.*none is free"):
        influence = uw.explain(model, X, y)
    assert abs(penalties.gradient(influence.objective)[-1]) < 1e-9 * penalties.diagonal(influence.objective)[-1]
    moved = influence.on_params()
    assert np.abs(moved[:, 1]).max() < 1e-4 * np.abs(moved[:, 0]).max()


def test_networks_follow_every_solver_and_loss():
    draw = np.random.default_rng(5)
    X = draw.normal(size=(30, 3))
    counts = draw.poisson(2.0, size=30).astype(float)
    if "loss" in MLPRegressor().get_params():
        model = MLPRegressor(loss="poisson", **LBFGS).fit(X, counts)
        influence = uw.explain(model, X, counts)
        close(influence.on_loss(X, counts).query_values, poisson(model, X, counts), 1e-9)
        assert influence.check().rows_from_minimum < 0.1
    model = MLPRegressor(**(NET | {"max_iter": 5, "batch_size": "auto"}))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.fit(X, counts)
    with pytest.warns(uw.errors.TheoryWarning, match="MLPRegressor is not at a minimum"):
        influence = uw.explain(model, X, counts)
    assert influence.objective.penalty.strengths["coefs.0"] == pytest.approx(2 * 0.5 / 30)
