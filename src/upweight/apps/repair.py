"""Section 5.4: which labels to look at first, which label each should have, and what correcting them is worth.

A row whose label is wrong has been paid for: its loss would be much larger without it. Rows are ranked by that number,
their self-influence (1/n) ∇LᵢᵀH⁻¹∇Lᵢ; loss, margin and chance stand beside it, for they are what it has to beat.

For an inspected row the suggestion is the label with the smallest loss of the row after training with it, as worked out
in `suggestions`. A row of large self-influence is one that the model would call otherwise without it, so most of those
inspected are told to change, the right ones too: a suggestion is a question to a person, not a correction.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from jaxtyping import Float, Int, Shaped
from numpy.typing import NDArray

import upweight as uw
from upweight.apps.mean_loss import losses_of
from upweight.apps.names import name_in_text, names_in_json
from upweight.apps.suggestions import suggested
from upweight.errors import InvalidInput, UnsupportedModel, checked_count


@dataclass(frozen=True)
class Repair:
    """Rows to inspect, a suggestion for each, and the order in which each score would inspect them.

    Args:
        rows: (k,) the rows to inspect, the largest self-influence first.
        suggested: (k,) the label suggested for each; the present one where no other saves a hundredth of its loss.
        gain: (k,) by how much the row's own loss would fall with the suggested label, after training, in nats for log
            losses, so at most the loss now where losses are ≥ 0; 0 where the label stays.
        labels: (n,) present labels of all rows.
        scores: for "self-influence", "loss", "margin" and "random" (n,) numbers, larger is more suspicious.
        certificate: of the self-influence.
        ids: (n,) names of all rows, None where they have none.
    """

    rows: Int[NDArray[np.int64], " k"]
    suggested: Shaped[NDArray[Any], " k"]
    gain: Float[NDArray[np.float64], " k"]
    labels: Shaped[NDArray[Any], " n"] = field(repr=False)
    scores: Mapping[str, Float[NDArray[np.float64], " n"]] = field(repr=False)
    certificate: uw.Certificate = field(repr=False)
    ids: Shaped[NDArray[Any], " n"] | None = field(default=None, repr=False)

    def order(self, score: str) -> Int[NDArray[np.int64], " n"]:
        """All rows in the order in which a score would inspect them.

        Raises:
            InvalidInput: if there is no such score.
        """
        if score not in self.scores:
            message = f"There is no score '{score}'; there are {', '.join(self.scores)}."
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
        target = curves["self-influence"][inspected - 1]
        needed = {name: int(np.searchsorted(curve, target)) + 1 for name, curve in curves.items()}
        return Found(
            inspected,
            int(wrong.sum()),
            {name: int(curve[inspected - 1]) for name, curve in curves.items()},
            needed,
            float(right.mean()) if len(right) else float("nan"),
            int((self.suggested != self.labels[self.rows])[~hit].sum()),
        )

    def __str__(self) -> str:
        told = len(self.suggestions())
        lines = [
            f"{len(self.rows)} of {len(self.labels)} rows to inspect, {told} with another label suggested",
            f"{'row':>8} {'self-influence':>15} {'rank by loss':>13} {'by margin':>10} {'gain':>8}  label -> suggested",
        ]
        by_loss, by_margin = self.ranks("loss"), self.ranks("margin")
        for place, row in enumerate(self.rows[:20]):
            suggested = self.suggested[place]
            arrow = "stays" if suggested == self.labels[row] else f"-> {suggested}"
            lines.append(
                f"{row:>8} {self.scores['self-influence'][row]:>15.4g} {by_loss[place]:>13} {by_margin[place]:>10} "
                f"{self.gain[place]:>8.3g}  {self.labels[row]} {arrow}{name_in_text(self.ids, row)}"
            )
        if len(self.rows) > 20:
            lines.append(f"… and {len(self.rows) - 20} more")
        if told == len(self.rows):
            lines.append("Every one is told to change. That says that the model would call each otherwise without it,")
            lines.append("not that its label is wrong: look at each, first at those that gain most, or inspect more.")
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """The rows to inspect as plain numbers and lists."""
        return {
            "inspected": len(self.rows),
            "rows": self.rows.tolist(),
            "labels": self.labels[self.rows].tolist(),
            "suggested": self.suggested.tolist(),
            "gain": self.gain.tolist(),
            "self_influence": self.scores["self-influence"][self.rows].tolist(),
            "rank_by_loss": self.ranks("loss").tolist(),
            "rank_by_margin": self.ranks("margin").tolist(),
            **names_in_json(self.ids, self.rows),
        }


@dataclass(frozen=True)
class Found:
    """How many wrong labels inspection finds.

    Args:
        inspected: rows that were inspected.
        wrong: how many labels are wrong in all.
        by: for every score, how many of them are among its first `inspected` rows.
        needed: for every score, how many rows it has to inspect to find as many as self-influence did.
        suggested_right: the share of the wrong labels found whose suggestion is the true label.
        right_told: how many inspected rows are told to change though their label is right.
    """

    inspected: int
    wrong: int
    by: Mapping[str, int]
    needed: Mapping[str, int]
    suggested_right: float
    right_told: int

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers."""
        return {
            "inspected": self.inspected,
            "wrong": self.wrong,
            "found": dict(self.by),
            "needed": dict(self.needed),
            "suggested_right": self.suggested_right,
            "right_told": self.right_told,
        }

    def __str__(self) -> str:
        lines = [f"{self.wrong} wrong labels, {self.inspected} rows inspected"]
        for name, count in self.by.items():
            more = "" if name == "self-influence" else f"; as many as self-influence after {self.needed[name]} rows"
            lines.append(f"  {name:<15} finds {count} ({count / self.wrong:.0%}){more}")
        lines.append(f"  the suggested label is the true one for {self.suggested_right:.0%} of those found")
        right = self.inspected - self.by["self-influence"]
        lines.append(f"  {self.right_told} right labels of the {right} inspected are told to change too")
        return "\n".join(lines)


