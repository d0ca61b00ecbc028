"""Direct solution by Cholesky factorisation."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

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
_ROWS = 1024
_EXACT_UP_TO = 2000
(_trsm,) = scipy.linalg.get_blas_funcs(("trsm",), dtype=np.float64)


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
        self.operator = _projected(operator)
        self.damping = damping
        scaled = self._filled()
        scaled[np.diag_indices_from(scaled)] += damping
        diagonal = np.diagonal(scaled).copy()
        if not (diagonal > 0).all():
            raise self._refusal()
        self._scale = 1 / np.sqrt(diagonal)
        scaled *= self._scale[:, None]
        scaled *= self._scale
        norm = max(float(np.abs(rows).sum(1).max()) for rows in _slices(scaled))
        try:
            # the transposed view of a symmetric matrix is in LAPACK's own order, which saves a copy
            self.factor = scipy.linalg.cho_factor(scaled.T, lower=True, overwrite_a=True, check_finite=False)
        except np.linalg.LinAlgError as error:
            raise self._refusal() from error
        (condition,) = scipy.linalg.get_lapack_funcs(("pocon",), (scaled,))
        reciprocal, _ = condition(self.factor[0], norm, uplo="L")
        if reciprocal < _MIN_RECIPROCAL_CONDITION:
            raise self._refusal()
        self.min_curvature = (
            -1 / smallest_eigenvalue(NegatedInverse(self), tolerance=_tolerance(self.size))[0] - damping
        )

    @property
    def size(self) -> int:
        """p."""
        return self.operator.size

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

    def forms(self, V: Float[Tensor, "k p"]) -> Float[Tensor, " k"]:
        """vᵀ (C + λI)⁻¹ v = ‖F⁻¹ D v‖² for every row v: one triangular solve, p² flops each."""
        V = self.operator.project(checked_sides(V))
        sides = np.ascontiguousarray(V.numpy() * self._scale).T
        half = _trsm(1.0, self.factor[0], sides, lower=1, overwrite_b=1)
        return torch.from_numpy(np.einsum("pk,pk->k", half, half))

    def _filled(self) -> NDArray[np.float64]:
        """C, made positive in the gauge directions, in memory of its own."""
        matrix = self.operator.matrix().numpy()
        filling = float(np.abs(np.diagonal(matrix)).max()) or 1.0
        if has_gauge(self.operator):
            eye = torch.eye(self.size, dtype=torch.float64)
            for start in range(0, self.size, _ROWS):
                part = eye[start : start + _ROWS]
                matrix[start : start + _ROWS] += filling * (part - self.operator.project(part)).numpy()
        return matrix

    def _refusal(self) -> NotPositiveDefinite:
        eigenvalues = torch.linalg.eigvalsh(torch.from_numpy(self._filled()))
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


@runtime_checkable
class Substitution(Protocol):
    """Something that applies (C + λI)⁻¹ without looking at the residual."""

    @property
    def operator(self) -> Operator:
        """C."""
        ...

    def substitute(self, V: Float[Tensor, "k p"]) -> Float[Tensor, "k p"]:
        """(C + λI)⁻¹ v for every row v."""
        ...


@dataclass(frozen=True)
class NegatedInverse:
    """−(C + λI)⁻¹, whose smallest eigenvalue is −1 over the smallest of C + λI, and converges in a few steps."""

    prepared: Substitution

    @property
    def size(self) -> int:
        """p."""
        return self.prepared.operator.size

    def apply(self, V: Float[Tensor, "k p"]) -> Float[Tensor, "k p"]:
        """−(C + λI)⁻¹ v for every row v."""
        return -self.prepared.substitute(V)

    def matrix(self) -> Float[Tensor, "p p"]:
        """−(C + λI)⁻¹."""
        return self.apply(torch.eye(self.size, dtype=torch.float64))

    def project(self, V: Float[Tensor, "k p"]) -> Float[Tensor, "k p"]:
        """V without the gauge directions."""
        return self.prepared.operator.project(V)


def has_gauge(operator: Operator) -> bool:
    """Whether the operator projects anything out; a random vector shows it."""
    probe = torch.randn(1, operator.size, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return not torch.equal(operator.project(probe), probe)


def _projected(operator: Operator) -> DenseOperator:
    """C without its gauge directions, as a matrix: P C P, which is C itself where C maps them to 0."""
    matrix = operator.matrix()
    if has_gauge(operator):
        for _ in range(2):
            for start in range(0, len(matrix), _ROWS):
                matrix[start : start + _ROWS] = operator.project(matrix[start : start + _ROWS])
            matrix = matrix.T.contiguous()
    return DenseOperator(matrix, operator.project)


def _slices(matrix: NDArray[np.float64]) -> Iterator[NDArray[np.float64]]:
    """The matrix, some rows at a time, so that a temporary stays small."""
    return (matrix[start : start + _ROWS] for start in range(0, len(matrix), _ROWS))


def _tolerance(p: int) -> float:
    """How exactly the smallest curvature is reported: a large system's substitutions cost too much to be exact."""
    return 1e-10 if p <= _EXACT_UP_TO else 1e-4
