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
from upweight.errors import checked_count
from upweight.influence import kept, pairs, scoring
from upweight.influence.certificate import Certificate
from upweight.influence.scores import Scores
from upweight.influence.system import PROBE, System
from upweight.model import routes
from upweight.model.objective import Objective
from upweight.model.sweep import joined
from upweight.solvers import Pairwise, Solution

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
        _removed(system, system.objective, block, of_block(store, number * size))
        for number, block in enumerate(queries.blocks(size))
    )


def on_measure(system: System, measure: Callable[[Any, Any], Tensor], Xq: Any, yq: Any, store: Any) -> Scores:
    """On any scalar of a query: `Influence.on_measure`."""
    measured, queries = asked(system, measure, Xq, yq)
    return _removed(system, measured, queries, store)


def in_chunks(
    system: System, measured: Objective, queries: Examples, store: Any
) -> tuple[Iterator[tuple[int, Float[NDArray[np.float64], "c q"]]], Solution | Certificate]:
    """The values of every row, (rows, queries), a chunk of rows after the other, and what they come from.

    Each chunk is computed when it is asked for, or read from the store.
    """
    weights = system.examples.weights / system.n
    pairwise = _pairwise(system, measured, store)
    if pairwise is not None:
        return pairs.in_chunks(system, queries, pairwise, system.solve, weights)
    folder = None if store is None else kept.folder(system, queries, measured.name, store)
    solution = scoring.solutions(system, queries, measured, folder)
    if folder is not None:
        solution = kept.compared(system, folder, solution)
    share = system.penalty_share
    return scoring.in_chunks(system, solution.x, share, store=folder, factors=weights), solution


def block_size(system: System, measured: Objective, store: Any) -> int:
    """How many queries are solved at once."""
    pairwise = _pairwise(system, measured, store)
    return max(1, _BLOCK_NUMBERS // (system.objective.size if pairwise is None else system.n))


def asked(system: System, measure: Callable[[Any, Any], Tensor] | None, Xq: Any, yq: Any) -> tuple[Objective, Examples]:
    """What is measured, the loss where there is no `measure`, and on which queries."""
    if measure is None:
        return system.objective, system.encoded(Xq, yq)
    queries = system.encoder.examples(Xq, yq)
    return routes.probe(system.objective.measuring(measure), queries.batch(queries.spread(PROBE))), queries


def of_block(path: Any, first: int) -> Any:
    """The folder of a block of queries, by its first query; None where nothing is kept."""
    return None if path is None else Path(path) / f"queries-{first:08d}"


def _removed(system: System, measured: Objective, queries: Examples, store: Any) -> Scores:
    size = block_size(system, measured, store)
    if store is None and len(queries) > size:
        return Scores.joined([_removed(system, measured, block, None) for block in queries.blocks(size)])
    found, known = in_chunks(system, measured, queries, store)
    mean = joined(found, system.n).T
    weights = system.examples.weights / system.n
    single = isinstance(known, Certificate)
    every = None if single else scoring.estimates(system, known, system.penalty_share, factors=weights)
    changes = scoring.Products(mean, every)
    columns = scoring.Columns.of(system.examples)
    return scoring.scores(system, known, changes, -weights, columns, "row removed", queries, measured)


def _pairwise(system: System, measured: Objective, store: Any) -> Pairwise | None:
    return pairs.comparing(measured, system.prepared) if store is None else None
