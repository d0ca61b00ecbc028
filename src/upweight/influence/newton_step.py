"""Removing rows from a model with a linear predictor, by the removal's own Newton step.

With U the rows e_j ⊗ x̃ᵢ of a group (m·K of them), D = blockdiag(wᵢ hᵢ)/n and A = U C⁻¹ Uᵀ, the curvature without the
group is C − UᵀDU and, by Woodbury's identity,

    (C − UᵀDU)⁻¹ = C⁻¹ + C⁻¹Uᵀ D (I − A D)⁻¹ U C⁻¹

For one row and one output this is the leverage correction 1/(1 − h). No new factorisation is needed. A group so large
that A would cost more than it saves (mK > 1,000) is solved by conjugate gradients on the curvature without it instead,
with C⁻¹, or the solver's own preconditioner, as preconditioner: a few products, however large the group.
Reference: Pregibon (1981); paper, section 2 (leave-one-out), taken one step beyond first order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from upweight.data.examples import Examples
from upweight.errors import NotConverged, NotPositiveDefinite, Undefined, UnsupportedModel
from upweight.influence.classes import Classes
from upweight.influence.deletion import AMPLIFIED
from upweight.influence.system import System, solved
from upweight.model import linear, losses, penalties
from upweight.model.objective import L2, Objective
from upweight.model.sweep import Sweep
from upweight.operators.linear import LinearHessian
from upweight.solvers import Solution, Substitution
from upweight.solvers.flat import LEANS, Flat
from upweight.solvers.recurrence import Progress, descend

_GROUP_BLOCK = 64
_UPDATED_UP_TO = 1000  # systems solved for one block of groups; a larger group is solved as a whole
_WARM_RTOL = 1e-9
_WARM_STEPS = 500
_AGAIN = 3  # times, from the true residual
_SINGULAR_GROWTH = 1e9
_SMALLEST_LEFT = 1e-10  # 1 − leverage
_SHARE_STEPS = 12  # the penalty's share w/Σw of a row is tiny, and each step of the fixed point gains a factor of it
_SHARE_RTOL = 1e-12


@dataclass(frozen=True)
class NewtonStep:
    """The move of θ̂ when each group is removed, (g, p), and the step that would come next, (g, p): its error.

    `impossible` says for the number of a group why it has none; its lines are NaN. `flat` has for the number of a group
    the directions that no row sees that is left, if there are any: the step has no part along them, and predictions
    that lean on them are not determined.
    """

    theta_change: Float[Tensor, "g p"]
    next_step: Float[Tensor, "g p"]
    impossible: dict[int, str] = field(default_factory=dict)
    flat: dict[int, Flat] = field(default_factory=dict)


@dataclass(frozen=True)
class _Rest:
    """What is left without each group: its Newton step (g, p), and (C′ + λI)⁻¹ of a gradient for each group."""

    step: Tensor
    inverse: Callable[[Tensor], Tensor]
    flat: Flat | None = None


def newton_steps(system: System, groups: list[NDArray[np.int64]]) -> NewtonStep:
    """The Newton step of removing each group, and the one that would follow it with the same curvature.

    Squared losses are quadratic, so there the step is repeated once, which removes the solver's own error. Without a
    penalty, a group that holds all rows of a level leaves a direction that no row sees: its step is that of minimum
    norm, from a factorisation of its own. A group without which a class has no row, or the rest is singular to
    rounding, has no step.

    Raises:
        NotPositiveDefinite: if the fit is not unique whichever group is removed.
        Undefined: if no group has a step, and one holds all rows of a class.
    """
    classes = Classes.of(system)
    lost = {} if classes is None else {j: why for j, group in enumerate(groups) if (why := classes.without(group))}
    places = [j for j in range(len(groups)) if j not in lost]
    if not places:
        raise Undefined(lost[0])
    outputs = system.objective.linear.n_outputs  # type: ignore[union-attr]
    many = system.for_many(outputs * sum(map(len, groups)))
    found = many.ask(lambda: _steps_of_most(many, [groups[j] for j in places]))
    impossible = lost | {places[j]: why for j, why in found.impossible.items()}
    if len(impossible) == len(groups):
        raise Undefined(next(iter(lost.values()))) if lost else NotPositiveDefinite(impossible[0])
    if not lost:
        return found
    moves = torch.full((2, len(groups), system.objective.size), torch.nan, dtype=torch.float64)
    moves[:, places] = torch.stack([found.theta_change, found.next_step])
    flat = {places[j]: one for j, one in found.flat.items()}
    return NewtonStep(moves[0], moves[1], dict(sorted(impossible.items())), flat)


def _steps_of_most(system: System, groups: list[NDArray[np.int64]]) -> NewtonStep:
    """The steps of all groups that have one; halves are tried apart, so that one group costs the others little."""
    try:
        return _steps_of_all(system, groups)
    except NotPositiveDefinite as error:
        if len(groups) == 1:
            fresh = _fresh_rest(system, groups[0])
            if fresh is not None:
                change, following = _refined(system, groups, fresh)
                return NewtonStep(change, following, flat={} if fresh.flat is None else {0: fresh.flat})
            nothing = torch.full((1, system.objective.size), torch.nan, dtype=torch.float64)
            return NewtonStep(nothing, nothing, {0: str(error)})
    half = len(groups) // 2
    first, second = _steps_of_most(system, groups[:half]), _steps_of_most(system, groups[half:])
    return NewtonStep(
        torch.cat([first.theta_change, second.theta_change]),
        torch.cat([first.next_step, second.next_step]),
        first.impossible | {half + number: why for number, why in second.impossible.items()},
        first.flat | {half + number: one for number, one in second.flat.items()},
    )


def _steps_of_all(system: System, groups: list[NDArray[np.int64]]) -> NewtonStep:
    """The steps of all groups, refused if one has none."""
    objective, sweep = system.objective, system.sweep
    if objective.folded and not isinstance(objective.penalty, L2):
        message = (
            "of_removing with penalty_per_example=True needs an L2 penalty, whose share it removes in closed form. "
            "Use on_loss (first order)."
        )
        raise UnsupportedModel(message)
    K = objective.linear.n_outputs  # type: ignore[union-attr]
    changes, following = [], []
    for block in _blocks(groups, K):
        large = len(block) == 1 and len(block[0]) * K > _UPDATED_UP_TO
        rest = None if large else _steps(objective, sweep.examples, system.solve, block)
        rest = _warm_steps(system, block) if rest is None else rest
        change, further = _refined(system, block, rest)
        changes.append(change)
        following.append(further)
    return NewtonStep(torch.cat(changes), torch.cat(following))


def _refined(system: System, groups: list[NDArray[np.int64]], rest: _Rest) -> tuple[Tensor, Tensor]:
    """The steps, of a squared loss repeated once, and those that would follow."""
    objective, change = system.objective, rest.step
    known = (objective, system.sweep, groups)
    left = _remaining(*known, change, system.risk_gradient)
    if objective.linear.loss is losses.squared:  # type: ignore[union-attr]
        change = change - rest.inverse(system.project(left + system.damping * change))
        left = _remaining(*known, change, system.risk_gradient)
    return change, -rest.inverse(system.project(left))


def _fresh_rest(system: System, group: NDArray[np.int64]) -> _Rest | None:
    """What is left without a group that leaves a direction flat, from its rows alone; None if they are too few or bad.

    Only without a penalty: a part of one would stay, and a coefficient that it holds is determined.
    """
    objective, operator, n = system.objective, system.operator, system.n
    free = isinstance(objective.penalty, L2 | None) and not bool(penalties.diagonal(objective).any())
    rows = np.setdiff1d(np.arange(n), group)
    if not free or system.damping or not len(rows) or not isinstance(operator, LinearHessian):
        return None
    try:
        prepared = system.solver.prepare(operator.of_rows(rows), 0.0)
        flat = getattr(prepared, "flat", None)
    except NotPositiveDefinite:
        return None

    def inverse(V: Tensor) -> Tensor:
        V = system.operator.project(V)
        return solved(prepared, V if flat is None else flat.project(V), repr(system.solver)).x * (n / len(rows))

    weights = torch.from_numpy(system.examples.weights[group])
    side = linear.pull(objective, system.examples.batch(group), weights[None]) / n
    return _Rest(inverse(side), inverse, flat)


def _blocks(groups: list[NDArray[np.int64]], K: int) -> Iterator[list[NDArray[np.int64]]]:
    """The groups in order, some at a time, so that the systems of a block fit in memory; a large group comes alone."""
    block: list[NDArray[np.int64]] = []
    for group in groups:
        systems = K * (sum(map(len, block)) + len(group))
        if block and (len(block) == _GROUP_BLOCK or systems > _UPDATED_UP_TO):
            yield block
            block = []
        block.append(group)
    yield block


def _warm_steps(system: System, groups: list[NDArray[np.int64]]) -> _Rest:
    """The steps of groups that are too large, or carry too much of the penalty, for Woodbury's identity."""
    each = [_warm_rest(system, group) for group in groups]
    return _Rest(
        torch.cat([rest.step for rest in each]),
        lambda G: torch.cat([rest.inverse(g[None]) for rest, g in zip(each, G, strict=True)]),
    )


