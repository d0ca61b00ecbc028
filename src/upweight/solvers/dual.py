"""Direct solution through the rows instead of the parameters, for more parameters than rows."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import scipy.linalg
import scipy.sparse
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from upweight.errors import NotPositiveDefinite, UnsupportedModel
from upweight.model import linear, penalties
from upweight.model.objective import L2
from upweight.operators.base import Operator
from upweight.operators.linear import LinearHessian
from upweight.solvers.base import Solution, checked_damping, checked_sides, residuals
from upweight.solvers.direct import NegatedInverse
from upweight.solvers.lanczos import smallest_eigenvalue

_PROMISE = 1e-6
_GRAM_ROWS = 512
_REFINEMENTS = 2
_CANCELLED = 1e7  # of M's diagonal: the digits that Λ⁻¹ − Λ⁻¹Uᵀ M⁻¹ U Λ⁻¹ loses; scores bear the loss of seven
_CANCELLED_FORMS = 1e3  # forms become leverages, and 1 − h loses as many again


@dataclass(frozen=True)
class Dual:
    """Solve (C + λI) x = v for a linear predictor through an (nK) × (nK) matrix, by Woodbury's identity.

    With wᵢhᵢ = BᵢBᵢᵀ, U the nK rows Bᵢ[:, m] ⊗ xᵢ/√n and Λ the penalty's strengths plus λ, C + λI = UᵀU + Λ and

        (UᵀU + Λ)⁻¹ = Λ⁻¹ − Λ⁻¹Uᵀ M⁻¹ U Λ⁻¹,    M = I + U Λ⁻¹ Uᵀ

    Unpenalised intercepts are eliminated by their Schur complement. X may be sparse; nothing of size p × p is formed.
    Cost: the Gram matrix of X, (nK)³/3 flops once, (nK)² per right-hand side; 16(nK)² bytes. Right when nK < p.

    Reference: Woodbury (1950); the kernel trick is the same identity.
    """

    def prepare(self, operator: Operator, damping: float = 0.0) -> Woodbury:
        """The factorisation of M.

        Raises:
            UnsupportedModel: if the curvature is not the exact one of a linear predictor.
            NotPositiveDefinite: if a coefficient has neither penalty nor damping, or hardly any beside the curvature,
                or a row's curvature is negative.
        """
        if not isinstance(operator, LinearHessian):
            message = (
                f"Dual() works on the exact Hessian of a linear predictor, and the curvature is "
                f"{type(operator).__name__}. Use CG() or Cholesky()."
            )
            raise UnsupportedModel(message)
        return Woodbury(operator, checked_damping(damping))


class Woodbury:
    """(C + λI)⁻¹ through the factor of M."""

    def __init__(self, operator: LinearHessian, damping: float) -> None:
        objective = operator.sweep.objective
        self.operator, self.damping, self._objective = operator, damping, objective
        structure = objective.linear
        assert structure is not None  # LinearHessian has a linear predictor
        self._K, self._split = structure.n_outputs, structure.n_outputs * structure.n_features
        strengths = penalties.diagonal(objective) + damping
        _refuse(operator, strengths[: self._split], damping)
        self._inverse = 1 / strengths[: self._split]
        self._X = operator.sweep.examples.batch(slice(None))[0]
        self._X = self._X.astype("float64", copy=False) if scipy.sparse.issparse(self._X) else self._X.double()
        self._root = _Root.of(operator.curvatures, self._K, operator.sweep.n)
        inner = self._inner()
        largest = float(np.abs(np.diagonal(inner)).max())
        self._factor = _factor(inner, largest)
        self._free = None
        if structure.intercept:
            outputs = torch.eye(self._K, dtype=torch.float64).expand(operator.sweep.n, -1, -1)
            self._Uf = self._root.down(outputs).transpose(0, 1).reshape(self._K, -1)  # (K, nK)
            schur = torch.diag(strengths[self._split :]) + self._Uf @ self._small(self._Uf).T
            self._free = self._schur_inverse(schur)
        self.accurate, self._cancels = largest < _CANCELLED, largest > _CANCELLED_FORMS
        self.min_curvature = -1 / smallest_eigenvalue(NegatedInverse(self), tolerance=1e-4)[0] - damping

    def solve(self, V: Float[Tensor, "k p"], *, state: Mapping[str, Tensor] | None = None) -> Solution:  # noqa: ARG002
        """x with (C + λI) x = v for every row v, with its residuals recomputed from C."""
        V = self.operator.project(checked_sides(V))
        x = self._refined(V)
        residual = residuals(self.operator, self.damping, x, V)
        return Solution(x, residual, converged=bool((residual < _PROMISE).all()), min_curvature=self.min_curvature)

    def substitute(self, V: Float[Tensor, "k p"]) -> Float[Tensor, "k p"]:
        """(C + λI)⁻¹ v for every row v, without looking at the residual."""
        coef = V[:, : self._split] * self._inverse
        t = self._small(self._down(coef))
        if self._free is None:
            return coef - self._up(t) * self._inverse
        free = (V[:, self._split :] - t @ self._Uf.T) @ self._free
        t = t + free @ self._small(self._Uf)
        return self.operator.project(torch.cat([coef - self._up(t) * self._inverse, free], 1))

    def _refined(self, V: Tensor) -> Tensor:
        """The substitution and its correction by the true residual: Λ⁻¹ − Λ⁻¹Uᵀ M⁻¹ U Λ⁻¹ cancels where UᵀU ≫ Λ."""
        x = self.substitute(V)
        for _ in range(_REFINEMENTS):
            x = x + self.substitute(V - self.operator.project(self.operator.apply(x)) - self.damping * x)
        return x

    def forms(self, V: Float[Tensor, "k p"]) -> Float[Tensor, " k"]:
        """vᵀ (C + λI)⁻¹ v for every row v.  Cost: one triangular solve, (nK)² flops each; two products more if the
        cancellation of UᵀU against Λ asks for refined solutions.
        """
        V = self.operator.project(checked_sides(V))
        if self._cancels:
            return (V * self._refined(V)).sum(1)
        coef = V[:, : self._split]
        sides = self._down(coef * self._inverse)
        half = scipy.linalg.solve_triangular(self._factor[0], sides.numpy().T, lower=True, check_finite=False)
        value = (coef * coef * self._inverse).sum(1) - torch.from_numpy((half * half).sum(0))
        if self._free is None:
            return value
        left = V[:, self._split :] - self._small(sides) @ self._Uf.T
        return value + ((left @ self._free) * left).sum(1)

    def own(self, X: Any, R: Float[Tensor, "b K"]) -> Float[Tensor, " b"]:
        """vᵀ (C + λI)⁻¹ v of every v = r ⊗ x̃.  Cost: n products of rows and one triangular solve, (nK)² flops, each."""
        sides = self._examples_down(X, R)
        half = scipy.linalg.solve_triangular(self._factor[0], sides.numpy().T, lower=True, check_finite=False)
        square = X.multiply(X).tocsr() if scipy.sparse.issparse(X) else X * X
        squares = linear.times(square, self._inverse.reshape(self._K, -1).T)  # (b, K)
        value = (R * R * squares).sum(1) - torch.from_numpy((half * half).sum(0))
        if self._free is None:
            return value
        left = R - self._small(sides) @ self._Uf.T
        return value + ((left @ self._free) * left).sum(1)

    def against(self, X: Any, R: Float[Tensor, "q K"]) -> Callable[[Any, Tensor], Tensor]:
        """A function of other examples (X, R) that gives v_otherᵀ (C + λI)⁻¹ v for each of them, (b, q).

        Cost: (nK)² flops for each example given here; q·nK + b·nK multiplications for each pair of blocks afterwards.
        """
        t = self._small(self._examples_down(X, R))  # (q, nK)
        free = None if self._free is None else (R - t @ self._Uf.T) @ self._free
        inverse = self._inverse.reshape(self._K, -1)

        def products(X_other: Any, R_other: Tensor) -> Tensor:
            sides = self._examples_down(X_other, R_other)
            values = -sides @ t.T
            for k, gram in _grams(X_other, inverse, X):
                values += R_other[:, k] @ R[:, k].T * gram
            if free is None:
                return values
            return values + (R_other - sides @ self._small(self._Uf).T) @ free.T

        return products

    def _examples_down(self, X: Any, R: Tensor) -> Tensor:
        """U Λ⁻¹ v of examples v = r ⊗ x, (b, nK), through products of rows with rows."""
        total = torch.zeros(R.shape[0], self.operator.sweep.n, self._K, dtype=torch.float64)
        for k, gram in _grams(X, self._inverse.reshape(self._K, -1), self._X):
            part = torch.zeros_like(R)
            part[:, k] = R[:, k]
            total += self._root.down(part.expand(self.operator.sweep.n, -1, -1)).transpose(0, 1) * gram[:, :, None]
        return total.reshape(len(R), -1)

    def _down(self, coef: Tensor) -> Tensor:
        """U v: (k, nK)."""
        structure = self._objective.linear
        assert structure is not None  # checked when built
        Z = linear.times(self._X, coef.reshape(-1, structure.n_features).T).reshape(-1, len(coef), self._K)
        return self._root.down(Z).transpose(0, 1).reshape(len(coef), -1)

    def _up(self, t: Tensor) -> Tensor:
        """Uᵀ t: (k, coefficients)."""
        R = self._root.up(t.reshape(len(t), -1, self._K).transpose(0, 1))
        return linear.transposed(self._objective, self._X, R)[:, : self._split]

    def _small(self, t: Tensor) -> Tensor:
        """M⁻¹ t for every row t."""
        x = scipy.linalg.cho_solve(self._factor, t.numpy().T, check_finite=False).T
        return torch.from_numpy(np.ascontiguousarray(x))

    def _inner(self) -> NDArray[np.float64]:
        """M = I + U Λ⁻¹ Uᵀ, (nK, nK), in LAPACK's order."""
        n, K = self.operator.sweep.n, self._K
        B = self._root.matrix()  # (n, K, K): B[i, k, m]
        if K == 1:
            _, gram = next(_grams(self._X, self._inverse.reshape(1, -1), self._X))
            gram.mul_(B[:, 0, 0, None]).mul_(B[:, 0, 0])
            gram.diagonal().add_(1.0)
            return gram.numpy().T
        M = torch.zeros(n, K, n, K, dtype=torch.float64)
        for k, gram in _grams(self._X, self._inverse.reshape(K, -1), self._X):
            M += torch.einsum("ikm,ij,jkl->imjl", B[:, k], gram, B[:, k])
        flat = M.reshape(n * K, n * K)
        flat.diagonal().add_(1.0)
        return flat.numpy().T

    def _schur_inverse(self, schur: Tensor) -> Tensor:
        """The inverse on the intercepts, without a common shift of them if that is a gauge direction."""
        eye = torch.zeros(self._K, self.operator.size, dtype=torch.float64)
        eye[:, self._split :] = torch.eye(self._K, dtype=torch.float64)
        gauge = torch.eye(self._K, dtype=torch.float64) - self.operator.project(eye)[:, self._split :]
        filled = schur + float(schur.diagonal().abs().max()) * gauge
        eigenvalues = torch.linalg.eigvalsh(filled)
        if float(eigenvalues[0]) <= 1e-12 * float(eigenvalues[-1]):
            message = (
                f"The data do not determine the intercept: its curvature is {float(eigenvalues[0]):.3g} against "
                f"{float(eigenvalues[-1]):.3g}. For a support vector machine: no row lies on the margin. Try "
                "damping=1e-6, or a smoother loss."
            )
            raise NotPositiveDefinite(message, None, 1e-6)
        return torch.linalg.inv(filled)


