"""A penalty given as a function beside a linear predictor: every solver knows its second derivatives, or says not.

The oracle is the dense Hessian of R by autograd, written out here.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

import upweight as uw
from small import XQ, ZQ, X, Z
from upweight import losses, solvers
from upweight.model.objective import Linear, Objective

COUPLING = torch.tensor([[2.0, 0.5, 0.0], [0.5, 1.0, -0.3], [0.0, -0.3, 1.5]], dtype=torch.float64)


def penalty(params):
    """Coupled, and with a curvature that is not constant."""
    theta = params["coef"][0]
    return theta @ COUPLING @ theta / 2 + (theta**4).sum() / 12 + params["intercept"].square().sum()


def risk(theta, weights):
    coef, intercept = theta[:3], theta[3:]
    error = torch.from_numpy(X) @ coef + intercept - torch.from_numpy(Z)
    return (weights * error**2).sum() / len(X) + penalty({"coef": coef[None], "intercept": intercept})


def minimum():
    theta, ones = torch.zeros(4, dtype=torch.float64), torch.ones(len(X), dtype=torch.float64)
    for _ in range(50):
        gradient = torch.func.grad(risk)(theta, ones)
        theta = theta - torch.linalg.solve(torch.func.hessian(risk)(theta, ones), gradient)
    return theta


THETA = minimum()
LINEAR = Linear(losses.squared, 1, 3, True)


def influence(solver=None, **settings):
    objective = Objective(
        LINEAR.loss, {"coef": THETA[None, :3], "intercept": THETA[3:]}, penalty=penalty, linear=LINEAR, **settings
    )
    return uw.Influence(objective, (X, Z[:, None]), solver=solver)


def expected():
    ones = torch.ones(len(X), dtype=torch.float64)
    H = torch.func.hessian(risk)(THETA, ones)

    def loss(theta, x, z):
        return (x @ theta[:3] + theta[3] - z) ** 2

    gradients = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0, 0))
    queries = gradients(THETA, torch.from_numpy(XQ), torch.from_numpy(ZQ))
    return (queries @ torch.linalg.solve(H, gradients(THETA, torch.from_numpy(X), torch.from_numpy(Z)).T)).numpy()


@pytest.mark.parametrize("solver", [None, solvers.Cholesky(), solvers.CG(rtol=1e-10)], ids=["none", "Cholesky", "CG"])
def test_values_are_those_of_the_whole_hessian(solver):
    values = influence(solver).on_loss(XQ, ZQ[:, None]).values
    np.testing.assert_allclose(values, expected() / len(X), rtol=1e-6)
