"""What a solver promises: to solve (C + λI) x = v, where λ is the damping and means itself everywhere.

A specification (`CG(rtol=1e-6)`) holds hyper-parameters; `prepare(operator, damping)` does once what can be done once;
`solve(V)` then solves for many right-hand sides, the rows of V, and returns a `Solution` that carries its residuals.
Damping is given to `prepare` only. Directions in which the objective is constant by construction (its gauge) are
projected out of V and of x, which gives the solution of minimum norm.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from upweight.errors import InvalidInput
from upweight.operators.base import Operator

LOOKED = ("settled", "settled_bound", "error_bound")  # of a Solution: what an iteration says that followed its values


@dataclass(frozen=True)
class Solution:
    """x with (C + λI) x ≈ v, and how near that is.

    Args:
        x: (k, p) solutions.
        residual: (k,) relative residuals ‖v − (C + λI) x‖ / ‖v‖, recomputed from the definition; NaN if not promised.
        converged: whether every row kept the solver's promise.
        sweeps: how many times the operator was applied.
        min_curvature: an estimate of the smallest eigenvalue of C (exact for Cholesky, an upper bound for CG, NaN if
            unknown).
        replicas: (r, k, p) independent estimates whose mean is x, for stochastic solvers; their spread is the
            standard error.
        truncation: a bound on the relative bias of stopping a recursion early; 0 for solvers that do not.
        preconditioner_gap: (k,) how far the preconditioner alone was from the answer, ‖x₀ − x‖/‖x‖ in the norm of
            C + λI with x₀ = M v; None where there is no preconditioner that is an answer of its own.
        state: what `solve(V, state=…)` needs in order to go on.
        settled: (k,) what is estimated to be still to come to a query's values, relative to their size; None where that
            was not followed.
        settled_bound: (k,) what can still come at most, proven; None where C is not known to be positive semidefinite.
        error_bound: (k,) a proven bound on ‖x − (C + λI)⁻¹v‖; None likewise.

    >>> import upweight as uw
    >>> C = uw.operators.DenseOperator(torch.tensor([[2.0, 1.0], [1.0, 2.0]]))
    >>> V = torch.tensor([[3.0, 0.0]], dtype=torch.float64)
    >>> solution = uw.solvers.CG(rtol=1e-8).prepare(C, 1.0).solve(V)
    >>> solution.converged, solution.sweeps, solution.x.numpy().round(4), bool(solution.residual.max() < 1e-8)
    (True, 3, array([[ 1.125, -0.375]]), True)
    """

    x: Float[Tensor, "k p"]
    residual: Float[Tensor, " k"]
    converged: bool
    sweeps: int = 0
    min_curvature: float = float("nan")
    replicas: Float[Tensor, "r k p"] | None = None
    truncation: float = 0.0
    preconditioner_gap: Float[Tensor, " k"] | None = None
    state: Mapping[str, Tensor] = field(default_factory=dict, repr=False)
    settled: Float[Tensor, " k"] | None = None
    settled_bound: Float[Tensor, " k"] | None = None
    error_bound: Float[Tensor, " k"] | None = None

    @property
    def looked(self) -> dict[str, Tensor]:
        """What is said of the values, where they had settled before the residual was small; nothing elsewhere."""
        found = {name: getattr(self, name) for name in LOOKED}
        return {} if self.settled is None else {name: x for name, x in found.items() if x is not None}


@runtime_checkable
class Prepared(Protocol):
    """(C + λI)⁻¹, ready to be applied.

    >>> import upweight as uw
    >>> C = uw.operators.DenseOperator(torch.tensor([[2.0, 1.0], [1.0, 2.0]]))
    >>> V = torch.tensor([[3.0, 0.0]], dtype=torch.float64)
    >>> prepared = uw.solvers.Cholesky().prepare(C, 1.0)
    >>> isinstance(prepared, Prepared), prepared.solve(V).x.numpy().round(4)  # (C + I)⁻¹v
    (True, array([[ 1.125, -0.375]]))
    """

    def solve(self, V: Float[Tensor, "k p"], *, state: Mapping[str, Tensor] | None = None) -> Solution:
        """x with (C + λI) x = v for every row v."""
        ...


@runtime_checkable
class Solver(Protocol):
    """A specification of a method to solve linear systems."""

    def prepare(self, operator: Operator, damping: float = 0.0) -> Prepared:
        """What can be computed before the right-hand sides are known."""
        ...


@runtime_checkable
class Quadratic(Prepared, Protocol):
    """(C + λI)⁻¹ that can weigh many vectors without solving for them.

    >>> import upweight as uw
    >>> C = uw.operators.DenseOperator(torch.tensor([[2.0, 1.0], [1.0, 2.0]]))
    >>> V = torch.tensor([[3.0, 0.0]], dtype=torch.float64)
    >>> prepared = uw.solvers.Cholesky().prepare(C, 1.0)
    >>> isinstance(prepared, Quadratic)
    True
    >>> round(prepared.forms(V).item(), 4), round((prepared.solve(V).x * V).sum().item(), 4)
    (3.375, 3.375)
    """

    def forms(self, V: Float[Tensor, "k p"]) -> Float[Tensor, " k"]:
        """vᵀ (C + λI)⁻¹ v for every row v."""
        ...


@runtime_checkable
class Movable(Prepared, Protocol):
    """(C + λI)⁻¹ that can take another λ and keep what does not depend on it.

    >>> import upweight as uw
    >>> C = uw.operators.DenseOperator(torch.tensor([[2.0, 1.0], [1.0, 2.0]]))
    >>> V = torch.tensor([[3.0, 0.0]], dtype=torch.float64)
    >>> prepared = uw.solvers.CG().prepare(C, 0.0)
    >>> isinstance(prepared, Movable)
    True
    >>> [prepared.at(damping).solve(V).x.numpy().round(4) for damping in (0.0, 1.0)]
    [array([[ 2., -1.]]), array([[ 1.125, -0.375]])]
    """

    @property
    def operator(self) -> Operator:
        """C."""
        ...

    def at(self, damping: float) -> Movable:
        """(C + λI)⁻¹ at another λ."""
        ...


@runtime_checkable
class Pairwise(Quadratic, Protocol):
    """(C + λI)⁻¹ of a linear predictor that compares examples, v = r ⊗ x̃, without writing out their p numbers.

    >>> from sklearn.linear_model import Ridge
    >>> import upweight as uw
    >>> X, y = torch.tensor([[0.0, 1.0, 3.0, 2.0], [1.0, 1.0, 0.0, 2.0]], dtype=torch.float64), [0.0, 2.0]
    >>> influence = uw.explain(Ridge(fit_intercept=False).fit(X, y), X, y, solver=uw.solvers.Dual())
    >>> R = torch.ones(2, 1, dtype=torch.float64)  # v = r ⊗ x, here x itself
    >>> isinstance(influence.prepared, Pairwise)
    True
    >>> influence.prepared.own(X, R).allclose(influence.prepared.forms(X))
    True
    """

    @property
    def accurate(self) -> bool:
        """Whether comparing loses no digits that a solution keeps."""
        ...

    def own(self, X: Any, R: Float[Tensor, "b K"]) -> Float[Tensor, " b"]:
        """vᵀ (C + λI)⁻¹ v of every example."""
        ...

    def against(self, X: Any, R: Float[Tensor, "q K"]) -> Callable[[Any, Tensor], Tensor]:
        """A function of other examples (X, R) that gives v_otherᵀ (C + λI)⁻¹ v for each of them, (b, q)."""
        ...


def checked_damping(damping: float) -> float:
    """λ as a finite float ≥ 0.

    Raises:
        InvalidInput: if it is anything else.
    """
    if (
        isinstance(damping, bool)
        or not isinstance(damping, int | float | np.number)
        or not np.isfinite(damping)
        or damping < 0
    ):
        message = (
            f"damping={damping!r}. It is the λ of (C + λI) x = v and must be a finite number ≥ 0; damping=0 solves "
            "with C itself."
        )
        raise InvalidInput(message)
    return float(damping)


def checked_sides(V: Float[Tensor, "k p"]) -> Float[Tensor, "k p"]:
    """Right-hand sides in float64, all finite.

    Raises:
        InvalidInput: if one of them is not.
    """
    finite = bool(torch.isfinite(V.sum()))  # one pass; where it overflows, each is looked at
    bad = [] if finite else torch.nonzero(~torch.isfinite(V).all(1))
    if len(bad):
        message = (
            f"The gradient of query {int(bad[0])} is NaN or infinite, so its system has no solution. Its loss is "
            "probably infinite or not differentiable there; leave it out, or clamp inside the loss."
        )
        raise InvalidInput(message)
    return V.double()


def residuals(
    operator: Operator, damping: float, X: Float[Tensor, "k p"], V: Float[Tensor, "k p"]
) -> Float[Tensor, " k"]:
    """‖v − (C + λI) x‖ / ‖v‖ for every row, by definition; 0 where v = 0 and x = 0.  Cost: one product.

    Directions of the gauge are left out of both.
    """
    missing = (V - operator.project(operator.apply(X)) - damping * X).norm(dim=1)
    size = V.norm(dim=1)
    return torch.where(size > 0, missing / size.clamp(min=torch.finfo(size.dtype).tiny), missing)
