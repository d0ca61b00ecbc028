"""Direct solution by Cholesky factorisation."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol, runtime_checkable

import numpy as np
import scipy.linalg
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from upweight.errors import NotPositiveDefinite
from upweight.model.objective import Linear
from upweight.operators.base import Operator
from upweight.operators.shift import Shift
from upweight.solvers.base import Solution, checked_damping, checked_sides, residuals
from upweight.solvers.flat import LEANS, Flat, directions
from upweight.solvers.lanczos import rounded_up, smallest_eigenvalue
from upweight.solvers.outer import PROMISE, OuterForms, outer_forms

_MIN_RECIPROCAL_CONDITION = 1e-12  # beyond it, forming C in float64 has lost what divides: errors of 1e-4 and more
_PROMISE = 1e-6
_ROWS = 1024
_NOTHING = 1e-10  # of a direction of length 1: rounding
_EXACT_UP_TO = 2000
_LOOK = 6  # substitutions between two looks at the smallest curvature
_trsm, _trmm, _symm = scipy.linalg.get_blas_funcs(("trsm", "trmm", "symm"), dtype=np.float64)
_potrf, _pocon, _potrs = scipy.linalg.get_lapack_funcs(("potrf", "pocon", "potrs"), dtype=np.float64)


@dataclass(frozen=True)
class Cholesky:
    """Factorise C + λI once in float64, then solve by substitution.

    The matrix is scaled to a unit diagonal first, so that features of different units cost no digits. The factor
    and the matrix share one array, a triangle each, so that residuals are recomputed from C and memory stays at 8p².
    Cost: writing out C, p³/3 flops once and 2p² per right-hand side; 8p² bytes. Right for p up to several thousand.
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
        self.damping = damping
        self._shift: Shift | None = getattr(operator, "shift", None)
        matrix = _filled(operator, self._shift)
        matrix[np.diag_indices_from(matrix)] += damping
        diagonal = np.diagonal(matrix).copy()
        if not (diagonal >= 0).all():
            raise _refusal(matrix, damping)
        self._scale = 1 / np.sqrt(np.where(diagonal > 0, diagonal, 1.0))
        for rows, scale in zip(_slices(matrix), _slices(self._scale), strict=True):
            rows *= scale[:, None]
            rows *= self._scale
        packed, missing, reciprocal = _factorised(matrix)
        self.flat: Flat | None = None
        if reciprocal < _MIN_RECIPROCAL_CONDITION:
            np.fill_diagonal(packed, diagonal > 0)
            whole = np.triu(packed) + np.triu(packed, 1).T
            if damping == 0 and self._shift is None and getattr(operator, "exact", False):
                self.flat = directions(operator, whole, self._scale)
            if self.flat is not None:
                packed, missing, reciprocal = _factorised(whole + self.flat.scaled @ self.flat.scaled.T)
            if reciprocal < _MIN_RECIPROCAL_CONDITION:
                raise _refusal(whole / self._scale[:, None] / self._scale, damping)
        self.factor = (packed, True)
        self._gauge = operator.project
        self._outer: list[OuterForms | None] = []
        self.operator = PackedOperator(packed, missing, self._scale, damping, operator.project, self._shift, self.flat)
        lowest = (
            -1 / smallest_eigenvalue(NegatedInverse(self), tolerance=_tolerance(len(packed)), look=_LOOK)[0] - damping
        )
        self.min_curvature = lowest if self._shift is None else min(lowest, float(self._shift.curvature.min()))

    def solve(self, V: Float[Tensor, "k p"], *, state: Mapping[str, Tensor] | None = None) -> Solution:  # noqa: ARG002
        """x with (C + λI) x = v for every row v, with its residuals recomputed from C.

        A v that leans on what is flat has no x: it is NaN, and its residual is the share of v that leans.
        """
        V = self._gauge(checked_sides(V))
        x = self.substitute(V)
        residual = residuals(self.operator, self.damping, x, V)
        kept = residual < _PROMISE
        if self.flat is not None:
            share = self.flat.leaning(V)
            leans = share > LEANS
            x[leans], residual[leans], kept = torch.nan, share[leans], kept | leans
        return Solution(x, residual, converged=bool(kept.all()), min_curvature=self.min_curvature)

    def substitute(self, V: Float[Tensor, "k p"]) -> Float[Tensor, "k p"]:
        """(C + λI)⁻¹ v for every row v, without looking at the residual."""
        shift = None if self._shift is None else self._shift.part(V)
        V = V if shift is None else V - shift
        # cho_solve is the same with ten times the overhead, which the steps of an iteration would pay each
        x = _potrs(self.factor[0], (V.numpy() * self._scale).T, lower=1, overwrite_b=1)[0].T * self._scale
        solved = self.operator.project(torch.from_numpy(np.ascontiguousarray(x)))
        if self._shift is None or shift is None:
            return solved
        return solved - self._shift.part(solved) + self._shift.solved(shift, self.damping)

    @cached_property
    def _whitening(self) -> Tensor:
        """D F⁻ᵀ, so that ‖v D F⁻ᵀ‖² is the form: for small p one product beats many small substitutions."""
        identity = np.asfortranarray(np.diag(self._scale))
        return torch.from_numpy(np.ascontiguousarray(_trsm(1.0, self.factor[0], identity, lower=1, overwrite_b=1).T))

    def forms(self, V: Float[Tensor, "k p"]) -> Float[Tensor, " k"]:
        """vᵀ (C + λI)⁻¹ v = ‖F⁻¹ D v‖² for every row v: one triangular solve, p² flops each."""
        V = self._gauge(checked_sides(V))
        shift = None if self._shift is None else self._shift.part(V)
        rest = V if shift is None else V - shift
        if self.operator.size <= _EXACT_UP_TO:
            half = _trmm(1.0, self._whitening.numpy().T, np.ascontiguousarray(rest.numpy()).T, lower=1).T
            value = torch.from_numpy(np.einsum("kp,kp->k", half, half))
        else:
            half = _trsm(
                1.0, self.factor[0], np.ascontiguousarray(rest.numpy() * self._scale).T, lower=1, overwrite_b=1
            )
            value = torch.from_numpy(np.einsum("pk,pk->k", half, half))
        if self.flat is not None:
            value[self.flat.leaning(V) > LEANS] = torch.nan
        if self._shift is None or shift is None:
            return value
        return value + (shift * self._shift.solved(shift, self.damping)).sum(1)

    def outer(self, structure: Linear, active: NDArray[np.int64]) -> OuterForms | None:
        """What gives the forms of r ⊗ x̃ with Σ_k r_k = 0 in fewer flops; None where digits or directions lack.

        It is made once and kept, 4p² bytes: structure and columns are those of the operator's rows.
        """
        if not self._outer:
            self._outer.append(self._made_outer(structure, active))
        return self._outer[0]

    def _made_outer(self, structure: Linear, active: NDArray[np.int64]) -> OuterForms | None:
        K, d = structure.n_outputs, structure.n_features
        draw = np.random.default_rng(0).normal(size=(K, d + int(structure.intercept)))
        draw -= draw.mean(0)
        probe = torch.from_numpy(np.concatenate([draw[:, :d].ravel(), draw[:, d:].ravel()]))[None]
        lost = (self._gauge(probe) - probe).abs() + (0.0 if self._shift is None else self._shift.part(probe).abs())
        if self.flat is not None or float(lost.max()) > _NOTHING:
            return None
        found = outer_forms(self.factor[0], self._scale, structure, active)
        return found if found.bound <= PROMISE else None