def repair(influence: uw.Influence, *, inspect: float = 0.1, candidates: int = 10, seed: int = 0) -> Repair:
    """Which rows' labels to look at first, and the label that each should have.

    For a linear predictor the loss of a row after training with another label is that of the outputs that minimise this
    loss and the rest of the objective, to second order around the fit without the row: exact for squared loss, within a
    few hundredths of a nat of a refit for other smooth losses, and coarser for hinges. Other models, and curvatures or
    solvers that are no more than estimates, are taken to first order, which chooses nothing: the label is the one that
    costs least now, if that is less than the present label would cost without the row, and the loss after training is
    at least 0. A network that has learnt its rows by heart fits any label, so there present labels stay.

    Cost: `of_self()` of all rows, and for every row to inspect K linear systems, K the outputs; two for other models.

    Args:
        influence: of a classifier, of any number of classes.
        inspect: the share of the rows to inspect, a float up to 1.0 for all; or their number, a whole number.
        candidates: the labels that a linear predictor tries for each row, those that cost least without it.
        seed: of the random order.

    Raises:
        InvalidInput: if `inspect` is no share and no number of rows.
        UnsupportedModel: if the model's targets are no classes, or its outputs not one per class.

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
    own = influence.of_self()
    scores = {
        "self-influence": own.values,
        "loss": losses_of(influence, influence.examples),
        "margin": -uw.predict(influence, influence.examples).margins(labels),
        "random": np.random.default_rng(seed).random(influence.n),
    }
    rows = np.argsort(-own.values, kind="stable")[:count]
    present = np.array([names.index(label) for label in labels[rows].tolist()])
    best, gain = suggested(influence, rows, names, present, candidates)
    return Repair(rows, np.asarray(names)[best], gain, labels, scores, own.certificate, influence.examples.ids)


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
