"""Section 5.4: which labels to look at first, which label each should have, and what correcting them is worth.

A row whose label is wrong has been paid for: its loss would be much larger without it. That number is its
self-influence (1/n) ∇LᵢᵀH⁻¹∇Lᵢ, by which Koh & Liang rank rows. A row's loss, its margin, and the mean of the three
ranks are other orders, and which finds most depends on the model and the data. So some labels are flipped on purpose
(`planted`), and the order that finds most of those is taken; all are reported side by side.

For an inspected row the suggestion is the label with the smallest loss of the row after training with it, as worked out
in `suggestions`. An inspected row is one that the model would call otherwise, so most of those are told to change, the
right ones too: a suggestion is a question to a person, not a correction.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
from jaxtyping import Float, Int, Shaped
from numpy.typing import NDArray
from scipy.stats import rankdata

import upweight as uw
from upweight.apps import notebook
from upweight.apps.mean_loss import losses_of
from upweight.apps.names import name_in_text, names_in_json
from upweight.apps.planted import Orders, Planted, planted, planted_table
from upweight.apps.suggestions import suggested
from upweight.errors import (
    InvalidInput,
    StoreMismatch,
    UnsupportedModel,
    UpweightError,
    WorkerError,
    checked_count,
)

SELF, LOSS, MARGIN, MEAN_RANK, RANDOM = "self-influence", "loss", "margin", "mean-rank", "random"
_ALL_CHANGE = (
    "Every one is told to change. That says that the model would call each otherwise without it,",
    "not that its label is wrong: look at each, first at those that gain most, or inspect more.",
)


@dataclass(frozen=True)
class Repair:
    """Rows to inspect, a suggestion for each, and the order in which each score would inspect them.

    Args:
        rows: (k,) the rows to inspect, in the chosen order.
        suggested: (k,) the label suggested for each; the present one where no other saves a hundredth of its loss.
        gain: (k,) by how much the row's own loss would fall with the suggested label, after training, in nats for log
            losses, so at most the loss now where losses are ≥ 0; 0 where the label stays.
        labels: (n,) present labels of all rows.
        scores: for "self-influence", "loss", "margin", "mean-rank" (minus the mean of the ranks by those three), what
            was added, and "random" (n,) numbers, larger is more suspicious.
        certificate: of the self-influence.
        chosen: the score whose order was taken.
        why: why it was, as a sentence.
        planted: which flips made on purpose each order found; None where that was not asked or could not be.
        ids: (n,) names of all rows, None where they have none.
    """

    rows: Int[NDArray[np.int64], " k"]
    suggested: Shaped[NDArray[Any], " k"]
    gain: Float[NDArray[np.float64], " k"]
    labels: Shaped[NDArray[Any], " n"] = field(repr=False)
    scores: Mapping[str, Float[NDArray[np.float64], " n"]] = field(repr=False)
    certificate: uw.Certificate = field(repr=False)
    chosen: str
    why: str
    planted: Planted | None
    ids: Shaped[NDArray[Any], " n"] | None = field(default=None, repr=False)

    def order(self, score: str) -> Int[NDArray[np.int64], " n"]:
        """All rows in the order in which a score would inspect them.

        Raises:
            InvalidInput: if there is no such score.
        """
        if score not in self.scores:
            message = f"There is no score '{score}'. Name one of {', '.join(self.scores)}."
            raise InvalidInput(message)
        return np.argsort(-self.scores[score], kind="stable")

    def ranks(self, score: str) -> Int[NDArray[np.int64], " k"]:
        """(k,) the place, from 1, that a score gives each of the rows to inspect."""
        places = np.empty(len(self.labels), dtype=np.int64)
        places[self.order(score)] = np.arange(1, len(self.labels) + 1)
        return places[self.rows]

    def suggestions(self, least: float = 0.0) -> dict[int, Any]:
        """The suggested labels that differ from the present ones, by row: candidates for a person to look at.

        Rows are inspected because the model would call them otherwise without their labels, so most are told to change,
        right or wrong. `least` keeps those that gain much, and far fewer right ones (`Found.right_told` counts them).

        Args:
            least: the smallest gain that counts, in units of the loss.

        Raises:
            InvalidInput: if it is no number ≥ 0.
        """
        if isinstance(least, bool) or not isinstance(least, int | float | np.number) or not least >= 0:
            message = (
                f"least={least!r}. It is the smallest gain that counts, a number ≥ 0 in units of the loss, like 1."
            )
            raise InvalidInput(message)
        changed = (self.suggested != self.labels[self.rows]) & (self.gain >= least)
        return dict(zip(self.rows[changed].tolist(), self.suggested[changed].tolist(), strict=True))

    def found(self, truth: Any) -> Found:
        """How many wrong labels were found, where the true ones are known.

        Args:
            truth: (n,) true labels.

        Raises:
            InvalidInput: if truth does not have n labels of the same kind, or none is wrong.
        """
        true = np.asarray(truth)
        if true.shape != self.labels.shape:
            message = f"truth has shape {true.shape}, and there are {len(self.labels)} rows. Pass one label for each."
            raise InvalidInput(message)
        if not set(true.tolist()) & set(self.labels.tolist()):
            message = (
                f"truth holds labels such as {true.tolist()[0]!r}, and the rows such as {self.labels.tolist()[0]!r}, "
                "and they have none in common. Pass true labels by the same names."
            )
            raise InvalidInput(message)
        wrong = true != self.labels
        if not wrong.any():
            message = (
                "All labels equal the truth, so there is nothing to find. Pass the labels before they were spoilt."
            )
            raise InvalidInput(message)
        curves = {name: np.cumsum(wrong[self.order(name)]) for name in self.scores}
        inspected = len(self.rows)
        hit = wrong[self.rows]
        right = self.suggested[hit] == true[self.rows[hit]]
        target = curves[self.chosen][inspected - 1]
        needed = {name: int(np.searchsorted(curve, target)) + 1 for name, curve in curves.items()}
        return Found(
            inspected,
            int(wrong.sum()),
            {name: int(curve[inspected - 1]) for name, curve in curves.items()},
            needed,
            float(right.mean()) if len(right) else float("nan"),
            int((self.suggested != self.labels[self.rows])[~hit].sum()),
            self.chosen,
        )

    def text(self, numbers: Sequence[int] | NDArray[np.int64] | None = None) -> str:
        """The report, in which rows are called by these (n,) numbers; None calls them 0 to n − 1."""
        orders = self._ranked
        lines = [
            self._counts,
            f"Order: {self.chosen}. {self.why}",
            *([] if self.planted is None else [str(self.planted)]),
            "",
            f"{'row':>8}  rank by {'  '.join(orders)} {'gain':>8}  label -> suggested",
        ]
        for place, row in enumerate(self.rows[:20]):
            suggested = self.suggested[place]
            arrow = "stays" if suggested == self.labels[row] else f"-> {suggested}"
            ranks = "  ".join(f"{ranks[place]:>{len(name)}}" for name, ranks in orders.items())
            called = row if numbers is None else numbers[row]
            named = name_in_text(self.ids, row)
            lines.append(f"{called:>8}          {ranks} {self.gain[place]:>8.3g}  {self.labels[row]} {arrow}{named}")
        if len(self.rows) > 20:
            lines.append(f"… and {len(self.rows) - 20} more")
        if len(self.suggestions()) == len(self.rows):
            lines += _ALL_CHANGE
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        orders = self._ranked
        lines = [
            [
                notebook.row(row, self.ids),
                notebook.change(self.labels[row], self.suggested[place]),
                notebook.plain(self.gain[place], ".3g"),
                *(notebook.plain(ranks[place], ",") for ranks in orders.values()),
            ]
            for place, row in enumerate(self.rows[: notebook.LINES].tolist())
        ]
        head = ["row", "label → suggested", "gain", *(f"rank by {name}" for name in orders)]
        said = [f"Order: {self.chosen}. {self.why}"]
        said += [" ".join(_ALL_CHANGE)] if len(self.suggestions()) == len(self.rows) else []
        table = notebook.table(self._counts, head, lines, len(self.rows))
        return notebook.shown(table, *([] if self.planted is None else [planted_table(self.planted)]), said=said)

    @property
    def _counts(self) -> str:
        """How many rows there are, and how many are told to change."""
        told = len(self.suggestions())
        return f"{len(self.rows)} of {len(self.labels)} rows to inspect, {told} with another label suggested"

    @property
    def _ranked(self) -> dict[str, NDArray[np.int64]]:
        """The ranks of the rows by every score but chance."""
        return {name: self.ranks(name) for name in self.scores if name != RANDOM}

    def __str__(self) -> str:
        return self.text()

    def to_dict(self) -> dict[str, Any]:
        """The rows to inspect, and why in this order, as plain numbers and lists."""
        return {
            "inspected": len(self.rows),
            "order": self.chosen,
            "why": self.why,
            "planted": None if self.planted is None else self.planted.to_dict(),
            "rows": self.rows.tolist(),
            "labels": self.labels[self.rows].tolist(),
            "suggested": self.suggested.tolist(),
            "gain": self.gain.tolist(),
            "scores": {name: values[self.rows].tolist() for name, values in self.scores.items() if name != RANDOM},
            "ranks": {name: self.ranks(name).tolist() for name in self.scores if name != RANDOM},
            **names_in_json(self.ids, self.rows),
        }


@dataclass(frozen=True)
class Found:
    """How many wrong labels inspection finds.

    Args:
        inspected: rows that were inspected.
        wrong: how many labels are wrong in all.
        by: for every score, how many of them are among its first `inspected` rows.
        needed: for every score, how many rows it has to inspect to find as many as the chosen order did.
        suggested_right: the share of the wrong labels found whose suggestion is the true label.
        right_told: how many inspected rows are told to change though their label is right.
        chosen: the score in whose order rows were inspected.
    """

    inspected: int
    wrong: int
    by: Mapping[str, int]
    needed: Mapping[str, int]
    suggested_right: float
    right_told: int
    chosen: str

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers."""
        return {
            "inspected": self.inspected,
            "wrong": self.wrong,
            "found": dict(self.by),
            "needed": dict(self.needed),
            "suggested_right": self.suggested_right,
            "right_told": self.right_told,
            "order": self.chosen,
        }

    def _repr_html_(self) -> str:
        lines = [
            [
                notebook.plain(name),
                notebook.plain(f"{count} ({count / self.wrong:.0%})"),
                notebook.plain(self.needed[name], ","),
            ]
            for name, count in self.by.items()
        ]
        head = ["order", "found", f"rows to find as many as {self.chosen}"]
        caption = f"{self.wrong} wrong labels, {self.inspected} rows inspected by {self.chosen}"
        return notebook.shown(notebook.table(caption, head, lines), said=self._told)

    @property
    def _told(self) -> list[str]:
        """What the suggestions are worth, in sentences."""
        right = self.inspected - self.by[self.chosen]
        return [
            f"the suggested label is the true one for {self.suggested_right:.0%} of those found",
            f"{self.right_told} right labels of the {right} inspected are told to change too",
        ]

    def __str__(self) -> str:
        lines = [f"{self.wrong} wrong labels, {self.inspected} rows inspected"]
        for name, count in self.by.items():
            more = f"; as many as {self.chosen} after {self.needed[name]} rows"
            taken = "; its order was taken" if name == self.chosen else more
            lines.append(f"  {name:<18} finds {count} ({count / self.wrong:.0%}){taken}")
        return "\n".join([*lines, *(f"  {line}" for line in self._told)])