class PackedOperator:
    """C from the strict upper triangle of an array whose lower triangle is the factor of D (C + λI) D."""

    def __init__(
        self,
        packed: NDArray[np.float64],
        missing: NDArray[np.float64],
        scale: NDArray[np.float64],
        damping: float,
        project: Callable[[Tensor], Tensor],
        shift: Shift | None = None,
        flat: Flat | None = None,
    ) -> None:
        self._packed, self._scale, self._damping, self._project = packed, scale, damping, project
        self._missing = missing  # from the diagonal: where the scaled matrix had its own, the factor's stands now
        self._shift, self._flat = shift, flat

    @property
    def size(self) -> int:
        """p."""
        return len(self._packed)

    def apply(self, V: Float[Tensor, "k p"]) -> Float[Tensor, "k p"]:
        """C v for every row v without gauge directions."""
        shift = None if self._shift is None else self._shift.part(V)
        rest = V if shift is None else V - shift
        sides = np.ascontiguousarray(rest.numpy() / self._scale)
        image = _symm(1.0, self._packed, sides.T, lower=0).T + self._missing * sides
        if self._flat is not None:
            image -= (sides @ self._flat.scaled) @ self._flat.scaled.T  # what was added to be divided by
        whole = torch.from_numpy(np.ascontiguousarray(image / self._scale)) - self._damping * rest
        if self._shift is None or shift is None:
            return whole
        return whole - self._shift.part(whole) + self._shift.curved(shift)

    def matrix(self) -> Float[Tensor, "p p"]:
        """C."""
        return self.apply(torch.eye(self.size, dtype=torch.float64))

    def project(self, V: Float[Tensor, "k p"]) -> Float[Tensor, "k p"]:
        """V without the gauge directions, and without those that no row sees."""
        V = self._project(V)
        return V if self._flat is None else self._flat.project(V)


