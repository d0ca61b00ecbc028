"""Equation 2: the change of a query's measure if a training row is removed, to first order, for every row.

values[q, i] = (wᵢ/n) ∇f(z_q)ᵀ (C + λI)⁻¹ ∇L(zᵢ)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from torch import Tensor

from upweight.data.examples import Examples
from upweight.errors import checked_count
from upweight.influence import kept, pairs, scoring
from upweight.influence.scores import Scores
from upweight.influence.system import PROBE, System
from upweight.model import routes
from upweight.model.objective import Objective
from upweight.runs import ranks

_BLOCK_NUMBERS = 2**24  # of the queries' gradients at once: 128 MB


def on_loss(system: System, Xq: Any, yq: Any = None, store: Any = None) -> Scores:
    """On the queries' losses: `Influence.on_loss`."""
    return _removed(system, system.objective, system.encoded(Xq, yq), store)


def on_loss_in_blocks(system: System, Xq: Any, yq: Any, size: int, store: Any) -> Iterator[Scores]:
    """The same, `size` queries at a time: `Influence.on_loss_in_blocks`.

    Raises:
        InvalidInput: if size is not a positive whole number.
    """
    checked_count(size, "size", hint="256 queries at a time")
    queries = system.encoded(Xq, yq)
    return (
        _removed(
            system, system.objective, block, None if store is None else Path(store) / f"queries-{number * size:08d}"
        )
        for number, block in enumerate(queries.blocks(size))
    )


def on_measure(system: System, measure: Callable[[Any, Any], Tensor], Xq: Any, yq: Any, store: Any) -> Scores:
    """On any scalar of a query: `Influence.on_measure`."""
    queries = system.encoder.examples(Xq, yq)
    objective = routes.probe(system.objective.measuring(measure), queries.batch(queries.spread(PROBE)))
    return _removed(system, objective, queries, store)


def _removed(system: System, measured: Objective, queries: Examples, store: Any) -> Scores:
    asked = {"queries": queries.fingerprint, "measure": lambda: measured.name}
    ranks.refuse_others("comparing the queries of all ranks", lambda: {name: of() for name, of in asked.items()})
    pairwise = pairs.comparing(measured, system.prepared) if store is None else None
    size = max(1, _BLOCK_NUMBERS // (system.objective.size if pairwise is None else system.n))
    if store is None and len(queries) > size:
        return Scores.joined([_removed(system, measured, block, None) for block in queries.blocks(size)])
    weights = system.examples.weights / system.n
    columns = scoring.Columns.of(system.examples)
    if pairwise is not None:
        changes, known = pairs.products(system, queries, pairwise, system.solve)
        return scoring.scores(system, known, changes.scaled(weights), -weights, columns, "row removed", queries)
    folder = None if store is None else kept.folder(system, queries, measured.name, store)
    solution = scoring.solutions(system, queries, measured, folder)
    if folder is not None:
        solution = kept.compared(system, folder, solution)
    changes = scoring.with_rows(system, solution, system.penalty_share, store=folder).scaled(weights)
    return scoring.scores(system, solution, changes, -weights, columns, "row removed", queries, measured)