@dataclass(frozen=True)
class _Root:
    """Bᵢ with wᵢhᵢ = BᵢBᵢᵀ: D^½ (I − γ v vᵀ) for h = diag(a) − u uᵀ, D = diag(a), v = D^−½ u."""

    scale: Tensor  # (n, K) √a
    v: Tensor | None  # (n, K)
    gamma: Tensor | None  # (n, 1)

    @classmethod
    def of(cls, h: Tensor, K: int, n: int) -> _Root:
        """Of hᵢ/n."""
        a = h[:, :K] / n
        if float(a.min()) < 0:
            message = (
                f"A row has the curvature {float(a.min()):.3g} < 0, so C has no factor UᵀU. Use Cholesky() or CG()."
            )
            raise NotPositiveDefinite(message)
        scale = a.sqrt()
        if h.shape[1] == K:
            return cls(scale, None, None)
        v = torch.where(scale > 0, h[:, K:] / n**0.5 / scale.clamp(min=1e-300), torch.zeros_like(scale))
        share = (v * v).sum(1, keepdim=True).clamp(max=1.0)  # (1 − γ share)² = 1 − share
        gamma = torch.where(share > 0, (1 - (1 - share).sqrt()) / share.clamp(min=1e-300), torch.zeros_like(share))
        return cls(scale, v, gamma)

    def down(self, Z: Float[Tensor, "n k K"]) -> Float[Tensor, "n k K"]:
        """Bᵢᵀ z for every row and vector."""
        return self._reflect(Z * self.scale[:, None])

    def up(self, T: Float[Tensor, "n k K"]) -> Float[Tensor, "n k K"]:
        """Bᵢ t for every row and vector."""
        return self._reflect(T) * self.scale[:, None]

    def matrix(self) -> Float[Tensor, "n K K"]:
        """Bᵢ itself."""
        n, K = self.scale.shape
        return self.up(torch.eye(K, dtype=torch.float64).expand(n, K, K)).transpose(1, 2)

    def _reflect(self, Z: Tensor) -> Tensor:
        if self.v is None or self.gamma is None:
            return Z
        return Z - (self.gamma * self.v)[:, None] * (Z * self.v[:, None]).sum(2, keepdim=True)