def _factorised(matrix: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64], float]:
    """The factor, with what was above the diagonal left there; what its diagonal lacks of the matrix's; 1/condition.

    The last is 0 if the matrix is not positive.
    """
    diagonal = np.diagonal(matrix).copy()
    norm = max(float(np.abs(rows).sum(1).max()) for rows in _slices(matrix))
    # seen transposed, a symmetric matrix is in LAPACK's order; its upper triangle stays what it was
    packed, failed = _potrf(matrix.T, lower=1, overwrite_a=1, clean=0)
    return packed, diagonal - np.diagonal(packed), 0.0 if failed else float(_pocon(packed, norm, uplo="L")[0])


def _filled(operator: Operator, shift: Shift | None) -> NDArray[np.float64]:
    """P C P, made positive in the gauge directions that P leaves out, and as large as its neighbours in shifts."""
    matrix = operator.matrix()
    if shift is not None:
        shift.fill(matrix)
    filling = float(matrix.diagonal().abs().max()) or 1.0
    if not has_gauge(operator):
        return matrix.numpy()
    for _ in range(2):  # rows, then columns; where C maps the gauge to 0 this changes nothing
        for start in range(0, len(matrix), _ROWS):
            matrix[start : start + _ROWS] = operator.project(matrix[start : start + _ROWS])
        matrix = matrix.T.contiguous()
    eye = torch.eye(len(matrix), dtype=torch.float64)
    for start in range(0, len(matrix), _ROWS):
        part = eye[start : start + _ROWS]
        matrix[start : start + _ROWS] += filling * (part - operator.project(part))
    return matrix.numpy()


def _refusal(matrix: NDArray[np.float64], damping: float) -> NotPositiveDefinite:
    """What is wrong with C + λI, and which damping would do."""
    eigenvalues = torch.linalg.eigvalsh(torch.from_numpy(np.ascontiguousarray(matrix))) - damping
    smallest, largest = float(eigenvalues[0]), float(eigenvalues.abs().max())
    rounding = 1e-10 * largest
    floor = 1e-6 * largest
    if smallest < -rounding:
        kind = f"negative curvature {smallest:.3g}"
        why = "θ̂ is probably not a minimum"
        suggestion = rounded_up(-1.1 * smallest)
    else:
        kind = f"a curvature of {smallest:.3g} against a largest of {largest:.3g}, which is singular to rounding"
        why = (
            "Features are probably collinear or far from 0 compared with their spread, or there are more parameters "
            "than the data determine; centring and scaling (StandardScaler) cures the former"
        )
        suggestion = rounded_up(max(floor - smallest, floor))
    negative = int((eigenvalues < -rounding).sum())
    instead = ", curvature=GaussNewton(), or train further" if negative else ", or drop or standardise features"
    message = (
        f"C has {kind} (damping {damping:g}, {negative} of {len(eigenvalues)} eigenvalues negative). "
        f"{why}. Try damping={suggestion:g}{instead}; see influence.check()."
    )
    return NotPositiveDefinite(message, None, suggestion)


@runtime_checkable
class Substitution(Protocol):
    """Something that applies (C + λI)⁻¹ without looking at the residual.

    >>> import upweight as uw
    >>> C = uw.operators.DenseOperator(torch.tensor([[2.0, 1.0], [1.0, 2.0]]))
    >>> V = torch.tensor([[3.0, 0.0]], dtype=torch.float64)
    >>> factor = uw.solvers.Cholesky().prepare(C, 1.0)
    >>> isinstance(factor, Substitution), factor.substitute(V).allclose(factor.solve(V).x)
    (True, True)
    """

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


def _slices(matrix: NDArray[np.float64]) -> Iterator[NDArray[np.float64]]:
    """The matrix, some rows at a time, so that a temporary stays small."""
    return (matrix[start : start + _ROWS] for start in range(0, len(matrix), _ROWS))


def _tolerance(p: int) -> float:
    """How exactly the smallest curvature is reported: a large system's substitutions cost too much to be exact."""
    return 1e-10 if p <= _EXACT_UP_TO else 1e-4
