"""Solution through eigenvectors, for curvatures that know their own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from upweight.errors import NotPositiveDefinite, UnsupportedModel
from upweight.operators.base import Operator, Spectral
from upweight.solvers.base import Solution, checked_damping, checked_sides, residuals
from upweight.solvers.direct import has_gauge
from upweight.solvers.lanczos import rounded_up

_PROMISE = 1e-6
ROUNDING = 1e-12  # of the largest eigenvalue: what is smaller cannot be divided by


@dataclass(frozen=True)
class Factored:
    """(C + λI)⁻¹ v = f(C) v with f(x) = 1/(x + λ), for any curvature that knows its eigenvalues.

    Right for KFAC, EKFAC, Arnoldi, Nystroem, Identity and Dense. It solves with the curvature that it was given, which
    may be an approximation; `CG(preconditioner=Preconditioned(…))` solves with the exact one instead.

    Cost: the eigenvectors once, when the curvature is bound; then one `map` and one product per right-hand side, no
    sweep. Another damping costs nothing more, for only 1/(x + λ) changes.
    """

    def prepare(self, operator: Operator, damping: float = 0.0) -> Diagonalised:
        """The eigenvalues, checked.

        Raises:
            UnsupportedModel: if the curvature does not know its eigenvalues.
            NotPositiveDefinite: if C + λI has an eigenvalue ≤ 0, or one too small to divide by; says which damping
                would do.
        """
        if not isinstance(operator, Spectral):
            message = (
                f"Factored() divides by the eigenvalues of the curvature, and {type(operator).__name__} knows only its "
                "products. Pass curvature=operators.EKFAC(), Nystroem(rank) or Dense(…), or solve with CG()."
            )
            raise UnsupportedModel(message)
        damping = checked_damping(damping)
        lowest, largest = _ends(operator)
        if lowest + damping <= ROUNDING * largest and not (abs(lowest) <= ROUNDING * largest and has_gauge(operator)):
            raise _refusal(operator, damping, lowest, largest)
        return Diagonalised(operator, damping, lowest, largest)


@dataclass(frozen=True)
class Diagonalised:
    """(C + λI)⁻¹ of a curvature that knows its eigenvalues."""

    operator: Spectral
    damping: float
    lowest: float
    largest: float

    def solve(self, V: Float[Tensor, "k p"], *, state: Mapping[str, Tensor] | None = None) -> Solution:  # noqa: ARG002
        """x with (C + λI) x = v for every row v, with its residuals recomputed from C."""
        V = self.operator.project(checked_sides(V))
        x = self.substitute(V)
        residual = residuals(self.operator, self.damping, x, V)
        return Solution(x, residual, converged=bool((residual < _PROMISE).all()), min_curvature=self.lowest)

    def substitute(self, V: Float[Tensor, "k p"]) -> Float[Tensor, "k p"]:
        """(C + λI)⁻¹ v for every row v, without looking at the residual."""
        return self.operator.project(self.operator.map(self.inverse, V))

    def forms(self, V: Float[Tensor, "k p"]) -> Float[Tensor, " k"]:
        """vᵀ (C + λI)⁻¹ v for every row v."""
        V = self.operator.project(checked_sides(V))
        return (V * self.substitute(V)).sum(1)

    def at(self, damping: float) -> Diagonalised:
        """The same with another λ.

        Raises:
            NotPositiveDefinite: if that λ is too small.
        """
        return Factored().prepare(self.operator, damping)

    def inverse(self, eigenvalues: Tensor) -> Tensor:
        """1/(x + λ), and 0 in gauge directions."""
        shifted = eigenvalues + self.damping
        gone = shifted <= ROUNDING * self.largest  # gauge directions, of which v has no part
        return torch.where(gone, 0.0, 1 / torch.where(gone, 1.0, shifted))


def _ends(operator: Spectral) -> tuple[float, float]:
    """The smallest eigenvalue, and the largest absolute one."""
    eigenvalues = operator.eigenvalues
    return float(eigenvalues.min()), float(eigenvalues.abs().max()) or 1.0


def _refusal(operator: Spectral, damping: float, lowest: float, largest: float) -> NotPositiveDefinite:
    if lowest < -ROUNDING * largest:
        kind, instead = f"a negative eigenvalue, {lowest:.3g}", ", or curvature over GaussNewton(), which has none"
        why = "θ̂ is probably not a minimum"
        suggestion = rounded_up(-1.1 * lowest)
    else:
        kind, instead = f"an eigenvalue of {lowest:.3g} against a largest of {largest:.3g}", ", or a penalty on it all"
        why = "Directions that the data do not bend, or that a low rank leaves out, have no curvature of their own"
        suggestion = rounded_up(1e-3 * largest)
    count = int((operator.eigenvalues + damping <= ROUNDING * largest).sum())
    message = (
        f"C has {kind} (damping {damping:g}; {count} of {operator.size} are too small to "
        f"divide by). {why}. Try damping={suggestion:g}{instead}."
    )
    return NotPositiveDefinite(message, None, suggestion)
