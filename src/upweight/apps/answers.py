"""What `contrast` says about each wrong prediction, and about all of them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from jaxtyping import Int, Shaped
from numpy.typing import NDArray

from upweight.apps import notebook
from upweight.apps.names import listed, names_in_json, plain, short

_SHOWN = 20  # answers in a text


@dataclass(frozen=True)
class Answer:
    """The set for one query. Margins are the largest output of another class minus that of the right one: < 0 is right.

    Args:
        query: its number among the queries.
        label: what the model says now.
        wanted: the label that was asked for.
        rows: (k,) training rows, the strongest first; none if no set within the limit is predicted to be enough, or
            training again with nothing changed is.
        labels: (k,) their labels before.
        margin: now.
        control: the margin after training again with nothing changed; NaN if that failed.
        alone: what the model says that was trained again with nothing changed; None if that failed.
        predicted: predicted margin after the change; with no rows, after the largest set that was tried.
        actual: the margin after training again with the change; NaN if that was not done.
        after: what that model says, None if it was not trained.
        grown: a larger set that really corrects, found with further refits; None if it was not asked for or found.
        refused: why training again failed, "" if it did not.
        ids: (n,) names of all training rows, None where they have none.
        query_id: the name of the query, None where it has none.

    >>> from sklearn.linear_model import LogisticRegression
    >>> import upweight as uw
    >>> X, y = [[0.0], [1.0], [2.0], [3.0], [4.0], [5.0]], [0, 0, 1, 0, 1, 1]
    >>> influence = uw.explain(LogisticRegression(tol=1e-8).fit(X, y), X, y)
    >>> answer = uw.apps.contrast(influence, ([[2.0]], [1])).answers[0]
    >>> int(answer.label), int(answer.wanted), answer.rows, int(answer.after)
    (0, 1, array([0]), 1)
    >>> round(answer.margin, 2), round(answer.predicted, 2), round(answer.actual, 2)  # < 0 is right
    (0.38, -0.61, -0.61)
    """

    query: int
    label: Any
    wanted: Any
    rows: Int[NDArray[np.int64], " k"]
    labels: list[Any] = field(repr=False)
    margin: float
    control: float
    alone: Any
    predicted: float
    actual: float
    after: Any
    grown: Int[NDArray[np.int64], " m"] | None = None
    refused: str = ""
    ids: Shaped[NDArray[Any], " n"] | None = field(default=None, repr=False)
    query_id: Any = None

    @property
    def corrected_alone(self) -> bool:
        """Whether training again with nothing changed corrects the prediction."""
        return bool(self.alone is not None and self.alone == self.wanted)

    @property
    def corrected(self) -> bool:
        """Whether the predicted set really corrects the prediction, and training again alone does not."""
        return bool(self.after is not None and self.after == self.wanted) and not self.corrected_alone

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain numbers, lists and text."""
        return {
            "query": self.query,
            "label": str(self.label),
            "wanted": str(self.wanted),
            "rows": self.rows.tolist(),
            "labels": [str(label) for label in self.labels],
            "margin": self.margin,
            "control": self.control,
            "alone": None if self.alone is None else str(self.alone),
            "corrected_alone": self.corrected_alone,
            "predicted": self.predicted,
            "actual": self.actual,
            "after": None if self.after is None else str(self.after),
            "corrected": self.corrected,
            "grown": None if self.grown is None else self.grown.tolist(),
            "refused": self.refused,
            **names_in_json(self.ids, self.rows),
            **({} if self.grown is None else names_in_json(self.ids, self.grown, "grown_ids")),
            **({} if self.query_id is None else {"query_id": plain(self.query_id)}),
        }


