"""Direct solution by Cholesky factorisation."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import scipy.linalg
import scipy.sparse.linalg
import torch
from jaxtyping import Float
from torch import Tensor

from upweight.errors import NotPositiveDefinite
from upweight.operators.base import Operator
from upweight.operators.dense import DenseOperator
from upweight.solvers.base import Solution, checked_damping, residuals
from upweight.solvers.lanczos import rounded_up

_MIN_RECIPROCAL_CONDITION = 1e-14


@dataclass(frozen=True)
class Cholesky:
    """Factorise C + λI once in float64, then solve by substitution.

    Cost: writing out C, p³/3 flops once and 2p² per right-hand side; 16p² bytes. Right for p up to a few thousand.
    """

    def prepare(self, operator: Operator, damping: float = 0.0) -> Factored:
        """The factorisation of C + λI.

        Raises:
            NotPositiveDefinite: if C + λI has an eigenvalue ≤ 0, or one too small to divide by; says which damping would do.
        """
        return Factored(operator, checked_damping(damping))


class Factored:
    """(C + λI)⁻¹ as a Cholesky factor."""

    def __init__(self, operator: Operator, damping: float) -> None:
        matrix = operator.matrix()
        self.operator = DenseOperator(matrix, operator.project)
        self.damping = damping
        shifted = matrix.numpy().copy()
        shifted[np.diag_indices_from(shifted)] += damping
        self._scale = float(np.abs(np.diagonal(shifted)).max()) or 1.0
        gauge = self._gauge()
        if gauge is not None:
            shifted += self._scale * gauge
        norm = np.abs(shifted).sum(0).max()
        try:
            self.factor = scipy.linalg.cho_factor(shifted, lower=True, overwrite_a=True)
        except np.linalg.LinAlgError as error:
            raise self._refusal() from error
        reciprocal, _ = _reciprocal_condition(self.factor[0], norm, uplo="L")
        if reciprocal < _MIN_RECIPROCAL_CONDITION:
            raise self._refusal()
        self.min_curvature = self._smallest() - damping

    def solve(self, V: Float[Tensor, "k p"], *, state: Mapping[str, Tensor] | None = None) -> Solution:  # noqa: ARG002
        """x with (C + λI) x = v for every row v, with its residuals recomputed from C."""
        V = self.operator.project(V.double())
        x = self._substitute(V)
        residual = residuals(self.operator, self.damping, x, V)
        return Solution(x, residual, converged=bool((residual < 1e-6).all()), min_curvature=self.min_curvature)

    def _substitute(self, V: Tensor) -> Tensor:
        x = scipy.linalg.cho_solve(self.factor, V.numpy().T, check_finite=False).T
        return self.operator.project(torch.from_numpy(np.ascontiguousarray(x)))

    def _gauge(self) -> np.ndarray | None:
        """The projector on the gauge directions, or None; filling them keeps the matrix positive definite."""
        eye = torch.eye(self.operator.size, dtype=torch.float64)
        gauge = eye - self.operator.project(eye)
        return gauge.numpy() if bool(gauge.abs().max() > 0) else None

    def _smallest(self) -> float:
        """The smallest eigenvalue of C + λI outside the gauge, from Lanczos iteration on the inverse."""
        p = self.operator.size
        if p <= 2:
            return float(self.operator.eigenvalues[0]) + self.damping if self._gauge() is None else self._scale
        inverse = scipy.sparse.linalg.LinearOperator((p, p), matvec=lambda v: scipy.linalg.cho_solve(self.factor, v, check_finite=False), dtype=np.float64)
        start = np.random.default_rng(0).standard_normal(p)
        largest = scipy.sparse.linalg.eigsh(inverse, k=1, which="LA", v0=start, tol=1e-8, return_eigenvectors=False)
        return float(1 / largest[0])

    def _refusal(self) -> NotPositiveDefinite:
        eigenvalues = self.operator.eigenvalues
        gauge = self._gauge()
        if gauge is not None:
            eigenvalues = torch.linalg.eigvalsh(self.operator.matrix() + 2 * self._scale * torch.from_numpy(gauge))
        smallest, largest = float(eigenvalues[0]), float(eigenvalues.abs().max())
        negative = smallest < -1e-10 * largest
        floor = 1e-6 * largest
        suggestion = rounded_up(max(-1.1 * smallest, 0) if negative else max(floor - smallest, floor))
        why = "θ̂ is probably not a minimum" if negative else "Features are probably collinear, or there are more parameters than the data determine"
        kind = (
            f"negative curvature {smallest:.3g}"
            if negative
            else f"a curvature of {smallest:.3g} against a largest of {largest:.3g}, which is singular to rounding"
        )
        message = (
            f"C + λI has {kind} (damping {self.damping:g}, {int((eigenvalues < -1e-10 * largest).sum())} of {len(eigenvalues)} eigenvalues negative). "
            f"{why}. Try damping={suggestion:g}, curvature=GaussNewton(), or train further; see influence.check()."
        )
        return NotPositiveDefinite(message, None, suggestion)