def repair(
    influence: uw.Influence,
    *,
    inspect: float = 0.1,
    by: str | None = None,
    scores: Callable[[uw.Influence], Orders] | None = None,
    plantings: int | None = None,
    retrain: Any = None,
    candidates: int = 10,
    seed: int = 0,
    store: str | os.PathLike[str] | None = None,
) -> Repair:
    """Which rows' labels to look at first, and the label that each should have.

    Without `by` the order is chosen by planted flips: 3 % of the labels, drawn at random, are flipped on purpose, the
    model is trained again, and each order is asked how many of them it puts among the rows to inspect. That needs no
    truth, and is repeated. Where the model cannot be trained again the order is the mean of the ranks by
    self-influence, loss and margin, and the report says so.

    For a linear predictor the loss of a row after training with another label is that of the outputs that minimise this
    loss and the rest of the objective, to second order around the fit without the row: exact for squared loss, within a
    few hundredths of a nat of a refit for other smooth losses, and coarser for hinges. Other models, and curvatures or
    solvers that are no more than estimates, are taken to first order, which chooses nothing: the label is the one that
    costs least now, if that is less than the present label would cost without the row, and the loss after training is
    at least 0. A network that has learnt its rows by heart fits any label, so there present labels stay.

    Cost: `of_self()` of all rows, and for every row to inspect K linear systems, K the outputs; two for other models.
    Without `by` also one training, `of_self()` and `scores` for each planting, on the workers of
    `joblib.parallel_config` where there are some.

    Args:
        influence: of a classifier, of any number of classes.
        inspect: the share of the rows to inspect, a float up to 1.0 for all; or their number, a whole number.
        by: the score whose order is taken: "self-influence", "loss", "margin", "mean-rank", or one of `scores`; None
            takes the one that finds most planted flips.
        scores: from an influence to further scores by name, (n,) numbers each, larger is more suspicious; asked again
            for each planting, so it must follow the influence's labels.
        plantings: how often labels are flipped and the model is trained; None takes 3, or for few rows as many as plant
            200 flips in all, at most 10.
        retrain: as for leave_one_out; here a module needs one that trains on edited rows, an object with
            `bind(influence)` such as LBFGS() or StackedTraining(…).
        candidates: the labels that a linear predictor tries for each row, those that cost least without it.
        seed: of the random order and of the planted flips.
        store: a folder that keeps what every planting told as soon as it is done, so that the same call goes on where
            it was stopped; None keeps nothing.

    Raises:
        InvalidInput: if `inspect` is no share and no number of rows, there is no score `by`, or `scores` gives others
            than n numbers by new names.
        UnsupportedModel: if the model's targets are no classes, or its outputs not one per class.
        StoreMismatch: if the folder holds the plantings of other work.
        WorkerError: if a training cannot be sent to a worker of joblib's, or the worker ends before it does.

    References: Koh & Liang (2017), section 5.4.

    >>> from sklearn.datasets import load_iris
    >>> from sklearn.linear_model import LogisticRegression
    >>> X, y = load_iris(return_X_y=True)
    >>> spoilt = y.copy()
    >>> spoilt[[10, 60, 110]] = [1, 2, 0]
    >>> found = repair(uw.explain(LogisticRegression(tol=1e-8, max_iter=1000).fit(X, spoilt), X, spoilt), inspect=3)
    >>> found.suggestions()
    {110: 2, 60: 1, 10: 0}
    """
    labels, names = uw.training_labels(influence), uw.classes(influence)
    if labels is None or names is None:
        message = (
            f"The targets of {influence.objective.name} are no classes, so no label is wrong or right. Pass the "
            "influence of a classifier; for a regression look at influence.of_self() itself."
        )
        raise UnsupportedModel(message)
    checked_count(candidates, "candidates", hint="3 labels for each row")
    count = checked_share(inspect, influence.n)
    if plantings is not None:
        checked_count(plantings, "plantings", hint="each is a training, and 3 tell much")
    own = influence.of_self()
    known = _orders(influence, own, scores)

    def compare() -> Planted:
        orders = partial(_all_orders, more=scores)
        again = {"plantings": plantings, "retrain": retrain, "seed": seed, "store": store}
        return planted(influence, count, orders, list(known), **again)

    chosen, why, comparison = _choice(by, known, compare)
    rows = np.argsort(-known[chosen], kind="stable")[:count]
    present = np.array([names.index(label) for label in labels[rows].tolist()])
    best, gain = suggested(influence, rows, names, present, candidates)
    known[RANDOM] = np.random.default_rng(seed).random(influence.n)
    return Repair(
        rows,
        np.asarray(names)[best],
        gain,
        labels,
        known,
        own.certificate,
        chosen,
        why,
        comparison,
        influence.examples.ids,
    )