def _factor(inner: NDArray[np.float64], largest: float) -> tuple[NDArray[np.float64], bool]:
    """The Cholesky factor of M, in its place.

    Raises:
        NotPositiveDefinite: if rounding has left M none.
    """
    try:
        return scipy.linalg.cho_factor(inner, lower=True, overwrite_a=True, check_finite=False)
    except scipy.linalg.LinAlgError as error:
        message = (
            f"Dual() cannot factorise M = I + U Λ⁻¹ Uᵀ in float64: it reaches {largest:.2g}, beside which I is "
            "rounding. Usual reasons: features in small units, or hardly a penalty on them. Use Cholesky(), a larger "
            "penalty, or standardised features (StandardScaler)."
        )
        raise NotPositiveDefinite(message) from error


def _grams(X: Any, inverse: Tensor, Y: Any) -> Iterator[tuple[list[int], Tensor]]:
    """X Λ_k⁻¹ Yᵀ for every group of outputs k that share their strengths."""
    left = list(range(len(inverse)))
    while left:
        same = [k for k in left if torch.equal(inverse[k], inverse[left[0]])]
        scale = inverse[same[0]].numpy()
        right = Y.T if scipy.sparse.issparse(Y) else Y.numpy().T
        gram = np.empty((X.shape[0], Y.shape[0]))
        for start in range(0, X.shape[0], _GRAM_ROWS):  # a sparse product is nearly full, and takes more than an array
            rows = X[start : start + _GRAM_ROWS]
            part = (rows.multiply(scale).tocsr() if scipy.sparse.issparse(rows) else rows.numpy() * scale) @ right
            gram[start : start + _GRAM_ROWS] = part.toarray() if scipy.sparse.issparse(part) else part
        yield same, torch.from_numpy(gram)
        left = [k for k in left if k not in same]


def _refuse(operator: LinearHessian, strengths: Tensor, damping: float) -> None:
    penalty = operator.sweep.objective.penalty
    if penalty is not None and not isinstance(penalty, L2):
        unknown = (
            "Dual() divides by the penalty of every coefficient, and this one is a function, whose second derivatives "
            "it does not know apart. Use Cholesky() or CG(), or write the penalty as a float or L2(…)."
        )
        raise UnsupportedModel(unknown)
    if float(strengths.min()) <= 0:
        message = (
            f"Dual() divides by the penalty of every coefficient, and the smallest is {float(strengths.min()):g} "
            f"(damping {damping:g}). With more parameters than rows an unpenalised fit is not unique. Use a penalty, "
            "or damping=1e-6."
        )
        raise NotPositiveDefinite(message, None, 1e-6)
    probe = torch.zeros(1, operator.size, dtype=torch.float64)
    probe[:, : len(strengths)] = torch.linspace(1, 2, len(strengths), dtype=torch.float64)
    if not torch.equal(operator.project(probe), probe):
        refusal = (
            "Dual() needs every coefficient to be free to move, and some are held fixed here. Use Cholesky() or CG()."
        )
        raise UnsupportedModel(refusal)
