"""A tanh MLP on the digits that was not trained to a minimum: everything says so, and Gauss–Newton still works."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits

import upweight as uw
from upweight.errors import NotPositiveDefinite, TheoryWarning

cross_entropy = torch.nn.functional.cross_entropy
N, WEIGHT_DECAY = 600, 1e-3


@pytest.fixture(scope="module")
def data():
    X, y = load_digits(return_X_y=True)
    return torch.as_tensor(X / 16).float(), torch.as_tensor(y)


@pytest.fixture(scope="module")
def module(data):
    """64-8-10, thirty steps of Adam: far from a minimum."""
    X, y = data
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(64, 8), torch.nn.Tanh(), torch.nn.Linear(8, 10))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02, weight_decay=WEIGHT_DECAY)
    for _ in range(30):
        optimizer.zero_grad()
        cross_entropy(model(X[:N]), y[:N]).backward()
        optimizer.step()
    return model.eval()


def explain(module, data, **settings):
    X, y = data
    return uw.explain(module, X[:N], y[:N], loss=cross_entropy, penalty=WEIGHT_DECAY, **settings)


def lowest_eigenvalue(module, data):
    """Independent of the library: torch's dense Hessian of the mean loss, plus the penalty."""
    X, y = data[0][:N].double(), data[1][:N]
    shapes = {name: p.shape for name, p in module.named_parameters()}
    theta = torch.cat([p.detach().double().reshape(-1) for p in module.parameters()])

    def risk(theta):
        pieces = theta.split([shape.numel() for shape in shapes.values()])
        w1, b1, w2, b2 = (piece.reshape(shape) for piece, shape in zip(pieces, shapes.values(), strict=True))
        return cross_entropy(torch.tanh(X @ w1.T + b1) @ w2.T + b2, y) + WEIGHT_DECAY / 2 * (theta**2).sum()

    return float(torch.linalg.eigvalsh(torch.autograd.functional.hessian(risk, theta))[0])


def test_check_says_so(module, data):
    report = explain(module, data, curvature=uw.operators.Hessian()).check()
    assert not report.at_minimum
    assert not report.ok
    assert report.rows_from_minimum > 10
    assert report.min_curvature == pytest.approx(lowest_eigenvalue(module, data), rel=1e-2)
    assert report.suggested_damping > -report.min_curvature > 0
    assert "NOT at a minimum" in str(report)
    assert "NOT positive" in str(report)
    assert "suggestion" in str(report)


@pytest.mark.parametrize("solver", [uw.solvers.Cholesky(), uw.solvers.CG()], ids=repr)
def test_the_hessian_meets_negative_curvature_and_says_which_damping_would_do(module, data, solver):
    X, y = data
    query = (X[N : N + 2], y[N : N + 2])
    with (
        pytest.raises(NotPositiveDefinite, match=r"damping=.*GaussNewton.*train further") as refused,
        warnings.catch_warnings(
            action="ignore", category=TheoryWarning
        ),  # CG warns first; Cholesky has refused by then
    ):
        explain(module, data, curvature=uw.operators.Hessian(), solver=solver).on_loss(*query)
    suggested = refused.value.suggested_damping
    lowest = lowest_eigenvalue(module, data)
    assert -lowest < suggested < -1.5 * lowest
    damped = explain(module, data, curvature=uw.operators.Hessian(), solver=solver, damping=suggested)
    with pytest.warns(TheoryWarning, match="not at a minimum"):
        scores = damped.on_loss(*query)
    assert scores.certificate.converged
    assert scores.certificate.damping == suggested


def test_gauss_newton_works_and_the_certificate_still_shows_the_gradient(module, data):
    X, y = data
    query = (X[N : N + 3], y[N : N + 3])
    influence = explain(module, data)  # Gauss–Newton is the default for modules
    assert isinstance(influence.curvature, uw.operators.GaussNewton)
    scores = influence.on_loss(*query)
    assert scores.certificate.converged
    assert scores.certificate.residual.max() < 1e-10
    assert scores.certificate.min_curvature > 0
    assert scores.certificate.gradient_norm > 1e-3
    assert (
        np.abs(scores.certificate.drift).max() > np.abs(scores.values).max()
    )  # no row moves it as much as training on
    iterative = explain(module, data, solver=uw.solvers.CG(rtol=1e-10, max_sweeps=5000)).on_loss(*query)
    np.testing.assert_allclose(iterative.values, scores.values, rtol=1e-4, atol=1e-6 * np.abs(scores.values).max())


def test_float32_weights_are_explained_in_float64_and_stay_float32(module, data):
    influence = explain(module, data)
    assert influence.objective.reference.dtype == torch.float64
    assert all(parameter.dtype == torch.float32 for parameter in module.parameters())
