"""How far θ̂ is from a minimum, in the units that matter: one row's effect, and the values themselves.

A Newton step leads to where training would have ended, δ = −(C + λI)⁻¹∇R. At a distance of many rows' effects values
may still be right, for they are differences between two fits that both miss the minimum by the same; what they lose is
what gradients and curvature change along δ. So values are computed at θ̂ and at θ̂ + δ,

    v = fᵀ(C + λI)⁻¹g        v′ = f′ᵀ(C′ + λI)⁻¹g′        with (C′ + λI)⁻¹f′ ≈ x + (C + λI)⁻¹(f′ − (C′ + λI)x)

f and g the gradients of a few queries and rows, x = (C + λI)⁻¹f, and compared.

Where systems are solved by iteration each of them costs sweeps, so that three stand for all (`by_iteration`): with
random signs εᵢ = ±1 a group of many rows, γ = Σᵢ εᵢ wᵢgᵢ/n, has

    E[γᵀ(C + λI)⁻¹γ] = Σᵢ wᵢ²gᵢᵀ(C + λI)⁻¹gᵢ/n²        E[(fᵀ(C + λI)⁻¹γ)²] = Σᵢ (value of row i)²

and values come from two solutions: those of every query with the group, fᵀ(C + λI)⁻¹γ, and those of a group of queries
with every row. C′x = Cx + (C′ − C)x, of which a few hundred rows know the last part, which alone is a difference.
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
from upweight.model import calculus, layers, linear, per_row
from upweight.model.layers import pieces
from upweight.model.sweep import Sweep, finite
from upweight.operators import GaussNewton, Hessian
from upweight.operators.implicit import Implicit, once
from upweight.operators.layered import LayeredGaussNewton
from upweight.operators.linear import LinearHessian
from upweight.runs import ranks
from upweight.solvers import Solution
from upweight.solvers.cg import Iteration
from upweight.solvers.flat import LEANS
from upweight.solvers.lissa import Recursion

VALUES_KEPT = 0.05  # a change of the values that is as good as none
_ANOTHER = 100.0  # times as much, and a Newton step leads nowhere near
_ROWS, _QUERIES = 16, 8  # that stand for all of them
_GROUP = 64  # rows in a group with random signs
FEW = 512  # rows that know how the curvature changes on the way, and from one kind to another
_BLOCK = 2**16  # rows whose weights are added together
_STOCHASTIC = 3  # queries of a solver whose cost grows with them
_LOOSE = 0.05  # the residual of a system that is asked for a change of 5 %
_ROUGH = 0.05  # that of a group with random signs: its form errs by the square, and both sides of a change alike


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
    squares = system.sweep.emit(
        lambda batch, _: linear.weighed_squares(system.objective, batch, scale * scale), rows=rows, label="typical row"
    )
    typical = math.sqrt(float(np.mean(squares * (system.examples.weights[rows] / system.n) ** 2)))
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
        sides: the right-hand sides that were solved for: queries, or a sum of them.
        solution: of these.
    """

    missed: Distance
    drift: Float[Tensor, " q"]
    sides: Float[Tensor, "k p"]
    solution: Solution


def distance(system: System, queries: Examples | None = None, V: Float[Tensor, "q p"] | None = None) -> Distance:
    """The distance, with the values of a few queries, or of rows in their place.

    Args:
        system: the model and its rows.
        queries: the queries; None takes rows.
        V: their gradients, if they are known.

    Cost: of a direct solver products with the curvature of 512 rows at another θ; else as for `by_iteration`.
    """
    if isinstance(system.prepared, Recursion):  # what is stochastic tells no difference of a few per cent
        return _plain(system)
    try:
        return system.ask(lambda: _distance(system, queries, V))
    except UpweightError:
        return _plain(system)


def _distance(system: System, queries: Examples | None, V: Tensor | None) -> Distance:
    if not isinstance(system.prepared, Iteration):
        return _directly(system, queries, V)
    asked = system.examples.subset(_weighing(system, _QUERIES)) if queries is None else queries
    V = per_row.gradients(system.sweep.over(system.objective, asked)) if V is None else V
    return by_iteration(system, system.prepared, asked, V).missed


def look(system: System, asked: Examples, V: Float[Tensor, "q p"]) -> Looked:
    """The distance, with the solutions of as many queries as cost no more than three do.

    Args:
        system: the model and its rows.
        asked: the queries.
        V: their gradients.

    Raises:
        SolverError: if their systems could not be solved.
    """
    return system.ask(lambda: _look(system, asked, V))


def _look(system: System, asked: Examples, V: Float[Tensor, "q p"]) -> Looked:
    if isinstance(system.prepared, Iteration):
        return by_iteration(system, system.prepared, asked, V)
    sides = V[:_STOCHASTIC] if isinstance(system.prepared, Recursion) else V
    solution = system.prepared.solve(sides)
    return Looked(distance(system, asked, V), (solution.x @ system.risk_gradient).abs(), sides, solution)


