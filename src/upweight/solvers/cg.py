"""Conjugate gradients, with every query sharing every sweep over the data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from upweight.errors import InvalidInput, NotConverged, NotPositiveDefinite, checked_count
from upweight.operators.base import Operator
from upweight.solvers.base import Solution, checked_damping, checked_sides, residuals
from upweight.solvers.lanczos import suggest_damping

_RECOMPUTE = 50  # the recurrence for r drifts from v − Ax in floating point; every so often it is replaced by the truth


@dataclass(frozen=True)
class CG:
    """Conjugate gradients on (C + λI) x = v, one recurrence per query, one operator product per step for all of them.

    A query that has converged leaves the product. The residual that is promised, and reported, is recomputed from its
    definition at the end; if the recurrence was too optimistic, iteration goes on from the true residual.
    Cost: one sweep per step, about √cond(C + λI)·log(2/rtol)/2 steps; 4 vectors of length p per query.

    Args:
        rtol: the relative residual to reach, ‖v − (C + λI) x‖ ≤ rtol ‖v‖.
        max_sweeps: products after which NotConverged is raised.

    Raises:
        InvalidInput: if rtol is not between 0 and 1, or max_sweeps is not positive.

    References: Hestenes and Stiefel (1952); paper, section 3.
    """

    rtol: float = 1e-6
    max_sweeps: int = 1000

    def __post_init__(self) -> None:
        if not isinstance(self.rtol, float) or not 0 < self.rtol < 1:
            message = f"rtol={self.rtol}. It is a relative residual and must lie between 0 and 1, such as 1e-6."
            raise InvalidInput(message)
        checked_count(self.max_sweeps, "max_sweeps", hint="1000 is the default")

    def prepare(self, operator: Operator, damping: float = 0.0) -> Iteration:
        """The bound iteration; nothing is computed yet."""
        return Iteration(self, operator, checked_damping(damping))


@dataclass(frozen=True)
class Iteration:
    """(C + λI)⁻¹ by conjugate gradients."""

    spec: CG
    operator: Operator
    damping: float

    def solve(self, V: Float[Tensor, "k p"], *, state: Mapping[str, Tensor] | None = None) -> Solution:
        """x with (C + λI) x = v for every row v.

        Args:
            V: the right-hand sides.
            state: the state of an earlier Solution of the same V, to go on from it.

        Raises:
            NotConverged: if max_sweeps products do not reach rtol; carries the partial Solution.
            NotPositiveDefinite: if a direction of curvature ≤ 0 is met; carries the partial Solution and a damping
                that would do.
        """
        V = self.operator.project(checked_sides(V))
        if state is not None and {name: tuple(state[name].shape) for name in state} != dict.fromkeys(
            "xp", tuple(V.shape)
        ):
            message = (
                f"state is not that of an earlier Solution for {tuple(V.shape)} right-hand sides. Pass solution.state."
            )
            raise InvalidInput(message)
        size = V.norm(dim=1)
        X = torch.zeros_like(V) if state is None else state["x"].clone()
        R = V.clone() if state is None else V - self._apply(X)
        P = R.clone() if state is None else state["p"].clone()
        rho = (R * R).sum(1)
        if state is not None:
            # the direction is kept only where the recurrence continues it exactly; a restart from r is always valid
            P = torch.where(((P * R).sum(1) / rho.clamp(min=1e-300) - 1).abs()[:, None] < 1e-6, P, R)
        sweeps = 0
        smallest = torch.full((len(V),), torch.inf, dtype=torch.float64)
        while True:
            active = torch.nonzero(R.norm(dim=1) > self.spec.rtol * size)[:, 0]
            if len(active) == 0:
                R = V - self._apply(X)
                sweeps += 1
                if bool((R.norm(dim=1) <= self.spec.rtol * size).all()):
                    break
                if sweeps >= self.spec.max_sweeps:
                    raise self._unfinished(X, P, V, sweeps, smallest)
                P, rho = R.clone(), (R * R).sum(1)
                continue
            if sweeps >= self.spec.max_sweeps:
                raise self._unfinished(X, P, V, sweeps, smallest)
            AP = self._apply(P[active])
            sweeps += 1
            length = (P[active] ** 2).sum(1)
            curvature = (P[active] * AP).sum(1)
            quotient = curvature / length
            smallest[active] = torch.minimum(smallest[active], quotient)
            if not bool((quotient > 0).all()):
                raise self._refusal(X, P, V, sweeps, active, quotient)
            alpha = (rho[active] / curvature)[:, None]
            X[active] += alpha * P[active]
            R[active] -= alpha * AP
            if sweeps % _RECOMPUTE == 0:
                R = V - self._apply(X)
                sweeps += 1
            new = (R[active] ** 2).sum(1)
            P[active] = R[active] + (new / rho[active].clamp(min=1e-300))[:, None] * P[active]
            rho[active] = new
        X = self.operator.project(X)
        residual = torch.where(size > 0, R.norm(dim=1) / size.clamp(min=1e-300), torch.zeros_like(size))
        bottom = float(smallest.min()) - self.damping if bool(torch.isfinite(smallest).any()) else float("nan")
        return Solution(X, residual, True, sweeps, min_curvature=bottom, state={"x": X, "p": P})

    def _apply(self, V: Tensor) -> Tensor:
        return self.operator.project(self.operator.apply(V)) + self.damping * V

    def _partial(self, X: Tensor, P: Tensor, V: Tensor, sweeps: int) -> Solution:
        return Solution(
            X, residuals(self.operator, self.damping, X, V), False, sweeps, state={"x": X.clone(), "p": P.clone()}
        )

    def _unfinished(self, X: Tensor, P: Tensor, V: Tensor, sweeps: int, smallest: Tensor) -> NotConverged:
        partial = self._partial(X, P, V, sweeps)
        worst = int(partial.residual.argmax())
        message = (
            f"CG reached a relative residual of {float(partial.residual[worst]):.2g} for query {worst} after "
            f"{sweeps} sweeps; {self.spec.rtol:g} was promised "
            f"(damping {self.damping:g}, smallest curvature met {float(smallest.min()):.2g}). The system is badly "
            "conditioned, or the arithmetic is too coarse (float32). "
            "Continue from error.solution.state, raise max_sweeps, use a larger damping, or accept less: "
            f"CG(rtol={2 * float(partial.residual[worst]):.1g})."
        )
        return NotConverged(message, partial)

    def _refusal(
        self, X: Tensor, P: Tensor, V: Tensor, sweeps: int, active: Tensor, quotient: Tensor
    ) -> NotPositiveDefinite:
        worst = int(quotient.argmin())
        suggestion, lowest = suggest_damping(self.operator, self.damping, P[active[worst]])
        message = (
            f"CG met curvature {float(quotient[worst]):.3g} after {sweeps} sweeps (damping {self.damping:g}); "
            f"the smallest eigenvalue of C is about {lowest:.3g} (Lanczos). "
            f"θ̂ is probably not a minimum. Try damping={suggestion:g}, curvature=GaussNewton(), or train further; "
            "see influence.check()."
        )
        return NotPositiveDefinite(message, self._partial(X, P, V, sweeps), suggestion)
