"""The law-book of estimators: one table × what must hold for each. The oracle is scikit-learn itself, fitted again."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import pytest
import scipy.sparse
from scipy.special import logsumexp
from sklearn.base import clone
from sklearn.linear_model import LinearRegression, LogisticRegression, Ridge, RidgeClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

import upweight as uw

N, D, QUERIES, ROWS = 60, 3, 4, [0, 17, 41]
TIGHT = {"tol": 1e-12, "max_iter": 20_000}


@dataclass(frozen=True)
class Row:
    """One estimator: how it is built, what its labels are, and the class weights that a refit must hold fixed."""

    build: object
    task: str
    settings: dict = field(default_factory=dict)
    class_weight: dict | None = None
    rtol: float = 1e-4

    def estimator(self):
        extra = {"class_weight": self.class_weight} if self.class_weight else {}
        return self.build(**self.settings, **extra)


ESTIMATORS = {
    "logistic": Row(LogisticRegression, "binary", {"C": 0.7} | TIGHT),
    "logistic newton-cholesky": Row(LogisticRegression, "binary", {"solver": "newton-cholesky"} | TIGHT),
    "logistic liblinear": Row(LogisticRegression, "binary", {"solver": "liblinear", "intercept_scaling": 2.0} | TIGHT),
    "logistic without intercept": Row(LogisticRegression, "binary", {"fit_intercept": False} | TIGHT),
    "logistic without penalty": Row(LogisticRegression, "binary", {"C": np.inf} | TIGHT),
    "logistic with class weights": Row(LogisticRegression, "binary", TIGHT, {"no": 3.0, "yes": 0.5}),
    "multinomial": Row(LogisticRegression, "three", {"C": 0.7} | TIGHT),
    "multinomial without penalty": Row(LogisticRegression, "three", {"C": np.inf} | TIGHT),
    "multinomial without intercept": Row(LogisticRegression, "three", {"fit_intercept": False} | TIGHT),
    "multinomial with class weights": Row(LogisticRegression, "three", TIGHT, {"a": 2.0, "b": 0.3, "c": 1.0}),
    "linear regression": Row(LinearRegression, "number", {}),
    "linear regression without intercept": Row(LinearRegression, "number", {"fit_intercept": False}),
    "linear regression with two outputs": Row(LinearRegression, "numbers", {}),
    "ridge": Row(Ridge, "number", {"alpha": 3.0}, rtol=1e-6),
    "ridge with a penalty per output": Row(Ridge, "numbers", {"alpha": np.array([0.5, 7.0])}),
    "ridge classifier": Row(RidgeClassifier, "binary", {"alpha": 2.0}),
    "ridge classifier of three": Row(RidgeClassifier, "three", {"alpha": 2.0}, {"a": 2.0, "b": 0.3, "c": 1.0}),
}


@dataclass(frozen=True)
class Fit:
    row: Row
    model: object
    X: np.ndarray
    y: np.ndarray
    weights: np.ndarray
    Xq: np.ndarray
    yq: np.ndarray

    def influence(self, **settings):
        return uw.explain(self.model, self.X, self.y, sample_weight=self.weights, **settings)

    def effective(self, weights):
        """wᵢ: sample weight times class weight; a row's share of the penalty goes by it."""
        table = self.row.class_weight
        return weights * np.array([table[label] for label in self.y]) if table else weights

    def refitted(self, weights, *, folded=False, X=None, y=None):
        """The queries' losses after a refit by scikit-learn; folded scales the penalty with the weight that is left."""
        again = clone(self.model)
        share = self.effective(weights).sum() / self.effective(self.weights).sum() if folded else 1.0
        if folded and hasattr(again, "alpha"):
            again.set_params(alpha=again.alpha * share)
        elif folded and hasattr(again, "C"):
            again.set_params(C=again.C / share)
        again.fit(self.X if X is None else X, self.y if y is None else y, sample_weight=weights)
        return losses(again, self.Xq, self.yq)


def losses(model, X, y):
    """The loss of each example by its textbook formula, from what scikit-learn itself predicts."""
    if hasattr(model, "classes_"):
        eta, number = model.decision_function(X), np.searchsorted(model.classes_, y)
        if isinstance(model, LogisticRegression):
            if eta.ndim == 1:
                return np.logaddexp(0, -(2 * number - 1) * eta)
            return logsumexp(eta, axis=1) - eta[np.arange(len(y)), number]
        target = 2 * number - 1 if eta.ndim == 1 else np.where(number[:, None] == np.arange(eta.shape[1]), 1, -1)
        return ((eta - target) ** 2).reshape(len(y), -1).sum(1)
    return ((model.predict(X) - y) ** 2).reshape(len(y), -1).sum(1)