def _warm_rest(system: System, group: NDArray[np.int64]) -> _Rest:
    """What is left without one group, by conjugate gradients that start from the whole data's own solution.

    Raises:
        NotPositiveDefinite: if what is left does not determine the fit.
        NotConverged: if the iteration does not reach its goal.
    """
    objective, sweep = system.objective, system.sweep
    batch, n = sweep.examples.batch(group), sweep.n
    weights = torch.from_numpy(sweep.examples.weights[group])
    share = float(weights.sum()) / float(sweep.examples.weights.sum()) if objective.folded else 0.0
    strengths = share * penalties.diagonal(objective)
    project = system.project
    side = project(linear.pull(objective, batch, weights[None]) / n + share * penalties.gradient(objective))

    def without(V: Tensor) -> Tensor:
        gone = linear.hvp(objective, batch, V, weights) / n + strengths * V
        return project(system.operator.apply(V) - gone) + system.damping * V

    prepared = system.prepared
    inverse = prepared.substitute if isinstance(prepared, Substitution) else getattr(prepared, "nearly", None)
    precondition = None if inverse is None else lambda R: project(inverse(R))

    def inverse_of(sides: Tensor) -> tuple[Tensor, Progress]:
        start = system.solve(sides).x
        goal = _WARM_RTOL * sides.norm(dim=1)
        run = descend(without, precondition, start, sides - without(start), goal, _WARM_STEPS)
        for _ in range(_AGAIN):  # the recurrence's residual has drifted where the rest is badly conditioned
            left = sides - without(run.x)
            if run.stopped is not None or not bool((left.norm(dim=1) > 10 * goal).any()):
                break
            run = descend(without, precondition, run.x, left, goal, _WARM_STEPS)
        return start, run

    draw = torch.Generator().manual_seed(0)
    witness = project(torch.randn(1, objective.size, generator=draw, dtype=torch.float64))
    sides = torch.cat([side, witness])  # a random side meets every direction, which the group's own may not
    start, run = inverse_of(sides)
    left = (sides - without(run.x)).norm(dim=1) / sides.norm(dim=1).clamp(min=1e-300)
    growth = float(run.x[1].norm() / start[1].norm().clamp(min=1e-300))
    if run.stopped is not None:
        raise _singular(group, f"curvature {float(run.smallest.min()):.2g}")
    if growth > _SINGULAR_GROWTH:
        raise _singular(group, f"a random push moves θ̂ {growth:.2g} times as far")
    if float(left.max()) > 10 * _WARM_RTOL:
        message = (
            f"The Newton step of removing {len(group)} rows has a residual of {float(left.max()):.2g} after "
            f"{_WARM_STEPS} products; {_WARM_RTOL:g} was wanted. What is left is badly conditioned: add damping, or "
            "use subset_retraining on the rows that are left."
        )
        raise NotConverged(message)
    return _Rest(run.x[:1], lambda G: inverse_of(project(G))[1].x)