def by_iteration(system: System, prepared: Iteration, asked: Examples, V: Float[Tensor, "q p"]) -> Looked:
    """The same where every system costs sweeps: one of all queries with random signs, and the rest by symmetry.

    Cost: a solution of two systems, a rough one of three, gradients of some 140 rows, and up to four products with the
    curvature of 512 rows.

    Raises:
        NotConverged: if the systems were not solved.
        NotPositiveDefinite: if C + λI is not positive.
    """
    here, gradient = system.sweep, system.risk_gradient
    draw, rows = np.random.default_rng(0), _weighing(system, _GROUP)
    signs = draw.choice([-1.0, 1.0], size=len(rows)) * system.examples.weights[rows] / system.n
    few = _Few.of(here, rows)
    group = few.summed(system, signs)
    leaning = torch.zeros(len(V)) if prepared.flat is None else prepared.flat.leaning(V)
    able = np.flatnonzero((leaning <= LEANS).numpy())
    asks = torch.from_numpy(draw.choice([-1.0, 1.0], size=len(able)))
    sides, group = system.project(torch.stack([gradient, asks @ V[able]])), system.project(group[None])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", TheoryWarning)
        found = prepared.solve(sides)
        of_group, left = prepared.roughly(group, _ROUGH)
    step, forms = found.x[0], (found.x * sides).sum(1)
    drift = torch.full((len(V),), torch.nan, dtype=torch.float64)
    drift[able] = (V[able] @ step).abs()
    own = _summed_up(system, found, forms)
    effect, typical = (max(0.0, float(form)) ** 0.5 for form in (forms[0], (of_group * group).sum()))
    missed = Distance(effect * len(rows) ** 0.5 / typical if typical else math.inf)
    looked = Looked(missed, drift, sides[1:], own)
    if not len(able):
        return looked
    try:
        there, some = replace(here, objective=here.objective.at(here.objective.theta - step)), asked.subset(able)
        V_there, few_there = per_row.gradients(there.over(there.objective, some)), _Few.of(there, rows)
        sides_there = torch.stack([few_there.summed(system, signs), asks @ V_there])
        both, x = torch.cat([group, sides[1:]]), torch.cat([of_group, found.x[1:]])
        images = both - torch.cat([left, torch.zeros_like(left)]) - prepared.damping * x  # C x, known by being solved
        wrong = system.project(sides_there - both - _bent(system, there, x, images))
        x_there = x + prepared.roughly(wrong, _LOOSE)[0]
        before = torch.cat([V[able] @ x[0], few.along(system, x[1])])
        after = torch.cat([V_there @ x_there[0], few_there.along(system, x_there[1])])
    except UpweightError:  # the loss is not defined where the step leads, or its curvature is not
        return looked
    change = float((after - before).norm() / before.norm()) if bool(before.any()) else math.nan
    return replace(looked, missed=replace(missed, values=change))


def _summed_up(system: System, found: Solution, forms: Float[Tensor, " k"]) -> Solution:
    """The last solution with what is known of all: their residuals, and vᵀ(C + λI)v/vᵀv for v = x."""
    met = torch.where(forms > 0, forms / found.x.square().sum(1), torch.inf) - system.damping
    lowest = min(float(met.min()), math.inf if math.isnan(found.min_curvature) else found.min_curvature)
    return Solution(found.x[1:], found.residual.max()[None], found.converged, found.sweeps, min_curvature=lowest)


@dataclass(frozen=True)
class _Few:
    """Gradients of a few rows at some θ: where layers give them, from one pass, whatever is asked of them.

    Args:
        at: their sweep.
        kept: the pieces of every batch, and how many rows it has; None where gradients are found anew.
    """

    at: Sweep
    kept: list[tuple[int, list[pieces.Piece]]] | None

    @classmethod
    def of(cls, sweep: Sweep, rows: NDArray[np.int64]) -> _Few:
        """These rows of a sweep."""
        objective, examples = sweep.objective, sweep.examples.subset(rows)
        at = sweep.over(objective, examples)
        if not layers.structured(objective) or ranks.several():
            return cls(at, None)
        plan, vectors = objective.route.plan, layers.vectors(objective, sweep.example_bytes)
        found = at.keep(
            lambda batch, w: (len(w), layers.capture(objective, plan, batch)), vectors=vectors, label="gradients"
        )
        return cls(at, [batch for batches in found.values() for batch in batches])

    def summed(self, system: System, signs: NDArray[np.float64]) -> Float[Tensor, " p"]:
        """Σᵢ sᵢ(∇Lᵢ + share)."""
        objective, s = self.at.objective, torch.from_numpy(signs)
        if self.kept is None:
            total = self.at.fold(
                lambda batch, _, numbers: calculus.pull(objective, batch, s[numbers][None]),
                label="group",
                numbered=True,
            )[0]
        else:
            sizes, total = objective.route.plan.sizes, torch.zeros(objective.size, dtype=torch.float64)
            for own, (_, part) in zip(s.split([count for count, _ in self.kept]), self.kept, strict=True):
                total += pieces.onto(part, own[None, :, None].to(objective.reference), sizes)[0].double().cpu()
        return finite(total, "group") + float(signs.sum()) * system.penalty_share

    def along(self, system: System, x: Float[Tensor, " p"]) -> Float[Tensor, " r"]:
        """wᵢ xᵀ(∇Lᵢ + share)."""
        objective, v = self.at.objective, x[None].to(self.at.objective.reference)
        if self.kept is None:
            found = torch.from_numpy(self.at.emit(lambda batch, _: layers.dots(objective, batch, v)))[:, 0]
        else:
            sizes = objective.route.plan.sizes
            found = torch.cat([pieces.along(part, v, sizes)[0, :, 0] for _, part in self.kept]).double().cpu()
        return (finite(found, "group") + float(x @ system.penalty_share)) * torch.from_numpy(self.at.examples.weights)