def _orders(
    influence: uw.Influence, own: uw.SelfScores, more: Callable[[uw.Influence], Orders] | None
) -> dict[str, Float[NDArray[np.float64], " n"]]:
    """The scores of all rows by the orders that may be chosen.

    Raises:
        InvalidInput: if an added one has no new name, or is not n numbers.
    """
    known = {
        SELF: own.values,
        LOSS: losses_of(influence, influence.examples),
        MARGIN: -uw.predict(influence, influence.examples).margins(uw.training_labels(influence)),
    }
    known[MEAN_RANK] = -np.mean([rankdata(-values, nan_policy="omit") for values in known.values()], axis=0)
    for name, values in ({} if more is None else more(influence)).items():
        added = np.asarray(values, dtype=np.float64)
        if name in {*known, RANDOM} or added.shape != (influence.n,) or np.isnan(added).any():
            message = (
                f"scores gave '{name}' with shape {added.shape} and {int(np.isnan(added).sum())} that are no numbers. "
                f"Give each a name that is not {', '.join([*known, RANDOM])}, and one number for each of the "
                f"{influence.n} rows, larger for those to look at first."
            )
            raise InvalidInput(message)
        known[name] = added
    return known


def _all_orders(influence: uw.Influence, more: Callable[[uw.Influence], Orders] | None) -> Orders:
    """The same of an influence that was not asked about itself yet."""
    return _orders(influence, influence.of_self(), more)


