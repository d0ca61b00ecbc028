"""From gradients to solutions to Scores: the steps that all questions share.

    gradients of queries  →  S = (C + λI)⁻¹ ∇f  →  products S · ∇L(zᵢ)  →  values, their standard error, the certificate

A stochastic solver gives several independent S; every product is then formed for each of them, and their spread is the
standard error. `Products` holds both.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from upweight.data.examples import Examples
from upweight.data.ids import Ids
from upweight.influence.certificate import Certificate
from upweight.influence.scores import Scores, naming
from upweight.influence.system import System
from upweight.model import layers, per_row
from upweight.model.chunks import CHUNK, joined
from upweight.model.objective import Objective
from upweight.model.sweep import Sweep
from upweight.operators.linear import LinearHessian
from upweight.runs import ranks
from upweight.runs.store import Store
from upweight.runs.sums import Sums
from upweight.solvers import Solution


@dataclass(frozen=True)
class Products:
    """S · g for every query and row: their `mean`, and one layer per independent estimate of S, if there are any."""

    mean: Float[NDArray[np.float64], "q r"]
    replicas: Float[NDArray[np.float64], "m q r"] | None = None

    def grouped(self, columns: list[NDArray[np.int64]]) -> Products:
        """The sums over groups of columns."""

        def add(array: NDArray[np.float64]) -> NDArray[np.float64]:
            return np.stack([array[..., group].sum(-1) for group in columns], -1)

        return Products(add(self.mean), None if self.replicas is None else add(self.replicas))

    def scaled(self, factors: Float[NDArray[np.float64], " r"]) -> Products:
        """Every column times its factor."""
        return Products(self.mean * factors, None if self.replicas is None else self.replicas * factors)

    def standard_error(self) -> Float[NDArray[np.float64], "q r"] | None:
        """Standard deviation of the estimates over √m, or None when there are no independent estimates."""
        if self.replicas is None or len(self.replicas) < 2:
            return None
        return self.replicas.std(0, ddof=1) / np.sqrt(len(self.replicas))


@dataclass(frozen=True)
class Columns:
    """What the columns of scores stand for: rows, or numbers of groups or new examples, and their names."""

    rows: NDArray[np.int64]
    names: Ids | None

    @classmethod
    def of(cls, examples: Examples, rows: NDArray[np.int64] | None = None) -> Columns:
        """These examples; None means all."""
        rows = np.arange(len(examples)) if rows is None else rows
        return cls(rows, None if examples.names is None else examples.names.take(rows))


def solutions(
    system: System, queries: Examples, measured: Objective | None = None, store: Store | None = None
) -> Solution:
    """S = (C + λI)⁻¹ ∇f of every query; f is the loss, or what another objective measures.

    With a store an iteration keeps its state there, and goes on from the one that it finds.
    """
    G = per_row.gradients(system.sweep.over(measured or system.objective, queries))
    found = system.solve(G) if store is None else system.solve_in(store, G)
    return replace(found, x=ranks.same("the solutions", found.x))


def with_rows(
    system: System, solution: Solution, constant: Float[Tensor, " p"], *, rows: NDArray[np.int64] | None = None
) -> Products:
    """S · (∇L(zᵢ) + constant) for training rows, and for every independent estimate of S; see `in_chunks`."""
    mean = joined(in_chunks(system, solution.x, constant, rows=rows), system.n if rows is None else len(rows)).T
    return Products(mean, estimates(system, solution, constant, rows=rows))


def estimates(
    system: System,
    solution: Solution,
    constant: Float[Tensor, " p"],
    *,
    rows: NDArray[np.int64] | None = None,
    factors: Float[NDArray[np.float64], " r"] | None = None,
) -> Float[NDArray[np.float64], "m q r"] | None:
    """The same of the m independent estimates of S alone; None where there are none."""
    if solution.replicas is None:
        return None
    m, q, p = solution.replicas.shape
    found = in_chunks(system, solution.replicas.reshape(m * q, p), constant, rows=rows, factors=factors)
    return joined(found, system.n if rows is None else len(rows)).T.reshape(m, q, -1)


def in_chunks(
    system: System,
    S: Float[Tensor, "q p"],
    constant: Float[Tensor, " p"],
    *,
    rows: NDArray[np.int64] | None = None,
    store: Store | None = None,
    factors: Float[NDArray[np.float64], " r"] | None = None,
    begun: int = 0,
) -> Iterator[tuple[int, Float[NDArray[np.float64], "c q"]]]:
    """S · (∇L(zᵢ) + constant) for training rows, by one sweep that never forms their gradients: chunk after chunk.

    Args:
        system: whose training rows they are.
        S: solutions; that of a query without one is NaN, and so are its products.
        constant: the rows' share of the penalty's gradient.
        rows: which rows; None means all.
        store: finished chunks are kept there, without their factors.
        factors: what each row's products are multiplied by; None for nothing.
        begun: chunks that are left out, the first ones.
    """
    every = closed(system) is None and rows is None and store is None and not begun  # so that ∇R comes with them
    wanted = every and layers.structured(system.objective) and not system.knows_risk_gradient
    leaning = S.isnan().any(1)
    S, sums = torch.where(leaning[:, None], 0.0, S) if bool(leaning.any()) else S, Sums() if wanted else None
    if wanted:
        sweep, products = system.sweep, _with_gradients_summed(system.objective, S, constant)
    else:
        sweep, products = by_rows(system, S, constant)
    how: dict[str, Any] = {"rows": rows, "store": store, "sums": sums, "begun": begun}
    found = sweep.chunks(products, vectors=vectors(system, S), label="scores", **how)
    for number, own in found:
        start = number * CHUNK
        values = own if factors is None else own * factors[start : start + len(own), None]
        yield number, np.where(leaning.numpy(), np.nan, values) if bool(leaning.any()) else values
    if sums is not None:
        system.learn_risk_gradient(sums.total())


def by_rows(
    system: System, S: Float[Tensor, "k p"], constant: Float[Tensor, " p"]
) -> tuple[Sweep, Callable[[Any, Tensor], Tensor]]:
    """A sweep, and what gives S · (∇L(zᵢ) + constant) for every row of its batches.

    It goes through layers where there are any, and through the rows' slopes for a linear predictor, which has them.
    """
    shift, known = S @ constant, closed(system)
    if known is not None:
        sweep, dots = known.dots(S)
        return sweep, lambda batch, weights: _shifted(dots(batch, weights), shift)
    objective, V = system.objective, layers.in_order(system.objective, S)
    return system.sweep, lambda batch, _: _shifted(layers.dots(objective, batch, V), shift)


def _shifted(products: Tensor, shift: Tensor) -> Tensor:
    """Products and what all rows share, in float64, where the products are."""
    return products.double() + shift.to(products.device)


def vectors(system: System, S: Float[Tensor, "k p"]) -> int:
    """How many vectors such products are worth, for the batch size."""
    return layers.vectors(system.objective, system.sweep.example_bytes, len(S))


def _with_gradients_summed(
    objective: Objective, S: Float[Tensor, "k p"], constant: Float[Tensor, " p"]
) -> Callable[[Any, Tensor], tuple[Tensor, Tensor]]:
    """What gives the same products of a batch, and Σᵢ wᵢ∇Lᵢ over it, for an objective with layers."""
    shift, V = S @ constant, layers.in_order(objective, S)

    def both(batch: Any, weights: Tensor) -> tuple[Tensor, Tensor]:
        products, gradient = layers.dots_and_sum(objective, batch, weights, V)
        return _shifted(products, shift), gradient

    return both


def closed(system: System) -> LinearHessian | None:
    """The operator of a linear predictor; others are not bound to their data for it."""
    operator = None if system.objective.linear is None else system.operator
    return operator if isinstance(operator, LinearHessian) else None


def with_gradients(solution: Solution, G: Float[Tensor, "r p"]) -> Products:
    """S · g for gradients that are at hand."""
    replicas = None if solution.replicas is None else (solution.replicas @ G.T).numpy()
    return Products((solution.x @ G.T).numpy(), replicas)


def _array(found: Tensor | None) -> NDArray[np.float64] | None:
    return None if found is None else found.numpy()


def certificate(system: System, solution: Solution) -> Certificate:
    """What is known about how far a solution can be trusted."""
    return Certificate(
        residual=solution.residual.numpy(),
        converged=solution.converged,
        damping=system.damping,
        gradient_norm=float(system.risk_gradient.norm()),
        min_curvature=solution.min_curvature,
        coverage=system.objective.coverage,
        drift=-(solution.x @ system.risk_gradient).numpy(),
        curvature=repr(system.curvature) + getattr(system.operator, "note", ""),
        solver=repr(system.solver),
        sweeps=solution.sweeps,
        truncation=solution.truncation,
        settled=_array(solution.settled),
        settled_bound=_array(solution.settled_bound),
        error_bound=_array(solution.error_bound),
        preconditioner_gap=_array(solution.preconditioner_gap),
    )


def scores(
    system: System,
    solution: Solution | Certificate,
    changes: Products,
    scale: NDArray[np.float64],
    columns: Columns,
    counterfactual: str,
    queries: Examples,
    measured: Objective | None = None,
) -> Scores:
    """Scores of predicted changes, with the certificate of the solution they come from and the queries' values now."""
    measured = measured or system.objective
    return Scores(
        changes.mean,
        counterfactual,
        columns.rows,
        system.n,
        solution if isinstance(solution, Certificate) else certificate(system, solution),
        scale,
        system.objective.measure if measured is system.objective else measured.name,
        per_row.measures(system.sweep.over(measured, queries)),
        changes.standard_error(),
        **naming(columns.names, queries.names),
    )