def targets(task, X, draw):
    if task == "binary":
        return np.where(X @ [1.0, -1.0, 0.5] + draw.normal(size=len(X)) > 0, "yes", "no")
    if task == "three":
        return np.array(["a", "b", "c"])[(X @ draw.normal(size=(D, 3)) + draw.normal(size=(len(X), 3))).argmax(1)]
    noise = draw.normal(size=(len(X), 2))
    return (X @ draw.normal(size=(D, 2)) + noise)[:, 0] if task == "number" else X @ draw.normal(size=(D, 2)) + noise


@pytest.fixture(scope="module", params=ESTIMATORS)
def fit(request):
    row = ESTIMATORS[request.param]
    draw = np.random.default_rng(7)
    X = draw.normal(size=(N + QUERIES, D))
    y = targets(row.task, X, draw)
    weights = draw.uniform(0.5, 2.0, size=N)
    model = row.estimator().fit(X[:N], y[:N], sample_weight=weights)
    return Fit(row, model, X[:N], y[:N], weights, X[N:], y[N:])


def stencil(function, step):
    a, b, c, d = (function(k * step) for k in (-2, -1, 1, 2))
    return (a - 8 * b + 8 * c - d) / (12 * step)


def close(ours, theirs, rtol):
    np.testing.assert_allclose(ours, theirs, rtol=rtol, atol=rtol * np.abs(theirs).max())


def test_the_loss_is_the_estimators_own(fit):
    close(fit.influence().on_loss(fit.Xq, fit.yq).query_values, losses(fit.model, fit.Xq, fit.yq), 1e-9)


def test_the_gradient_vanishes_at_the_fit(fit):
    report = fit.influence().check()
    assert report.rows_from_minimum < 1e-3
    assert report.ok


@pytest.mark.parametrize("folded", [False, True])
def test_scores_are_the_derivative_of_refits_in_the_rows_weight(fit, folded):
    """Both meanings of the penalty; sample weights and class weights given; the sign and 1/n by deed."""

    def refit(row, change):
        weights = fit.weights.copy()
        weights[row] *= 1 + change
        return fit.refitted(weights, folded=folded)

    truth = np.stack([-stencil(lambda t, row=row: refit(row, t), 0.05) for row in ROWS], 1)
    close(fit.influence(penalty_per_example=folded).on_loss(fit.Xq, fit.yq).values[:, ROWS], truth, fit.row.rtol)


def test_the_default_meaning_of_the_penalty_is_sample_weight_zero(fit):
    default, fixed = fit.influence(), fit.influence(penalty_per_example=False)
    assert np.array_equal(default.on_loss(fit.Xq, fit.yq).values, fixed.on_loss(fit.Xq, fit.yq).values)


def test_of_removing_is_nearer_to_the_refit_than_first_order(fit):
    influence = fit.influence()
    on = (fit.Xq, fit.yq)
    weights = np.tile(fit.weights, (len(ROWS), 1))
    weights[range(len(ROWS)), ROWS] = 0
    truth = np.stack([fit.refitted(w) - losses(fit.model, *on) for w in weights], 1)
    newton, first = influence.of_removing(ROWS, on=on), influence.on_loss(*on).values[:, ROWS]
    assert np.linalg.norm(newton.values - truth) < 0.8 * np.linalg.norm(first - truth)
    if not isinstance(fit.model, LogisticRegression):
        close(newton.values, truth, 1e-8)


def test_a_new_label_brings_its_class_weight(fit):
    if fit.row.task not in ("binary", "three"):
        pytest.skip("numbers have no classes")
    row, on = ROWS[1], (fit.Xq, fit.yq)
    other = next(label for label in fit.model.classes_ if label != fit.y[row])
    X, y = np.concatenate([fit.X, fit.X[[row]]]), np.append(fit.y, other)

    def refit(moved):
        """A part of the row's weight moves to the same row with the other label."""
        weights = np.append(fit.weights, moved * fit.weights[row])
        weights[row] *= 1 - moved
        return fit.refitted(weights, X=X, y=y)

    f0, f1, f2, f3 = (refit(t) for t in (0.0, 0.02, 0.04, 0.06))
    truth = (-11 * f0 + 18 * f1 - 9 * f2 + 2 * f3) / 0.12  # one-sided: weights stay ≥ 0
    close(fit.influence().of_relabeling([row], [other], on=on).values[:, 0], truth, 1e-3)