@dataclass(frozen=True)
class Contrast:
    """For every wrong prediction the smallest set of changes predicted to correct it, and what they really did.

    Args:
        change: what is done to a row, in words.
        answers: one for every query that is wrong; queries that are right have none.
    """

    change: str
    answers: tuple[Answer, ...] = field(repr=False)

    @property
    def corrected(self) -> int:
        """How many predictions their sets really correct, where training again with nothing changed does not."""
        return sum(answer.corrected for answer in self.answers)

    @property
    def corrected_alone(self) -> int:
        """How many predictions training again with nothing changed corrects: the control."""
        return sum(answer.corrected_alone for answer in self.answers)

    @property
    def corrected_rate(self) -> float:
        """`corrected` as a share of the wrong predictions that the control leaves wrong; NaN if it leaves none."""
        left = len(self.answers) - self.corrected_alone
        return self.corrected / left if left else float("nan")

    @property
    def sizes(self) -> Int[NDArray[np.int64], " q"]:
        """How many rows each set has; 0 where none is enough."""
        return np.array([len(answer.rows) for answer in self.answers])

    @property
    def median_set_size(self) -> float:
        """The median size of the sets, where there is one; NaN where there is none."""
        found = self.sizes[self.sizes > 0]
        return float(np.median(found)) if len(found) else float("nan")

    @property
    def calibration(self) -> float:
        """The median of actual over predicted change of the margin, both from the control's.

        1 is right; NaN where nothing was trained.
        """
        ratios = [(a.actual - a.control) / (a.predicted - a.control) for a in self.answers if np.isfinite(a.actual)]
        return float(np.median(ratios)) if ratios else float("nan")

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain numbers, lists and text."""
        return {
            "change": self.change,
            "queries": len(self.answers),
            "corrected": self.corrected,
            "corrected_alone": self.corrected_alone,
            "corrected_rate": self.corrected_rate,
            "median_set_size": self.median_set_size,
            "calibration": self.calibration,
            "answers": [answer.to_dict() for answer in self.answers],
        }

    def __str__(self) -> str:
        more = [f"  … and {len(self.answers) - _SHOWN} more"] if len(self.answers) > _SHOWN else []
        return "\n".join([self._told, *(_said(answer) for answer in self.answers[:_SHOWN]), *more])

    def _repr_html_(self) -> str:
        head = ["query", "says", "rows", "margin now", "nothing changed", "predicted", "really", "outcome"]
        return notebook.shown(
            notebook.table(f"Contrast: {self.change}", head, map(_cells, self.answers)), said=[self._told]
        )

    @property
    def _told(self) -> str:
        """How many there are and what became of them, in a sentence."""
        left = len(self.answers) - self.corrected_alone
        rate = f" ({self.corrected_rate:.0%})" if left else ""
        failed = any(answer.alone is None for answer in self.answers)
        control = (
            "there is no control, for training again with nothing changed failed"
            if failed
            else f"control: training again with nothing changed corrects {self.corrected_alone} of {len(self.answers)}"
        )
        return (
            f"{len(self.answers)} wrong predictions, {self.change}: {self.corrected} of {left}{rate} are really "
            f"corrected after training again ({control}); median set {self.median_set_size:g} rows; actual over "
            f"predicted change of the margin {self.calibration:.2f}"
        )


def _cells(answer: Answer) -> list[str]:
    """One query's answer as a line of a table."""
    query = answer.query if answer.query_id is None else short(answer.query_id)
    if answer.corrected_alone:
        outcome = "corrected with nothing changed"
    elif not len(answer.rows):
        outcome = "no set is predicted to be enough"
    else:
        outcome = "corrected" if answer.corrected else f"NOT confirmed: {answer.refused or answer.after}"
    grown = "" if answer.grown is None else f"; {len(answer.grown)} rows do"
    margins = (answer.margin, answer.control, answer.predicted, answer.actual)
    return [
        notebook.plain(query),
        notebook.plain(f"{answer.label} instead of {answer.wanted}"),
        notebook.plain(f"{len(answer.rows)}: {listed(answer.ids, answer.rows, 6)}" if len(answer.rows) else "none"),
        *(notebook.plain(margin, "+.3g") for margin in margins),
        notebook.plain(outcome + grown),
    ]


def _said(answer: Answer) -> str:
    """One query's answer, in words."""
    query = answer.query if answer.query_id is None else short(answer.query_id)
    head = f"  query {query}, {answer.label} instead of {answer.wanted}: "
    if answer.corrected_alone:
        return head + (
            f"0 rows; training again with nothing changed corrects it, margin {answer.margin:+.3g}, then "
            f"{answer.control:+.3g}"
        )
    if not len(answer.rows):
        return head + "no set within the limit is predicted to be enough"
    outcome = "really corrected" if answer.corrected else f"NOT confirmed: {answer.refused or answer.after}"
    more = "" if answer.grown is None else f"; {len(answer.grown)} rows do"
    rows = f"{len(answer.rows)} row{'' if len(answer.rows) == 1 else 's'} ({listed(answer.ids, answer.rows, 6)})"
    return head + (
        f"{rows}; margin {answer.margin:+.3g}, with nothing changed {answer.control:+.3g}, "
        f"predicted {answer.predicted:+.3g}, actual {answer.actual:+.3g}; {outcome}{more}"
    )
