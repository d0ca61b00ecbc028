"""Rows that become others, or are new: equation 3 on queries, and the same with a new label or a new row.

values[q, i] = −S_q · (w_new ∇L(z_new) − wᵢ ∇L(zᵢ))/n        S_q = (C + λI)⁻¹ ∇L(z_q)
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from upweight.data.examples import Examples
from upweight.errors import InvalidInput
from upweight.influence import removal, scoring
from upweight.influence.scores import Scores
from upweight.influence.system import System
from upweight.model import per_row


def of_replacing(system: System, rows: Any, X_new: Any, y_new: Any, on: Any, store: Any = None) -> Scores:
    """Each row becomes a new example: `Influence.of_replacing`."""
    rows = system.examples.rows(rows)
    return _becoming(system, rows, new_examples(system, rows, X_new, y_new), "row replaced", on, store)


def of_relabeling(system: System, rows: Any, y_new: Any, on: Any, store: Any = None) -> Scores:
    """Each row gets another label: `Influence.of_relabeling`."""
    rows = system.examples.rows(rows)
    relabelled = system.examples.relabelled(rows, system.encoder.targets(y_new))
    return _becoming(system, rows, relabelled, "row relabelled", on, store)


def of_adding(system: System, X_new: Any, y_new: Any, on: Any, store: Any = None) -> Scores:
    """New examples join the training set: `Influence.of_adding`."""
    system.encoder.check_new(X_new)
    new = system.encoded(X_new, y_new)
    queries = system.queries(on)
    solution = removal.solutions(system, queries, store)
    scale = system.class_weights(new) * new.sample_weight / system.n
    G = per_row.gradients(system.sweep.over(system.objective, new)) + system.penalty_share
    changes = scoring.with_gradients(solution, system.undetermined.determined(G)).scaled(-scale)
    return scoring.scores(system, solution, changes, scale, scoring.Columns.of(new), "example added", queries)


def new_examples(system: System, rows: NDArray[np.int64], X: Any, y: Any) -> Examples:
    """X and y as one new example for each row.

    Raises:
        InvalidInput: if their number is another.
    """
    system.encoder.check_new(X)
    new = system.encoded(X, y)
    if len(new) != len(rows):
        message = f"{len(rows)} rows are to be replaced by {len(new)} new examples. Pass one new example for each row."
        raise InvalidInput(message)
    return new


def _becoming(
    system: System, rows: NDArray[np.int64], new: Examples, counterfactual: str, on: Any, store: Any
) -> Scores:
    queries = system.queries(on)
    solution = removal.solutions(system, queries, store)
    difference = system.undetermined.determined(_difference(system, rows, new))
    changes = scoring.with_gradients(solution, difference / -system.n)
    scale = system.examples.weights[rows] / system.n
    columns = scoring.Columns.of(system.examples, rows)
    return scoring.scores(system, solution, changes, scale, columns, counterfactual, queries)


def _difference(system: System, rows: NDArray[np.int64], new: Examples) -> Float[Tensor, "r p"]:
    """w_new ∇L(z_new) − wᵢ ∇L(zᵢ) for each row: how n·∇R changes when it is replaced.

    A new label brings the weight of its own class; with a folded penalty the row's share of ∇r follows its weight.
    """
    examples = system.examples
    old_weights = examples.weights[rows]
    new_weights = examples.sample_weight[rows] * system.class_weights(new)
    difference = per_row.gradients(system.sweep.over(system.objective, new)) * torch.from_numpy(new_weights)[:, None]
    difference -= per_row.gradients(system.sweep, rows) * torch.from_numpy(old_weights)[:, None]
    return difference + torch.from_numpy(new_weights - old_weights)[:, None] * system.penalty_share