def _bent(system: System, there: Sweep, S: Tensor, images: Tensor | None = None) -> Tensor:
    """(C′ − C) S by some of the rows; 0 where making another curvature costs much.

    Args:
        system: the model and its rows.
        there: another θ.
        S: some vectors.
        images: C S by all rows, if they are known.
    """
    if not isinstance(system.exact_curvature, Hessian | GaussNewton):
        return torch.zeros_like(S)
    operator = system.operator
    if not isinstance(operator, LinearHessian | Implicit | LayeredGaussNewton):
        operator = system.exact_curvature.bind(system.sweep)
    here = of_few_rows(operator)
    sweep = here.sweep.over(here.sweep.objective.at(there.objective.theta), here.sweep.examples)
    if isinstance(here, LinearHessian):
        return LinearHessian(sweep).apply(S) - here.apply(S)
    before = here.apply(S) if images is None or here is not operator else images
    moved = once(sweep, len(S)) if isinstance(here, LayeredGaussNewton) else replace(here, sweep=sweep)
    return moved.apply(S) - before


def of_few_rows(
    operator: LinearHessian | Implicit | LayeredGaussNewton,
) -> LinearHessian | Implicit | LayeredGaussNewton:
    """The same curvature of 512 rows that stand for all; itself if there are no more.

    What an operator has kept of these rows serves again.
    """
    examples = operator.sweep.examples
    if len(examples) <= FEW:
        return operator
    rows, weights = _standing_for(examples.weights)
    if isinstance(operator, LayeredGaussNewton):
        return operator.of(rows, weights)
    few = examples.subset(rows)
    few.weights = weights
    sweep = operator.sweep.over(operator.sweep.objective, few)
    if isinstance(operator, LinearHessian):
        return LinearHessian(replace(sweep, progress=False), operator.precision)
    return replace(operator, sweep=sweep)


def _standing_for(weights: NDArray[np.float64]) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """512 rows spread evenly through the weight of the data, each of which stands for as much: means stay means."""
    if np.count_nonzero(weights) > FEW:
        drawn, total = _spread(weights)
        rows, times = np.unique(drawn, return_counts=True)
        share = times.astype(np.float64) * (total / FEW)
    else:
        rows = np.flatnonzero(weights)
        share = weights[rows]
    return rows, share * (len(rows) / len(weights))


def _spread(weights: NDArray[np.float64]) -> tuple[NDArray[np.int64], float]:
    """The rows in which the middles of 512 equal parts of the weight lie, and the whole weight."""
    blocks = [weights[start : start + _BLOCK] for start in range(0, len(weights), _BLOCK)]
    ends = np.zeros(1 + len(blocks))
    for number, block in enumerate(blocks):
        ends[number + 1] = np.cumsum(np.append(ends[number], block))[-1]
    middles = (np.arange(FEW) + 0.5) / FEW * ends[-1]
    lie = np.searchsorted(ends[1:], middles, side="right")
    drawn = []
    for number in np.unique(lie):
        within = np.cumsum(np.append(ends[number], blocks[number]))[1:]
        drawn.append(number * _BLOCK + np.searchsorted(within, middles[lie == number], side="right"))
    return np.concatenate(drawn), float(ends[-1])


def _plain(system: System) -> Distance:
    return Distance(per_row.rows_from_minimum(system.sweep, system.risk_gradient))


def _directly(system: System, queries: Examples | None, V: Float[Tensor, "q p"] | None) -> Distance:
    """The same by some 30 systems, of a solver that has them for nothing."""
    chosen = _weighing(system, _ROWS + _QUERIES)
    asked, rows = chosen[1::3], np.delete(chosen, np.s_[1::3])
    if not len(asked):
        asked = rows
    targets = system.examples.subset(asked) if queries is None else queries.subset(np.arange(len(queries))[:_QUERIES])
    sources = system.examples.subset(rows)
    weights = torch.from_numpy(sources.weights / system.n)[:, None]
    here = system.sweep
    G = per_row.gradients(here.over(here.objective, sources))
    F = per_row.gradients(here.over(here.objective, targets)) if V is None else V[:_QUERIES]
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
