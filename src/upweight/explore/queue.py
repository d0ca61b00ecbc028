"""What is looked at next: the most suspicious rows, with random ones mixed in that nothing tells apart.

The random rows are controls. They say how many labels are wrong in the data, and against that the queue's own share of
wrong labels is worth something. They are blind: which places they take is drawn, and neither the page nor the position
says so before the row is decided.

Each control place takes exactly one draw of a random permutation of all rows. If that row stands in the queue already,
the draw counts all the same, and the place goes to the next suspicious row. So after any number of places the draws are
a random sample of a size that does not depend on what was found.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from upweight.errors import InvalidInput
from upweight.explore import intervals
from upweight.explore.entries import SKIP, Verdict
from upweight.explore.labels import Labels

RANDOM = "random"
ORDERS = ("self-influence", "loss", "margin", RANDOM)
BUDGET, CONTROLS = 100, 0.2
MOST = 100_000  # places


@dataclass(frozen=True)
class Queue:
    """Which rows are looked at, in which order.

    Args:
        by: the order: "self-influence", "loss", "margin" or "random".
        budget: how many rows somebody means to look at.
        controls: the share of places that are drawn at random.
        seed: of the places, the draws, and the random order.
    """

    by: str = ORDERS[0]
    budget: int = BUDGET
    controls: float = CONTROLS
    seed: int = 0

    def __post_init__(self) -> None:
        if self.by not in ORDERS:
            message = f"by={self.by!r} is no order of the queue; there are {', '.join(ORDERS)}. Name one of them."
            raise InvalidInput(message)
        if not (1 <= self.budget <= MOST and 0 <= self.controls <= 0.9 and self.seed >= 0):
            message = (
                f"budget={self.budget}, controls={self.controls}, seed={self.seed}. Pass a budget of 1 to {MOST:,} "
                "rows, controls from 0 to 0.9 as a share of it, and a seed ≥ 0."
            )
            raise InvalidInput(message)


@dataclass(frozen=True)
class Planned:
    """A queue, laid out.

    Args:
        rows: (places,) what is looked at, in this order; each row once.
        order: (k,) the suspicious rows that are in it, in their order.
        draws: (m,) the controls in the order of their drawing, also those that stand in the queue by themselves.
        ranked, drawn: (places + 1,) how many of `order` and of `draws` are among the first p places.
    """

    rows: NDArray[np.int64]
    order: NDArray[np.int64] = field(repr=False)
    draws: NDArray[np.int64] = field(repr=False)
    ranked: NDArray[np.int64] = field(repr=False)
    drawn: NDArray[np.int64] = field(repr=False)

    def reached(self, verdicts: Mapping[int, Verdict]) -> int:
        """How many places from the start on have been looked at without a gap."""
        return next((place for place, row in enumerate(self.rows.tolist()) if not _seen(verdicts, row)), len(self.rows))


def planned(queue: Queue, labels: Labels) -> Planned:
    """The places of a queue.

    Raises:
        InvalidInput: if the run does not hold the scores of that order.
    """
    draw = np.random.default_rng(queue.seed)
    draws, shuffled = draw.permutation(labels.n), draw.permutation(labels.n)
    kinds = draw.random(min(queue.budget, labels.n)) < queue.controls
    if queue.by == RANDOM:
        order = shuffled
    elif queue.by in labels.scores:
        order = _first(-labels.scores[queue.by], 2 * len(kinds))  # each place takes one, and passes over one at most
    else:
        message = (
            f"The run holds no {queue.by} of its rows; it has {', '.join([*labels.scores, RANDOM])}. Name one of "
            "these, or make the run again: uw.write_run(influence, folder, Xq, yq)."
        )
        raise InvalidInput(message)
    rows: list[int] = []
    taken: set[int] = set()
    ranked, drawn = [0], [0]
    next_ranked = next_drawn = 0
    for control in kinds.tolist():
        row = None
        if control:
            row, next_drawn = int(draws[next_drawn]), next_drawn + 1
        if row is None or row in taken:
            while int(order[next_ranked]) in taken:
                next_ranked += 1
            row = int(order[next_ranked])
        rows.append(row)
        taken.add(row)
        while next_ranked < len(order) and int(order[next_ranked]) in taken:
            next_ranked += 1
        ranked.append(next_ranked)
        drawn.append(next_drawn)
    found = (rows, order[:next_ranked], draws[:next_drawn], ranked, drawn)
    return Planned(*(np.asarray(part, dtype=np.int64) for part in found))


def _first(keys: NDArray[np.float64], count: int) -> NDArray[np.int64]:
    """The places of so many of the smallest keys, or of a few more, as a stable sort has them; NaN come last."""
    if count >= len(keys) or np.isnan(edge := np.partition(keys, count - 1)[count - 1]):
        return np.argsort(keys, kind="stable")
    few = np.flatnonzero(keys <= edge)
    return few[np.argsort(keys[few], kind="stable")]


@dataclass(frozen=True)
class Share:
    """How many of some rows were found wrong.

    Args:
        wrong: of those decided.
        decided: found right or wrong.
        skipped: could not be told.
        low, high: 95 % interval of the share (Clopper–Pearson).
    """

    wrong: int
    decided: int
    skipped: int
    low: float
    high: float

    @property
    def share(self) -> float | None:
        """Wrong ones of those decided; None where none was."""
        return self.wrong / self.decided if self.decided else None

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers."""
        return {**vars(self), "share": self.share}

    def __str__(self) -> str:
        if self.share is None:
            return "none decided yet"
        return f"{self.wrong} of {self.decided}: {self.share:.1%} (95 % interval {self.low:.1%} to {self.high:.1%})"


