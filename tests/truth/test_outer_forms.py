"""Self-influence of a softmax by pairs of outputs, beside dense float64 algebra, and the bound of its error."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.linalg
import torch
from sklearn.linear_model import LogisticRegression

import upweight as uw
from upweight.influence import self_scores
from upweight.solvers import direct
from upweight.solvers.outer import outer_forms


def problem(scale=1.0, classes=4, n=300, d=9, intercept=True, C=1.0):
    draw = np.random.default_rng(0)
    X = draw.normal(size=(n, d)) * np.geomspace(1, scale, d)
    X[:, 3] = 0.0  # an empty column
    y = np.argmax(
        X @ (draw.normal(size=(d, classes)) / np.geomspace(1, scale, d)[:, None]) + draw.gumbel(size=(n, classes)), 1
    )
    fit = LogisticRegression(C=C, tol=1e-10, max_iter=5000, fit_intercept=intercept).fit(X, y)
    return fit, X, y


def dense(influence):
    """wᵢ/n gᵢᵀ (C + λI)⁺ gᵢ with the dense Hessian and gradients by autograd."""
    objective, examples = influence.objective, influence.examples
    theta = objective.theta.clone().requires_grad_()
    K, d = objective.linear.n_outputs, objective.linear.n_features
    X, y = torch.from_numpy(np.asarray(examples.x)).double(), torch.from_numpy(np.asarray(examples.y)).long()

    def losses(theta):
        eta = X @ theta[: K * d].reshape(K, d).T
        eta = eta + theta[K * d :] if objective.linear.intercept else eta
        return torch.nn.functional.cross_entropy(eta, y, reduction="none")

    G = torch.autograd.functional.jacobian(losses, theta)
    H = torch.autograd.functional.hessian(lambda theta: losses(theta).mean(), theta)
    H = H + torch.diag(uw.penalties.diagonal(objective))
    return ((G @ torch.linalg.pinv(H, rtol=1e-13, hermitian=True)) * G).sum(1).numpy() / len(X)


@pytest.mark.parametrize("intercept", [True, False])
@pytest.mark.parametrize("classes", [3, 5])
def test_pairs_give_what_dense_algebra_gives(intercept, classes, monkeypatch):
    fit, X, y = problem(classes=classes, intercept=intercept)
    calls = []
    real = self_scores._outer
    monkeypatch.setattr(self_scores, "_outer", lambda *args: calls.append(real(*args)) or calls[-1])
    influence = uw.explain(fit, X, y, solver=uw.solvers.Cholesky())
    values = influence.of_self().values
    assert calls[0] is not None
    np.testing.assert_allclose(values, dense(influence), rtol=1e-8)


def test_sample_weights_and_few_rows_change_nothing_but_the_way(monkeypatch):
    fit, X, y = problem()
    weights = np.random.default_rng(1).uniform(0.5, 2, len(X))
    fit.fit(X, y, sample_weight=weights)
    influence = uw.explain(fit, X, y, sample_weight=weights, solver=uw.solvers.Cholesky())
    quick = influence.of_self().values
    monkeypatch.setattr(self_scores, "_outer", lambda *_: None)
    np.testing.assert_allclose(quick, influence.of_self().values, rtol=1e-9)


def test_the_inverse_is_made_once(monkeypatch):
    fit, X, y = problem()
    made = []
    monkeypatch.setattr(direct, "outer_forms", lambda *args: made.append(0) or outer_forms(*args))
    influence = uw.explain(fit, X, y, solver=uw.solvers.Cholesky())
    first = influence.of_self()
    np.testing.assert_array_equal(influence.of_self(range(200)).values, first.values[:200])
    assert len(made) == 1


@pytest.mark.parametrize("classes", [2, 4])
def test_columns_that_are_all_empty_leave_the_intercept(classes):
    X, y = np.zeros((60, 3)), np.arange(60) ** 2 % 7 % classes
    influence = uw.explain(LogisticRegression(tol=1e-10).fit(X, y), X, y, solver=uw.solvers.Cholesky())
    rate = (np.bincount(y) / len(y))[y]
    np.testing.assert_allclose(influence.of_self().values, (1 - rate) / rate / len(y), rtol=1e-6)


@pytest.mark.parametrize("condition", [1e2, 1e5, 1e8, 1e11])
def test_the_bound_holds_on_ill_conditioned_matrices_and_grows_with_them(condition):
    draw, K, d = np.random.default_rng(0), 3, 8
    p, structure = K * d, uw.Linear(uw.losses.cross_entropy, K, d, False)
    Q = np.linalg.qr(draw.normal(size=(p, p)))[0]
    A = (Q * np.geomspace(1, 1 / condition, p)) @ Q.T
    scale = 1 / np.sqrt(np.diag(A))
    S = np.asfortranarray(A * scale[:, None] * scale)
    packed = np.asfortranarray(np.tril(scipy.linalg.cholesky(S, lower=True)) + np.triu(S, 1))
    forms = outer_forms(packed, scale, structure, np.arange(d))
    R = draw.normal(size=(50, K))
    R -= R.mean(1, keepdims=True)
    X = draw.normal(size=(50, d))
    V = np.einsum("bk,bd->bkd", R, X).reshape(50, p).astype(np.longdouble)
    half = scipy.linalg.solve_triangular(np.tril(packed), (V * scale).T.astype(np.float64), lower=True)
    exact = (half**2).sum(0)
    found = forms.own(torch.from_numpy(X), torch.from_numpy(R)).numpy()
    error = float(np.abs(found / exact - 1).max())
    assert error <= forms.bound + 1e-14 * condition
    assert forms.bound >= 1e-16 * condition
    assert (forms.bound <= 1e-6) == (condition <= 1e5)
