"""The steps of `on_loss`, really taken on a few training rows and metered: what `plan` extrapolates from.

The curvature is bound to a few rows, spread through the data, and everything after it runs as it will: the damping, the
solver, the queries' gradients and systems, the scores of those rows. An iteration is stopped after a few products, and
a recursion after a few steps; `Rehearsed.times` says how many times as much the whole takes.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, is_dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from upweight.data.examples import Examples
from upweight.errors import NotConverged, SolverError, TheoryWarning
from upweight.influence import defaults, pairs, scoring
from upweight.influence.system import System
from upweight.model import per_row
from upweight.model.chunks import joined
from upweight.operators import Dense
from upweight.operators.base import Operator
from upweight.operators.layered import LayeredGaussNewton
from upweight.operators.linear import LinearHessian
from upweight.runs.meter import Meter, Taken
from upweight.runs.progress import forecast
from upweight.solvers import CG, Cholesky, Dual, LiSSA, Solution, SparseCholesky

CURVATURE, DAMPING, MATRIX, SOLVER, GRADIENTS, SYSTEMS, SCORES = STEPS = (
    *("curvature", "damping", "matrix", "preparing the solver", "gradients of queries", "systems", "scores"),
)
FACTORISED_UP_TO = 500  # parameters: a larger matrix is not factorised for a rehearsal
WRITTEN_UP_TO = 4000  # nor is a still larger one written out
_PRODUCTS = (20, 10)  # of an iteration, that are really made; of one whose products take long
_STEPS, _REPEATS = 20, 2  # of a recursion
_COUNTED = (4, 8)  # rows on which operations are counted, and caches fill
_START, _MORE = 64, 8  # rows of a rehearsal, and times as many of the next one
_ENOUGH = 1.0  # seconds that it may take longer than the one before
MOST = 2**16  # rows: the longest block that a linear predictor reads at once
_MOST_DUAL = 2**11  # rows times outputs


@dataclass(frozen=True)
class Rehearsed:
    """One step on a few rows.

    Args:
        rows: how many.
        visits: how often a row was read.
        taken: seconds and memory, the latter with all that earlier steps keep.
        flops: that torch counted; 0 where it was not asked.
        times: what the whole step takes, in units of its part that does not grow with the rows, and of the other.
    """

    rows: int
    visits: int
    taken: Taken
    flops: float = 0.0
    times: tuple[float, float] = (1.0, 1.0)


@dataclass(frozen=True)
class Iterated:
    """How many products a few rows need, or are forecast to.

    Args:
        made: products that were made.
        needed: products in all.
        rows: on how many rows.
    """

    made: int
    needed: float
    rows: int


@dataclass(frozen=True)
class Rehearsal:
    """Every step by its name: twice counted, then metered on a small and a larger number of rows."""

    counted: tuple[dict[str, Rehearsed], dict[str, Rehearsed]]
    small: dict[str, Rehearsed]
    large: dict[str, Rehearsed]
    iterated: Iterated | None


def rehearse(system: System, queries: Examples) -> Rehearsal:
    """The steps on more and more rows, as long as a larger rehearsal is cheap.

    Cost: about two seconds; more where a few rows alone take longer.
    """
    meter, n = Meter(), system.n
    run = _Run(system, queries, _PRODUCTS[0], meter)
    first, second = (run.on(min(rows, n), count=system.objective.linear is None)[0] for rows in _COUNTED)
    if _seconds(second) > _ENOUGH:
        run = replace(run, products=_PRODUCTS[1])
    found = [run.on(rows) for rows in (min(_START // _MORE, n), min(_START, n))]
    rows, most = _START, min(n // 2, _most(system))
    while rows < most:
        more = min(_MORE * rows, most)
        took, before = (_seconds(one[0]) for one in found[:-3:-1])
        if took > 3 * _ENOUGH or (took - before) * (more - rows) / rows > _ENOUGH:
            break
        found.append(run.on(more))
        rows = more
    return Rehearsal((first, second), found[-2][0], found[-1][0], found[-1][1])


def _most(system: System) -> int:
    """Rows of the largest rehearsal: what a linear predictor reads at once, and few where all pairs of them meet."""
    structure = system.objective.linear
    return _MOST_DUAL // structure.n_outputs if isinstance(system.solver, Dual) and structure else MOST


def _seconds(steps: dict[str, Rehearsed]) -> float:
    return sum(step.taken.processor_seconds for step in steps.values())


@dataclass(frozen=True)
class _Run:
    """The steps of some queries, with so many products of an iteration at most."""

    system: System
    queries: Examples
    products: int
    meter: Meter

    def on(self, rows: int, count: bool = False) -> tuple[dict[str, Rehearsed], Iterated | None]:
        """The steps on so many rows, and what became of the iteration."""
        twin = self._twin(rows)
        try:
            return self._taken(twin, rows, count)
        except SolverError:  # so few rows determine too little; a damping costs nothing
            enough = abs(defaults.mean_eigenvalue(twin.operator)) or 1.0
            return self._taken(replace(self._twin(rows), named_damping=enough), rows, count)

    def _twin(self, rows: int) -> System:
        """The system of a few rows, whose solver stops early."""
        system, solver = self.system, self.system.solver
        chosen = _Counted.of(system.examples, system.examples.spread(rows))
        sweep = replace(system.sweep.over(system.objective, chosen), progress=False)
        if isinstance(solver, CG):
            solver = replace(solver, max_sweeps=min(self.products, solver.max_sweeps))
        elif isinstance(solver, LiSSA):
            solver = replace(solver, depth=min(_STEPS, solver.depth), repeats=min(_REPEATS, solver.repeats))
        return replace(system, sweep=sweep, solver=solver, named_damping=system.known_damping)

    def _taken(self, twin: System, rows: int, count: bool) -> tuple[dict[str, Rehearsed], Iterated | None]:
        seen = twin.examples.seen  # type: ignore[attr-defined]
        steps: dict[str, Rehearsed] = {}
        iterated = None
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", TheoryWarning)
            for call in _done(self.system, twin):
                call()
            self.meter.start()
            for name, call in _steps(self.system, twin, self.queries):
                before = seen[0]
                with FlopCounterMode(display=False) if count else nullcontext() as counter:
                    value, taken = self.meter.lap(call)
                times = (1.0, 1.0)
                if isinstance(value, Solution):
                    iterated, times = _whole(self.system.solver, twin.solver, value, rows)
                flops = 0.0 if counter is None else float(counter.get_total_flops())
                steps[name] = Rehearsed(rows, seen[0] - before, taken, flops, times)
        return steps, iterated


class _Counted(Examples):
    """Examples that count how many of their rows are read."""

    seen: list[int]

    @classmethod
    def of(cls, examples: Examples, rows: NDArray[np.int64]) -> _Counted:
        """These rows."""
        counted = object.__new__(cls)
        counted.__dict__.update(examples.subset(rows).__dict__)
        counted.seen = [0]
        return counted

    def batch(self, rows: Any) -> Any:
        """As `Examples.batch`."""
        self.seen[0] += len(self.weights[rows])
        return Examples.batch(self, rows)


def is_tried(system: System) -> bool:
    """Whether systems are solved in a rehearsal: not by a factorisation that takes too long."""
    return not isinstance(system.solver, Cholesky | SparseCholesky) or system.objective.size <= FACTORISED_UP_TO


def has_operator(system: System) -> bool:
    """Whether C was bound already, with what its products need of every row."""
    if "operator" not in system.__dict__:
        return False
    if isinstance(system.operator, LayeredGaussNewton):
        return "kept" in system.operator.__dict__
    return not isinstance(system.operator, LinearHessian) or system.knows_risk_gradient


def _done(system: System, twin: System) -> list[Callable[[], Any]]:
    """What later questions find prepared, in its order."""
    known = [
        (has_operator(system), lambda: _bind(system, twin)),
        (has_operator(system) and system.knows_risk_gradient, lambda: twin.risk_gradient),
        ("prepared" in system.__dict__ and is_tried(system), lambda: twin.prepared),
    ]
    return [call for done, call in known if done]


def _steps(system: System, twin: System, queries: Examples) -> Iterator[tuple[str, Callable[[], Any]]]:
    """The steps of `on_loss` on the twin, in their order, without those that were done already."""
    if not has_operator(system):
        yield CURVATURE, lambda: _bind(system, twin)
    if system.known_damping is None:
        yield DAMPING, lambda: twin.damping
    whole = is_tried(system)
    if "prepared" not in system.__dict__:
        if whole:
            yield SOLVER, lambda: twin.prepared
        elif system.objective.size <= WRITTEN_UP_TO and isinstance(system.solver, Cholesky):
            yield MATRIX, lambda: twin.operator.matrix() is None
    pairwise = pairs.comparing(system.objective, twin.prepared) if whole else None
    if pairwise is not None:
        weights = twin.examples.weights / twin.n
        yield SCORES, lambda: joined(pairs.in_chunks(twin, queries, pairwise, twin.solve, weights)[0], twin.n)
        return
    held: list[Any] = []
    yield GRADIENTS, lambda: held.append(per_row.gradients(twin.sweep.over(system.objective, queries)))
    G = held.pop()
    if whole:
        yield SYSTEMS, lambda: held.append(_solved(twin, G)) or held[0]
    solution = held.pop() if whole else Solution(G, torch.zeros(len(G), dtype=torch.float64), True)
    yield SCORES, lambda: _scored(twin, solution, queries)


def _bind(system: System, twin: System) -> None:
    """The curvature on the twin's rows, of the kind that it has on all of them, with what its products need of rows."""
    own = None if isinstance(system.curvature, (*defaults.SPECTRAL, Dense)) else system.operator
    if is_dataclass(own) and hasattr(own, "sweep"):
        near: Any = replace(own, sweep=own.sweep.over(own.sweep.objective, twin.examples))  # type: ignore[attr-defined]
        twin.__dict__["operator"] = near
    operator: Operator = twin.operator
    if isinstance(operator, LinearHessian):
        operator.slopes  # noqa: B018 it is computed when it is asked for
    elif isinstance(operator, LayeredGaussNewton):
        operator.kept  # noqa: B018 likewise


