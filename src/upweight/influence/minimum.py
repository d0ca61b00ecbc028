"""How far θ̂ is from a minimum, in the units that matter: one row's effect, and the values themselves.

A Newton step leads to where training would have ended, δ = −(C + λI)⁻¹∇R. At a distance of many rows' effects values
may still be right, for they are differences between two fits that both miss the minimum by the same; what they lose is
what gradients and curvature change along δ. So values are computed at θ̂ and at θ̂ + δ,

    v = fᵀ(C + λI)⁻¹g        v′ = f′ᵀ(C′ + λI)⁻¹g′        with (C′ + λI)⁻¹f′ ≈ x + (C + λI)⁻¹(f′ − (C′ + λI)x)

f and g the gradients of a few queries and rows, x = (C + λI)⁻¹f, and compared.

Where systems are solved by iteration each of them costs sweeps, so that three stand for all (`by_iteration`): with
random signs εᵢ = ±1 the group γ = Σᵢ εᵢ wᵢgᵢ/n of many rows has

    E[γᵀ(C + λI)⁻¹γ] = Σᵢ wᵢ²gᵢᵀ(C + λI)⁻¹gᵢ/n²        E[(fᵀ(C + λI)⁻¹γ)²] = Σᵢ (value of row i)²

and the values of all queries come from the one y = (C + λI)⁻¹γ, as fᵀy. C′y = Cy + (C′ − C)y, of which a few thousand
rows know the last part, which alone is a difference.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from upweight.data.examples import Examples
from upweight.errors import TheoryWarning, UpweightError
from upweight.influence.system import System
from upweight.model import per_row
from upweight.model.sweep import Sweep
from upweight.operators import GaussNewton, Hessian
from upweight.operators.linear import LinearHessian
from upweight.solvers import Solution
from upweight.solvers.cg import Iteration
from upweight.solvers.flat import LEANS
from upweight.solvers.lissa import Recursion

VALUES_KEPT = 0.05  # a change of the values that is as good as none
_ANOTHER = 100.0  # times as much, and a Newton step leads nowhere near
_ROWS, _QUERIES = 16, 8  # that stand for all of them
_GROUP = 64  # rows in a group with random signs
_BENT_ROWS = 2048  # that know how the curvature changes on the way
_STOCHASTIC = 3  # queries of a solver whose cost grows with them
_LOOSE = 1e-2  # the residual of a system that is asked for a change of 5 %


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


@dataclass(frozen=True)
class Looked:
    """What a few systems tell of a fitted model.

    Args:
        missed: how far it is from a minimum.
        drift: (q,) predicted change of every query's loss if training went on there; NaN where it has no solution.
        sides: the gradients of the queries that were solved for.
        solution: of these.
    """

    missed: Distance
    drift: Float[Tensor, " q"]
    sides: Float[Tensor, "k p"]
    solution: Solution


def distance(system: System, queries: Examples | None = None) -> Distance:
    """The distance, with the values of a few queries, or of rows in their place.

    Cost: of a direct solver products with the curvature of 2,048 rows at another θ; else as for `by_iteration`.
    """
    if isinstance(system.prepared, Recursion):  # what is stochastic tells no difference of a few per cent
        return _plain(system)
    if isinstance(system.prepared, Iteration):
        asked = system.examples.subset(_weighing(system, _QUERIES)) if queries is None else queries
        try:
            return by_iteration(system, asked, per_row.gradients(system.sweep.over(system.objective, asked))).missed
        except UpweightError:
            return _plain(system)
    return _directly(system, queries)


def look(system: System, asked: Examples, V: Float[Tensor, "q p"]) -> Looked:
    """The distance, with the solutions of as many queries as cost no more than three do.

    Args:
        system: the model and its rows.
        asked: the queries.
        V: their gradients.

    Raises:
        SolverError: if their systems could not be solved.
    """
    if isinstance(system.prepared, Iteration):
        return by_iteration(system, asked, V)
    sides = V[:_STOCHASTIC] if isinstance(system.prepared, Recursion) else V
    solution = system.prepared.solve(sides)
    return Looked(distance(system, asked), (solution.x @ system.risk_gradient).abs(), sides, solution)


def by_iteration(system: System, asked: Examples, V: Float[Tensor, "q p"]) -> Looked:
    """The same where every system costs sweeps: a query's solution, and what is known of the others by symmetry.

    Cost: a solution of three systems, a loose one of one, gradients of some 80 rows, and up to four products with the
    curvature of 2,048 rows.

    Raises:
        NotConverged: if the systems were not solved.
        NotPositiveDefinite: if C + λI is not positive.
    """
    prepared, here, gradient = system.prepared, system.sweep, system.risk_gradient
    assert isinstance(prepared, Iteration)
    rows = _weighing(system, _GROUP)
    signs = np.random.default_rng(0).choice([-1.0, 1.0], size=len(rows)) * system.examples.weights[rows] / system.n
    group = _group(system, here, rows, signs)
    leaning = torch.zeros(len(V)) if prepared.flat is None else prepared.flat.leaning(V)
    leans, query = leaning > LEANS, int(leaning.argmin())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", TheoryWarning)
        found = prepared.solve(torch.stack([gradient, group, V[query]]))
    step, y = found.x[0], found.x[1]
    drift = torch.where(leans, torch.nan, (V @ step).abs())
    own = replace(found, x=found.x[2:])
    effect, typical = (max(0.0, float(a @ b)) ** 0.5 for a, b in ((gradient, step), (group, y)))
    missed = Distance(effect * len(rows) ** 0.5 / typical if typical else math.inf)
    if bool(leans.all()):
        return Looked(missed, drift, V[query : query + 1], own)
    try:
        few = asked.subset(np.arange(len(asked))[~leans.numpy()][:_QUERIES])
        there = replace(here, objective=here.objective.at(here.objective.theta - step))
        F, F_there = (per_row.gradients(one.over(one.objective, few)) for one in (here, there))
        wrong = _group(system, there, rows, signs) - system.project(group[None])[0] - _bent(system, there, y[None])[0]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", TheoryWarning)
            y_there = y + prepared.loosely(_LOOSE).solve(system.project(wrong[None])).x[0]
        before, after = F @ y, F_there @ y_there
        missed = replace(
            missed, values=float((after - before).norm() / before.norm()) if bool(before.any()) else math.nan
        )
    except UpweightError:  # the loss is not defined where the step leads, or its curvature is not
        pass
    return Looked(missed, drift, V[query : query + 1], own)


def _group(system: System, at: Sweep, rows: NDArray[np.int64], signs: NDArray[np.float64]) -> Float[Tensor, " p"]:
    """Σᵢ sᵢ(∇Lᵢ + share) over some rows, at some θ."""
    return torch.from_numpy(signs) @ per_row.gradients(at, rows) + float(signs.sum()) * system.penalty_share


def _bent(system: System, there: Sweep, S: Tensor) -> Tensor:
    """(C′ − C) S by some of the rows; 0 where making another curvature costs much."""
    spec = system.exact_curvature
    if not isinstance(spec, Hessian | GaussNewton):
        return torch.zeros_like(S)
    rows = system.examples.spread(_BENT_ROWS)
    if len(rows) == system.n:
        return spec.bind(there).apply(S) - system.operator.apply(S)
    few, other = (one.over(one.objective, system.examples.subset(rows)) for one in (system.sweep, there))
    return spec.bind(other).apply(S) - spec.bind(few).apply(S)


def _plain(system: System) -> Distance:
    return Distance(per_row.rows_from_minimum(system.sweep, system.risk_gradient))


def _directly(system: System, queries: Examples | None) -> Distance:
    """The same by some 30 systems, of a solver that has them for nothing."""
    chosen = _weighing(system, _ROWS + _QUERIES)
    asked, rows = chosen[1::3], np.delete(chosen, np.s_[1::3])
    if not len(asked):
        asked = rows
    targets = system.examples.subset(asked) if queries is None else queries.subset(np.arange(len(queries))[:_QUERIES])
    sources = system.examples.subset(rows)
    weights = torch.from_numpy(sources.weights / system.n)[:, None]
    here = system.sweep
    F, G = (per_row.gradients(here.over(here.objective, some)) for some in (targets, sources))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", TheoryWarning)
            first = system.prepared.solve(system.project(torch.cat([system.risk_gradient[None], G * weights, F])))
            if first.replicas is not None or not first.converged:
                return _plain(system)
            R, S = first.x[0], first.x[1 + len(G) :]
            forms = (first.x[: 1 + len(G)] * torch.cat([system.risk_gradient[None], G * weights])).sum(1).clamp(min=0)
            missed = float(forms[0].sqrt() / forms[1:].mean().sqrt()) if bool(forms[1:].any()) else math.inf
            there = replace(here, objective=here.objective.at(here.objective.theta - R))
            F_there, G_there = (per_row.gradients(there.over(there.objective, some)) for some in (targets, sources))
            wrong = system.project(F_there - F - _bent(system, there, S))
            S_there = S + system.prepared.solve(wrong).x
    except UpweightError:  # no Newton step leads to a minimum, or the loss is not defined where it does
        return _plain(system)
    share = system.penalty_share
    before, after = S @ ((G + share) * weights).T, S_there @ ((G_there + share) * weights).T
    change = float((after - before).norm() / before.norm()) if bool(before.any()) else math.nan
    return Distance(missed, change)
