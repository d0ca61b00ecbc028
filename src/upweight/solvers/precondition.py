"""Cheap approximations of (C + λI)⁻¹ that shorten an iteration and never change its answer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from upweight.errors import InvalidInput, UnsupportedModel, checked_count
from upweight.operators.base import Curvature, Operator, Spectral
from upweight.operators.leading import leading_inverse
from upweight.solvers.recurrence import descend

Inverse = Callable[[Tensor], Tensor]
_FLOOR = 1e-8  # of the largest eigenvalue: what a preconditioner divides by at least
_FEWEST_ROWS = 2  # a subsample that is more than one row in so many saves nothing


@runtime_checkable
class Preconditioner(Protocol):
    """A specification of an approximate inverse.

    >>> import upweight as uw
    >>> @dataclass(frozen=True)
    ... class Diagonal:
    ...     def prepare(self, operator, damping):
    ...         return lambda R: R / (operator.matrix().diagonal() + damping)
    >>> C = uw.operators.DenseOperator(torch.diag(torch.tensor([1.0, 10.0, 100.0])))
    >>> isinstance(Diagonal(), Preconditioner)
    True
    >>> V = torch.ones(1, 3, dtype=torch.float64)
    >>> [uw.solvers.CG(preconditioner=one).prepare(C, 0.0).solve(V).sweeps for one in (Plain(), Diagonal())]
    [4, 2]
    """

    def prepare(self, operator: Operator, damping: float) -> Inverse:
        """A function that maps right-hand sides (k, p) to approximate solutions; it may vary from call to call."""
        ...


@dataclass(frozen=True)
class Plain:
    """No preconditioner: the textbook method, in float64 throughout.

    >>> import upweight as uw
    >>> C = uw.operators.DenseOperator(torch.diag(torch.tensor([1.0, 2.0, 2.0])))
    >>> solution = uw.solvers.CG(preconditioner=Plain()).prepare(C, 0.0).solve(torch.ones(1, 3, dtype=torch.float64))
    >>> solution.sweeps, solution.x.numpy().round(6)  # as many steps as there are different eigenvalues
    (3, array([[1. , 0.5, 0.5]]))
    """

    def prepare(self, operator: Operator, damping: float) -> Inverse:  # noqa: ARG002
        """The identity."""
        return lambda R: R


@dataclass(frozen=True)
class Approximate:
    """The operator's own approximate inverse: Kronecker factors of its mean, or its diagonal.

    Where rows are sparse and every coefficient is held by a penalty or a damping, CG solves for the columns of at most
    one entry, and for the intercepts, exactly, and iterates on the others alone (`operators.eliminated`).

    Cost: one pass over the data and two small eigendecompositions, once; 4·p·(d + K) flops per vector afterwards.

    >>> from sklearn.datasets import load_digits
    >>> from sklearn.linear_model import LogisticRegression
    >>> import upweight as uw
    >>> X, y = load_digits(return_X_y=True)
    >>> X, y = X[:200] / 16, y[:200]
    >>> model = LogisticRegression(tol=1e-8, max_iter=1000).fit(X, y)
    >>> def sweeps(preconditioner):
    ...     influence = uw.explain(model, X, y, solver=uw.solvers.CG(preconditioner=preconditioner))
    ...     return influence.on_loss(X[:1], y[:1]).certificate.sweeps
    >>> sweeps(Plain()) > 1.5 * sweeps(Approximate())  # 56 and 34
    True
    """

    def prepare(self, operator: Operator, damping: float) -> Inverse:
        """The approximate inverse.

        Raises:
            UnsupportedModel: if the operator has none.
        """
        if not hasattr(operator, "approximate_inverse"):
            message = (
                f"Approximate() asks the curvature for an approximate inverse, and {type(operator).__name__} has none. "
                "Only linear predictors have one; leave preconditioner=None."
            )
            raise UnsupportedModel(message)
        return operator.approximate_inverse(damping)  # type: ignore[attr-defined]


@dataclass(frozen=True)
class TwoLevel:
    """The same curvature over a subsample of rows, solved approximately.

    The subsample's curvature is right wherever many rows agree, which is almost everywhere. With dense X of up to about
    a thousand features it is written out on the leading principal directions of X and taken as a Kronecker product on
    the rest, so that its inverse is a few small matrix products (`operators.leading`). Otherwise, and where that block
    is not positive, it is a loose inner CG, itself preconditioned by `Approximate`. On MNIST softmax regression
    (n = 55,000, p = 7,840, λ = 0.01) it leaves 8 passes of plain CG's 44.

    Args:
        rows: size of the subsample; if the data have fewer than twice as many, all of them with `Approximate`.
        rank: leading directions.
        rtol: relative residual of the inner CG, where there is one.
        max_steps: its steps, after which it is used as it is.
        seed: of the draw.

    Raises:
        InvalidInput: if rtol is not between 0 and 1, or a count is not positive.
    """

    rows: int = 4096
    rank: int = 64
    rtol: float = 0.1
    max_steps: int = 60
    seed: int = 0

    def __post_init__(self) -> None:
        if not isinstance(self.rtol, float) or not 0 < self.rtol < 1:
            message = f"TwoLevel(rtol={self.rtol}). It is a relative residual between 0 and 1, such as 0.1."
            raise InvalidInput(message)
        checked_count(self.rows, "rows", hint="4096 is the default")
        checked_count(self.rank, "rank", hint="64 is the default")
        checked_count(self.max_steps, "max_steps", hint="60 is the default")

    def prepare(self, operator: Operator, damping: float) -> Inverse:
        """The inner solve.

        Raises:
            UnsupportedModel: if the operator is no mean over rows of a linear predictor.
        """
        sweep = getattr(operator, "sweep", None)
        if sweep is None or not hasattr(operator, "subsample"):
            message = (
                f"TwoLevel() needs the curvature of a few rows, and {type(operator).__name__} has it of all only. "
                "Only linear predictors can; leave preconditioner=None."
            )
            raise UnsupportedModel(message)
        if _FEWEST_ROWS * self.rows > sweep.n:
            return Approximate().prepare(operator, damping)
        small = getattr(operator, "coarse", operator).subsample(self.rows, self.seed)  # type: ignore[attr-defined]
        leading = leading_inverse(small, damping, self.rank) if small.dense_and_narrow else None
        if leading is not None:
            return lambda R: operator.project(leading(R))
        inner = Approximate().prepare(small, damping)

        def product(V: Tensor) -> Tensor:
            return operator.project(small.apply(V)) + damping * V

        def solve(R: Tensor) -> Tensor:
            start, goal = torch.zeros_like(R), self.rtol * R.norm(dim=1)
            run = descend(product, lambda r: operator.project(inner(r)), start, R, goal, self.max_steps)
            # float32 may see curvature ≤ 0 in a flat direction; the approximate inverse is positive by construction
            return run.x if run.stopped is None else operator.project(inner(R))

        return solve


@dataclass(frozen=True)
class Preconditioned:
    """The answer of another, cheaper curvature on the same data: Ĉ → (Ĉ + λI)⁻¹, such as `EKFAC()` or `Nystroem(100)`.

    CG corrects it until the exact curvature's system is solved, and the solution tells how far it was off alone
    (`preconditioner_gap`). Negative eigenvalues count as 0.

    It shortens the way where it is near. On a 784-16-10 tanh network (MNIST, n = 4,000, λ = 0.01, 10 queries) plain
    block CG took 24 products, `Nystroem(300)` 13 after its sketch, `EKFAC()` 28: layers that are taken as uncorrelated
    spread eigenvalues that the exact curvature has together.

    Cost: binding the curvature, once for all dampings; then one `map` per step, no sweep.

    Args:
        curvature: a specification that knows its eigenvalues when it is bound.

    Raises:
        InvalidInput: if it is not a specification.

    References: Frangella, Tropp and Udell (2023) for Nyström.
    """

    curvature: Curvature

    def __post_init__(self) -> None:
        if isinstance(self.curvature, type) or not hasattr(self.curvature, "bind"):
            message = (
                f"Preconditioned({self.curvature!r}) is no curvature. Pass an object, such as Preconditioned("
                "operators.EKFAC())."
            )
            raise InvalidInput(message)

    def prepare(self, operator: Operator, damping: float) -> ByEigenvalues:
        """The inverse of the other curvature.

        Raises:
            UnsupportedModel: if the operator has no rows to bind it to, or its eigenvalues are not known.
        """
        sweep = getattr(operator, "sweep", None)
        if sweep is None:
            message = (
                f"Preconditioned() binds {self.curvature!r} to the operator's rows, and {type(operator).__name__} has "
                "none. Use CG with curvature=GaussNewton() or Hessian(), or Cholesky() for a matrix."
            )
            raise UnsupportedModel(message)
        near = self.curvature.bind(getattr(operator, "whole", None) or sweep)
        if not isinstance(near, Spectral):
            refusal = (
                f"{self.curvature!r} does not know its eigenvalues, so it cannot be inverted cheaply. Use "
                "operators.EKFAC(), KFAC(), Nystroem(rank), Arnoldi(rank) or Dense(…)."
            )
            raise UnsupportedModel(refusal)
        return ByEigenvalues(near, damping)


@dataclass(frozen=True)
class ByEigenvalues:
    """(Ĉ + λI)⁻¹ through the eigenvalues of Ĉ."""

    near: Spectral
    damping: float

    def __call__(self, R: Tensor) -> Tensor:
        """(Ĉ + λI)⁻¹ r for every row r."""

        def inverse(eigenvalues: Tensor) -> Tensor:
            shifted = eigenvalues.clamp(min=0) + self.damping
            return 1 / shifted.clamp(min=_FLOOR * float(shifted.max()) or 1.0)

        return self.near.map(inverse, R)

    def at(self, damping: float) -> ByEigenvalues:
        """The same eigenvectors at another λ."""
        return replace(self, damping=damping)
