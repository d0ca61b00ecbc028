"""Conjugate gradients, with every query sharing every sweep over the data."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from upweight.errors import InvalidInput, NotConverged, NotPositiveDefinite, checked_count
from upweight.model import penalties
from upweight.model.objective import Objective
from upweight.operators.base import Operator
from upweight.operators.eliminated import Eliminated, eliminated
from upweight.operators.linear import LinearHessian
from upweight.operators.lowest import lowest_eigenvalue
from upweight.runs import progress
from upweight.solvers import bounds
from upweight.solvers.base import Solution, checked_damping, checked_sides
from upweight.solvers.block import descend_together, spanning
from upweight.solvers.direct import Cholesky
from upweight.solvers.flat import LEANS, PROBES, Flat, probed
from upweight.solvers.lanczos import suggest_damping
from upweight.solvers.pacing import Keep, Pace
from upweight.solvers.precondition import Approximate, ByEigenvalues, Plain, Preconditioner
from upweight.solvers.recurrence import Progress, descend
from upweight.solvers.reduced import Way

_RECOMPUTE = 50  # the recurrence for r drifts from v − Ax in floating point; every so often it is replaced by the truth
_RARELY = 500  # the same where little is added to r: that of sparse rows, reduced
_COARSE_GAIN = 0.1  # a run in float32 must shrink the true residual to this share, else products become float64
_SCALE_ROWS = 1024
_TINY = 1e-30  # of the largest number on the diagonal: what a few rows say of so little is asked of all
_MATRIX_UP_TO = 4000  # parameters: many directions that no row sees are found in a matrix
_SMALL = 500  # where the matrix takes a few products as long as a solution: the same of models that are not linear
FURTHER = 5.0  # times the products of a trial
_MARGIN = 0.9  # of the goal, so that the residual that is recomputed at the end passes too


@dataclass(frozen=True)
class CG:
    """Conjugate gradients on (C + λI) x = v, all queries in one shared Krylov space.

    One query alone is the textbook recurrence; several take block steps (`solvers.block`), each of which looks for
    every x in the span of all queries' directions, so that together they need far fewer products. A query that has
    converged adds no direction. The residual that is promised, and reported, is recomputed from its
    definition in float64 at the end; if the recurrence was too optimistic, iteration goes on from the true residual.
    With a preconditioner the promise holds in two norms, ‖r‖/‖v‖ and the same with every parameter divided by
    √diag(C + λI), so that no feature hides behind another's units; the larger is reported.
    Products of linear predictors with a preconditioner, and of networks whose activations are kept, run in float32
    between two such corrections (iterative refinement), and in float64 when that gains nothing, or for `Plain()`.

    Cost: one sweep per step, about √cond(C + λI)·log(2/rtol)/2 steps without preconditioner; 4 vectors of length p per
    query. With `Preconditioned(curvature)` one product more, which tells how far that curvature alone was from the
    answer (`Solution.preconditioner_gap`).

    Args:
        rtol: the relative residual to reach, ‖v − (C + λI) x‖ ≤ rtol ‖v‖.
        max_sweeps: products after which NotConverged is raised.
        settled: stop earlier, when what is still to come to the values (relative to all of a query's, on 64 rows spread
            through the data) is estimated to be no more than this, such as 0.01; the residual that is left is reported.
            Values settle long before the residual is small. Beside the estimate stands a proven bound, where C is known
            to be positive semidefinite (`Solution.settled_bound`). None stops at rtol only.
        preconditioner: `Preconditioned(EKFAC())` or another curvature, `TwoLevel()`, `Approximate()` or `Plain()`,
            which is none. None lets `defaults` choose: TwoLevel for linear predictors, Approximate where their rows are
            sparse, none otherwise.

    Raises:
        InvalidInput: if rtol is not between 0 and 1, or max_sweeps is not positive.

    References: Hestenes and Stiefel (1952); Notay (2000) for varying preconditioners; O'Leary (1980) for blocks; paper,
    section 3.
    """

    rtol: float = 1e-6
    max_sweeps: int = 1000
    preconditioner: Preconditioner | None = None
    settled: float | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.rtol, float) or not 0 < self.rtol < 1:
            message = f"rtol={self.rtol}. It is a relative residual and must lie between 0 and 1, such as 1e-6."
            raise InvalidInput(message)
        checked_count(self.max_sweeps, "max_sweeps", hint="1000 is the default")
        if self.settled is not None and not (isinstance(self.settled, float) and 0 < self.settled < 1):
            told = f"settled={self.settled!r}. Pass the share of the values that may still come, such as 0.01, or None."
            raise InvalidInput(told)
        given = self.preconditioner
        if isinstance(given, type) or not (given is None or isinstance(given, Preconditioner)):
            refusal = f"preconditioner={given!r}. Pass an object, such as solvers.TwoLevel(), or None."
            raise InvalidInput(refusal)

    def prepare(self, operator: Operator, damping: float = 0.0) -> Iteration:
        """The iteration, with its preconditioner built."""
        damping = checked_damping(damping)
        plain = self.preconditioner is None or isinstance(self.preconditioner, Plain)
        if isinstance(self.preconditioner, Approximate) and isinstance(operator, LinearHessian):
            reduced = eliminated(operator, damping)
            if reduced is not None:
                return Iteration(self, operator, damping, None, _scale(operator, damping), reduced=reduced)
        inverse = None if plain else self.preconditioner.prepare(operator, damping)  # type: ignore[union-attr]
        return Iteration(self, operator, damping, inverse, None if inverse is None else _scale(operator, damping))


@dataclass(frozen=True)
class Iteration:
    """(C + λI)⁻¹ by conjugate gradients.

    Args:
        spec: the hyper-parameters.
        operator: C.
        damping: λ.
        inverse: the preconditioner, or None.
        scale: 1/√diag(C + λI), or None.
        reduced: the system without the columns of sparse rows that are solved for exactly, in place of an inverse.
        patience: from the number of right-hand sides to the products after which it looks how far it has come, and
            gives up if it will need `FURTHER` times as many: something else would be quicker. None goes on.
    """

    spec: CG
    operator: Operator
    damping: float
    inverse: Callable[[Tensor], Tensor] | None = None
    scale: Tensor | None = None
    patience: Callable[[int], int] | None = None
    reduced: Eliminated | None = None

    @property
    def nearly(self) -> Callable[[Tensor], Tensor] | None:
        """An approximate (C + λI)⁻¹, which another iteration can take as its preconditioner; None if there is none."""
        return self.inverse if self.reduced is None else self.reduced.inverse

    @cached_property
    def flat(self) -> Flat | None:
        """The directions that no row sees, of an exact Hessian without damping; `_held` says where there are none.

        Raises:
            NotPositiveDefinite: if there are more than can be found by probes, and too many parameters for a matrix.
        """
        operator = self.operator
        if self.damping or not getattr(operator, "exact", False) or _held(operator.sweep.objective):  # type: ignore[attr-defined]
            return None
        if not isinstance(operator, LinearHessian):
            return _in_a_matrix(operator) if operator.size <= _SMALL else None
        found = probed(operator, operator.diagonal(), self.spec.max_sweeps)
        if found is None or found.plain.shape[1] < PROBES[-1]:
            return found
        if operator.size <= _MATRIX_UP_TO:
            return Cholesky().prepare(operator).flat
        message = (
            f"No row sees {PROBES[-1]} or more directions of the {operator.size:,} parameters: columns repeat, add up "
            "to others, or are 0, without a penalty on them. Use solver=Cholesky(), which finds them all, drop such "
            "columns and fit again, or fit with a penalty."
        )
        raise NotPositiveDefinite(message)

    def solve(
        self, V: Float[Tensor, "k p"], *, state: Mapping[str, Tensor] | None = None, keep: Keep | None = None
    ) -> Solution:
        """x with (C + λI) x = v for every row v.

        Args:
            V: the right-hand sides.
            state: the state of an earlier Solution of the same V, to go on from it; {"x": X} alone is a place to start.
            keep: is given such a state every half a minute, so that an interruption loses no more.

        Raises:
            NotConverged: if max_sweeps products do not reach rtol; carries the partial Solution.
            NotPositiveDefinite: if a direction of curvature ≤ 0 is met; carries the partial Solution and a damping
                that would do.
        """
        V = checked_sides(V)
        if self.flat is not None:
            share = self.flat.leaning(V)
            leans = share > LEANS
            if bool(leans.any()):
                known = None if state is None else {n: torch.where(leans[:, None], 0.0, S) for n, S in state.items()}
                found = self.solve(torch.where(leans[:, None], 0.0, V), state=known, keep=keep)
                x = torch.where(leans[:, None], torch.nan, found.x)
                return replace(found, x=x, residual=torch.where(leans, share, found.residual))
        V = self._project(V)
        if state is not None and ("x" not in state or any(state[name].shape != V.shape for name in state)):
            message = (
                f"state is not that of an earlier Solution for {tuple(V.shape)} right-hand sides. Pass solution.state."
            )
            raise InvalidInput(message)
        if state is None and self.spec.settled is None and self.together(V):
            basis, mixing = spanning(V)
            if len(basis) < len(V):
                return self._mixed(basis, mixing, V, keep)
        searched = None if self.spec.settled is None or self._lowest is None else bounds.Searched(self._lowest)
        return self._descended(V, state, Pace(self.spec.settled, self.operator, keep), searched)

    @cached_property
    def _lowest(self) -> float | None:
        return lowest_eigenvalue(self.operator, self.damping)

    def _descended(
        self,
        V: Float[Tensor, "k p"],
        state: Mapping[str, Tensor] | None,
        pace: Pace,
        searched: bounds.Searched | None,
    ) -> Solution:
        """The solution of right-hand sides that need no other treatment, run by run of the recurrence."""
        X = torch.zeros_like(V) if state is None else state["x"].clone()
        R = V.clone() if state is None else V - self._apply(X)
        P = None if state is None or self.reduced is not None else state.get("p")
        P = P if P is None or self.together(V) else _continued(P, R)
        D = torch.ones(V.shape[1], dtype=V.dtype) if self.scale is None else self.scale
        size, weighed = V.norm(dim=1), (V * D).norm(dim=1)
        coarse = self._coarse
        trial = None if self.patience is None else self.patience(len(V))
        sweeps, sharpened = 0 if state is None else 1, 1.0
        way = None if self.reduced is None else Way(self.reduced, weighed / size, self.spec.settled is None)
        met = math.inf if way is None else float(D.max()) ** -2  # a number on the diagonal is a curvature, too
        smallest = torch.full((len(V),), met, dtype=torch.float64)
        with self._steps(float((_share(R * D, weighed)).max()), V) as step:
            while True:
                missed = torch.maximum(_share(R, size), _share(R * D, weighed))
                if not bool((missed > self.spec.rtol).any()):
                    break
                exact = self.inverse is None and self.reduced is None
                goal = sharpened * (1.0 if exact else _MARGIN) * self.spec.rtol * weighed
                left_to_make = self.spec.max_sweeps - sweeps
                if trial is not None and sweeps < trial:
                    left_to_make = min(left_to_make, trial - sweeps)
                follow = searched if coarse is None and self.scale is None else None
                run = self._run(coarse, X / D, R * D, goal, left_to_make, P, step, pace, way, follow)
                sweeps += run.steps
                smallest = torch.minimum(smallest, run.smallest)
                if run.stopped is not None and coarse is None:
                    raise self._refusal(run, V, sweeps)
                true = V - self._apply(run.x * D)
                left = torch.maximum(_share(true, size), _share(true * D, weighed))
                if self._too_far(trial, sweeps, float(left.max())) or (
                    sweeps >= self.spec.max_sweeps and bool((left > self.spec.rtol).any())
                ):
                    raise self._unfinished(run.x * D, run.direction * D, V, sweeps, smallest)
                sweeps += 1
                tried = missed > self.spec.rtol
                gain = float(((true * D).norm(dim=1) / (R * D).norm(dim=1))[tried].max())
                paused = run.steps < (_RECOMPUTE if self.reduced is None else _RARELY) and bool(
                    (run.residual.norm(dim=1) > goal).any()
                )
                if coarse is not None and (run.stopped is not None or not (paused or gain <= _COARSE_GAIN)):
                    if coarse is not self.operator:  # float32 has given what it can
                        smallest = torch.full_like(smallest, met)
                    coarse = None
                reached = bool((_share(true * D, weighed) <= self.spec.rtol).all())
                sharpened *= 0.1 if reached else 1.0  # the plain residual is then what is still missing
                drifted = float((true * D - run.residual).norm() / (true * D).norm().clamp(min=1e-300))
                X, R = run.x * D, true
                alone = self.inverse is None and (way is None or not way.many)
                exactly = alone or self.together(V) or coarse is self.operator  # no coarser products
                P = run.direction if drifted < 1e-3 and exactly else None
                if pace.rests(X, R if P is None else P, drifted, None if way is None else run.steps):
                    missed = torch.maximum(_share(R, size), _share(R * D, weighed))
                    break
        found = self._found(self._project(X), R if P is None else P, V, R, missed, sweeps, smallest)
        found = replace(found, settled=pace.left)
        return found if searched is None else _bounded(found, R, V, pace, searched)

    def _found(
        self, X: Tensor, P: Tensor, V: Tensor, R: Tensor, missed: Tensor, sweeps: int, smallest: Tensor
    ) -> Solution:
        """The solution X of V, with what is left of it and the direction to go on in."""
        met = smallest if bool(torch.isfinite(smallest).any()) else (X * (V - R)).sum(1) / X.square().sum(1)  # along x
        bottom = float(met.nan_to_num(torch.inf).min()) - self.damping if bool(met.isfinite().any()) else float("nan")
        gap = self._gap(X, V, R)
        return Solution(
            X,
            missed,
            True,
            sweeps if gap is None else sweeps + 1,
            min_curvature=bottom,
            preconditioner_gap=gap,
            state={"x": X, "p": P},
        )

    @property
    def _coarse(self) -> Operator | None:
        """The operator with float32 products, if it has them and float64 was not asked for throughout."""
        return None if isinstance(self.spec.preconditioner, Plain) else getattr(self.operator, "coarse", None)

    def _too_far(self, trial: int | None, made: int, left: float) -> bool:
        """Whether what else there is would be quicker, by the residual that so many products have left."""
        if trial is None or made < trial or left <= self.spec.rtol:
            return False
        goal = self.spec.rtol
        return progress.forecast(made, 1 / goal, left / goal) > FURTHER * trial

    def at(self, damping: float) -> Iteration:
        """The same with another λ; the eigenvectors of a preconditioner that has them are kept."""
        if not isinstance(self.inverse, ByEigenvalues):
            return self.spec.prepare(self.operator, damping)
        return replace(self, damping=checked_damping(damping), inverse=self.inverse.at(damping))

    def roughly(self, V: Float[Tensor, "k p"], rtol: float) -> tuple[Float[Tensor, "k p"], Float[Tensor, "k p"]]:
        """x with (C + λI) x ≈ v and what is left of v, by the recurrence alone: for a residual rtol that is far above
        rounding, and a question that needs no certificate.

        Raises:
            NotConverged, NotPositiveDefinite: as for `solve`.
        """
        V = self._project(V)
        D = torch.ones_like(V[0]) if self.scale is None else self.scale
        X, R, P, made = torch.zeros_like(V), V * D, None, 0
        coarse, goal = self._coarse, max(rtol, self.spec.rtol) * (V * D).norm(dim=1)
        pace, larger = Pace(None, self.operator, None), (V * D).norm(dim=1) / V.norm(dim=1)
        way = None if self.reduced is None else Way(self.reduced, larger, shared=False)
        while bool((R.norm(dim=1) > goal).any()):
            run = self._run(coarse, X, R, goal, self.spec.max_sweeps - made, P, lambda _: None, pace, way)
            X, R, made = run.x, run.residual, made + run.steps
            P = run.direction if self.inverse is None or self.together(V) else None
            if run.stopped is not None and coarse is not None:
                X, R, P, coarse = torch.zeros_like(V), V * D, None, None
            elif run.stopped is not None:
                raise self._refusal(run, V, made)
            elif made >= self.spec.max_sweeps:
                raise self._unfinished(X * D, R / D, V, made, run.smallest)
        return self._project(X * D), R / D

    def patiently(self) -> Iteration:
        """The same, which goes on to its end."""
        return replace(self, patience=None)._with_flat_of(self)

    def _with_flat_of(self, other: Iteration) -> Iteration:
        if "flat" in other.__dict__:  # a frozen dataclass's cache
            self.__dict__["flat"] = other.flat
        return self

    def together(self, V: Tensor) -> bool:
        """Whether these right-hand sides are solved in one Krylov space.

        Not for linear predictors of dense rows with a preconditioner: ten cheap products leave nothing that would pay
        for it.
        """
        return len(V) > 1 and (self.scale is None or getattr(self.operator, "sparse", False)) and self.reduced is None

    def _mixed(self, basis: Tensor, mixing: Tensor, V: Tensor, keep: Keep | None) -> Solution:
        """Dependent right-hand sides through a basis of them: copies differ by rounding, which is no direction."""
        rtol = self.spec.rtol / (2 * math.sqrt(max(1, len(basis))))
        inner, failed = None, None
        whole = None if keep is None else lambda state: keep({"x": mixing @ state["x"]})
        if len(basis):
            try:
                inner = replace(self, spec=replace(self.spec, rtol=rtol)).solve(basis, keep=whole)
            except NotConverged as error:
                inner = failed = error.solution  # `_unfinished` gives it one
        X = torch.zeros_like(V) if inner is None else mixing @ inner.x
        R = V - self._apply(X)
        missed, sweeps = self._missed(R, V), 1 + (0 if inner is None else inner.sweeps)
        bottom = float("nan") if inner is None else inner.min_curvature
        good = bool((missed <= self.spec.rtol).all())  # what the basis missed may be small in what it spans
        if failed is not None and not good:
            raise self._unfinished(X, R, V, failed.sweeps, torch.full((len(V),), bottom + self.damping))
        state, gap = {"x": X, "p": R}, self._gap(X, V, R)
        return Solution(X, missed, good, sweeps, min_curvature=bottom, preconditioner_gap=gap, state=state)

    def _missed(self, R: Tensor, V: Tensor) -> Tensor:
        """‖r‖/‖v‖ of every row, in the larger of the two norms that are promised."""
        plain = _share(R, V.norm(dim=1))
        return plain if self.scale is None else plain.maximum(_share(R * self.scale, (V * self.scale).norm(dim=1)))

    def _gap(self, X: Tensor, V: Tensor, R: Tensor) -> Tensor | None:
        """‖x₀ − x‖/‖x‖ in the norm of C + λI, with x₀ the preconditioner's own answer.  Cost: one product."""
        if not isinstance(self.inverse, ByEigenvalues):
            return None
        off = self._project(self.inverse(V)) - X
        image = getattr(self.operator, "coarse", self.operator).apply(off) + self.damping * off
        return ((off * image).sum(1).clamp(min=0) / (X * (V - R)).sum(1).clamp(min=1e-300)).sqrt()

    def _steps(self, start: float, V: Tensor) -> AbstractContextManager[Callable[[float], None]]:
        """What counts the products and says what all will cost."""
        shown = getattr(getattr(self.operator, "sweep", None), "progress", None)
        most, rtol = self.spec.max_sweeps, self.spec.rtol
        return progress.descent("CG", "product", most, start / rtol, shown, size=V.numel())

    def _run(
        self,
        coarse: Operator | None,
        Y: Tensor,
        R: Tensor,
        goal: Tensor,
        left: int,
        direction: Tensor | None,
        step: Callable[[float], None],
        pace: Pace,
        way: Way | None = None,
        searched: bounds.Searched | None = None,
    ) -> Progress:
        """Steps on D (C + λI) D y = D v until the recurrence believes in the goal, or it is time to look again."""

        def watch(left: Tensor) -> None:
            step(float((left / goal.clamp(min=1e-300)).max()))

        if way is not None and self.scale is not None:
            run = way.run(R / self.scale, goal, pace.steps(min(left, _RARELY)), direction, watch)
            return replace(run, x=Y + run.x / self.scale)
        operator, project = self.operator if coarse is None else coarse, self._project
        D = torch.ones_like(R[0]) if self.scale is None else self.scale

        def product(Y: Tensor) -> Tensor:
            V = Y * D
            image = project(operator.apply(V))
            return (image + self.damping * V if self.damping else image) * D

        inverse = self.inverse
        precondition = None if inverse is None else lambda R: project(inverse(R / D)) / D
        steps, follow = min(left, _RECOMPUTE), None if searched is None else searched.follow
        look = pace.look if self.scale is None else lambda Y, P: pace.look(Y * D, P)
        known = (product, precondition, Y, R, goal, steps, direction)
        if self.together(R):
            return descend_together(*known, watch=watch, follow=follow, look=look)
        return descend(*known, scale=D, watch=watch, follow=follow, look=look)

    def _apply(self, V: Tensor) -> Tensor:
        return self._project(self.operator.apply(V)) + self.damping * V

    def _project(self, V: Tensor) -> Tensor:
        """V without the directions in which R is constant, by construction or because no row sees them."""
        V = self.operator.project(V)
        return V if self.flat is None else self.flat.project(V)

    def _partial(self, X: Tensor, P: Tensor, V: Tensor, sweeps: int) -> Solution:
        return Solution(X, self._missed(V - self._apply(X), V), False, sweeps, state={"x": X.clone(), "p": P.clone()})

    def _unfinished(self, X: Tensor, P: Tensor, V: Tensor, sweeps: int, smallest: Tensor) -> NotConverged:
        met = float(smallest.min()) - self.damping
        partial = replace(self._partial(X, P, V, sweeps), min_curvature=met if math.isfinite(met) else float("nan"))
        worst = int(partial.residual.argmax())
        less = f"{2 * float(partial.residual[worst]):.1g}"
        settling = "" if self.spec.settled is None else f", or values settled to {self.spec.settled:g},"
        accept = f", or accept less: CG(rtol={less})." if float(less) < 1 else "."
        message = (
            f"CG reached a relative residual of {float(partial.residual[worst]):.2g} for query {worst} after "
            f"{sweeps} sweeps; {self.spec.rtol:g}{settling} was promised "
            f"(damping {self.damping:g}, smallest curvature met {float(smallest.min()):.2g}). The system is badly "
            "conditioned, or the arithmetic is too coarse (float32). "
            f"Continue from error.solution.state, raise max_sweeps, or use a larger damping{accept}"
        )
        return NotConverged(message, partial)

    def _refusal(self, run: Progress, V: Tensor, sweeps: int) -> NotPositiveDefinite:
        witness = run.direction[run.stopped]  # no scale: negative curvature is met in float64, mostly by plain CG
        met = float(run.smallest[run.stopped])
        suggestion, lowest = suggest_damping(self.operator, self.damping, witness)
        message = (
            f"CG met curvature {met:.3g} after {sweeps} sweeps (damping {self.damping:g}); "
            f"the smallest eigenvalue of C is about {lowest:.3g} (Lanczos). "
            f"θ̂ is probably not a minimum. Try damping={suggestion:g}, curvature=GaussNewton(), or train further; "
            "see influence.check()."
        )
        return NotPositiveDefinite(message, self._partial(run.x, run.direction, V, sweeps), suggestion)


