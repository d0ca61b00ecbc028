"""Lanczos's basis of a symmetric operator: an orthonormal Q with Q C Qᵀ tridiagonal."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from upweight.operators.base import Operator

_GONE = 1e-11  # of the largest curvature met: a space that the operator does not leave


def lanczos(
    operator: Operator, steps: int, *, seed: int = 0
) -> tuple[Float[Tensor, "m p"], Float[Tensor, "m m"], float]:
    """Q, T = Q C Qᵀ, and the norm of what the last step would still add, so that ‖Cu − θu‖ = norm·|s_m| for u = sQ.

    Every vector is orthogonalised against all others, twice. Where the operator does not leave the space, a new random
    vector is taken, so that directions of equal curvature are found too; m < steps only where nothing is left but the
    gauge.  Cost: one product per step; 8·steps·p bytes.
    """
    p = operator.size
    draw = torch.Generator().manual_seed(seed)
    Q = torch.empty(steps, p, dtype=torch.float64)
    alphas: list[float] = []
    betas: list[float] = []
    scale, beta = 0.0, 0.0
    vector: Tensor | None = None
    for step in range(steps):
        if vector is None:
            fresh = _orthogonal(operator.project(torch.randn(1, p, generator=draw, dtype=torch.float64)), Q[:step])
            if float(fresh.norm()) <= 1e-8 * p**0.5:
                return Q[:step].clone(), _tridiagonal(alphas, betas[: step - 1]), 0.0
            vector = _unit(fresh / fresh.norm(), Q[:step])
        Q[step] = vector
        image = operator.project(operator.apply(Q[step : step + 1]))
        alphas.append(float(image[0] @ Q[step]))
        scale = max(scale, float(image.norm()))
        image = _orthogonal(image, Q[: step + 1])
        beta = float(image.norm())
        left = beta <= _GONE * max(scale, 1e-300)
        beta = 0.0 if left else beta
        betas.append(beta)
        vector = None if left else _unit(operator.project(image / beta), Q[: step + 1])
    return Q, _tridiagonal(alphas, betas[:-1]), beta


def _orthogonal(v: Tensor, Q: Tensor) -> Tensor:
    for _ in range(2):  # twice is enough (Kahan, Parlett)
        v = v - (v @ Q.T) @ Q
    return v


def _unit(v: Tensor, Q: Tensor) -> Tensor:
    """v as a unit vector without what lies in Q, once more: the rounding of a small remainder grew with it."""
    v = _orthogonal(v, Q)[0]
    return v / v.norm()


def _tridiagonal(alphas: list[float], betas: list[float]) -> Tensor:
    T = torch.diag(torch.tensor(alphas, dtype=torch.float64))
    if betas:
        off = torch.tensor(betas, dtype=torch.float64)
        T = T + torch.diag(off, 1) + torch.diag(off, -1)
    return T