def _solved(twin: System, G: Tensor) -> Solution:
    """The solution, as far as it comes."""
    try:
        return twin.solve(G)
    except NotConverged as error:
        if error.solution is None:
            raise
        return error.solution


def _scored(twin: System, solution: Solution, queries: Examples) -> Any:
    weights = twin.examples.weights / twin.n
    found = scoring.in_chunks(twin, solution.x, twin.penalty_share, factors=weights)
    every = scoring.estimates(twin, solution, twin.penalty_share, factors=weights)
    changes = scoring.Products(joined(found, twin.n).T, every)
    columns = scoring.Columns.of(twin.examples)
    return scoring.scores(twin, solution, changes, -weights, columns, "row removed", queries)


def _whole(solver: Any, tried: Any, solution: Solution, rows: int) -> tuple[Iterated | None, tuple[float, float]]:
    """What an iteration will need, and how many times as much as was tried the whole takes."""
    if isinstance(solver, LiSSA):
        repeats = solver.repeats / tried.repeats
        return None, (repeats * solver.depth / tried.depth, repeats)
    if not isinstance(solver, CG):
        return None, (1.0, 1.0)
    made = max(1, solution.sweeps)
    if solution.converged:
        return Iterated(made, made, rows), (1.0, 1.0)
    left = max(1.0, float(solution.residual.max()) / solver.rtol)
    needed = min(solver.max_sweeps, forecast(made, 1 / solver.rtol, left))
    return Iterated(made, needed, rows), (needed / made, needed / made)