def _bounded(solution: Solution, R: Tensor, V: Tensor, pace: Pace, searched: bounds.Searched) -> Solution:
    """The same with what is proven of it."""
    energy, lowest = searched.energy(R), searched.lowest
    known = pace.bound(solution.x, R, V, energy, lowest)
    return replace(solution, error_bound=energy / lowest**0.5, settled_bound=known)


def _held(objective: Objective) -> bool:
    """Whether a penalty holds every parameter, or all but the intercepts, which all rows see."""
    structure, strengths = objective.linear, penalties.diagonal(objective)
    return bool((strengths[: None if structure is None else structure.n_outputs * structure.n_features] > 0).all())


def _in_a_matrix(operator: Operator) -> Flat | None:
    """The flat directions of a small matrix; None if there is negative curvature, which CG will meet."""
    try:
        return Cholesky().prepare(operator).flat
    except NotPositiveDefinite:
        return None


def _share(R: Tensor, size: Tensor) -> Tensor:
    """‖r‖ / ‖v‖ of every row; 0 where both are 0."""
    norm = R.norm(dim=1)
    return torch.where(size > 0, norm / size.clamp(min=1e-300), norm)


def _scale(operator: Operator, damping: float) -> Tensor | None:
    """1/√diag(C + λI) over a few thousand rows, for operators that are means over rows; None for others."""
    rows: Any = operator
    if not hasattr(rows, "subsample"):
        return None
    whole = rows.sweep.n <= _SCALE_ROWS or getattr(rows, "sparse", False)  # few sparse rows miss most of the columns
    few = rows if whole else rows.subsample(_SCALE_ROWS)
    diagonal: Tensor = few.diagonal() + damping
    largest = float(diagonal.max()) or 1.0  # in place of what no row sees, which must not blow up rounding
    if not whole and bool(((diagonal > 0) & (diagonal < _TINY * largest)).any()):  # of these rows, or in small units
        diagonal = rows.diagonal() + damping
    return torch.where(diagonal > 0, diagonal, largest).rsqrt()


def _continued(direction: Tensor, R: Tensor) -> Tensor:
    """The directions of an earlier run where its recurrence goes on exactly; elsewhere a restart from r is valid."""
    rho = (R * R).sum(1)
    exact = ((direction * R).sum(1) / rho.clamp(min=1e-300) - 1).abs() < 1e-6
    return torch.where(exact[:, None], direction, R)