@dataclass(frozen=True)
class Progress:
    """How far a review has come, and what it says about the queue and about the data.

    Only places that were reached without a gap count, so that what was decided elsewhere cannot choose the sample. A
    row that is a control and suspicious too counts in both.

    Args:
        rows: of the data.
        places: of the queue: the budget.
        reached: of these.
        looked: of these, also behind a gap.
        queue: of the suspicious rows.
        controls: of the random ones.
        low, high: 95 % interval of how many labels of the data are wrong, by the controls (hypergeometric), at least
            those that were found.
        skipped: rows of either kind that could not be told, each once.
    """

    rows: int
    places: int
    reached: int
    looked: int
    queue: Share
    controls: Share
    low: int
    high: int
    skipped: int

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers, and what they say."""
        shares = {"queue": self.queue.to_dict(), "controls": self.controls.to_dict()}
        return {**vars(self), **shares, "says": self.says()}

    def says(self) -> list[str]:
        """What is known by now, in sentences."""
        lines = [f"{self.looked} of {self.places} looked at."]
        if self.queue.decided:
            lines.append(
                f"Of the suspicious rows {self.queue.wrong} of {self.queue.decided} were wrong: {_percent(self.queue)}."
            )
        if self.controls.decided:
            lines.append(
                f"Of the random rows among them {self.controls.wrong} of {self.controls.decided} were wrong: "
                f"{_percent(self.controls)}. So {self.low:,} to {self.high:,} of all {self.rows:,} labels are."
            )
        elif self.queue.decided:
            lines.append("No random row was reached yet, so nothing is known about the rest of the data.")
        if self.queue.decided and self.controls.decided:
            lines.append(_compared(self.queue, self.controls))
        if self.skipped:
            lines.append(f"{self.skipped} could not be told; they count neither as right nor as wrong.")
        return lines


def progress(plan: Planned, verdicts: Mapping[int, Verdict], labels: Labels) -> Progress:
    """What the verdicts about a queue's rows say by now."""
    reached = plan.reached(verdicts)
    suspicious, random = plan.order[: plan.ranked[reached]], plan.draws[: plan.drawn[reached]]
    queue, controls = _share(suspicious, verdicts), _share(random, verdicts)
    skipped = _share(np.union1d(suspicious, random), verdicts).skipped
    found = sum(one.wrong for one in verdicts.values())
    low, high = intervals.total(controls.wrong, controls.decided, labels.n)
    looked = sum(_seen(verdicts, row) for row in plan.rows.tolist())
    return Progress(
        labels.n, len(plan.rows), reached, looked, queue, controls, max(low, found), max(high, found), skipped
    )


def _share(rows: NDArray[np.int64], verdicts: Mapping[int, Verdict]) -> Share:
    known = [verdicts[row] for row in rows.tolist() if row in verdicts]
    wrong, decided = sum(one.wrong for one in known), sum(one.decided for one in known)
    return Share(wrong, decided, sum(one.action == SKIP for one in known), *intervals.share(wrong, decided))


def _seen(verdicts: Mapping[int, Verdict], row: int) -> bool:
    return row in verdicts and verdicts[row].action is not None


def _percent(share: Share) -> str:
    return f"{share.share:.1%}, with 95 % confidence {share.low:.1%} to {share.high:.1%}"


def _compared(queue: Share, controls: Share) -> str:
    if queue.low > controls.high:
        return f"So the queue finds at least {queue.low / controls.high:.1f} times what chance would."
    return "That is not yet enough to say that the queue finds more than chance would."