def changes(
    objective: Objective, queries: Examples, theta_change: Float[Tensor, "g p"]
) -> Float[NDArray[np.float64], "q g"]:
    """ℓ(query) at θ̂ + Δ minus ℓ(query) at θ̂, exactly, for every query and move."""
    X, y = queries.batch(slice(None))
    X = X if not isinstance(X, Tensor) else X.double()
    now = linear.predictor(objective, X)  # (q, K)
    moved = now[:, None, :] + linear.directional(objective, X, theta_change)  # (q, g, K)
    assert objective.linear is not None
    value = objective.linear.loss.value
    before = value(now, y)
    return torch.stack([value(moved[:, g], y) - before for g in range(len(theta_change))], 1).numpy()


def undetermined(step: NewtonStep, objective: Objective, queries: Examples) -> NDArray[np.bool_]:
    """(q, g) whether a query's prediction leans on what no row sees that is left."""
    found = np.zeros((len(queries), len(step.theta_change)), dtype=bool)
    if step.flat:
        U = linear.unit_solutions(objective, queries.batch(slice(None))[0])
        for number, flat in step.flat.items():
            found[:, number] = (flat.leaning(U) > LEANS).reshape(len(queries), -1).any(1).numpy()
    return found


def _steps(
    objective: Objective, examples: Examples, solve: Callable[[Tensor], Solution], groups: list[NDArray[np.int64]]
) -> _Rest | None:
    """What is left without each group, by Woodbury.

    None if a group carries too much of the penalty to iterate, or so much of the curvature that 1 − leverage is no
    larger than the solver's error allows.
    """
    n, total = len(examples), float(examples.weights.sum())
    union = np.unique(np.concatenate(groups))
    batch = examples.batch(union)
    K = objective.linear.n_outputs  # type: ignore[union-attr]
    U = linear.unit_solutions(objective, batch[0])  # (m K, p)
    weights = torch.from_numpy(examples.weights[union])
    slopes = linear.slopes(objective, batch) * weights[:, None]
    curvatures = linear.curvatures(objective, batch) * weights[:, None, None]
    penalty = penalties.gradient(objective) if objective.folded else None
    weightless = torch.from_numpy(np.repeat(examples.weights[union] == 0, K))
    U = torch.where(weightless[:, None], 0.0, U)  # removing it changes nothing, whatever it leans on
    solution = solve(U if penalty is None else torch.cat([U, penalty[None]]))
    solved, error = solution.x, AMPLIFIED * float(solution.residual.max())
    XU = solved[: len(U)]
    corrections, moves, shares = [], [], []
    for group in groups:
        place = np.searchsorted(union, group)
        index = torch.from_numpy((place[:, None] * K + np.arange(K)).reshape(-1))
        u, xu = U[index], XU[index]
        D = torch.block_diag(*curvatures[torch.from_numpy(place)]) / n
        A = u @ xu.T
        inner = torch.eye(len(A), dtype=torch.float64) - A @ D
        left = float(torch.linalg.eigvals(inner).real.min()) if len(A) else 1.0
        if error > _SMALLEST_LEFT and left < error:
            return None  # what is left is no larger than what the solver's own error may have made of it
        if left < _SMALLEST_LEFT:
            raise _singular(group, f"leverage {float(torch.linalg.eigvals(A @ D).real.max()):.6f}")
        corrections.append((D @ torch.linalg.inv(inner), u, xu))
        moves.append(slopes[torch.from_numpy(place)].reshape(-1) @ xu / n)
        shares.append(float(examples.weights[group].sum()) / total)

    def without_groups(steps: Tensor) -> Tensor:
        """(C − UᵀDU)⁻¹ v from C⁻¹ v, each line without its own group."""
        return torch.stack([v + (c @ (u @ v)) @ xu for v, (c, u, xu) in zip(steps, corrections, strict=True)])

    def inverse(G: Tensor) -> Tensor:
        return without_groups(solve(G).x)

    if penalty is None:
        return _Rest(without_groups(torch.stack(moves)), inverse)
    share = torch.tensor(shares, dtype=torch.float64)[:, None]
    first = without_groups(torch.stack(moves) + share * solved[-1])
    strengths, delta = penalties.diagonal(objective), first
    for _ in range(_SHARE_STEPS):
        before, delta = delta, first + without_groups(solve(share * strengths * delta).x)
        if float((delta - before).norm()) <= _SHARE_RTOL * float(delta.norm()):
            return _Rest(delta, inverse)
    return None


