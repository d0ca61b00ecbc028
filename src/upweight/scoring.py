"""From gradients to solutions to Scores: the steps that all questions share.

    gradients of queries  →  S = (C + λI)⁻¹ ∇f  →  products S · ∇L(zᵢ)  →  values, their standard error, the certificate

A stochastic solver gives several independent S; every product is then formed for each of them, and their spread is the
standard error. `Products` holds both.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from upweight import calculus, layers
from upweight.errors import NotConverged, TheoryWarning
from upweight.examples import Examples
from upweight.operators.linear import LinearHessian
from upweight.scores import Certificate
from upweight.solvers import Prepared, Solution
from upweight.store import Store
from upweight.sweep import Sweep

if TYPE_CHECKING:
    from upweight.influence import Influence


_SAMPLED_ROWS = 256


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


def gradients(sweep: Sweep, rows: NDArray[np.int64] | None = None) -> Float[Tensor, "k p"]:
    """∇L of examples, or ∇f of queries; without penalty."""
    one = sweep.objective
    values = sweep.emit(
        lambda batch, _: layers.gradients(one, batch), vectors=width(sweep), rows=rows, label="gradients"
    )
    return torch.from_numpy(values)


def measures(sweep: Sweep) -> Float[NDArray[np.float64], " q"]:
    """The measure of every query now; of a smooth stand-in the loss that it stands for."""
    reported = sweep.objective.reporting()
    return sweep.emit(lambda batch, _: calculus.losses(reported, batch), label="query measures")


def solved(
    prepared: Prepared, V: Float[Tensor, "k p"], solver: str, *, state: Mapping[str, Tensor] | None = None
) -> Solution:
    """The solutions of a prepared solver, if they are what it promised; `solver` names it in messages.

    Raises:
        NotConverged: if a residual that was promised is not reached.
    """
    solution = prepared.solve(V, state=state)
    if not solution.converged and solution.replicas is None:
        message = (
            f"{solver} left a relative residual of {float(solution.residual.max()):.2g}: C + λI is too badly "
            f"conditioned for float64 (smallest curvature {solution.min_curvature:.2g}). Try a larger damping, or "
            "drop collinear features."
        )
        raise NotConverged(message, solution)
    if not solution.converged:
        message = (
            f"{solver} has not settled (residual {float(solution.residual.max()):.2g}): its values may carry "
            "a bias that their standard errors do not contain. Raise depth, or use CG() for exact answers."
        )
        warnings.warn(message, TheoryWarning, stacklevel=5)
    return solution


def with_rows(
    influence: Influence,
    solution: Solution,
    constant: Float[Tensor, " p"],
    *,
    rows: NDArray[np.int64] | None = None,
    store: Store | None = None,
) -> Products:
    """S · (∇L(zᵢ) + constant) for training rows, by one sweep that never forms their gradients.

    Args:
        influence: whose training rows they are.
        solution: S, and its independent estimates.
        constant: the rows' share of the penalty's gradient.
        rows: which rows; None means all.
        store: finished chunks of the mean are kept there.
    """
    operator, objective = influence.operator, influence.objective
    known = operator if isinstance(operator, LinearHessian) else None  # it has the rows' slopes already

    def run(S: Tensor, store: Store | None) -> NDArray[np.float64]:
        shift = S @ constant
        sweep, dots = known.dots(S) if known is not None else _layered(influence, S)
        return sweep.emit(
            lambda batch, weights: dots(batch, weights).double().cpu() + shift,
            vectors=len(S) + layers.vectors(objective, sweep.example_bytes),
            rows=rows,
            store=store,
            label="scores",
        ).T

    mean = run(solution.x, store)
    if solution.replicas is None:
        return Products(mean)
    m, q, p = solution.replicas.shape
    return Products(mean, run(solution.replicas.reshape(m * q, p), None).reshape(m, q, -1))


def _layered(influence: Influence, S: Float[Tensor, "k p"]) -> tuple[Sweep, Callable[[Any, Tensor], Tensor]]:
    """A sweep, and what gives ∇Lᵢᵀ s for every row of its batches and vector, through layers where there are any."""
    objective = influence.objective
    V = S.to(objective.reference)  # cast once, not in every batch
    return influence.sweep, lambda batch, _: layers.dots(objective, batch, V)


def with_gradients(solution: Solution, G: Float[Tensor, "r p"]) -> Products:
    """S · g for gradients that are at hand."""
    replicas = None if solution.replicas is None else (solution.replicas @ G.T).numpy()
    return Products((solution.x @ G.T).numpy(), replicas)


def certificate(influence: Influence, solution: Solution) -> Certificate:
    """What is known about how far a solution can be trusted."""
    return Certificate(
        residual=solution.residual.numpy(),
        converged=solution.converged,
        damping=influence.damping,
        gradient_norm=float(influence.risk_gradient.norm()),
        min_curvature=solution.min_curvature,
        coverage=influence.objective.coverage,
        drift=-(solution.x @ influence.risk_gradient).numpy(),
        curvature=repr(influence.curvature) + getattr(influence.operator, "note", ""),
        solver=repr(influence.solver),
        sweeps=solution.sweeps,
        truncation=solution.truncation,
        preconditioner_gap=None if solution.preconditioner_gap is None else solution.preconditioner_gap.numpy(),
    )


def typical_row(sweep: Sweep) -> float:
    """rms(wᵢ‖∇Lᵢ‖/n): how much one row moves ∇R, over rows spread through the data; never 0."""
    rows = sweep.examples.spread(_SAMPLED_ROWS)
    squares = sweep.emit(
        lambda batch, _: layers.squares(sweep.objective, batch), vectors=width(sweep), rows=rows, label="typical row"
    )
    return max(float(np.sqrt(np.mean(squares * sweep.examples.weights[rows] ** 2))) / sweep.n, 1e-300)


def rows_from_minimum(sweep: Sweep, gradient: Float[Tensor, " p"]) -> float:
    """‖∇R‖ in units of one row's effect on it, over rows spread through the data."""
    return float(gradient.norm()) / typical_row(sweep)


def width(sweep: Sweep) -> int:
    """How many vectors' memory a row of p gradients is worth."""
    pieces = layers.vectors(sweep.objective, sweep.example_bytes)
    return 1 + pieces + 16 * sweep.objective.size // sweep.example_bytes


def replacement(influence: Influence, rows: NDArray[np.int64], new: Examples) -> Float[Tensor, "r p"]:
    """w_new ∇L(z_new) − wᵢ ∇L(zᵢ) for each row: how n·∇R changes when it is replaced.

    A new label brings the weight of its own class; with a folded penalty the row's share of ∇r follows its weight.
    """
    examples = influence.examples
    old_weights = examples.weights[rows]
    new_weights = examples.sample_weight[rows] * influence.class_weights(new)
    difference = gradients(influence.sweep.over(influence.objective, new)) * torch.from_numpy(new_weights)[:, None]
    difference -= gradients(influence.sweep, rows) * torch.from_numpy(old_weights)[:, None]
    return difference + torch.from_numpy(new_weights - old_weights)[:, None] * influence.penalty_share
