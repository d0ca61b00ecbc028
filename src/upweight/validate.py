"""Predicted against actual: train again without rows, and compare."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import scipy.stats
import torch
from jaxtyping import Float, Int
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from upweight import calculus, routes
from upweight.errors import InvalidInput, first_line
from upweight.influence import Influence
from upweight.objective import Objective
from upweight.retrain import BoundRefit, Retrain, bound
from upweight.scores import Scores


@dataclass(frozen=True)
class Outcomes:
    """What really happened to each query's measure when training ran again without each row.

    Args:
        actual: (q, r) measure after retraining without the row, minus the measure after retraining with all rows.
        control: (q,) measure after retraining with all rows, minus the measure of the model as it is: the drift of
            retraining itself, which no row caused. Near 0 when θ̂ is the minimum that retraining finds.
        rows: (r,) the rows that were left out.
        measure: what was measured on the query, in words.
        query_values: (q,) the measure of the model as it is; None if unknown.
    """

    actual: Float[NDArray[np.float64], "q r"]
    control: Float[NDArray[np.float64], " q"]
    rows: Int[NDArray[np.int64], " r"]
    measure: str = "loss"
    query_values: Float[NDArray[np.float64], " q"] | None = None

    def __repr__(self) -> str:
        return (
            f"Outcomes({self.actual.shape[0]} queries × {len(self.rows)} retrainings; control drift ≤ "
            f"{np.abs(self.control).max():.2g})"
        )


@dataclass(frozen=True)
class Agreement:
    """How predicted and actual changes agree over all (query, row) pairs.

    Args:
        pearson: linear correlation.
        spearman: rank correlation.
        slope: least squares of actual on predicted, with an intercept; 1 means that the size is right, which no
            correlation sees.
        intercept: of the same line, in units of the measure.
        pairs: how many pairs were compared.
    """

    pearson: float
    spearman: float
    slope: float
    intercept: float = 0.0
    pairs: int = 0

    def __str__(self) -> str:
        return f"r = {self.pearson:.5f}, rank r = {self.spearman:.5f}, slope = {self.slope:.4f} over {self.pairs} pairs"


def leave_one_out(
    influence: Influence,
    on: tuple[Any, ...],
    rows: Any,
    retrain: Retrain | Any = None,
    *,
    measure: Callable[[Any, Any], Tensor] | None = None,
    seed: int = 0,
    progress: bool | None = None,
) -> Outcomes:
    """Train again without each row, and once with all of them as the control.

    Cost: len(rows) + 1 trainings.

    Args:
        influence: whose objective and data are trained again.
        on: (Xq, yq), the queries.
        rows: the rows to leave out, one at a time.
        retrain: a function (weights, seed) → params (or flat θ), where weights multiply the examples' weights; or
            Newton(), LBFGS() or Refit(). None takes scikit-learn's own fit where the minimum is not smooth or not
            reached (hinge, lasso, kernels, SGD, MLP), else Newton for linear predictors and L-BFGS from θ̂ otherwise.
        measure: scalar of (params, example); None is the loss.
        seed: given to `retrain` for every training, the control included.
        progress: True or False forces the progress bar on or off; None shows it on a terminal only.

    Raises:
        RowOutOfRange: if a row does not exist.
    """
    rows = influence.examples.rows(rows)
    influence.queries(on)  # refuses what is no query
    train = bound(retrain, influence)
    objective, asked = (
        train.stage(on) if isinstance(train, BoundRefit) else (influence.objective, influence.queries(on))
    )
    queries = asked.batch(slice(None))
    measured = objective.reporting() if measure is None else routes.probe(objective.measuring(measure), queries)

    def after(weights: NDArray[np.float64]) -> NDArray[np.float64]:
        theta = _flat(objective, train(weights, seed))
        return calculus.losses(measured.at(theta), queries).double().cpu().numpy()

    now = calculus.losses(measured, queries).double().cpu().numpy()
    ones = np.ones(influence.n)
    control = after(ones)
    actual = np.empty((len(now), len(rows)))
    hidden = not sys.stderr.isatty() if progress is None else not progress
    for column, row in enumerate(tqdm(rows, desc="retraining", disable=hidden, file=sys.stderr, leave=False)):
        weights = ones.copy()
        weights[row] = 0
        actual[:, column] = after(weights) - control
    return Outcomes(actual, control - now, rows, objective.measure if measure is None else measured.name, now)


def agreement(scores: Scores, outcomes: Outcomes) -> Agreement:
    """Correlations and slope of actual on predicted, over all queries and all rows that were really removed.

    Raises:
        InvalidInput: if the rows or queries do not match, or fewer than two pairs remain.
    """
    if not isinstance(scores, Scores) or not isinstance(outcomes, Outcomes):
        message = f"agreement(scores, outcomes) got {type(scores).__name__}, {type(outcomes).__name__}."
        raise InvalidInput(message)
    if not scores.counterfactual.startswith("row removed") or scores.measure != outcomes.measure:
        message = (
            f"The scores predict the change of {scores.measure} for '{scores.counterfactual}'; the outcomes are the "
            f"change of {outcomes.measure} for rows removed one at a time. Compare like with like: on_loss, on_measure "
            "with leave_one_out(…, measure=…), or of_removing of single rows."
        )
        raise InvalidInput(message)
    before, after = scores.query_values, outcomes.query_values
    if (
        before is not None
        and after is not None
        and before.shape == after.shape
        and not np.allclose(before, after, 1e-6)
    ):
        message = (
            f"The scores are of queries whose {scores.measure} is {before[:3]}, the outcomes of others ({after[:3]}). "
            "Pass the same queries to both."
        )
        raise InvalidInput(message)
    place = {int(row): column for column, row in enumerate(scores.rows)}
    missing = [int(row) for row in outcomes.rows if int(row) not in place]
    if missing or len(scores.values) != len(outcomes.actual):
        message = (
            f"The scores hold {len(scores.values)} queries and {len(place)} rows, the outcomes "
            f"{len(outcomes.actual)} queries"
            + (f" and rows such as {missing[0]} that the scores do not have" if missing else "")
            + ". Compare scores and outcomes of the same queries and rows."
        )
        raise InvalidInput(message)
    predicted = scores.values[:, [place[int(row)] for row in outcomes.rows]].ravel()
    actual = outcomes.actual.ravel()
    if len(predicted) < 2 or np.ptp(predicted) == 0:
        message = (
            f"{len(predicted)} pair(s) with a spread of {np.ptp(predicted):.3g} in the prediction: a slope needs at "
            "least two different predictions."
        )
        raise InvalidInput(message)
    slope, intercept = np.polyfit(predicted, actual, 1)
    constant = np.ptp(actual) == 0
    pearson = float("nan") if constant else float(np.corrcoef(predicted, actual)[0, 1])
    spearman = float("nan") if constant else float(scipy.stats.spearmanr(predicted, actual)[0])  # type: ignore[arg-type]
    return Agreement(pearson, spearman, float(slope), float(intercept), len(predicted))


def _flat(objective: Objective, params: Any) -> Tensor:
    """Whatever a retrainer returned, as a flat vector.

    Raises:
        InvalidInput: if it does not fit θ̂.
    """
    if isinstance(params, dict):
        missing = [name for name in objective.blocks if name not in params]
        if missing:
            message = (
                f"retrain returned parameters without '{missing[0]}'. Return a dict with the names "
                f"{list(objective.blocks)}, or one flat vector."
            )
            raise InvalidInput(message)
        parts = [params[name] for name in objective.blocks]
    else:
        parts = [params]
    try:
        flat = [
            part.detach() if isinstance(part, Tensor) else torch.as_tensor(part, dtype=torch.float64) for part in parts
        ]
        vector = torch.cat([part.reshape(-1).double() for part in flat])
    except (TypeError, ValueError, RuntimeError) as error:
        message = (
            f"retrain returned a {type(params).__name__} ({first_line(error)}). Return the parameters: a dict with the "
            f"names {list(objective.blocks)}, or one flat vector."
        )
        raise InvalidInput(message) from error
    if len(vector) != objective.size:
        message = (
            f"retrain returned {len(vector)} numbers, and the objective has {objective.size} parameters "
            f"({', '.join(objective.blocks)})."
        )
        raise InvalidInput(message)
    if not torch.isfinite(vector).all():
        message = "retrain returned NaN or infinite parameters: training diverged. Check its step size."
        raise InvalidInput(message)
    return vector
