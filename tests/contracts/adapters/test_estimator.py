"""The law-book of estimators that end at a smooth minimum: one table × what must hold for each.

The table and its oracle, scikit-learn fitted again, are in estimators.py; test_estimator_stretched.py holds the rest.
"""

from __future__ import annotations

import numpy as np
import pytest
import scipy.sparse
from sklearn.base import clone
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

import upweight as uw
from estimators import ESTIMATORS, ROWS, TIGHT, D, N, close, made, plain, signed_squares, squares, targets


@pytest.fixture(scope="module", params=ESTIMATORS)
def fit(request):
    return made(ESTIMATORS[request.param])


def stencil(function, step):
    a, b, c, d = (function(k * step) for k in (-2, -1, 1, 2))
    return (a - 8 * b + 8 * c - d) / (12 * step)


def test_the_loss_is_the_estimators_own(fit):
    scores = fit.influence().on_loss(*fit.on)
    close(scores.query_values, fit.losses(), 1e-9)
    assert scores.measure == "loss"


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

    truth = np.stack([-stencil(lambda t, row=row: refit(row, t), fit.row.step) for row in ROWS], 1)
    close(fit.influence(penalty_per_example=folded).on_loss(*fit.on).values[:, ROWS], truth, fit.row.rtol)


def test_the_default_meaning_of_the_penalty_is_the_estimators(fit):
    default, same = fit.influence(), fit.influence(penalty_per_example=fit.row.mean)
    assert np.array_equal(default.on_loss(*fit.on).values, same.on_loss(*fit.on).values)


def test_of_removing_is_nearer_to_the_refit_than_first_order(fit):
    influence = fit.influence()
    if influence.objective.linear is None:
        pytest.skip("of_removing needs a linear predictor")
    weights = np.tile(fit.weights, (len(ROWS), 1))
    weights[range(len(ROWS)), ROWS] = 0
    truth = np.stack([fit.refitted(w) - fit.losses() for w in weights], 1)
    newton, first = influence.of_removing(ROWS, on=fit.on), influence.on_loss(*fit.on).values[:, ROWS]
    smooth = fit.row.step == 0.05  # where curvature jumps between the fits, no step sees it
    assert np.linalg.norm(newton.values - truth) < (0.8 if smooth else 1) * np.linalg.norm(first - truth)
    if fit.row.loss in {squares, signed_squares} and getattr(fit.model, "link", "auto") != "log":
        close(newton.values, truth, 1e-6 if fit.row.mean else 1e-8)


@pytest.mark.parametrize("folded", [False, True])
def test_leave_one_out_is_scikit_learns(fit, folded):
    """Whatever retrains by default, and fit() itself, end where the estimator does without the row."""
    influence = fit.influence(penalty_per_example=folded)
    row = int(np.abs(influence.on_loss(*fit.on).values).max(0).argmax())
    weights = fit.weights.copy()
    weights[row] = 0
    truth = fit.refitted(weights, folded=folded) - fit.losses()
    for retrain in (None, uw.Refit()):
        outcomes = uw.leave_one_out(influence, fit.on, [row], retrain, progress=False)
        close(outcomes.actual[:, 0], truth, max(fit.row.rtol, 1e-5))


def test_a_new_label_brings_its_class_weight(fit):
    if fit.row.task not in ("binary", "three"):
        pytest.skip("numbers have no classes")
    row = ROWS[1]
    other = next(label for label in fit.model.classes_ if label != fit.y[row])
    X, y = np.concatenate([fit.X, fit.X[[row]]]), np.append(fit.y, other)

    def refit(moved):
        """A part of the row's weight moves to the same row with the other label."""
        weights = np.append(fit.weights, moved * fit.weights[row])
        weights[row] *= 1 - moved
        return fit.refitted(weights, X=X, y=y)

    step = min(0.02, 4 * fit.row.step)
    f0, f1, f2, f3 = (refit(t * step) for t in (0, 1, 2, 3))
    truth = (-11 * f0 + 18 * f1 - 9 * f2 + 2 * f3) / (6 * step)  # one-sided: weights stay ≥ 0
    close(fit.influence().of_relabeling([row], [other], on=fit.on).values[:, 0], truth, 1e-3)


def test_a_row_of_weight_zero_has_no_value_and_changes_nothing(fit):
    weights = fit.weights.copy()
    weights[ROWS[0]] = 0
    model = plain(fit.model).fit(fit.X, fit.y, sample_weight=weights)
    scores = uw.explain(model, fit.X, fit.y, sample_weight=weights).on_loss(*fit.on)
    assert not scores.values[:, ROWS[0]].any()
    keep = np.arange(N) != ROWS[0]
    smaller = plain(fit.model)
    without = uw.explain(
        smaller.fit(fit.X[keep], fit.y[keep], sample_weight=weights[keep]),
        fit.X[keep],
        fit.y[keep],
        sample_weight=weights[keep],
    )
    close(scores.values[:, keep], without.on_loss(*fit.on).values, max(fit.row.rtol, 1e-4))


def test_a_pipeline_is_its_estimator_on_transformed_rows(fit):
    scaler = StandardScaler().fit(3 * fit.X + 1)
    pipeline = make_pipeline(scaler, plain(fit.model))
    inside = {f"{pipeline.steps[-1][0]}__sample_weight": fit.weights}
    pipeline.fit(3 * fit.X + 1, fit.y, **inside)
    whole = uw.explain(pipeline, 3 * fit.X + 1, fit.y, sample_weight=fit.weights)
    Z, Zq = (pipeline[:-1].transform(3 * A + 1) for A in (fit.X, fit.Xq))
    part = uw.explain(pipeline[-1], Z, fit.y, sample_weight=fit.weights)
    close(whole.on_loss(3 * fit.Xq + 1, fit.yq).values, part.on_loss(Zq, fit.yq).values, 1e-12)


@pytest.mark.parametrize("kind", [scipy.sparse.csr_matrix, scipy.sparse.csc_array, lambda X: X.tolist()])
def test_sparse_and_plain_rows_give_the_same(fit, kind):
    mine = fit.influence()
    other = uw.explain(fit.model, kind(fit.X), fit.y, sample_weight=fit.weights)
    queries = (kind(fit.Xq), fit.yq)
    close(other.on_loss(*queries).values, mine.on_loss(*fit.on).values, 1e-9)
    if mine.objective.linear is not None:
        close(other.of_removing([ROWS], on=queries).values, mine.of_removing([ROWS], on=fit.on).values, 1e-9)
    close(other.of_self().values, mine.of_self().values, 1e-9)


def test_moving_an_input_is_the_limit_of_replacing_the_row(fit):
    """Equation 5, in the columns that the user has; kernels have none."""
    influence = fit.influence()
    if type(fit.model).__name__ == "KernelRidge":
        with pytest.raises(uw.errors.UnsupportedModel, match="Fit on the moved rows"):
            influence.of_perturbing([0], on=fit.on)
        return
    moved = influence.of_perturbing(ROWS, on=fit.on)
    assert moved.shape == (len(fit.yq), len(ROWS), D)
    for feature in range(D):
        delta = np.zeros(D)
        delta[feature] = 1e-5
        up, down = (
            influence.of_replacing(ROWS, fit.X[ROWS] + sign * delta, fit.y[ROWS], on=fit.on).values for sign in (1, -1)
        )
        close(moved[:, :, feature], (up - down) / 2e-5, 1e-5)


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
    model = clone(LogisticRegression(tol=10.0)).fit(X, y)
    with pytest.warns(uw.errors.TheoryWarning, match=r"refit with a smaller tol and a larger max_iter"):
        uw.explain(model, X, y)
