"""(C + λI)⁻¹ v in an app, or an error that says what it was for."""

from __future__ import annotations

import warnings

from jaxtyping import Float
from torch import Tensor

import upweight as uw
from upweight.errors import NotConverged, TheoryWarning


def solved(
    influence: uw.Influence, V: Float[Tensor, "k p"], what: str, *, systems: int = 1, estimates: bool = False
) -> Float[Tensor, "k p"]:
    """(C + λI)⁻¹ v for every row v.

    Args:
        influence: whose curvature and solver.
        V: the right-hand sides.
        what: they are of, in words.
        systems: how many will be asked for in all; a factorisation is used if it costs less, and the choice was left.
        estimates: whether a stochastic solver that has not settled warns, and is not refused.

    Raises:
        NotConverged: if the solver did not keep its promise.
    """
    system = influence.system.for_many(systems)
    solution = system.ask(lambda: system.prepared.solve(V))
    if not solution.converged and not (estimates and solution.replicas is not None):
        message = (
            f"The solver left a relative residual of {float(solution.residual.max()):.2g} for {what}. Raise the "
            "damping, or use an exact solver: explain(..., solver=uw.solvers.Cholesky())."
        )
        raise NotConverged(message, solution)
    if not solution.converged:
        message = (
            f"The solver has not settled (residual {float(solution.residual.max()):.2g}) for {what}, which may be off "
            "by more than its own error. Raise depth, or use CG()."
        )
        warnings.warn(message, TheoryWarning, stacklevel=4)
    return solution.x
