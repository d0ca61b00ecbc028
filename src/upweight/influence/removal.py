"""Equation 2: the change of a query's measure if a training row is removed, to first order, for every row.

values[q, i] = (wᵢ/n) ∇f(z_q)ᵀ (C + λI)⁻¹ ∇L(zᵢ)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from torch import Tensor

from upweight.data.examples import Examples
from upweight.errors import InvalidInput, checked_count
from upweight.influence import kept, pairs, scoring
from upweight.influence.scores import Scores
from upweight.influence.system import PROBE, System
from upweight.model import routes
from upweight.model.objective import Objective
from upweight.runs.machine import in_bytes
from upweight.runs.store import Store
from upweight.solvers import Dual

_BLOCK_BYTES = 2**27  # of the queries' gradients at once
_SCORE_BYTES = 16  # of every score, while they are multiplied by the rows' weights


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
        _fitting(
            system, system.objective, part, None if store is None else Path(store) / f"queries-{number * size:08d}"
        )
        for number, part in enumerate(queries.blocks(size))
    )


def on_measure(system: System, measure: Callable[[Any, Any], Tensor], Xq: Any, yq: Any, store: Any) -> Scores:
    """On any scalar of a query: `Influence.on_measure`."""
    queries = system.encoder.examples(Xq, yq)
    objective = routes.probe(system.objective.measuring(measure), queries.batch(queries.spread(PROBE)))
    return _fitting(system, objective, queries, store)


def block(system: System, queries: int) -> int:
    """How many of the queries are solved and scored at once."""
    numbers = system.n if isinstance(system.solver, Dual) else system.objective.size
    return min(queries, max(1, system.sweep.at_most(_BLOCK_BYTES, 16) // (8 * numbers)))


def _fitting(system: System, measured: Objective, queries: Examples, store: Any) -> Scores:
    """The scores, if the budget holds them.

    Raises:
        InvalidInput: if it does not.
    """
    budget, each = system.sweep.budget, _SCORE_BYTES * system.n
    if budget is not None and each * len(queries) > budget // 2:
        message = (
            f"{len(queries):,} queries on {system.n:,} rows are scores of {in_bytes(each * len(queries))} "
            f"({_SCORE_BYTES} bytes each while they are made), and may take half of memory_budget="
            f"{in_bytes(budget)!r}. Ask for some queries at a time: on_loss_in_blocks(Xq, yq, "
            f"size={max(1, budget // 2 // each)}), or name a larger budget."
        )
        raise InvalidInput(message)
    return _removed(system, measured, queries, store)


def _removed(system: System, measured: Objective, queries: Examples, store: Any) -> Scores:
    if store is not None:
        return _removed_in(kept.folder(system, queries, measured.name, store), system, measured, queries)
    pairwise = pairs.comparing(measured, system.prepared)
    size = block(system, len(queries))
    if len(queries) > size:
        return Scores.joined([_removed(system, measured, part, None) for part in queries.blocks(size)])
    weights = system.examples.weights / system.n
    columns = scoring.Columns.of(system.examples)
    if pairwise is not None:
        changes, known = pairs.products(system, queries, pairwise, system.solve)
        return scoring.scores(system, known, changes.scaled(weights), -weights, columns, "row removed", queries)
    solution = scoring.solutions(system, queries, measured)
    changes = scoring.with_rows(system, solution, system.penalty_share).scaled(weights)
    return scoring.scores(system, solution, changes, -weights, columns, "row removed", queries, measured)


def _removed_in(folder: Store, system: System, measured: Objective, queries: Examples) -> Scores:
    """The same by way of a store."""
    weights = system.examples.weights / system.n
    with folder:
        system.prepare_in(folder)
        solution = kept.compared(system, folder, scoring.solutions(system, queries, measured, folder))
        changes = scoring.with_rows(system, solution, system.penalty_share, store=folder).scaled(weights)
        columns = scoring.Columns.of(system.examples)
        found = scoring.scores(system, solution, changes, -weights, columns, "row removed", queries, measured)
        kept.finish(folder, found)
        return found
