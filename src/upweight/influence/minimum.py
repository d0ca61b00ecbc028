"""How far θ̂ is from a minimum, in the units that matter: one row's effect, and the values themselves.

A Newton step leads to where training would have ended, δ = −(C + λI)⁻¹∇R. At a distance of many rows' effects values
may still be right, for they are differences between two fits that both miss the minimum by the same; what they lose is
what gradients and curvature change along δ. So values are computed at θ̂ and at θ̂ + δ,

    v = fᵀ(C + λI)⁻¹g        v′ = f′ᵀ(C′ + λI)⁻¹g′        with (C′ + λI)⁻¹f′ ≈ x + (C + λI)⁻¹(f′ − (C′ + λI)x)

f and g the gradients of a few queries and rows, x = (C + λI)⁻¹f, and compared.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from upweight.data.examples import Examples
from upweight.errors import TheoryWarning, UpweightError
from upweight.influence.system import System
from upweight.model import per_row
from upweight.model.sweep import Sweep
from upweight.operators import GaussNewton, Hessian
from upweight.operators.linear import LinearHessian

VALUES_KEPT = 0.05  # a change of the values that is as good as none
_ANOTHER = 100.0  # times as much, and a Newton step leads nowhere near
_ROWS, _QUERIES = 16, 8  # that stand for all of them
_FEW_ROWS, _FEW_QUERIES, _WIDE = 4, 2, 100_000  # where there are so many parameters that systems are what costs


@dataclass(frozen=True)
class Distance:
    """From θ̂ to the minimum that a Newton step leads to.

    Args:
        rows: ‖∇R‖ over the root mean square of wᵢ‖∇Lᵢ‖/n, both in the norm √(vᵀ(C + λI)⁻¹v), which no feature's units
            can hide from; in the Euclidean norm where the systems were not solved.
        values: root mean square of v′ − v over that of v, as a fraction; NaN where the systems were not solved.
    """

    rows: float
    values: float = math.nan

    @property
    def kept(self) -> bool:
        """Whether θ̂ is nearer than one row's effect, or values would stay what they are."""
        return self.rows < 1 or self.values <= VALUES_KEPT

    def __str__(self) -> str:
        size = f"as much as {self.rows:.3g} rows"
        if math.isnan(self.values):
            return size
        if self.values > _ANOTHER:
            return f"{size} (going on to the minimum would give another model, with values of its own)"
        change = f"{self.values:.2g} times" if self.values > 1 else f"{self.values:.1%}"
        return f"{size} (going on to the minimum would change values by about {change})"


def rows_by_scale(system: System, operator: LinearHessian) -> float:
    """‖∇R‖ over the root mean square of wᵢ‖∇Lᵢ‖/n, every parameter in units of 1/√diag C: none hides.

    It needs no linear system, only a pass over the rows of a linear predictor.
    """
    diagonal = operator.diagonal()
    scale = torch.where(diagonal > 0, diagonal, 1.0).rsqrt()
    rows = _weighing(system, _ROWS)
    G = per_row.gradients(system.sweep, rows) * torch.from_numpy(system.examples.weights[rows] / system.n)[:, None]
    typical = float((G * scale).square().sum(1).mean().sqrt())
    return float((operator.project(system.risk_gradient[None])[0] * scale).norm()) / max(typical, 1e-300)


def _weighing(system: System, count: int) -> NDArray[np.int64]:
    """Some rows that weigh anything, spread through the data."""
    rows = np.flatnonzero(system.examples.weights > 0)
    return rows[np.unique(np.linspace(0, len(rows) - 1, count).astype(np.int64))]


def distance(system: System, queries: Examples | None = None) -> Distance:
    """The distance, with the values of a few queries, or of rows in their place.

    Cost: some 30 linear systems, 9 of more than 100,000 parameters, and a product with the curvature at another θ.
    """
    count, most = (_FEW_ROWS, _FEW_QUERIES) if system.objective.size > _WIDE else (_ROWS, _QUERIES)
    chosen = _weighing(system, count + most)
    asked, rows = chosen[1::3], np.delete(chosen, np.s_[1::3])
    if not len(asked):
        asked = rows
    targets = system.examples.subset(asked) if queries is None else queries.subset(np.arange(len(queries))[:most])
    sources = system.examples.subset(rows)
    weights = torch.from_numpy(sources.weights / system.n)[:, None]
    here = system.sweep
    F, G = (per_row.gradients(here.over(here.objective, some)) for some in (targets, sources))
    plain = Distance(float(system.risk_gradient.norm()) / per_row.typical_row(here))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", TheoryWarning)
            first = system.prepared.solve(system.project(torch.cat([system.risk_gradient[None], G * weights, F])))
            if first.replicas is not None or not first.converged:
                return plain
            R, S = first.x[0], first.x[1 + len(G) :]
            forms = (first.x[: 1 + len(G)] * torch.cat([system.risk_gradient[None], G * weights])).sum(1).clamp(min=0)
            missed = float(forms[0].sqrt() / forms[1:].mean().sqrt()) if bool(forms[1:].any()) else math.inf
            there = replace(here, objective=here.objective.at(here.objective.theta - R))
            F_there, G_there = (per_row.gradients(there.over(there.objective, some)) for some in (targets, sources))
            wrong = system.project(F_there - _curved(system, there, S))
            S_there = S + system.prepared.solve(wrong).x
    except UpweightError:  # no Newton step leads to a minimum, or the loss is not defined where it does
        return plain
    share = system.penalty_share
    before, after = S @ ((G + share) * weights).T, S_there @ ((G_there + share) * weights).T
    change = float((after - before).norm() / before.norm()) if bool(before.any()) else math.nan
    return Distance(missed, change)


def _curved(system: System, there: Sweep, S: Tensor) -> Tensor:
    """(C′ + λI) S with the curvature where the step leads; that of θ̂ where making another costs much."""
    spec = system.exact_curvature
    operator = spec.bind(there) if isinstance(spec, Hessian | GaussNewton) else system.operator
    return operator.apply(S) + system.damping * S
