"""Slow, dense, obviously right: training problems written out, re-solved, and differentiated numerically.

Nothing here imports upweight. A `Problem` is R(θ) = (1/n) Σᵢ wᵢ L(xᵢ, yᵢ, θ) + c r(θ), with c = Σw/Σw₀ when a row owns
its share of the penalty (`folded`), else 1. Its Hessian is autograd's dense one, its minimum is found by Newton's
method, and derivatives of the minimum are taken by moving a weight or an input and solving again.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor
from torch.autograd.functional import hessian, jacobian

STEP = 2e-3


@dataclass(frozen=True)
class Problem:
    """A training problem with θ as one flat float64 vector."""

    loss: Callable[[Tensor, Tensor, Tensor], Tensor]
    penalty: Callable[[Tensor], Tensor] | None
    X: Tensor
    y: Tensor
    weights: Tensor
    start: Tensor
    folded: bool = False
    original_weight: float | None = None

    def losses(self, theta: Tensor) -> Tensor:
        return torch.stack([self.loss(theta, x, y) for x, y in zip(self.X, self.y, strict=True)])

    def share(self) -> float:
        return float(self.weights.sum()) / (self.original_weight or float(self.weights.sum())) if self.folded else 1.0

    def risk(self, theta: Tensor) -> Tensor:
        total = (self.weights * self.losses(theta)).sum() / len(self.X)
        return total if self.penalty is None else total + self.share() * self.penalty(theta)

    def reweighted(self, weights: Tensor) -> Problem:
        return replace(self, weights=weights, original_weight=self.original_weight or float(self.weights.sum()))


def gradient(function: Callable[[Tensor], Tensor], theta: Tensor) -> Tensor:
    theta = theta.detach().clone().requires_grad_()
    return torch.autograd.grad(function(theta), theta)[0]


def dense_hessian(problem: Problem, theta: Tensor) -> Tensor:
    return hessian(problem.risk, theta)


def dense_gauss_newton(
    problem: Problem,
    output: Callable[[Tensor, Tensor], Tensor],
    output_loss: Callable[[Tensor, Tensor], Tensor],
    theta: Tensor,
) -> Tensor:
    """(1/n) Σ wᵢ Jᵢᵀ (∂²ℓ/∂f²) Jᵢ + ∇²r, row by row."""
    total = torch.zeros(len(theta), len(theta), dtype=torch.float64)
    for x, y, w in zip(problem.X, problem.y, problem.weights, strict=True):
        J = jacobian(lambda t, x=x: output(t, x), theta)
        H = hessian(lambda f, y=y: output_loss(f, y), output(theta, x).detach())
        total += w * J.T @ H @ J
    return total / len(problem.X) + _penalty_hessian(problem, theta)


def dense_fisher(problem: Problem, theta: Tensor) -> Tensor:
    """(1/n) Σ wᵢ ∇Lᵢ ∇Lᵢᵀ + ∇²r, row by row."""
    total = torch.zeros(len(theta), len(theta), dtype=torch.float64)
    for x, y, w in zip(problem.X, problem.y, problem.weights, strict=True):
        g = gradient(lambda t, x=x, y=y: problem.loss(t, x, y), theta)
        total += w * torch.outer(g, g)
    return total / len(problem.X) + _penalty_hessian(problem, theta)


def _penalty_hessian(problem: Problem, theta: Tensor) -> Tensor:
    if problem.penalty is None:
        return torch.zeros(len(theta), len(theta), dtype=torch.float64)
    return problem.share() * hessian(problem.penalty, theta)


def argmin(problem: Problem, start: Tensor | None = None) -> Tensor:
    """A minimum by Newton's method with halved steps, to a gradient of rounding size."""
    theta = (problem.start if start is None else start).clone()
    best = torch.inf
    for _ in range(500):
        g = gradient(problem.risk, theta)
        size = float(g.norm())
        if size < 1e-15 or (size < 1e-12 and size >= best):
            return theta
        best = min(best, size)
        H = dense_hessian(problem, theta)
        eigenvalues, Q = torch.linalg.eigh(H)
        flat = eigenvalues.abs() < 1e-12 * eigenvalues.abs().max()
        step = Q @ torch.where(flat, 0, (Q.T @ g) / torch.where(flat, 1, eigenvalues.abs()))
        length, value = 1.0, float(problem.risk(theta))
        while float(problem.risk(theta - length * step)) > value + 1e-15 * abs(value) and length > 1e-8:
            length /= 2
        theta = theta - length * step
    raise AssertionError(f"no minimum: gradient {size:.1e}")


def derivative(function: Callable[[float], Tensor], step: float = STEP) -> Tensor:
    """d function/dε at 0, by a five-point stencil."""
    a, b, c, d = (function(k * step) for k in (-2, -1, 1, 2))
    return (a - 8 * b + 8 * c - d) / (12 * step)


def params_when_weight_grows(problem: Problem, theta: Tensor, row: int) -> Tensor:
    """dθ̂/dε when row's weight wᵢ/n becomes wᵢ/n + ε: the left side of equation 1."""
    n = len(problem.X)

    def solved(change: float) -> Tensor:
        weights = problem.weights.clone()
        weights[row] += change
        return argmin(problem.reweighted(weights), theta)

    return n * derivative(solved)


def params_when_input_moves(problem: Problem, theta: Tensor, row: int, direction: Tensor) -> Tensor:
    """dθ̂/dt when the input of a row becomes x + t·direction: equation 4 in the limit, times wᵢ/n."""

    def solved(change: float) -> Tensor:
        X = problem.X.clone()
        X[row] = X[row] + change * direction
        return argmin(replace(problem, X=X), theta)

    return derivative(solved)


def without_rows(problem: Problem, theta: Tensor, rows: list[int]) -> Tensor:
    """θ̂ after really training without these rows."""
    weights = problem.weights.clone()
    weights[rows] = 0
    return argmin(problem.reweighted(weights), theta)


def ridge_leave_one_out(X: np.ndarray, y: np.ndarray, alpha: float, Xq: np.ndarray, yq: np.ndarray) -> np.ndarray:
    """(q, n) change of each query's squared error when a row leaves Σ(η−y)² + α‖w‖² (free intercept): NumPy refits."""

    def fit(keep: np.ndarray) -> np.ndarray:
        A, t = np.c_[X[keep], np.ones(keep.sum())], y[keep]
        D = alpha * np.eye(A.shape[1])
        D[-1, -1] = 0
        return np.linalg.solve(A.T @ A + D, A.T @ t)

    Aq = np.c_[Xq, np.ones(len(Xq))]
    everything = np.ones(len(X), dtype=bool)
    before = (Aq @ fit(everything) - yq) ** 2
    columns = []
    for row in range(len(X)):
        keep = everything.copy()
        keep[row] = False
        columns.append((Aq @ fit(keep) - yq) ** 2 - before)
    return np.stack(columns, 1)
