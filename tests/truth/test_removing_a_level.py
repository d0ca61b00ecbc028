"""All rows of a level removed: the refit where it determines a prediction, and NaN where it does not."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.linear_model import LinearRegression, LogisticRegression, PoissonRegressor

import upweight as uw
from redundant import FREE, KIND, N, Y
from upweight.errors import NotPositiveDefinite, TheoryWarning
from upweight.solvers import CG, Cholesky

LEVEL = np.flatnonzero(KIND == 2)
LEFT = np.flatnonzero(KIND != 2)
ON = np.r_[LEFT[:4], LEVEL[:1]]
CODED = {"beside a reference": np.c_[FREE, np.eye(4)[KIND][:, 1:]], "all levels": np.c_[FREE, np.eye(4)[KIND]]}
SOLVERS = {"Cholesky": Cholesky(), "CG": CG(1e-8)}
WEIGHTS = np.random.default_rng(2).uniform(0.5, 2, N)


def of_the_refit(X, group, on, weights):
    """Squared errors after lstsq without a group, minus those before: torch's default loss is (η − y)²."""
    A = np.c_[X, np.ones(N)]

    def errors(rows):
        root = np.sqrt(weights[rows])[:, None]
        theta = np.linalg.lstsq(root * A[rows], root[:, 0] * Y[rows], rcond=None)[0]
        return (A[on] @ theta - Y[on]) ** 2

    return errors(np.setdiff1d(np.arange(N), group)) - errors(np.arange(N))


@pytest.mark.parametrize(
    ("coded", "solver", "weights"),
    [
        ("beside a reference", Cholesky(), None),
        ("all levels", Cholesky(), WEIGHTS),
        ("beside a reference", CG(1e-8), WEIGHTS),
        ("all levels", CG(1e-8), None),
    ],
)
def test_the_rest_is_the_refit_and_the_level_itself_is_not_determined(coded, solver, weights):
    X = CODED[coded]
    model = LinearRegression().fit(X, Y, sample_weight=weights)
    influence = uw.explain(model, X, Y, sample_weight=weights, solver=solver)
    groups = [LEFT[:1], LEVEL, np.r_[LEVEL, LEFT[4:8]], LEVEL[1:]][: 4 if solver == Cholesky() else 2]
    with pytest.warns(TheoryWarning, match=r"Removal number 1 .* 1 of 5 queries \(first: number 4\)"):
        scores = influence.of_removing(groups, on=(X[ON], Y[ON]))
    w = np.ones(N) if weights is None else weights
    expected = np.stack([of_the_refit(X, group, ON, w) for group in groups], 1)
    expected[4, 1:3] = np.nan
    np.testing.assert_allclose(scores.values, expected, rtol=1e-5, atol=1e-8)
    assert np.abs(expected[:4, 1]).min() > 1e-3
    assert np.nanmax(np.abs(scores.error)) < 1e-6  # a squared loss is done


@pytest.mark.parametrize("solver", SOLVERS.values(), ids=SOLVERS)
@pytest.mark.parametrize(
    ("model", "y"),
    [
        (LogisticRegression(C=np.inf, tol=1e-10, max_iter=10_000), (Y > 0).astype(int)),
        (LogisticRegression(C=np.inf, tol=1e-10, max_iter=10_000), np.digitize(Y, [-0.5, 0.5])),
        (PoissonRegressor(alpha=0, solver="newton-cholesky", tol=1e-10), np.floor(np.exp(Y / 2))),
    ],
    ids=["binomial", "three classes", "poisson"],
)
def test_other_losses_take_the_newton_step_of_the_rest(model, y, solver):
    """The step is −(Hessian of the rest)⁺ (gradient of the rest), with both by autograd."""
    X = CODED["beside a reference"]
    influence = uw.explain(model.fit(X, y), X, y, solver=solver)
    with pytest.warns(TheoryWarning, match="takes all rows of a column or level"):
        scores = influence.of_removing([LEVEL], on=(X[ON], y[ON]))
    objective = influence.objective
    examples = influence.system.examples

    def loss(theta, rows):
        params, batch = objective.unravel(theta), examples.batch(rows)
        each = [objective.loss(params, (batch[0][b], batch[1][b])) for b in range(len(rows))]
        return torch.stack(each)

    def risk(theta):
        return loss(theta, LEFT).sum()

    theta = objective.theta
    H, g = torch.func.hessian(risk)(theta), torch.func.grad(risk)(theta)
    moved = theta - torch.linalg.pinv(H, rtol=1e-10, hermitian=True) @ g
    expected = (loss(moved, ON) - loss(theta, ON)).numpy()
    np.testing.assert_allclose(scores.values[:4, 0], expected[:4], rtol=2e-4, atol=1e-7)
    assert np.isnan(scores.values[4, 0])


def test_a_query_of_the_level_alone_is_refused_and_what_the_error_says_to_do_works():
    X = CODED["beside a reference"]
    influence = uw.explain(LinearRegression().fit(X, Y), X, Y)
    with pytest.raises(NotPositiveDefinite, match="lean on it"):
        influence.of_removing([LEVEL], on=(X[LEVEL], Y[LEVEL]))
