"""The scores of the same queries at many dampings, from one factorisation.

A large λ trusts the gradients alone, a small one the curvature in its flattest directions, which the data hardly
determine. Where the values hardly change from one λ to the next, the choice does not matter.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from upweight.data import markup
from upweight.data.examples import Examples
from upweight.errors import InvalidInput, require
from upweight.influence import defaults, scoring
from upweight.influence.scores import Scores, naming
from upweight.influence.scoring import Products
from upweight.influence.system import System, solved
from upweight.model import per_row
from upweight.operators import DenseOperator
from upweight.solvers import CG, Cholesky, Factored, Movable, Prepared, Solution
from upweight.solvers.base import checked_damping

if TYPE_CHECKING:
    import pandas as pd


_NUMBERS = 2**24  # of the queries' gradients in a block
_HELD = 2**26  # of the solutions in one sweep: 512 MB, for a sweep over the rows costs more than its memory
_KEPT = 2  # dampings whose solutions the next one starts from
_TELLS_APART = 1e-10  # share of a solution that those of other dampings and queries do not span


@dataclass(frozen=True)
class DampingPath:
    """Removal scores (equation 2) at m dampings, ascending.

    Args:
        dampings: (m,) the λ of (C + λI).
        every: the Scores at each of them, with its certificate.
    """

    dampings: Float[NDArray[np.float64], " m"]
    every: tuple[Scores, ...] = field(repr=False)

    @property
    def values(self) -> Float[NDArray[np.float64], "m q n"]:
        """The values at every damping; a copy of 8·m·q·n bytes."""
        return np.stack([scores.values for scores in self.every])

    @property
    def residuals(self) -> Float[NDArray[np.float64], "m q"]:
        """The relative residuals of the systems."""
        return np.stack([scores.certificate.residual for scores in self.every])

    @property
    def preconditioner_gaps(self) -> Float[NDArray[np.float64], "m q"] | None:
        """How far the preconditioner alone was from each answer, as a fraction; None if no curvature preconditioned."""
        gaps = [scores.certificate.preconditioner_gap for scores in self.every]
        known = [gap for gap in gaps if gap is not None]
        return np.stack(known) if len(known) == len(gaps) else None

    @property
    def correlation_with_next(self) -> Float[NDArray[np.float64], " m"]:
        """Pearson's r of a query's values with those at the next damping, mean over the queries; NaN for the last."""
        pairs = zip(self.every, self.every[1:], strict=False)
        return np.array([_correlation(one.values, other.values) for one, other in pairs] + [np.nan])

    def scores(self, damping: float) -> Scores:
        """The scores at one of the dampings.

        Raises:
            InvalidInput: if it is none of them.
        """
        near = np.flatnonzero(np.isclose(self.dampings, damping, rtol=1e-9, atol=0.0))
        if not near.size:
            known = ", ".join(f"{value:.6g}" for value in self.dampings)
            message = f"damping={damping!r} is not on this path; its dampings are {known}. Take one of path.dampings."
            raise InvalidInput(message)
        return self.every[int(near[0])]

    def to_pandas(self) -> pd.DataFrame:
        """One line per damping: worst residual, worst preconditioner_gap, products with C, root mean square of the
        values, and their correlation with those at the next damping.
        """
        pandas = require("pandas", "pandas")
        return pandas.DataFrame(self._columns(), index=pandas.Index(self.dampings, name="damping"))

    def _repr_html_(self) -> str:
        columns = self._columns()
        lines = [
            [f"{damping:.3g}", *(f"{values[number]:.3g}" for values in columns.values())]
            for number, damping in enumerate(self.dampings)
        ]
        return markup.frame(markup.table("Values along a path of dampings", ["damping", *columns], lines))

    def __repr__(self) -> str:
        columns = self._columns()
        queries, rows = self.every[0].values.shape
        head = f"DampingPath({len(self.dampings)} dampings × {queries} queries × {rows} rows)"
        lines = [f"{'damping':>10} " + " ".join(f"{name:>21}" for name in columns)]
        for number, damping in enumerate(self.dampings):
            cells = " ".join(f"{values[number]:>21.3g}" for values in columns.values())
            lines.append(f"{damping:>10.3g} {cells}")
        return "\n".join([head, *lines])

    def _columns(self) -> dict[str, NDArray[Any]]:
        gaps = self.preconditioner_gaps
        return {
            "residual": self.residuals.max(1),
            "preconditioner_gap": np.full(len(self.dampings), np.nan) if gaps is None else gaps.max(1),
            "products": np.array([scores.certificate.sweeps for scores in self.every]),
            "rms_value": np.array(
                [np.sqrt(np.mean(scores.values[_known(scores.values)] ** 2)) for scores in self.every]
            ),
            "correlation_with_next": self.correlation_with_next,
        }


def path_of(system: System, Xq: Any, yq: Any, dampings: Iterable[float] | None) -> DampingPath:
    """The path of the queries' losses: `Influence.damping_path`."""
    queries = system.encoded(Xq, yq)
    named = defaults.dampings(system.operator).tolist() if dampings is None else list(dampings)
    numbers = sorted({checked_damping(damping) for damping in named})
    if not numbers:
        message = "dampings is empty. Pass some λ > 0, such as numpy.geomspace(1e-4, 1, 9), or None."
        raise InvalidInput(message)
    size = max(1, _NUMBERS // system.objective.size)

    def blocks_of_scores() -> list[list[Scores]]:
        prepared = _Family(system)
        return [_block(system, block, numbers, prepared) for block in queries.blocks(size)]

    blocks = system.ask(blocks_of_scores)
    return DampingPath(np.array(numbers), tuple(Scores.joined(parts) for parts in zip(*blocks, strict=True)))


class _Family:
    """(C + λI)⁻¹ for one λ after the other; what does not depend on λ is computed once."""

    def __init__(self, system: System) -> None:
        operator = system.operator
        self._direct = direct = isinstance(system.solver, Cholesky)
        self._system = system
        self.operator = DenseOperator(operator.matrix(), operator.project) if direct else operator
        self.solver = Factored() if direct else system.solver
        self._last: Prepared | None = None

    def at(self, damping: float) -> Prepared:
        """The solver at λ; at 0 a factorisation of its own, which knows what no row sees."""
        if self._direct and damping == 0:
            return Cholesky().prepare(self._system.operator)
        last = self._last
        self._last = last.at(damping) if isinstance(last, Movable) else self.solver.prepare(self.operator, damping)
        return self._last


def _block(system: System, queries: Examples, dampings: list[float], family: _Family) -> list[Scores]:
    """The scores of some queries at every damping, from the largest, whose systems are easiest, to the smallest."""
    V = per_row.gradients(system.sweep.over(system.objective, queries))
    measured = per_row.measures(system.sweep.over(system.objective, queries))
    weights = system.examples.weights / system.n
    found: list[Scores] = []
    for damping, solution, changes in _products(system, _solutions(system, family, V, dampings[::-1])):
        known = scoring.certificate(system, solution)
        known = replace(known, damping=damping, solver=repr(family.solver))
        scaled = changes.scaled(weights)
        found.append(
            Scores(
                scaled.mean,
                "row removed",
                np.arange(system.n),
                system.n,
                known,
                -weights,
                system.objective.measure,
                measured,
                scaled.standard_error(),
                **naming(system.examples.names, queries.names),
            )
        )
    return found[::-1]


def _solutions(system: System, family: _Family, V: Tensor, dampings: list[float]) -> Iterator[tuple[float, Solution]]:
    """The solution at each damping; an iteration starts from the best in the span of those before it."""
    before: list[tuple[Tensor, Tensor]] = []  # solutions, and C times them
    warm = isinstance(family.solver, CG)
    for damping in dampings:
        prepared = family.at(damping)
        solve = _from(before, damping) if warm and before else None
        solution = solved(prepared, V, repr(family.solver), state=None if solve is None else {"x": solve(V)})
        system.undetermined_by(getattr(prepared, "flat", None)).announce(solution, refuse=False)
        if warm:
            before = [*before, (solution.x, family.operator.project(V) - damping * solution.x)][-_KEPT:]
        yield damping, solution


def _from(before: list[tuple[Tensor, Tensor]], damping: float) -> Callable[[Tensor], Tensor]:
    """v → the x in the span of earlier solutions whose error is smallest in the norm of C + λI (Galerkin)."""
    X, image = torch.cat([x for x, _ in before]), torch.cat([c for _, c in before])
    size = X.norm(dim=1, keepdim=True).clamp(min=1e-300)
    X, image = X / size, image / size  # C x is known from the system that x solved
    values, U = torch.linalg.eigh(X @ X.T)
    kept = values > _TELLS_APART * values[-1]
    whiten = (U[:, kept] / values[kept].sqrt()).T
    basis, curved = whiten @ X, whiten @ image
    G = basis @ curved.T
    G = (G + G.T) / 2 + damping * torch.eye(len(basis), dtype=G.dtype)
    return lambda V: torch.linalg.lstsq(G, basis @ V.T).solution.T @ basis


def _products(
    system: System, solutions: Iterator[tuple[float, Solution]]
) -> Iterator[tuple[float, Solution, Products]]:
    """S · ∇L(zᵢ) for every row; the solutions of as many dampings as fit in memory share a sweep."""
    waiting: list[tuple[float, Solution]] = []

    def flush() -> Iterator[tuple[float, Solution, Products]]:
        x = torch.cat([solution.x for _, solution in waiting])
        whole = scoring.with_rows(system, Solution(x, x.new_zeros(len(x)), True), system.penalty_share)
        parts = np.split(whole.mean, len(waiting))
        yield from ((*one, Products(part)) for one, part in zip(waiting, parts, strict=True))
        waiting.clear()

    for damping, solution in solutions:
        if solution.replicas is not None:
            yield damping, solution, scoring.with_rows(system, solution, system.penalty_share)
            continue
        waiting.append((damping, solution))
        if (len(waiting) + 1) * solution.x.numel() > _HELD:
            yield from flush()
    if waiting:
        yield from flush()


def _known(values: NDArray[np.float64]) -> NDArray[np.bool_]:
    """(q,) queries that the data determine at this damping; all of them if there are none, whose mean is then NaN."""
    known = np.logical_not(np.isnan(values).any(axis=1))
    return known if known.any() else np.ones(len(values), dtype=bool)


def _correlation(A: NDArray[np.float64], B: NDArray[np.float64]) -> float:
    """Pearson's r of two queries' values, mean over the queries."""
    both = _known(A) & _known(B)
    A, B = A[both], B[both]
    A, B = A - A.mean(1, keepdims=True), B - B.mean(1, keepdims=True)
    size = np.sqrt((A**2).sum(1) * (B**2).sum(1))
    return float(np.mean((A * B).sum(1) / np.where(size > 0, size, 1.0)))
