"""Two curves by which scores are judged: what removing the rows they name does, and how early they find wrong labels.

removal curve     remove the k rows that are said to help a query most, train again, measure the query
mislabel curve    inspect rows from the most suspicious on; the share of the wrong labels found so far
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import scipy.stats
from jaxtyping import Bool, Float, Int
from numpy.typing import NDArray
from torch import Tensor

from upweight.data import markup
from upweight.data.arrays import checked_rows
from upweight.errors import InvalidInput, TheoryWarning, checked_count
from upweight.evaluation.lds import LEFT_OUT
from upweight.evaluation.leave_one_out import checked_level, of_others
from upweight.influence.face import Influence
from upweight.influence.scores import Scores, SelfScores
from upweight.training.course import Course, digest
from upweight.training.retrainers import Retrain
from upweight.training.trials import Job, Measured, Trials

RANDOM = "random"


@dataclass(frozen=True)
class RemovalCurve:
    """What removing the k most helpful rows of each query really did to it, for several ways of choosing them.

    Args:
        counts: (c,) how many rows were removed.
        changes: for every way of choosing, (c, q) measure after retraining minus the control, mean over seeds.
        flipped: for every way of choosing, (c, q) share of the seeds in which the query's predicted class changed; None
            where outputs are no classes.
        control: (q,) measure after retraining with all rows, mean over seeds.
        measure: what was measured on the query, in words.
    """

    counts: Int[NDArray[np.int64], " c"]
    changes: Mapping[str, Float[NDArray[np.float64], "c q"]] = field(repr=False)
    flipped: Mapping[str, Float[NDArray[np.float64], "c q"]] | None = field(repr=False)
    control: Float[NDArray[np.float64], " q"] = field(repr=False)
    measure: str = "loss"

    def mean(self, name: str) -> Float[NDArray[np.float64], " c"]:
        """The mean change over queries for one way of choosing."""
        return self._known(self.changes, name).mean(1)

    def standard_error(self, name: str) -> Float[NDArray[np.float64], " c"]:
        """The standard error of `mean` over queries; NaN for a single query."""
        lines = self._known(self.changes, name)
        if lines.shape[1] < 2:
            return np.full(len(lines), np.nan)
        return lines.std(1, ddof=1) / np.sqrt(lines.shape[1])

    def flips(self, name: str) -> Float[NDArray[np.float64], " c"]:
        """The share of queries whose predicted class changed.

        Raises:
            InvalidInput: if the model's outputs are no classes.
        """
        if self.flipped is None:
            message = (
                "These outputs are no classes, so no prediction can flip. Use `mean` for the change of the measure."
            )
            raise InvalidInput(message)
        return self._known(self.flipped, name).mean(1)

    def _known(self, curves: Mapping[str, NDArray[np.float64]], name: str) -> NDArray[np.float64]:
        if name not in curves:
            message = f"There is no curve '{name}'; name one of: {', '.join(curves)}."
            raise InvalidInput(message)
        return curves[name]

    def _repr_html_(self) -> str:
        head = ["rows removed", *(f"{count:,}" for count in self.counts.tolist())]
        lines = [[markup.text(name), *(f"{value:+.3g}" for value in self.mean(name))] for name in self.changes]
        if self.flipped is not None:
            flips = {name: self.flips(name) for name in self.flipped}
            lines += [[markup.text(f"{name}: flipped"), *(f"{x:.0%}" for x in share)] for name, share in flips.items()]
        return markup.frame(markup.table(f"Mean change of the query's {self.measure}", head, lines))

    def __str__(self) -> str:
        lines = [f"removed {self.counts.tolist()}: mean change of the query's {self.measure}"]
        for name in self.changes:
            shown = ", ".join(f"{value:+.3g}" for value in self.mean(name))
            flips = "" if self.flipped is None else f"; flipped {', '.join(f'{x:.0%}' for x in self.flips(name))}"
            lines.append(f"{name}: {shown}{flips}")
        return "\n".join(lines)


def removal_curve(
    influence: Influence,
    scores: Scores | Mapping[str, Scores],
    on: tuple[Any, ...],
    *,
    counts: Sequence[int] = (1, 5, 20, 50),
    retrain: Retrain | Any = None,
    seed: int = 0,
    seeds: int = 1,
    measure: Callable[[Any, Any], Tensor] | None = None,
    store: str | os.PathLike[str] | None = None,
    progress: bool | None = None,
) -> RemovalCurve:
    """Brittleness: remove the k rows that are said to help each query most, train again, and see what it does.

    Random rows are removed beside them: what removing any k rows does.

    Cost: (ways + 1) × queries × counts × seeds trainings and `seeds` controls; side by side where the retrainer has a
    `many`, and on the workers of `joblib.parallel_config` where there are some.

    Args:
        influence: whose objective and data are trained again.
        scores: removal values for the queries, or a dict of them with names: influence, baselines.
        on: (Xq, yq), the queries.
        counts: the k's, ascending.
        retrain: as for leave_one_out.
        seed: the first seed; also of the random rows.
        seeds: trainings of each, with seed, seed + 1, ….
        measure: scalar of (params, example); None is the loss.
        store: a folder that keeps the outcome of every finished training, so that the same call resumes there, and one
            with more seeds goes on; None keeps nothing.
        progress: True or False forces the progress bar on or off; None shows it on a terminal only.

    Raises:
        InvalidInput: if scores, counts, queries or the retrainer cannot be used.
        StoreMismatch: if the folder holds the outcomes of other data, models, scores, counts, retrainers or seeds.
        WorkerError: if a training cannot be sent to a worker of joblib's, or the worker ends before it does.

    References: Ilyas et al., Datamodels (2022), section 4; Park et al., TRAK (2023), appendix.
    """
    named = {"scores": scores} if isinstance(scores, Scores) else dict(scores)
    ks = _checked_counts(counts, influence.n)
    checked_count(seeds, "seeds")
    trials = Trials.of(influence, on, retrain, measure)
    q, n = len(trials.now()), influence.n
    for name, given in named.items():
        _check_scores(name, given, q, n)
        if others := of_others(given, trials.now()):
            message = (
                f"{name}: {others} Are they other queries, or another model? Pass scores of these queries by this "
                "influence, such as influence.on_loss(*on)."
            )
            warnings.warn(message, TheoryWarning, stacklevel=2)
    chosen = {name: given.helpful(ks[-1]).rows for name, given in named.items()}
    draw = np.random.default_rng(seed)
    gone = influence.examples.weights == 0  # removing these would change nothing
    orders = (draw.permutation(n) for _ in range(q))
    chosen[RANDOM] = np.stack([order[np.argsort(gone[order], kind="stable")][: ks[-1]] for order in orders])

    places = [(name, c, query) for name in chosen for c in range(len(ks)) for query in range(q)]
    per_seed = 1 + len(places)  # the first is the control
    question = {"work": "removal_curve", "rows": {name: digest(rows) for name, rows in chosen.items()}}
    question |= {"counts": ks.tolist(), "seed": seed, **trials.question(influence, on)}
    course = Course(influence, store, question)
    course.agree("query_values", trials.now())

    def job(number: int) -> Job:
        kept = np.ones(n, dtype=bool)
        if number % per_seed:
            name, c, query = places[number % per_seed - 1]
            kept[chosen[name][query, : ks[c]]] = False
        return kept, seed + number // per_seed

    blocks = trials.blocks(seeds, per_seed)
    after = course.each(Measured(trials, trials.said), job, blocks, label="removal curve", progress=progress)
    said = np.stack(after).reshape(seeds, per_seed, -1, q)  # measures, and classes where there are any
    changes = {name: np.zeros((len(ks), q)) for name in chosen}
    flipped = {name: np.zeros((len(ks), q)) for name in chosen}
    for s in range(seeds):
        for (name, c, query), line in zip(places, said[s, 1:], strict=True):
            changed = line[:, query] - said[s, 0, :, query]
            changes[name][c, query] += changed[0] / seeds
            flipped[name][c, query] += (changed[-1] != 0) / seeds
    classes = said.shape[2] > 1
    return RemovalCurve(ks, changes, flipped if classes else None, said[:, 0, 0].mean(0), trials.measure)


@dataclass(frozen=True)
class MislabelCurve:
    """How well scores tell wrong labels from right ones, when rows are inspected from the largest score on.

    Args:
        auc: the chance that a mislabelled row scores above a clean one (ties count half); 0.5 is guessing.
        low, high: its confidence interval (DeLong), cut at 0 and 1. Where every wrong label scores above every clean
            one, DeLong's variance is 0; the interval then ends where m rows in order have a chance of 1 − level, m the
            smaller of the two counts.
        found: (n,) share of the mislabelled rows among the first 1, 2, … n inspected.
        mislabelled: how many there are.
        level: of the interval.
    """

    auc: float
    low: float
    high: float
    found: Float[NDArray[np.float64], " n"] = field(repr=False)
    mislabelled: int
    level: float = 0.95

    def found_in(self, fraction: float) -> float:
        """The share of the mislabelled rows that is found when this fraction of all rows is inspected.

        Raises:
            InvalidInput: if the fraction is not in 0 … 1.
        """
        if not 0 <= fraction <= 1:
            message = f"fraction={fraction}. It is a share of the rows, such as 0.1."
            raise InvalidInput(message)
        inspected = round(fraction * len(self.found))
        return float(self.found[inspected - 1]) if inspected else 0.0

    def _repr_html_(self) -> str:
        found = [(f"found in {share:.0%} of rows", f"{self.found_in(share):.1%}") for share in (0.05, 0.1, 0.2, 0.3)]
        auc = f"{self.auc:.3f}, {self.level:.0%} interval {self.low:.3f} to {self.high:.3f}"
        return markup.facts(f"Finding {self.mislabelled:,} wrong labels", [("AUC", auc), *found])

    def __str__(self) -> str:
        return (
            f"AUC {self.auc:.3f} ({self.level:.0%} interval {self.low:.3f} to {self.high:.3f}); of {self.mislabelled} "
            f"wrong labels {self.found_in(0.1):.0%} found in the first 10 %, {self.found_in(0.2):.0%} in 20 %"
        )


def mislabel_auc(scores: Any, flipped: Any, *, level: float = 0.95) -> MislabelCurve:
    """How well suspicion finds wrong labels: area under the ROC curve, and the share found early.

    Args:
        scores: SelfScores of all rows, or (n,) numbers that are larger the more suspicious the row is (for a ranking:
            minus the position).
        flipped: the rows whose label is wrong, as row numbers or a mask of n booleans.
        level: of the confidence interval.

    Raises:
        InvalidInput: if the scores are not n finite numbers, or no row or every row is flipped.

    References: DeLong, DeLong and Clarke-Pearson (1988) for the interval.

    >>> print(mislabel_auc([0.9, 0.1, 0.8, 0.3], [0, 2]).auc)
    1.0
    """
    checked_level(level)
    values = np.asarray(scores.values if isinstance(scores, SelfScores) else scores, dtype=np.float64)
    if isinstance(scores, SelfScores):
        if not np.array_equal(np.sort(scores.rows), np.arange(len(values))):
            message = (
                f"The scores are of {len(values)} rows between {int(scores.rows.min())} and {int(scores.rows.max())}, "
                "so row numbers of wrong labels cannot be placed. Pass of_self() of all rows, or plain numbers."
            )
            raise InvalidInput(message)
        values = values[np.argsort(scores.rows)]
    if values.ndim != 1 or not np.isfinite(values).all():
        message = f"scores has shape {values.shape}, or holds NaN. Pass SelfScores of all rows or n finite numbers."
        raise InvalidInput(message)
    wrong: Bool[NDArray[np.bool_], " n"] = np.zeros(len(values), dtype=bool)
    wrong[checked_rows(flipped, len(values))] = True
    bad, good = int(wrong.sum()), int((~wrong).sum())
    if good < 1:
        message = (
            f"{bad} of {len(wrong)} rows are flipped. An AUC compares some flipped rows with some clean ones: pass "
            "only the rows whose label is wrong."
        )
        raise InvalidInput(message)
    everywhere = scipy.stats.rankdata(values)
    below = (everywhere[wrong] - scipy.stats.rankdata(values[wrong])) / good  # share of clean rows below each wrong one
    above = (
        1 - (everywhere[~wrong] - scipy.stats.rankdata(values[~wrong])) / bad
    )  # share of wrong rows above each clean
    auc = float(below.mean())
    variance = sum(float(part.var(ddof=1)) / len(part) for part in (below, above) if len(part) > 1)
    reach = float(scipy.stats.norm.ppf((1 + level) / 2)) * np.sqrt(variance)
    if variance == 0:  # no row was out of order; as many rows might still hide that many errors
        reach = 1 - (1 - level) ** (1 / min(bad, good))
    order = np.argsort(-values, kind="stable")
    _, group, size = np.unique(-values, return_inverse=True, return_counts=True)
    chance = np.bincount(group, weights=wrong) / size  # rows that are equally suspicious come in no order of their own
    found = np.cumsum(chance[group][order]) / bad
    return MislabelCurve(auc, max(0.0, auc - reach), min(1.0, auc + reach), found, bad, level)


def _checked_counts(counts: Sequence[int], n: int) -> NDArray[np.int64]:
    ks = np.asarray(list(counts))
    if ks.size == 0 or ks.dtype.kind not in "iu" or ks[0] < 1 or ks[-1] >= n or not (np.diff(ks) > 0).all():
        message = f"counts={list(counts)}. They are different numbers of rows to remove, ascending, from 1 to {n - 1}."
        raise InvalidInput(message)
    return ks.astype(np.int64)


def _check_scores(name: str, scores: Any, q: int, n: int) -> None:
    if not isinstance(scores, Scores) or name == RANDOM:
        message = (
            f"scores['{name}'] is a {type(scores).__name__}. Pass Scores with names of their own; '{RANDOM}' rows are "
            "removed anyway."
        )
        raise InvalidInput(message)
    if scores.values.shape != (q, n) or not scores.counterfactual.startswith(LEFT_OUT):
        message = (
            f"{name} holds {scores.values.shape[0]} queries × {scores.values.shape[1]} columns for "
            f"'{scores.counterfactual}', and there are {q} queries and {n} rows to remove. Pass removal values of all "
            "rows for these queries, such as on_loss."
        )
        raise InvalidInput(message)
