"""Groups of rows removed together: to first order the sum over members, or the group's own Newton step."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
from numpy.typing import NDArray

from upweight.data.ids import of_keys
from upweight.errors import NotPositiveDefinite, TheoryWarning, UnsupportedModel
from upweight.influence import newton_step, removal, scoring
from upweight.influence.scores import Scores, naming
from upweight.influence.system import System
from upweight.model import per_row
from upweight.operators import GaussNewton, Hessian


def of_groups(system: System, groups: Any, on: Any, store: Any = None) -> Scores:
    """To first order: `Influence.of_groups`."""
    members = system.examples.groups(groups)
    union = np.unique(np.concatenate(members))
    queries = system.queries(on)
    solution = removal.solutions(system, queries, store)
    single = scoring.with_rows(system, solution, system.penalty_share, rows=union)
    changes = single.scaled(system.examples.weights[union] / system.n).grouped(
        [np.searchsorted(union, group) for group in members]
    )
    scale = np.full(len(members), -1 / system.n)
    columns = scoring.Columns(np.arange(len(members)), of_keys(groups))
    return scoring.scores(system, solution, changes, scale, columns, "group removed", queries)


def of_removing(system: System, groups: Any, on: Any) -> Scores:
    """By the removal's own Newton step: `Influence.of_removing`.

    A removal that leaves a fit singular to rounding, or a class without a row, is NaN, with a TheoryWarning, if others
    have a value; so is a query that leans on what no row sees that is left.

    Raises:
        NotPositiveDefinite, Undefined: if no removal has a value.
        UnsupportedModel: if the model has no linear predictor, the curvature is not its Hessian, or the solver is
            stochastic.
    """
    if system.objective.linear is None or not isinstance(system.exact_curvature, Hessian | GaussNewton):
        message = (
            f"of_removing updates the exact Hessian of a linear predictor, and this is {system.objective.name} with "
            f"{system.curvature}. Use on_loss or of_groups (first order), or leave_one_out or subset_retraining to "
            "retrain."
        )
        raise UnsupportedModel(message)
    members = system.examples.groups(groups)
    queries = system.queries(on)
    solution = scoring.solutions(system, queries)
    if solution.replicas is not None:
        refusal = f"of_removing needs exact solutions, and {system.solver} gives estimates. Use Cholesky() or CG()."
        raise UnsupportedModel(refusal)
    step = newton_step.newton_steps(system, members)
    if step.impossible:
        numbers = list(step.impossible)
        warning = (
            f"{len(numbers)} of {len(members)} removals (first: number {numbers[0]}) have no value and are NaN. "
            f"Leave them out, or see to the first: {step.impossible[numbers[0]]}"
        )
        warnings.warn(warning, TheoryWarning, stacklevel=3)
    single = all(len(group) == 1 for group in members)
    reported = system.objective.reporting()
    changes = newton_step.changes(reported, queries, step.theta_change)
    further = newton_step.changes(reported, queries, step.theta_change + step.next_step)
    changes[solution.x.isnan().any(1).numpy()] = np.nan  # queries that lean on what the data do not determine
    changes[_undetermined(newton_step.undetermined(step, reported, queries), members)] = np.nan
    rows = np.array([group[0] for group in members]) if single else np.arange(len(members))
    own = scoring.Columns.of(system.examples, rows).names if single else None
    return Scores(
        changes,
        "row removed, Newton step" if single else "group removed, Newton step",
        rows,
        system.n,
        scoring.certificate(system, solution),
        measure=system.objective.measure,
        query_values=per_row.measures(system.sweep.over(system.objective, queries)),
        error=further - changes,
        **naming(of_keys(groups) or own, queries.names),
    )


def _undetermined(leaning: NDArray[np.bool_], members: list[NDArray[np.int64]]) -> NDArray[np.bool_]:
    """The same, (q, g), with a TheoryWarning if there are any.

    Raises:
        NotPositiveDefinite: if no query has a value.
    """
    if not leaning.any():
        return leaning
    number = int(leaning.any(0).argmax())
    query = int(leaning[:, number].argmax())
    asked = (
        f"Removal number {number} (of rows {members[number][:5].tolist()}) takes all rows of a column or level, and "
        f"{int(leaning[:, number].sum())} of {len(leaning)} queries (first: number {query}) lean on it: without those "
        "rows their predictions depend on how the fit fills the gap"
    )
    advice = "Ask about queries that have nothing of it, leave some of its rows in, or fit with a penalty."
    if leaning.all():
        refusal = f"{asked}, and no query has a value. {advice}"
        raise NotPositiveDefinite(refusal)
    warnings.warn(f"{asked}; these are NaN. {advice}", TheoryWarning, stacklevel=4)
    return leaning
