"""Linear models of every shape, dense and sparse, well and badly conditioned, and the plain solver beside them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import scipy.sparse
import torch

import upweight as uw
from upweight import losses
from upweight.solvers import CG, Approximate, Cholesky, Dual, Plain, TwoLevel

RTOL = 1e-6
WORDS = 20  # entries of a sparse row
CHOICES = {
    "Cholesky": Cholesky(),
    "Dual": Dual(),
    "CG, plain": CG(preconditioner=Plain()),
    "CG, approximate": CG(preconditioner=Approximate()),
    "CG, two-level": CG(preconditioner=TwoLevel()),
}


@dataclass(frozen=True)
class Shape:
    """A problem: n rows of d columns, K outputs, q queries."""

    n: int
    d: int
    K: int = 1
    sparse: bool = False
    bad: bool = False
    queries: int = 1

    @property
    def p(self):
        return self.K * (self.d + 1)

    def __str__(self):
        kind = "sparse" if self.sparse else "dense"
        return f"{kind} {'bad' if self.bad else 'good'} n={self.n} d={self.d} K={self.K} q={self.queries}"


@dataclass(frozen=True)
class Problem:
    """The rows, what was fitted to them, and the queries."""

    shape: Shape
    X: object
    y: np.ndarray
    objective: uw.Objective
    Xq: object
    yq: np.ndarray

    def influence(self, solver=None):
        return uw.Influence(self.objective, uw.Examples(self.X, self.y), solver=solver, progress=False)

    def values(self, solver=None):
        """What on_loss gives, from the model to the values."""
        return self.influence(solver).on_loss(self.Xq, self.yq)


def problem(shape: Shape) -> Problem:
    """Rows of a spectrum that falls as 1/k (well) or 1/k² (badly), under a penalty of 1e-2 or 1e-6 of its mean.

    Sparse rows have columns as frequent as words (badly) or nearly alike, under a penalty of 1e-4 or 1e-2.
    """
    draw = np.random.default_rng(0)
    n, d, K = shape.n, shape.d, shape.K
    if shape.sparse:
        share = 1 / np.arange(1, d + 1) ** (1.1 if shape.bad else 0.3)
        columns = draw.choice(d, size=n * WORDS, p=share / share.sum())
        numbers = np.exp(0.5 * draw.normal(size=n * WORDS) if shape.bad else np.zeros(n * WORDS))
        X = scipy.sparse.csr_matrix((numbers, columns, np.arange(0, n * WORDS + 1, WORDS)), shape=(n, d))
        X.sum_duplicates()
        mean = float(X.multiply(X).sum()) / n / d
        queries = X[: shape.queries]
    else:
        X = draw.normal(size=(n, d))
        r = min(n, d, 256)
        turn = np.linalg.qr(draw.normal(size=(d, r)))[0]
        size = 1 / np.arange(1, r + 1) ** (1.0 if shape.bad else 0.5)
        X *= 1e-3 if shape.bad else 0.1
        X += (draw.normal(size=(n, r)) * size * np.sqrt(d)) @ turn.T
        mean = float((X * X).sum()) / n / d
        queries = X[: shape.queries] + 0.1 * draw.normal(size=(shape.queries, d))
    theta = {"coef": torch.from_numpy(draw.normal(size=(K, d)) / np.sqrt(d * mean))}
    theta["intercept"] = torch.zeros(K, dtype=torch.float64)
    loss = losses.logistic if K == 1 else losses.cross_entropy
    labels = draw.integers(0, max(2, K), size=n + shape.queries)
    structure = uw.Linear(loss, K, d, intercept=True)

    def outputs(params, example):
        return params["coef"] @ example[0] + params["intercept"]

    strength = ((1e-4 if shape.sparse else 1e-6) if shape.bad else 1e-2) * mean
    objective = uw.Objective(
        lambda params, example: loss(outputs(params, example), example[1]),
        theta,
        penalty=uw.L2({"coef": strength, "intercept": strength}),
        outputs=outputs,
        output_loss=lambda output, example: loss(output, example[1]),
        linear=structure,
    )
    return Problem(shape, X, labels[:n], objective, queries, labels[n:])


def plain(found: Problem, most=300):
    """The textbook: conjugate gradients in NumPy or SciPy, a query after the other; values and products."""
    X, objective, K, n = found.X, found.objective, found.shape.K, found.shape.n
    coef, shift = (block.numpy() for block in objective.blocks.values())
    strength = float(next(iter(objective.penalty.strengths.values())))

    def slopes(X, y):
        eta = X @ coef.T + shift
        P = 1 / (1 + np.exp(-eta)) if K == 1 else np.exp(eta - eta.max(1, keepdims=True))
        P = P if K == 1 else P / P.sum(1, keepdims=True)
        return P, P - (y[:, None] if K == 1 else np.eye(K)[y])

    P, residual = slopes(X, found.y)
    _, asked = slopes(found.Xq, found.yq)

    def product(w):
        Z = X @ w[:, :-1].T + w[:, -1]
        R = P * (1 - P) * Z if K == 1 else P * (Z - (P * Z).sum(1, keepdims=True))
        return np.hstack([(X.T @ R).T, R.sum(0)[:, None]]) / n + strength * w

    values, products = [], 0
    for q in range(found.shape.queries):
        row = found.Xq[q].toarray()[0] if scipy.sparse.issparse(found.Xq) else found.Xq[q]
        v = np.outer(asked[q], np.append(row, 1.0))
        x, r = np.zeros_like(v), v.copy()
        p, rho = r.copy(), float((r * r).sum())
        while np.sqrt(rho) > RTOL * np.linalg.norm(v) and products < most:
            image = product(p)
            alpha = rho / float((p * image).sum())
            x += alpha * p
            r -= alpha * image
            new = float((r * r).sum())
            p, rho, products = r + new / rho * p, new, products + 1
        values.append(((X @ x[:, :-1].T + x[:, -1]) * residual).sum(1) / n)
    return np.array(values), products