def _choice(by: str | None, known: Orders, compare: Callable[[], Planted]) -> tuple[str, str, Planted | None]:
    """The order that is taken, why, and what it was compared by.

    Raises:
        InvalidInput: if it was asked for and does not exist.
    """
    if by is not None:
        if by not in known:
            message = f"by={by!r} is no order of inspection; there are {', '.join(known)}. Name one, or leave it out: "
            raise InvalidInput(message + "then planted flips choose.")
        return by, "It was asked for.", None
    try:
        found = compare()
    except (StoreMismatch, WorkerError):
        raise
    except UpweightError as error:
        said = " ".join(str(error).split()).rstrip(".")
        return MEAN_RANK, f"The orders could not be compared: {said}. So the mean of their ranks is taken.", None
    return found.best, _told(found), found


def _told(found: Planted) -> str:
    """What the planted flips say, as a sentence."""
    share, low, high = found.share(found.best)
    return (
        f"Of {found.flips} labels flipped on purpose in {found.plantings} plantings it finds {share:.1%} among "
        f"{found.inspected} rows (95 % interval {low:.1%} to {high:.1%}); no order finds more."
    )


def checked_share(inspect: Any, n: int) -> int:
    """How many of n rows: a share such as 0.1, up to 1.0 for all of them, or a whole number such as 50.

    Raises:
        InvalidInput: if it is neither.
    """
    if isinstance(inspect, int | np.integer) and not isinstance(inspect, bool) and 1 <= inspect <= n:
        return int(inspect)
    if isinstance(inspect, float | np.floating) and 0 < inspect <= 1:
        return max(1, round(float(inspect) * n))
    message = (
        f"inspect={inspect!r}. It is a share of the rows, a float such as 0.1 and at most 1.0, or a number of rows, "
        f"a whole number from 1 to {n} such as {min(50, n)}."
    )
    raise InvalidInput(message)
