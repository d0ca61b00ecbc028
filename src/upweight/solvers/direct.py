"""Direct solution by Cholesky factorisation."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import scipy.linalg
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from upweight.errors import NotPositiveDefinite
from upweight.operators.base import Operator
from upweight.operators.dense import DenseOperator
from upweight.solvers.base import Solution, checked_damping, checked_sides, residuals
from upweight.solvers.lanczos import rounded_up, smallest_eigenvalue

_MIN_RECIPROCAL_CONDITION = 1e-12  # beyond it, forming C in float64 has lost what divides: errors of 1e-4 and more
_PROMISE = 1e-6


@dataclass(frozen=True)
class Cholesky:
    """Factorise C + λI once in float64, then solve by substitution.

    The matrix is scaled to a unit diagonal first, so that features of different units cost no digits.
    Cost: writing out C, p³/3 flops once and 2p² per right-hand side; 24p² bytes. Right for p up to a few thousand.
    """

    def prepare(self, operator: Operator, damping: float = 0.0) -> Factored:
        """The factorisation of C + λI.

        Raises:
            NotPositiveDefinite: if C + λI has an eigenvalue ≤ 0, or one too small to divide by; says which damping
                would do.
        """
        return Factored(operator, checked_damping(damping))


class Factored:
    """(C + λI)⁻¹ as D F⁻ᵀ F⁻¹ D, with F the Cholesky factor of the scaled matrix D (C + λI) D."""

    def __init__(self, operator: Operator, damping: float) -> None:
        matrix = operator.matrix()
        self.operator = DenseOperator(matrix, operator.project)
        self.damping = damping
        self._gauge = _gauge(self.operator)
        scaled = matrix.numpy().copy()
        scaled[np.diag_indices_from(scaled)] += damping
        self._filling = float(np.abs(np.diagonal(scaled)).max()) or 1.0
        if self._gauge is not None:
            scaled += self._filling * self._gauge
        diagonal = np.diagonal(scaled).copy()
        if not (diagonal > 0).all():
            raise self._refusal()
        self._scale = 1 / np.sqrt(diagonal)
        scaled *= self._scale[:, None] * self._scale
        norm = np.abs(scaled).sum(0).max()
        try:
            self.factor = scipy.linalg.cho_factor(scaled, lower=True, overwrite_a=True)
        except np.linalg.LinAlgError as error:
            raise self._refusal() from error
        (condition,) = scipy.linalg.get_lapack_funcs(("pocon",), (scaled,))
        reciprocal, _ = condition(self.factor[0], norm, uplo="L")
        if reciprocal < _MIN_RECIPROCAL_CONDITION:
            raise self._refusal()
        inverse = _NegatedInverse(self)
        self.min_curvature = -1 / smallest_eigenvalue(inverse, tolerance=1e-10)[0] - damping

    def solve(self, V: Float[Tensor, "k p"], *, state: Mapping[str, Tensor] | None = None) -> Solution:  # noqa: ARG002
        """x with (C + λI) x = v for every row v, with its residuals recomputed from C."""
        V = self.operator.project(checked_sides(V))
        x = self.substitute(V)
        residual = residuals(self.operator, self.damping, x, V)
        return Solution(x, residual, converged=bool((residual < _PROMISE).all()), min_curvature=self.min_curvature)

    def substitute(self, V: Float[Tensor, "k p"]) -> Float[Tensor, "k p"]:
        """(C + λI)⁻¹ v for every row v, without looking at the residual."""
        x = scipy.linalg.cho_solve(self.factor, (V.numpy() * self._scale).T, check_finite=False).T * self._scale
        return self.operator.project(torch.from_numpy(np.ascontiguousarray(x)))

    def _refusal(self) -> NotPositiveDefinite:
        eigenvalues = self.operator.eigenvalues
        if self._gauge is not None:
            eigenvalues = torch.linalg.eigvalsh(self.operator.matrix() + self._filling * torch.from_numpy(self._gauge))
        smallest, largest = float(eigenvalues[0]), float(eigenvalues.abs().max())
        rounding = 1e-10 * largest
        floor = 1e-6 * largest
        if smallest < -rounding:
            kind = f"negative curvature {smallest:.3g}"
            why = "θ̂ is probably not a minimum"
            suggestion = rounded_up(-1.1 * smallest)
        else:
            kind = f"a curvature of {smallest:.3g} against a largest of {largest:.3g}, which is singular to rounding"
            why = "Features are probably collinear, or there are more parameters than the data determine"
            suggestion = rounded_up(max(floor - smallest, floor))
        negative = int((eigenvalues < -rounding).sum())
        instead = ", curvature=GaussNewton(), or train further" if negative else ", or drop features"
        message = (
            f"C has {kind} (damping {self.damping:g}, {negative} of {len(eigenvalues)} eigenvalues negative). "
            f"{why}. Try damping={suggestion:g}{instead}; see influence.check()."
        )
        return NotPositiveDefinite(message, None, suggestion)


@dataclass(frozen=True)
class _NegatedInverse:
    """−(C + λI)⁻¹, whose smallest eigenvalue is −1 over the smallest of C + λI, and converges in a few steps."""

    factored: Factored

    @property
    def size(self) -> int:
        return self.factored.operator.size

    def apply(self, V: Tensor) -> Tensor:
        return -self.factored.substitute(V)

    def matrix(self) -> Tensor:
        return self.apply(torch.eye(self.size, dtype=torch.float64))

    def project(self, V: Tensor) -> Tensor:
        return self.factored.operator.project(V)


def _gauge(operator: DenseOperator) -> NDArray[np.float64] | None:
    """The projector on the gauge directions, or None; filling them keeps the matrix positive definite."""
    eye = torch.eye(operator.size, dtype=torch.float64)
    gauge = eye - operator.project(eye)
    return gauge.numpy() if bool(gauge.abs().max() > 0) else None
