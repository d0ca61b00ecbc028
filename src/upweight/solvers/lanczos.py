"""The smallest eigenvalue of an operator by Lanczos iteration, and the damping that makes it positive."""

from __future__ import annotations

from math import ceil, floor, log10

import torch
from torch import Tensor

from upweight.operators.base import Operator

_SHARE = 0.1  # suggested damping lies this far beyond the most negative eigenvalue
_GONE = 1e-10  # of the largest curvature along a direction: the Krylov space may be at its end


def smallest_eigenvalue(
    operator: Operator,
    *,
    steps: int = 100,
    tolerance: float = 1e-3,
    seed: int = 0,
    start: Tensor | None = None,
    look: int = 1,
) -> tuple[float, float, Tensor]:
    """The smallest Ritz value of C, its error bound, and its vector, with full reorthogonalisation.

    The true smallest eigenvalue is never above the Ritz value; an eigenvalue lies within the error bound of it.
    Iteration ends when the bound falls below `tolerance` times the largest |Ritz value|, which is asked every `look`
    products, or after `steps` of them.
    Directions of the gauge are left out.  Cost: one product per step and steps × p numbers.
    """
    p = operator.size
    generator = torch.Generator().manual_seed(seed)
    vector = (
        torch.randn(1, p, generator=generator, dtype=torch.float64) if start is None else start.reshape(1, p).double()
    )
    vector = operator.project(vector)
    basis = torch.empty(min(steps, p) + 1, p, dtype=torch.float64)  # a page is taken when it is first written
    basis[0] = (vector / vector.norm())[0]
    alphas: list[float] = []
    betas: list[float] = []
    value, bound, coefficients = 0.0, float("inf"), torch.ones(1, dtype=torch.float64)
    for step in range(min(steps, p)):
        image = operator.project(operator.apply(basis[step : step + 1]))[0]
        alphas.append(float(basis[step] @ image))
        for _ in range(2):  # twice is enough (Kahan, Parlett)
            image = image - (basis[: step + 1] @ image) @ basis[: step + 1]
        beta = float(image.norm())
        if (step + 1) % look and step + 1 < min(steps, p) and beta > _GONE * max(map(abs, alphas)):
            betas.append(beta)
            torch.div(image, beta, out=basis[step + 1])
            continue
        T = torch.diag(torch.tensor(alphas, dtype=torch.float64))
        if betas:
            off = torch.tensor(betas, dtype=torch.float64)
            T = T + torch.diag(off, 1) + torch.diag(off, -1)
        ritz, vectors = torch.linalg.eigh(T)
        scale = float(ritz.abs().max())
        value, bound, coefficients = float(ritz[0]), beta * float(vectors[-1, 0].abs()), vectors[:, 0]
        if bound <= tolerance * max(abs(value), 1e-3 * scale) or beta <= 1e-12 * max(scale, 1e-300):
            break
        betas.append(beta)
        torch.div(image, beta, out=basis[step + 1])
    return value, bound, coefficients @ basis[: len(coefficients)]


def suggest_damping(operator: Operator, damping: float, witness: Tensor | None = None) -> tuple[float, float]:
    """A damping that makes C + λI positive definite, and the smallest curvature found.

    CG knows only that some curvature is negative, not how negative the worst is. Lanczos finds it, starting from the
    `witness` direction that CG met and again from random ones; the suggestion is checked by a new start before it is
    made.
    """
    value, bound, _ = smallest_eigenvalue(operator, start=witness)
    lowest = value - bound
    for seed in range(1, 4):
        suggestion = rounded_up(max(damping, -(1 + _SHARE) * lowest))
        again, again_bound, _ = smallest_eigenvalue(operator, seed=seed)
        value = min(value, again)
        if again - again_bound + suggestion > 0:
            return suggestion, value
        lowest = min(lowest, again - again_bound)
    return rounded_up(-(1 + _SHARE) * lowest), value


def rounded_up(number: float) -> float:
    """The number with two significant digits, rounded away from zero, so that a suggestion can be typed."""
    if number <= 0:
        return 0.0
    power = 10.0 ** (floor(log10(number)) - 1)
    return float(f"{ceil(number / power - 1e-9) * power:.2g}")
