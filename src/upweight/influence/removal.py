"""Equation 2: the change of a query's measure if a training row is removed, to first order, for every row.

values[q, i] = (wᵢ/n) ∇f(z_q)ᵀ (C + λI)⁻¹ ∇L(zᵢ)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from upweight.data.examples import Examples
from upweight.errors import InvalidInput, checked_count
from upweight.influence import kept, pairs, scoring
from upweight.influence.certificate import Certificate
from upweight.influence.scores import Scores
from upweight.influence.system import PROBE, System
from upweight.model import routes
from upweight.model.chunks import joined
from upweight.model.objective import Objective
from upweight.runs.machine import in_bytes
from upweight.runs.store import Store
from upweight.solvers import Dual, Solution

_BLOCK_BYTES = 2**27  # of the queries' gradients at once
_SCORE_BYTES = 8  # of every score


def on_loss(system: System, Xq: Any, yq: Any = None, store: Any = None) -> Scores:
    """On the queries' losses: `Influence.on_loss`."""
    return _fitting(system, system.objective, system.encoded(Xq, yq), store)


def on_loss_in_blocks(system: System, Xq: Any, yq: Any, size: int, store: Any) -> Iterator[Scores]:
    """The same, `size` queries at a time: `Influence.on_loss_in_blocks`.

    Raises:
        InvalidInput: if size is not a positive whole number.
    """
    checked_count(size, "size", hint="256 queries at a time")
    queries = system.encoded(Xq, yq)
    return (
        _fitting(system, system.objective, part, of_block(store, number * size))
        for number, part in enumerate(queries.blocks(size))
    )


def on_measure(system: System, measure: Callable[[Any, Any], Tensor], Xq: Any, yq: Any, store: Any) -> Scores:
    """On any scalar of a query: `Influence.on_measure`."""
    measured, queries = asked(system, measure, Xq, yq)
    return _fitting(system, measured, queries, store)


def in_chunks(
    system: System, measured: Objective, queries: Examples, folder: Store | None
) -> tuple[Iterator[tuple[int, Float[NDArray[np.float64], "c q"]]], Solution | Certificate]:
    """The values of every row, (rows, queries), a chunk of rows after the other, and what they come from.

    Each chunk is computed when it is asked for, and kept in the folder, or read from there.
    """
    pairwise = pairs.comparing(measured, system.prepared) if folder is None else None
    if pairwise is not None:
        return pairs.in_chunks(system, queries, pairwise, system.solve, _shares(system))
    solution = solved(system, measured, queries, folder)
    return of_rows(system, solution, folder), solution


def solved(system: System, measured: Objective, queries: Examples, folder: Store | None) -> Solution:
    """The systems' solutions; those in the folder, if they are there."""
    if folder is None:
        return scoring.solutions(system, queries, measured)
    kept.compare_losses(system, folder)  # before any sum that was kept is taken up
    system.prepare_in(folder)
    return kept.compared(system, folder, scoring.solutions(system, queries, measured, folder))


def solutions(system: System, queries: Examples, store: Any) -> Solution:
    """Those that `on_loss` of the same queries needs, by way of its folder where one is named."""
    if store is None:
        return scoring.solutions(system, queries)
    if system.objective.linear is not None:  # as on_loss does, whose folder it is
        system = system.for_many(len(queries))
    kept.refuse_other_queries(queries, system.objective.name)
    with kept.opened(system, queries, system.objective.name, store, values=False) as folder:
        return solved(system, system.objective, queries, folder)


def of_rows(
    system: System, solution: Solution, store: Store | None, begun: int = 0
) -> Iterator[tuple[int, Float[NDArray[np.float64], "c q"]]]:
    """The values of every row but those of the first chunks; what a store has is read, the others are kept there."""
    share = system.penalty_share
    return scoring.in_chunks(system, solution.x, share, store=store, factors=_shares(system), begun=begun)


def _shares(system: System) -> Float[NDArray[np.float64], " n"]:
    """wᵢ/n of every row, one number where all are equal."""
    weights = system.examples.weights
    if (weights == weights[0]).all():
        return np.broadcast_to(weights[0] / system.n, weights.shape)
    return weights / system.n


def block(system: System, queries: int) -> int:
    """How many of the queries are solved and scored at once."""
    numbers = system.n if isinstance(system.solver, Dual) else system.objective.size
    return min(queries, max(1, system.sweep.at_most(_BLOCK_BYTES, 16) // (8 * numbers)))


def asked(system: System, measure: Callable[[Any, Any], Tensor] | None, Xq: Any, yq: Any) -> tuple[Objective, Examples]:
    """What is measured, the loss where there is no `measure`, and on which queries."""
    if measure is None:
        return system.objective, system.encoded(Xq, yq)
    queries = system.encoder.examples(Xq, yq)
    return routes.probe(system.objective.measuring(measure), queries.batch(queries.spread(PROBE))), queries


def of_block(path: Any, first: int) -> Any:
    """The folder of a block of queries, by its first query; None where nothing is kept."""
    return None if path is None else Path(path) / f"queries-{first:08d}"


def _fitting(system: System, measured: Objective, queries: Examples, store: Any) -> Scores:
    """The scores, if the budget holds them.

    Raises:
        InvalidInput: if it does not.
    """
    budget, each = system.sweep.budget, _SCORE_BYTES * system.n
    if budget is not None and each * len(queries) > budget // 2:
        message = (
            f"{len(queries):,} queries on {system.n:,} rows are scores of {in_bytes(each * len(queries))} "
            f"({_SCORE_BYTES} bytes each), and may take half of memory_budget="
            f"{in_bytes(budget)!r}. Ask for some queries at a time: on_loss_in_blocks(Xq, yq, "
            f"size={max(1, budget // 2 // each)}), or name a larger budget."
        )
        raise InvalidInput(message)
    kept.refuse_other_queries(queries, measured.name)
    return _removed(system, measured, queries, store)


def _removed(system: System, measured: Objective, queries: Examples, store: Any) -> Scores:
    if system.objective.linear is not None:  # a network's products are shared by many queries
        system = system.for_many(len(queries))
    size = block(system, len(queries))
    if store is None and len(queries) > size:
        return Scores.joined([_removed(system, measured, part, None) for part in queries.blocks(size)])
    weights = system.examples.weights / system.n
    with kept.opened(system, queries, measured.name, store) as folder:
        found, known = in_chunks(system, measured, queries, folder)
        mean = joined(found, system.n).T
        single = isinstance(known, Certificate)
        every = None if single else scoring.estimates(system, known, system.penalty_share, factors=weights)
        changes = scoring.Products(mean, every)
        columns = scoring.Columns.of(system.examples)
        scores = scoring.scores(system, known, changes, -weights, columns, "row removed", queries, measured)
        if folder is not None:
            kept.finish(folder, scores)
    return scores