def _singular(group: NDArray[np.int64], how: str) -> NotPositiveDefinite:
    message = (
        f"Removing rows {group[:5].tolist()} leaves no curvature in some direction ({how}): they alone determine a "
        "parameter. Without them the fit is not unique. Add a penalty or damping, or remove other rows."
    )
    return NotPositiveDefinite(message)


def _remaining(
    objective: Objective, sweep: Sweep, groups: list[NDArray[np.int64]], change: Tensor, risk_gradient: Tensor
) -> Tensor:
    """∇R without each group at θ̂ + Δ, less the gradient that was there before: (g, p)."""
    loss = objective.linear.loss  # type: ignore[union-attr]
    g, K = len(groups), objective.linear.n_outputs  # type: ignore[union-attr]

    def slopes_after(batch: Any, moves: Tensor) -> Tensor:
        """(b, g, K) slopes at θ̂ + Δ."""
        X = batch[0].double() if isinstance(batch[0], Tensor) else batch[0]
        eta = linear.predictor(objective, X)[:, None, :] + linear.directional(objective, X, moves)
        return torch.stack([loss.slope(eta[:, j], batch[1]) for j in range(len(moves))], 1)

    def total(batch: Any, weights: Tensor) -> Tensor:
        X = batch[0].double() if isinstance(batch[0], Tensor) else batch[0]
        return linear.transposed(objective, X, slopes_after(batch, change) * weights[:, None, None])

    gradient = sweep.fold(total, vectors=g * max(1, K // 2), label="removal error") / sweep.n
    n_total = float(sweep.examples.weights.sum())
    penalty = torch.stack([penalties.gradient(objective.at(objective.theta + step)) for step in change])
    for j, group in enumerate(groups):
        batch = sweep.examples.batch(group)
        weights = torch.from_numpy(sweep.examples.weights[group])
        X = batch[0].double() if isinstance(batch[0], Tensor) else batch[0]
        mine = slopes_after(batch, change[j : j + 1]) * weights[:, None, None]
        gradient[j] -= linear.transposed(objective, X, mine)[0] / sweep.n
        share = float(sweep.examples.weights[group].sum()) / n_total if objective.folded else 0.0
        gradient[j] += (1 - share) * penalty[j]
    return gradient - risk_gradient
