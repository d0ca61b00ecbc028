"""A number that no eigenvalue of C + λI is below, known from what C is made of."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from upweight.errors import UnsupportedModel
from upweight.model import calculus, penalties
from upweight.model.objective import L2
from upweight.model.sweep import Sweep
from upweight.operators.base import Operator
from upweight.operators.cotangents import Signs
from upweight.operators.implicit import Implicit, fisher_product
from upweight.operators.layered import LayeredGaussNewton
from upweight.operators.linear import LinearHessian


def lowest_eigenvalue(operator: Operator, damping: float) -> float | None:
    """A number that no eigenvalue of C + λI is below, by what C is made of; None where nothing positive is known.

    λ and the least strength of an L2 penalty, of a Gauss–Newton matrix whose criterion is convex in the outputs (which
    is looked at on every row) and of an empirical Fisher matrix. The Hessian of a network may bend downwards.
    """
    sweep = getattr(operator, "sweep", None)
    if sweep is None:
        return None
    objective = sweep.objective
    if objective.penalty is not None and not isinstance(objective.penalty, L2):
        return None
    lowest = damping + float(penalties.diagonal(objective).min())
    if lowest <= 0:
        return None
    if isinstance(operator, Implicit) and operator.product is fisher_product:
        return lowest
    bent = isinstance(operator, Implicit) and operator.product is calculus.ggnvp
    if not bent and not isinstance(operator, LayeredGaussNewton | LinearHessian):
        return None
    return lowest if _convex(getattr(operator, "whole", None) or sweep) else None


def _convex(sweep: Sweep) -> bool:
    """Whether the criterion is convex in the outputs of every row, and known to be.  Cost: a forward pass over them."""
    objective = sweep.objective
    if objective.linear is not None:
        return objective.linear.loss.convex
    signs = Signs(1, 0)

    def look(batch: Any, weights: Tensor, numbers: Any) -> Tensor:
        signs.of(objective, batch, list(map(int, numbers)), calculus.shaped_outputs(objective, batch))
        return weights.sum()[None]

    try:
        sweep.fold(look, label="convexity", numbered=True)
    except UnsupportedModel:
        return False
    return True
