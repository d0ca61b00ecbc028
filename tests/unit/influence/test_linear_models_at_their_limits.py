"""Linear models where digits, units, shifts, kinks and leverages are at their limits."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from sklearn.datasets import load_breast_cancer
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import HuberRegressor, LogisticRegression, Ridge, SGDClassifier, TweedieRegressor
from sklearn.neural_network import MLPClassifier

import upweight as uw
from upweight.operators import Hessian
from upweight.solvers import CG, Cholesky, Dual, TwoLevel


@pytest.mark.parametrize("alpha", [1e-4, 1e-5])
def test_leverage_near_one_costs_the_dual_no_digits(alpha):
    draw = np.random.default_rng(2)
    X = draw.normal(size=(40, 150))
    y = X[:, 0] + draw.normal(size=40)
    inf = uw.explain(Ridge(alpha=alpha, solver="cholesky").fit(X, y), X, y)
    assert inf.solver == Dual()
    ours = inf.of_removing([0, 1, 2], on=(X[:3], y[:3])).values.diagonal()
    rest = [np.delete(np.arange(40), row) for row in range(3)]
    again = [Ridge(alpha=alpha, solver="cholesky").fit(X[r], y[r]) for r in rest]
    truth = [(again[row].predict(X[[row]])[0] - y[row]) ** 2 for row in range(3)]
    np.testing.assert_allclose(ours, truth, rtol=1e-5)
    frame = inf.summary_frame()
    np.testing.assert_allclose(frame["loo_residual"][:3] ** 2, truth, rtol=1e-5)


@pytest.mark.parametrize("solver", [CG(rtol=1e-6), CG(rtol=1e-6, preconditioner=TwoLevel(rows=100))], ids=repr)
def test_the_promise_of_cg_holds_in_every_features_units(solver):
    draw = np.random.default_rng(3)
    X = draw.normal(size=(900, 8)) * [1e6, 1e-6, 1, 1, 1, 1, 1, 1]
    y = X[:, 2] + draw.normal(size=900)
    model = Ridge(alpha=1.0).fit(X, y)
    ours, exact = (uw.explain(model, X, y, solver=s).on_loss(X[:5], y[:5]).values for s in (solver, Cholesky()))
    np.testing.assert_allclose(ours, exact, rtol=1e-4, atol=1e-5 * np.abs(exact).max())


@pytest.mark.parametrize("scale", [1e3, 1e5])
def test_a_softmax_with_a_feature_of_other_units_is_solved_and_refined(scale):
    draw = np.random.default_rng(0)
    X = draw.normal(size=(500, 5))
    y = (X[:, 2] + draw.normal(size=500) > 0).astype(int) + draw.integers(0, 2, 500)
    X[:, 0] *= scale
    model = LogisticRegression(C=1.0, tol=1e-10, max_iter=500, solver="newton-cholesky").fit(X, y)
    small = [uw.explain(model, X, y, solver=s).on_loss(X[:5], y[:5]).values for s in (Cholesky(), CG(rtol=1e-12))]
    np.testing.assert_allclose(small[0], small[1], rtol=1e-4, atol=1e-6 * np.abs(small[1]).max())
    two = uw.explain(model, X, y, solver=CG(preconditioner=TwoLevel(rows=100))).on_loss(X[:5], y[:5])
    np.testing.assert_allclose(two.values, small[1], rtol=1e-3, atol=1e-4 * np.abs(small[1]).max())


def test_shifts_of_a_softmax_meet_the_penalty_alone():
    draw = np.random.default_rng(0)
    X, y = draw.normal(size=(60, 3)), draw.integers(0, 3, 60)
    model = LogisticRegression(C=0.5, fit_intercept=False, tol=1e-10).fit(X, y)
    inf = uw.explain(model, X, y)
    A = inf.operator.matrix() + 0.1 * torch.eye(9, dtype=torch.float64)
    V = torch.randn(4, 9, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    prepared = Cholesky().prepare(inf.operator, 0.1)
    expected = torch.linalg.solve(A, V.T).T
    torch.testing.assert_close(prepared.solve(V).x, expected, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(prepared.forms(V), (expected * V).sum(1), rtol=1e-9, atol=1e-12)
    assert float(prepared.solve(V).residual.max()) < 1e-12


def test_the_error_of_a_removal_is_the_step_that_would_follow():
    draw = np.random.default_rng(0)
    X = draw.normal(size=(200, 3))
    y = (X[:, 0] + draw.normal(size=200) > 0).astype(int)
    settings = {"C": 1.0, "tol": 1e-12, "solver": "newton-cholesky"}
    model = LogisticRegression(**settings).fit(X, y)
    group = np.flatnonzero(X[:, 0] > 0)
    inf = uw.explain(model, X, y)
    scores = inf.of_removing([group], on=(X[:3], y[:3]))
    rest = np.setdiff1d(np.arange(200), group)
    again = LogisticRegression(**settings).fit(X[rest], y[rest])
    truth = -again.predict_log_proba(X[:3])[np.arange(3), y[:3]] - scores.query_values
    missing = truth - scores.values[:, 0]
    assert np.linalg.norm(missing - scores.error[:, 0]) < 0.8 * np.linalg.norm(missing)
    assert np.abs(scores.error).max() > 0.2 * np.abs(missing).max()


def test_a_fit_that_stopped_early_in_a_flat_direction_is_not_called_a_minimum():
    X, y = load_breast_cancer(return_X_y=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        model = LogisticRegression().fit(X, y)
        warnings.simplefilter("ignore", uw.errors.TheoryWarning)
        report = uw.explain(model, X, y).check()
    assert not report.ok
    assert "NOT at a minimum" in str(report)


def test_the_dual_is_no_default_for_losses_that_are_not_convex():
    draw = np.random.default_rng(1)
    X, y = draw.normal(size=(25, 60)), draw.gamma(1, 1, 25) + 0.01
    model = TweedieRegressor(power=3, link="log", alpha=1.0, tol=1e-10, max_iter=10_000).fit(X, y)
    inf = uw.explain(model, X, y)
    assert inf.solver == Cholesky()
    assert inf.on_loss(X[:2], y[:2]).certificate.converged


def test_huber_is_really_fitted_again_by_scikit_learn():
    draw = np.random.default_rng(3)
    X = draw.normal(size=(80, 4))
    y = X[:, 0] + 0.1 * draw.standard_t(3, size=80)
    inf = uw.explain(HuberRegressor(tol=1e-8, max_iter=10_000).fit(X, y), X, y)
    out = uw.leave_one_out(inf, (X[:3], y[:3]), range(20))
    assert uw.agreement(inf.on_loss(X[:3], y[:3]), out).pearson > 0.95


def test_a_hinge_without_rows_near_its_kink_holds_the_intercept_instead_of_throwing_it_away():
    from sklearn.datasets import load_wine
    from sklearn.preprocessing import StandardScaler

    X, y = load_wine(return_X_y=True)
    order = np.random.RandomState(0).permutation(178)
    X, y = StandardScaler().fit_transform(X)[order], (y == 1)[order]
    model = SGDClassifier(loss="hinge", alpha=0.05, max_iter=20_000, tol=1e-8, random_state=0, average=True)
    with pytest.warns(uw.errors.TheoryWarning, match="held fixed"):
        inf = uw.explain(model.fit(X[:120], y[:120]), X[:120], y[:120])
    assert np.abs(inf.on_loss(X[120:135], y[120:135]).values).max() < 10


def test_the_hessian_of_a_softmax_network_leaves_the_shift_of_its_outputs_out():
    draw = np.random.default_rng(0)
    X = draw.normal(size=(120, 4))
    y = X[:, :3].argmax(1)
    model = MLPClassifier((3,), activation="tanh", alpha=1.0, solver="lbfgs", max_iter=5000, tol=1e-10, random_state=0)
    inf = uw.explain(model.fit(X, y), X, y, curvature=Hessian(), damping=1e-3)
    shift = torch.zeros(1, inf.objective.size, dtype=torch.float64)
    shift[:, -3:] = 1.0
    assert not inf.objective.project(shift).any()
    assert float(inf.operator.apply(shift).abs().max()) < 1e-10
    assert inf.on_loss(X[:2], y[:2]).certificate.converged


def test_sparse_integers_do_not_overflow():
    import scipy.sparse

    draw = np.random.default_rng(0)
    X = draw.integers(0, 200, size=(50, 3)).astype(np.uint8)
    y = X @ [0.1, -0.2, 0.1] + draw.normal(size=50)
    model = Ridge(alpha=1.0).fit(X.astype(float), y)
    diagonals = [uw.explain(model, kind(X), y).operator.diagonal() for kind in (scipy.sparse.csr_matrix, np.asarray)]
    torch.testing.assert_close(diagonals[0], diagonals[1])
