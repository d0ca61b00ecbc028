"""What removing each row does to the fit of one linear predictor, for all rows in one sweep.

    M = nC = Σ wⱼφ″ⱼ x̃ⱼx̃ⱼᵀ + n∇²r        u = M⁻¹x̃        h = wφ″ x̃ᵀu        Δ = −u a/(1 − h)

Every system here has an objective of one output, K = 1; n, φ, x̃ and a as in `diagnostics`. When a removed row
takes its share s = wᵢ/Σw of the penalty along, M loses s·n∇²r, and Δ = −u a/(1 − h) + s(g + wφ″(x̃·g)/(1 − h)·u) with
g = M⁻¹n∇r. Products with M⁻¹ are solved in blocks of rows, so nothing of size n × n exists.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from upweight.errors import NotConverged, UnsupportedModel
from upweight.influence.system import System
from upweight.model import linear, penalties, per_row
from upweight.model.objective import L2, Objective
from upweight.solvers import LiSSA, Solution
from upweight.solvers.base import Quadratic

AMPLIFIED = 1e4  # 1 − leverage must be so many times the solver's residual
_DETERMINED = 1e-8  # a row with 1 − leverage below it is fitted exactly; what division by it gives is rounding
_SHARE_STEPS = 200
BLOCK = 1024

Vector = Float[NDArray[np.float64], " n"]


@dataclass(frozen=True)
class Family:
    """What a loss says about y beyond its derivatives in η.

    Args:
        mean: μ(η). φ″ is linear in y, so E, the expected φ″, is φ″ at y = μ. None if φ″ does not depend on y.
        known_scale: whether the dispersion is 1 by definition (binomial, Poisson), not estimated from the residuals.
        least_squares: whether φ is c(η − y)²/2, so that leave-one-out has a closed form.
    """

    mean: Callable[[Tensor], Tensor] | None = None
    known_scale: bool = False
    least_squares: bool = False


@dataclass(frozen=True)
class Removals:
    """What one sweep knows about the removal of every row.

    Args:
        form: x̃ᵀM⁻¹x̃.
        theta_change: Δᵢ, one line for each row removed.
        eta_change: x̃ᵢ·Δᵢ, the change of the row's own predictor.
        squares_change: change of Σ wⱼφ″ⱼeⱼ² over all rows, the removed one included, when θ̂ moves by Δᵢ (squared loss).
        penalty_form: uᵀ(n∇²r)u/(1 − h) of u = M⁻¹x̃, with M and h without the row's share of the penalty.
        determined: rows with leverage 1: nothing is known about the fit without them.
    """

    form: Vector
    theta_change: Float[NDArray[np.float64], "n p"]
    eta_change: Vector
    squares_change: Vector
    penalty_form: Vector
    determined: NDArray[np.bool_]


def forms(system: System) -> Vector:
    """x̃ᵀM⁻¹x̃ of every row."""
    many = system.for_many(system.n)
    return many.ask(lambda: _forms(many))


def _forms(system: System) -> Vector:
    prepared = system.prepared  # here, on every rank, and not inside of the sweep

    def form(batch: Any, w: Tensor) -> Tensor:
        U = linear.unit_solutions(system.objective, batch[0])  # (b, p)
        known = prepared.forms(U) if isinstance(prepared, Quadratic) else (U * _solution(system, U).x).sum(1)
        # a row without weight may lean on what the others do not determine
        return torch.where((w == 0) & known.isnan(), 0.0, known) / system.n

    with system.by_itself():
        return system.sweep.emit(form, vectors=2 * per_row.width(system.sweep), label="leverage")


def inverse_diagonal(system: System) -> Float[NDArray[np.float64], " p"]:
    """The diagonal of M⁻¹, in blocks of its columns."""
    p = system.objective.size
    system = system.for_many(p)
    pieces = []
    for start in range(0, p, BLOCK):
        stop = min(start + BLOCK, p)
        eye = torch.zeros(stop - start, p, dtype=torch.float64)
        eye[torch.arange(stop - start), torch.arange(start, stop)] = 1
        pieces.append(solve(system, eye)[torch.arange(stop - start), torch.arange(start, stop)])
    return torch.cat(pieces).numpy() / system.n


def expected_curvature(objective: Objective, family: Family, batch: Any) -> Float[Tensor, " b"]:
    """E = (dμ/dη)²/V(μ) of every row of a batch, up to the constant that φ carries."""
    if family.mean is None:
        return linear.curvatures(objective, batch)[:, 0, 0]
    X = batch[0].double() if isinstance(batch[0], Tensor) else batch[0]
    eta = linear.predictor(objective, X)
    assert objective.linear is not None
    return objective.linear.loss.curvature(eta, family.mean(eta))[:, 0, 0]


def all_removals(system: System, family: Family) -> Removals:
    """Δᵢ and what follows from it, for every row, in one sweep."""
    many = system.for_many(system.n)
    return many.ask(lambda: _all_removals(many, family))


def _all_removals(system: System, family: Family) -> Removals:
    objective, n, p = system.objective, system.n, system.objective.size
    total = float(system.examples.weights.sum())
    b = n * penalties.gradient(objective)
    curved = _penalty_curvature(system)
    plain = _solution(system, b[None]).x[0] / n if objective.folded else None

    def removals(batch: Any, w: Tensor) -> Tensor:
        x = linear.unit_solutions(objective, batch[0])  # (b, p)
        if system.flat is not None:  # a row without weight may lean on what the others do not determine
            x = torch.where((w == 0)[:, None], 0.0, x)
        slope = linear.slopes(objective, batch)[:, 0]
        curvature = linear.curvatures(objective, batch)[:, 0, 0]
        u0 = _solve_for_removal(system, x, w * curvature) / n
        expected = expected_curvature(objective, family, batch)
        ratio = torch.where(expected > 0, curvature / expected, 1.0).clamp(min=0)
        pull = -w * slope * ratio.sqrt()  # √(wφ″)·Pearson residual
        share = (w / total)[:, None] if objective.folded else torch.zeros(1, 1, dtype=torch.float64)
        u = _without_share(system, u0, share, curved)
        left = 1 - w * curvature * (x * u).sum(1)  # 1 − h
        determined = left < _DETERMINED
        left = torch.where(determined, 1.0, left)
        change = -u * (pull / left)[:, None]
        moved = -(x + share * curved(u)) * (pull / left)[:, None]  # M times it
        if plain is not None:
            g = _without_share(system, plain.expand(len(x), p), share, curved)
            along = (w * curvature * (x * g).sum(1) / left)[:, None]
            change = change + share * (g + along * u)
            moved = moved + share * (b + share * curved(g) + along * (x + share * curved(u)))
        squares = (change * (moved - curved(change) - 2 * b)).sum(1)
        scalars = [(x * u0).sum(1), (x * change).sum(1), squares, (u * curved(u)).sum(1) / left, determined.double()]
        return torch.cat([torch.stack(scalars, 1), change], 1)

    width = 8 * per_row.width(system.sweep)
    table = system.sweep.emit(removals, vectors=width, label="removals")
    form, eta_change, squares, penalty_form, determined = table[:, :5].T.copy()
    return Removals(form, table[:, 5:], eta_change, squares, penalty_form, determined > 0)


def _without_share(
    system: System, U: Tensor, share: Float[Tensor, "b 1"], curved: Callable[[Tensor], Tensor]
) -> Float[Tensor, "b p"]:
    """(M − s·n∇²r)⁻¹v from M⁻¹v: a fixed point that gains a factor s = wᵢ/Σw with every step."""
    if not system.objective.folded:
        return U
    now = U
    for _ in range(_SHARE_STEPS):
        before, now = now, U + share * _solution(system, curved(now)).x / system.n
        if float((now - before).abs().max()) <= 1e-15 * float(now.abs().max()):
            break
    return now


def _penalty_curvature(system: System) -> Callable[[Tensor], Tensor]:
    """V ↦ V(n∇²r) for rows V."""
    objective, n = system.objective, system.n
    if objective.penalty is None or isinstance(objective.penalty, L2):
        diagonal = n * penalties.diagonal(objective)
        return lambda V: V * diagonal
    matrix = n * penalties.hvp(objective, torch.eye(objective.size, dtype=torch.float64))
    return lambda V: V @ matrix


def refuse_estimates(system: System) -> None:
    """Raises before anything is solved if the solver's answers are random.

    Raises:
        UnsupportedModel: if the solver is stochastic.
    """
    if isinstance(system.solver, LiSSA):
        message = (
            f"These diagnostics need exact solutions, and {system.solver} gives estimates. Use solver=Cholesky() or "
            "CG(), or leave solver=None."
        )
        raise UnsupportedModel(message)


def _solve_for_removal(system: System, X: Float[Tensor, "b p"], weights: Float[Tensor, " b"]) -> Float[Tensor, "b p"]:
    """C⁻¹x of rows that are removed: division by 1 − h multiplies the solver's error, so it is solved for once more.

    Args:
        system: of all rows.
        X: their features.
        weights: wφ″ of each, so that h = wφ″ xᵀC⁻¹x/n.
    """
    solution = _solution(system, X)
    left = 1 - weights * (X * solution.x).sum(1) / system.n
    near = (left < AMPLIFIED * float(solution.residual.max())) & ~solution.x.isnan().any(1)
    if not bool(near.any()):
        return solution.x
    found = solution.x.clone()
    missing = X[near] - system.operator.apply(found[near]) - system.damping * found[near]
    found[near] += _solution(system, missing).x
    return found


def solve(system: System, V: Float[Tensor, "k p"]) -> Float[Tensor, "k p"]:
    """C⁻¹v for every row v, outside of sweeps: all ranks come here alike.

    Raises:
        NotConverged: if a residual is larger than the solver's promise.
    """
    return system.ask(lambda: _solution(system, V).x)


def _solution(system: System, V: Float[Tensor, "k p"]) -> Solution:
    """The same with its residual, inside of a question.

    Raises:
        NotConverged: if a residual is larger than the solver's promise.
    """
    solution = system.prepared.solve(V)
    if not solution.converged:
        message = (
            f"{system.solver} left a relative residual of {float(solution.residual.max()):.2g}: C is too badly "
            f"conditioned (smallest curvature {solution.min_curvature:.2g}). Drop collinear features, standardise them "
            "(StandardScaler), or add a penalty."
        )
        raise NotConverged(message, solution)
    return solution
