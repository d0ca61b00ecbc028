"""Scores of queries against rows through products of examples with examples, for linear predictors.

∇L = r ⊗ x̃, so that ∇L_qᵀ (C + λI)⁻¹ ∇Lᵢ needs x̃_q and x̃ᵢ only through their inner products with the training rows: a
solver that works through the rows (`Dual`) never writes out the p numbers of a gradient, however long and sparse x is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import scipy.sparse
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from upweight.data.examples import Examples
from upweight.influence import scoring
from upweight.influence.certificate import Certificate
from upweight.influence.system import System
from upweight.model import linear, per_row
from upweight.model.chunks import CHUNK
from upweight.model.objective import Objective
from upweight.solvers import Pairwise, Prepared, Solution

WITNESSES = 32  # systems that are solved in full, to measure the residual of the factorisation


def comparing(objective: Objective, prepared: Prepared) -> Pairwise | None:
    """The solver, if it can compare examples of this objective and loses no digits by it."""
    able = isinstance(prepared, Pairwise) and objective.linear is not None and prepared.accurate
    return prepared if isinstance(prepared, Pairwise) and able else None


def in_chunks(
    system: System,
    queries: Examples,
    prepared: Pairwise,
    solve: Callable[[Tensor], Solution],
    factors: Float[NDArray[np.float64], " n"],
) -> tuple[Iterator[tuple[int, Float[NDArray[np.float64], "c q"]]], Certificate]:
    """factorᵢ S_q · (∇Lᵢ + share) for every query and training row, a chunk of rows at a time, and its certificate.

    The residual is measured on 32 of the queries and given for all.  Cost: (nK)² flops per query and per block of rows.
    """
    objective, sweep = system.objective, system.sweep
    witnesses = queries.subset(queries.spread(WITNESSES))
    solution = solve(per_row.gradients(sweep.over(objective, witnesses)))
    whole = queries.batch(slice(None))
    compare = prepared.against(*features(objective, whole))
    across = solve(torch.stack([system.risk_gradient, system.penalty_share])).x
    drift, shift = linear.dots(objective, whole, across).T

    def emitted(batch: Any, _: Tensor) -> Tensor:
        return compare(*features(objective, batch)) + shift

    def scaled() -> Iterator[tuple[int, NDArray[np.float64]]]:
        for number, products in found:
            start = number * CHUNK
            yield number, products * factors[start : start + len(products), None]

    found = sweep.chunks(emitted, vectors=1 + len(queries) // 8, label="scores")
    known = scoring.certificate(system, solution)
    residual = np.full(len(queries), float(solution.residual.max()))
    return scaled(), replace(known, residual=residual, drift=-drift.numpy())


def features(objective: Any, batch: Any) -> tuple[Any, Tensor]:
    """x in float64 and r = ∂ℓ/∂η of every example."""
    X = batch[0].astype("float64", copy=False) if scipy.sparse.issparse(batch[0]) else batch[0].double()
    return X, linear.slopes(objective, batch)
