"""The top layer of section 5.2's attack: logistic regression that is refitted after small changes of few rows.

    R(θ) = (1/n) Σᵢ log(1 + exp(−yᵢ θᵀhᵢ)) + (λ/2)‖θ‖²,      yᵢ = ±1, no intercept

The same answers as an Influence gives, faster over hundreds of thousands of refits: Newton from the last θ, its systems
by conjugate gradients with the last Cholesky factor as preconditioner, factorised anew when that takes long.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import scipy.linalg
from numpy.typing import NDArray
from scipy.special import expit

Array = NDArray[np.float64]
_GRADIENT = 1e-8  # ‖∇R‖ of a fit
_RTOL = 1e-4  # residual of s_test
_ROUNDS = 25  # of conjugate gradients before a new factor pays


class Head:
    """θ̂ on features, and what depends on it.

    Args:
        H: (n, d) features; change rows in place and call `fit`.
        y: (n,) labels 0 and 1.
        penalty: λ.
    """

    def __init__(self, H: Array, y: Array, penalty: float) -> None:
        self.H, self.y, self.penalty = H.copy(), y, penalty
        self.theta = np.zeros(H.shape[1])
        self.factor: tuple[Array, bool] | None = None

    def copy(self) -> Head:
        """The same fit with features of its own."""
        other = Head(self.H, self.y, self.penalty)
        other.theta, other.factor = self.theta, self.factor
        return other

    def risk(self, theta: Array) -> float:
        """R(θ)."""
        signs = 2 * self.y - 1
        return float(np.logaddexp(0, -signs * (self.H @ theta)).mean() + self.penalty / 2 * theta @ theta)

    def fit(self) -> None:
        """θ̂ from the last one, by Newton's method with step halving.

        Raises:
            ValueError: if 60 steps are not enough.
        """
        risk = self.risk(self.theta)
        for _ in range(60):
            gradient = self.H.T @ (expit(self.H @ self.theta) - self.y) / len(self.y) + self.penalty * self.theta
            if np.linalg.norm(gradient) < _GRADIENT:
                return
            step, size = -self.solve(gradient, 1e-2), 1.0
            while (new := self.risk(self.theta + size * step)) > risk + 1e-4 * size * (gradient @ step) + 1e-15:
                size /= 2
                if size < 1e-9:
                    message = f"No step lowers the risk any more at ‖∇R‖ = {np.linalg.norm(gradient):.3g}."
                    raise ValueError(message)
            self.theta, risk = self.theta + size * step, new
        message = f"Newton's method did not end within 60 steps; ‖∇R‖ = {np.linalg.norm(gradient):.3g}."
        raise ValueError(message)

    def solve(self, v: Array, rtol: float) -> Array:
        """x with ∇²R(θ̂) x = v, to this relative residual."""
        p = expit(self.H @ self.theta)
        D = p * (1 - p) / len(self.y)

        def curvature(x: Array) -> Array:
            return self.H.T @ (D * (self.H @ x)) + self.penalty * x

        if self.factor is not None:
            x, reached = _gradients(curvature, v, self.factor, rtol)
            if reached:
                return x
        W = self.H * np.sqrt(D)[:, None]
        self.factor = scipy.linalg.cho_factor(W.T @ W + self.penalty * np.eye(len(v)))
        return _gradients(curvature, v, self.factor, rtol)[0]

    def margins(self, queries: Array, labels: Array) -> Array:
        """(q,) ±θᵀh: negative where the model is wrong."""
        return (2 * labels - 1) * (queries @ self.theta)

    def loss(self, queries: Array, labels: Array) -> float:
        """The mean loss of the queries."""
        return float(np.logaddexp(0, -self.margins(queries, labels)).mean())

    def s_test(self, queries: Array, labels: Array) -> Array:
        """(d,) ∇²R(θ̂)⁻¹ times the gradient of the queries' mean loss."""
        residual = expit(queries @ self.theta) - labels
        return self.solve(queries.T @ residual / len(labels), _RTOL)

    def of_perturbing(self, s: Array) -> Array:
        """(n, d) equation 5 by features: −(1/n) ∂(s·∇L(zᵢ))/∂hᵢ with ∇L = (p − y)h."""
        p = expit(self.H @ self.theta)
        parts = np.outer(p - self.y, s) + np.outer(p * (1 - p) * (self.H @ s), self.theta)
        return -parts / len(self.y)


def _gradients(
    curvature: Callable[[Array], Array], v: Array, factor: tuple[Array, bool], rtol: float
) -> tuple[Array, bool]:
    """Preconditioned conjugate gradients, and whether the residual was reached."""
    x, r = np.zeros_like(v), v.copy()
    z = scipy.linalg.cho_solve(factor, r)
    d, rz, enough = z, r @ z, rtol * np.linalg.norm(v)
    for _ in range(_ROUNDS):
        if np.linalg.norm(r) <= enough:
            return x, True
        Cd = curvature(d)
        size = rz / (d @ Cd)
        x, r = x + size * d, r - size * Cd
        z = scipy.linalg.cho_solve(factor, r)
        d, rz = z + (r @ z) / rz * d, r @ z
    return x, bool(np.linalg.norm(r) <= enough)