def test_a_row_of_weight_zero_has_no_value_and_changes_nothing(fit):
    weights = fit.weights.copy()
    weights[ROWS[0]] = 0
    model = clone(fit.model).fit(fit.X, fit.y, sample_weight=weights)
    scores = uw.explain(model, fit.X, fit.y, sample_weight=weights).on_loss(fit.Xq, fit.yq)
    assert not scores.values[:, ROWS[0]].any()
    keep = np.arange(N) != ROWS[0]
    smaller = clone(fit.model)
    without = uw.explain(
        smaller.fit(fit.X[keep], fit.y[keep], sample_weight=weights[keep]),
        fit.X[keep],
        fit.y[keep],
        sample_weight=weights[keep],
    )
    close(scores.values[:, keep], without.on_loss(fit.Xq, fit.yq).values, fit.row.rtol)


def test_a_pipeline_is_its_estimator_on_transformed_rows(fit):
    scaler = StandardScaler().fit(3 * fit.X + 1)
    pipeline = make_pipeline(scaler, clone(fit.model))
    inside = {f"{pipeline.steps[-1][0]}__sample_weight": fit.weights}
    pipeline.fit(3 * fit.X + 1, fit.y, **inside)
    whole = uw.explain(pipeline, 3 * fit.X + 1, fit.y, sample_weight=fit.weights)
    Z, Zq = (pipeline[:-1].transform(3 * A + 1) for A in (fit.X, fit.Xq))
    part = uw.explain(pipeline[-1], Z, fit.y, sample_weight=fit.weights)
    close(whole.on_loss(3 * fit.Xq + 1, fit.yq).values, part.on_loss(Zq, fit.yq).values, 1e-12)


@pytest.mark.parametrize("kind", [scipy.sparse.csr_matrix, scipy.sparse.csc_array, lambda X: X.tolist()])
def test_sparse_and_plain_rows_give_the_same(fit, kind):
    other = uw.explain(fit.model, kind(fit.X), fit.y, sample_weight=fit.weights)
    on = (fit.Xq, fit.yq)
    close(other.on_loss(kind(fit.Xq), fit.yq).values, fit.influence().on_loss(*on).values, 1e-9)
    close(other.of_removing([ROWS], on=on).values, fit.influence().of_removing([ROWS], on=on).values, 1e-9)
    close(other.of_self().values, fit.influence().of_self().values, 1e-9)


def test_a_balanced_class_weight_is_read_as_fit_computed_it():
    draw = np.random.default_rng(1)
    X = draw.normal(size=(N, D))
    y = targets("three", X, draw)
    for weights in (None, draw.uniform(0.5, 2, size=N)):
        model = LogisticRegression(class_weight="balanced", **TIGHT).fit(X, y, sample_weight=weights)
        assert uw.explain(model, X, y, sample_weight=weights).check().rows_from_minimum < 1e-3


@pytest.mark.parametrize(
    ("settings", "told"),
    [({"C": 0.4}, "not at a minimum"), ({"C": 3.0}, "tol="), ({"class_weight": {"yes": 2.0}}, "rows")],
)
def test_a_setting_changed_after_the_fit_is_noticed(settings, told):
    draw = np.random.default_rng(1)
    X = draw.normal(size=(N, D))
    y = targets("binary", X, draw)
    model = LogisticRegression(C=1.0, **TIGHT).fit(X, y).set_params(**settings)
    with pytest.warns(uw.errors.TheoryWarning, match=told):
        uw.explain(model, X, y)


def test_a_ridge_of_another_alpha_or_forgotten_weights_are_noticed():
    draw = np.random.default_rng(1)
    X = draw.normal(size=(N, D))
    y = targets("number", X, draw)
    with pytest.warns(uw.errors.TheoryWarning, match="not those of the fit"):
        uw.explain(Ridge(alpha=1.0).fit(X, y).set_params(alpha=1.3), X, y)
    with pytest.warns(uw.errors.TheoryWarning, match="not those of the fit"):
        uw.explain(Ridge(alpha=1.0).fit(X, y, sample_weight=np.full(N, 1.1)), X, y)


def test_an_early_stop_names_the_settings_to_change():
    draw = np.random.default_rng(1)
    X = draw.normal(size=(N, D)) * [1, 10, 100]
    y = targets("binary", X / [1, 10, 100], draw)
    model = LogisticRegression(tol=10.0).fit(X, y)
    with pytest.warns(uw.errors.TheoryWarning, match=r"refit with a smaller tol and a larger max_iter"):
        uw.explain(model, X, y)
