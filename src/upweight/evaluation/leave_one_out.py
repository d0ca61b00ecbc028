"""Predicted against actual: train again without rows, and compare."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
import scipy.stats
import torch
from jaxtyping import Float, Int
from numpy.typing import NDArray
from torch import Tensor

from upweight.data import markup
from upweight.errors import InvalidInput, SolverError, TheoryWarning, Undefined, checked_count, first_line
from upweight.influence.face import Influence
from upweight.influence.minimum import distance
from upweight.influence.scores import Scores
from upweight.training.course import Course, digest
from upweight.training.retrainers import BoundLBFGS, Retrain
from upweight.training.trials import Job, Measured, Trials


@dataclass(frozen=True)
class Outcomes:
    """What really happened to each query's measure when training ran again without each row.

    Args:
        actual: (q, r) measure after retraining without the row, minus the measure after retraining with all rows;
            the mean over seeds, each minus the control of its own seed.
        control: (q,) measure after retraining with all rows, minus the measure of the model as it is: the drift of
            retraining itself, which no row caused; the mean over seeds. Near 0 when θ̂ is the minimum that retraining
            finds.
        rows: (r,) the rows that were left out.
        measure: what was measured on the query, in words.
        query_values: (q,) the measure of the model as it is; None if unknown.
        by_seed: (m, q, r) `actual` of every seed, when there were several.
        control_by_seed: (m, q) `control` of every seed, when there were several.
    """

    actual: Float[NDArray[np.float64], "q r"]
    control: Float[NDArray[np.float64], " q"]
    rows: Int[NDArray[np.int64], " r"]
    measure: str = "loss"
    query_values: Float[NDArray[np.float64], " q"] | None = None
    by_seed: Float[NDArray[np.float64], "m q r"] | None = field(default=None, repr=False)
    control_by_seed: Float[NDArray[np.float64], "m q"] | None = field(default=None, repr=False)

    @property
    def standard_error(self) -> Float[NDArray[np.float64], "q r"] | None:
        """Seed noise of `actual`: the standard deviation over the m seeds over √m; None for a single seed."""
        if self.by_seed is None:
            return None
        return self.by_seed.std(0, ddof=1) / np.sqrt(len(self.by_seed))

    @property
    def reliability(self) -> float | None:
        """The share of the variance of `actual` over all pairs that is not seed noise, 1 − noise / var(actual).

        noise = Σ_seeds var_pairs(by_seed − mean) / (m (m − 1)): what a seed moves all pairs by, such as a control's
        own noise of a single query, spreads no pairs and is not in it. The root is the largest correlation that a
        perfect prediction can have with `actual`. None for a single seed; not below 0.
        """
        if self.by_seed is None or self.standard_error is None:
            return None
        m, spread = len(self.by_seed), float(self.actual.var())
        deviations = (self.by_seed - self.by_seed.mean(0)).reshape(m, -1)
        noise = float(deviations.var(1).sum()) / (m * (m - 1))
        return max(0.0, 1 - noise / spread) if spread > 0 else 0.0

    def _repr_html_(self) -> str:
        return markup.facts("What retraining without rows really did", [(self.measure, repr(self))])

    def __repr__(self) -> str:
        drift = f"control drift ≤ {np.abs(self.control).max():.2g}"
        if self.by_seed is None or self.standard_error is None:
            return f"Outcomes({self.actual.shape[0]} queries × {len(self.rows)} retrainings; {drift})"
        noise, size = np.sqrt((self.standard_error**2).mean()), np.sqrt((self.actual**2).mean())
        return (
            f"Outcomes({self.actual.shape[0]} queries × {len(self.rows)} rows × {len(self.by_seed)} seeds; {drift}; "
            f"changes {size:.2g} ± {noise:.2g} (rms, seed noise of the mean))"
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

    def _repr_html_(self) -> str:
        pairs = [
            ("pearson", f"{self.pearson:.5f}"),
            ("spearman", f"{self.spearman:.5f} (of ranks)"),
            ("slope", f"{self.slope:.4f} of actual on predicted; 1 is the right size"),
            ("intercept", f"{self.intercept:.3g}"),
            ("pairs", f"{self.pairs:,}"),
        ]
        return markup.facts("Predicted against actual changes", pairs)

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
    seeds: int = 1,
    store: str | os.PathLike[str] | None = None,
    progress: bool | None = None,
) -> Outcomes:
    """Train again without each row, and once with all of them as the control.

    A row without which there is nothing to train (all of a class, or a fit that is not unique) is NaN, with a
    TheoryWarning that says why.

    Cost: (len(rows) + 1) × seeds trainings; side by side where the retrainer has a `many`, and on the workers of
    `joblib.parallel_config` where there are some.

    Args:
        influence: whose objective and data are trained again.
        on: (Xq, yq), the queries.
        rows: the rows to leave out, one at a time.
        retrain: a function (weights, seed) → params (or flat θ), where weights multiply the examples' weights; or
            Newton(), LBFGS(), Refit() or StackedTraining(…). None takes scikit-learn's own fit where the minimum is not
            smooth or not reached (hinge, lasso, kernels, SGD, MLP), else Newton for linear predictors and L-BFGS
            otherwise: from θ̂ to the minimum of all rows, and from there.
        measure: scalar of (params, example); None is the loss.
        seed: given to `retrain` for every training, the control included.
        seeds: repetitions with seed, seed + 1, …; each has a control of its own. Only a retrainer with chance in it
            needs more than one.
        store: a folder that keeps the outcome of every finished training, so that the same call resumes there, and one
            with more seeds goes on; None keeps nothing.
        progress: True or False forces the progress bar on or off; None shows it on a terminal only.

    Raises:
        RowOutOfRange: if a row does not exist.
        InvalidInput: if `seeds` is no number ≥ 1, or the queries or the retrainer cannot be used, or a network is far
            from a minimum and no retrainer was given.
        NotConverged, NotPositiveDefinite, Undefined: if training with all rows fails, or without any one of them.
        StoreMismatch: if the folder holds the outcomes of other data, models, rows, retrainers or seeds.
        WorkerError: if a training cannot be sent to a worker of joblib's, or the worker ends before it does.
    """
    rows = influence.examples.rows(rows)
    checked_count(seeds, "seeds", hint="1 for a retrainer without chance")
    trials = Trials.of(influence, on, retrain, measure)
    now = trials.now()
    if isinstance(trials.train, BoundLBFGS) and retrain is None:
        _refuse_far_from_a_minimum(influence)
    question = {"work": "leave_one_out", "rows": f"{len(rows)}, {digest(rows)}", "seed": seed}
    course = Course(influence, store, question | trials.question(influence, on))
    course.agree("query_values", now)
    if isinstance(trials.train, BoundLBFGS):
        # every training then goes the short way from one minimum, and not its own way from θ̂ to one of many
        whole = course.numbers(partial(trials.train, np.ones(influence.n), seed))
        trials = replace(trials, train=trials.train.starting_at(torch.from_numpy(whole)))
    per_seed = len(rows) + 1  # the first is the control

    def job(number: int) -> Job:
        kept = np.ones(influence.n, dtype=bool)
        place = number % per_seed
        kept[rows[place - 1 : place]] = False
        return kept, seed + number // per_seed

    work = Measured(trials, trials.at, (SolverError, Undefined))
    found = course.each(work, job, trials.blocks(seeds, per_seed), label="retraining", progress=progress)
    after = np.full((len(found), len(now)), np.nan)
    failed: dict[int, Exception] = {}
    for place, outcome in enumerate(found):
        if isinstance(outcome, Exception):
            failed[place] = outcome
        else:
            after[place] = outcome
    _name_failures(failed, rows, seeds)
    after = after.reshape(seeds, per_seed, -1)
    control = after[:, 0] - now
    actual = (after[:, 1:] - after[:, :1]).transpose(0, 2, 1)  # (m, q, r)
    return Outcomes(
        actual.mean(0),
        control.mean(0),
        rows,
        trials.measure,
        now,
        actual if seeds > 1 else None,
        control if seeds > 1 else None,
    )


def _refuse_far_from_a_minimum(influence: Influence) -> None:
    """Raises at once, and not after an hour of training to somewhere else, where θ̂ is not at a minimum.

    Raises:
        InvalidInput: with the ways to go on.
    """
    away = distance(influence.system)
    if away.kept:
        return
    message = (
        f"{influence.objective.name} is not at a minimum of its objective, {away}, and without retrain= every training "
        "goes on to one, so that it would tell about another model. Usual reasons: training stopped early, or its "
        "weight decay was not passed as penalty=. Pass the training procedure that made the model: "
        "retrain=StackedTraining(…), or a function (weights, seed) → module. Or ask about the model that training goes "
        "on to: leave_one_out(uw.retrained(influence), …), or leave_one_out(…, retrain=uw.LBFGS())."
    )
    raise InvalidInput(message)


def _name_failures(failed: dict[int, Exception], rows: NDArray[np.int64], seeds: int) -> None:
    """A TheoryWarning about rows without which training failed, by the places of their jobs.

    Raises:
        UpweightError: what training raised, if it failed without any one of them.
    """
    if not failed:
        return
    first = next(iter(failed.values()))
    if len(failed) == seeds * len(rows):
        raise first
    lost = sorted({int(rows[place % (len(rows) + 1) - 1]) for place in failed})
    message = (
        f"Training without {len(lost)} of {len(rows)} rows (first: {lost[:5]}) gave nothing, and their changes are "
        f"NaN. To compare the others, pass rows without them. The first said: {first_line(first, length=400)}"
    )
    warnings.warn(message, TheoryWarning, stacklevel=3)


def of_others(scores: Scores, now: Float[NDArray[np.float64], " q"] | None) -> str:
    """What to say where queries have other values at the model that was scored than at the one that was retrained."""
    before = scores.query_values
    if before is None or now is None or scores.certificate.members:  # a mean over models, none retrained alone
        return ""
    if before.shape != now.shape or np.allclose(before, now, 1e-6):
        return ""
    return f"The scores are of queries whose {scores.measure} is {before[:3]}, the outcomes of others ({now[:3]})."


def checked_level(level: Any) -> float:
    """The level of a confidence interval.

    Raises:
        InvalidInput: if it is no fraction.
    """
    if not isinstance(level, float) or not 0 < level < 1:
        message = f"level={level!r}. It is a fraction such as 0.95."
        raise InvalidInput(message)
    return level


def agreement(scores: Scores, outcomes: Outcomes) -> Agreement:
    """Correlations and slope of actual on predicted, over all queries and all rows that were really removed.

    Raises:
        InvalidInput: if the rows or queries do not match, or fewer than two pairs remain.
    """
    if not isinstance(scores, Scores) or not isinstance(outcomes, Outcomes):
        message = (
            f"agreement(scores, outcomes) got {type(scores).__name__}, {type(outcomes).__name__}. Pass the Scores of "
            "on_loss, and the Outcomes of leave_one_out."
        )
        raise InvalidInput(message)
    if not scores.counterfactual.startswith("row removed") or scores.measure != outcomes.measure:
        message = (
            f"The scores predict the change of {scores.measure} for '{scores.counterfactual}'; the outcomes are the "
            f"change of {outcomes.measure} for rows removed one at a time. Compare like with like: on_loss, on_measure "
            "with leave_one_out(…, measure=…), or of_removing of single rows."
        )
        raise InvalidInput(message)
    others = of_others(scores, outcomes.query_values)
    if others:
        message = f"{others} Pass the same queries to both, and ask the same influence."
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
    nothing = sorted({int(row) for row in outcomes.rows if np.isnan(scores.values[:, place[int(row)]]).any()})
    if nothing or np.isnan(actual).any():
        lost = nothing or outcomes.rows[np.isnan(outcomes.actual).any(0)].tolist()
        message = (
            f"The {'scores' if nothing else 'outcomes'} of row(s) {lost[:5]} are NaN: without them the fit is not "
            "unique, or there is none, so there is nothing to compare. Leave those rows out of the outcomes: "
            "leave_one_out(…, rows without them)."
        )
        raise InvalidInput(message)
    if len(predicted) < 2 or np.ptp(predicted) == 0:
        message = (
            f"{len(predicted)} pair(s) with a spread of {np.ptp(predicted):.3g} in the prediction: a slope needs at "
            "least two different predictions. Leave out more rows: leave_one_out(…, more rows)."
        )
        raise InvalidInput(message)
    slope, intercept = np.polyfit(predicted, actual, 1)
    constant = np.ptp(actual) == 0
    pearson = float("nan") if constant else float(np.corrcoef(predicted, actual)[0, 1])
    spearman = float("nan") if constant else float(scipy.stats.spearmanr(predicted, actual)[0])  # type: ignore[arg-type]
    return Agreement(pearson, spearman, float(slope), float(intercept), len(predicted))
