"""Predicted against really retrained, on the real data that ship with scikit-learn: slope, not only correlation."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.datasets import load_breast_cancer, load_diabetes, load_digits
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

import oracles
import upweight as uw

MOST = 100


def digits():
    """n = 1,400 training digits, 10 classes, the paper's objective; the query is the first that is misclassified."""
    X, y = load_digits(return_X_y=True)
    X, n = X / 16, 1400
    model = LogisticRegression(C=1 / (0.01 * n), tol=1e-8, max_iter=5000).fit(X[:n], y[:n])
    wrong = n + int(np.flatnonzero(model.predict(X[n:]) != y[n:])[0])
    return model, X[:n], y[:n], (X[wrong : wrong + 1], y[wrong : wrong + 1])


def breast_cancer():
    """A Pipeline, whose scaler is held fixed while the classifier is trained again; string labels."""
    bunch = load_breast_cancer()
    X, y = bunch.data, bunch.target_names[bunch.target]
    n = 469
    logistic = LogisticRegression(C=1 / (0.01 * n), tol=1e-8, max_iter=5000)
    model = make_pipeline(StandardScaler(), logistic).fit(X[:n], y[:n])
    losses = -np.log(model.predict_proba(X[n:])[np.arange(len(X) - n), np.searchsorted(model.classes_, y[n:])])
    worst = n + int(losses.argmax())
    return model, X[:n], y[:n], (X[worst : worst + 1], y[worst : worst + 1])


@pytest.fixture(scope="module", params=[digits, breast_cancer], ids=["digits", "breast_cancer"])
def study(request):
    model, X, y, on = request.param()
    influence = uw.explain(model, X, y)
    scores = influence.on_loss(*on)
    most = np.argsort(-np.abs(scores.values[0]), kind="stable")[:MOST]
    return request.param.__name__, model, (X, y), on, influence, scores, most


def refit(model, X, y, on, weights):
    """The query's loss after scikit-learn itself has trained again with these weights; a scaler stays as it is."""
    estimator = model[-1] if hasattr(model, "steps") else model
    prepare = model[:-1].transform if hasattr(model, "steps") else np.asarray
    again = type(estimator)(**estimator.get_params() | {"tol": 1e-10}).fit(prepare(X), y, sample_weight=weights)
    return -np.log(again.predict_proba(prepare(on[0]))[0, np.searchsorted(again.classes_, on[1][0])])


def test_a_row_of_weight_99_percent_is_first_order_exactly(study):
    """Refit at weight 0.99 and multiply by 100: r ≥ 0.9999 and slope in [0.99, 1.01]."""
    *_, on, influence, scores, most = study
    train = uw.Newton().bind(influence)
    queries = influence.queries(on).batch([0])

    def loss(weights):
        return float(uw.calculus.losses(influence.objective.at(train(weights)), queries)[0])

    before = loss(np.ones(influence.n))
    actual = np.array([100 * (loss(np.where(np.arange(influence.n) == row, 0.99, 1.0)) - before) for row in most])
    predicted = scores.values[0, most]
    slope = np.polyfit(predicted, actual, 1)[0]
    assert np.corrcoef(predicted, actual)[0, 1] >= 0.9999
    assert 0.99 <= slope <= 1.01


def test_removing_rows_first_order_and_newton(study):
    """Full removal of the 100 most influential rows; the Newton step is nearer to slope 1.

    Breast cancer is nearly separable: a few rows with much leverage carry a query, first order misses 1/(1 − h) of
    each , and only the Newton step has the digits' accuracy.
    """
    name, _, _, on, influence, scores, most = study
    lowest_r, largest_slope = {"digits": (0.999, 1.10), "breast_cancer": (0.97, 1.30)}[name]
    outcomes = uw.leave_one_out(influence, on, most)
    first, newton = uw.agreement(scores, outcomes), uw.agreement(influence.of_removing(most.tolist(), on=on), outcomes)
    assert first.pairs == newton.pairs == MOST
    assert first.pearson >= lowest_r
    assert 0.95 <= first.slope <= largest_slope
    assert newton.pearson >= 0.999
    assert abs(newton.slope - 1) < min(0.03, abs(first.slope - 1))
    # the control moved the loss by far less than any of these rows
    assert abs(outcomes.control[0]) < 0.01 * np.abs(outcomes.actual).min()


def test_the_reference_retrainer_is_scikit_learn(study):
    _, model, (X, y), on, influence, _, most = study
    outcomes = uw.leave_one_out(influence, on, most[:5])
    ones = np.ones(len(y))
    before = refit(model, X, y, on, ones)
    for place, row in enumerate(most[:5]):
        weights = ones.copy()
        weights[row] = 0
        assert outcomes.actual[0, place] == pytest.approx(refit(model, X, y, on, weights) - before, rel=2e-3, abs=1e-6)


@pytest.mark.parametrize("alpha", [0.01, 1.0, 30.0])
def test_ridge_of_removing_is_the_closed_form_leave_one_out(alpha):
    X, y = load_diabetes(return_X_y=True)
    X, y = X[:120], y[:120]
    influence = uw.explain(Ridge(alpha=alpha).fit(X[:100], y[:100]), X[:100], y[:100])
    on = (X[100:], y[100:])
    truth = oracles.ridge_leave_one_out(X[:100], y[:100], alpha, *on)
    removed = influence.of_removing(range(100), on=on)
    np.testing.assert_allclose(removed.values, truth, rtol=1e-8, atol=1e-8 * np.abs(truth).max())
    # one more Newton step would add nothing, and it says so
    assert np.abs(removed.error).max() < 1e-8 * np.abs(truth).max()


def test_equation_16_what_is_left_of_the_gradient_separates_from_the_rows_effect():
    """Appendix B: away from the minimum, what a Newton step does is the drift plus the row's own effect."""
    model, X, y, on = digits()
    early = LogisticRegression(C=model.C, tol=3e-3, max_iter=500).fit(X, y)
    with pytest.warns(uw.errors.TheoryWarning, match=r"as much as .* rows"):
        influence = uw.explain(early, X, y)
    scores = influence.on_loss(*on)
    drift = float(scores.certificate.drift[0])
    row = int(scores.helpful(1).rows[0, 0])
    objective, n = influence.objective, influence.n
    queries = influence.queries(on).batch([0])

    def newton_step(weights):
        """−H⁻¹∇R of the reweighted risk, from the early θ̂, with the Hessian at θ̂ (equation 16)."""
        gradient = influence.sweep.fold(lambda batch, w: uw.calculus.pull(objective, batch, w[None]))[
            0
        ] / n + uw.penalties.gradient(objective)
        own = uw.calculus.gradients(objective, influence.examples.batch([row]))[0] / n
        return -influence.prepared.solve((gradient - (1 - weights) * own)[None]).x[0]

    slope = uw.calculus.gradients(objective, queries)[0]
    assert float(slope @ newton_step(1.0)) == pytest.approx(drift, rel=1e-8)
    assert float(slope @ newton_step(0.0)) == pytest.approx(drift + scores.values[0, row], rel=1e-8)
    # and the drift is real: training on to the minimum changes the loss by about that much
    outcomes = uw.leave_one_out(influence, on, [row])
    assert outcomes.control[0] == pytest.approx(drift, rel=0.15)
    assert abs(drift) > 1e-4
