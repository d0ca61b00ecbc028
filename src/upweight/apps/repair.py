"""Section 5.4: which labels to look at first, which label each should have, and what correcting them is worth.

A row whose label is wrong has been paid for: its loss would be much larger without it. Rows are ranked by that number,
their self-influence (1/n) ∇LᵢᵀH⁻¹∇Lᵢ; loss, margin and chance stand beside it, for they are what it has to beat.

For an inspected row the suggestion is the label c with the smallest loss of the row after training with c: L(xᵢ, c) now
plus what relabelling i to c does to it, −(1/n) ∇L(xᵢ, c)ᵀ(C + λI)⁻¹ (∇L(xᵢ, c) − ∇L(xᵢ, yᵢ)).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int, Shaped
from numpy.typing import NDArray

import upweight as uw
from upweight.errors import InvalidInput, UnsupportedModel, checked_count

BASELINES = ("loss", "margin", "random")
_BLOCK = 128  # rows whose relabelling is measured on one another, of which only the diagonal is needed


@dataclass(frozen=True)
class Repair:
    """Rows to inspect, a suggestion for each, and the order in which each score would inspect them.

    Args:
        rows: (k,) the rows to inspect, the largest self-influence first.
        suggested: (k,) the label suggested for each; the present one where no other is better.
        gain: (k,) by how much the row's own loss would fall with the suggested label, after training, in nats for log
            losses; 0 where the label stays.
        labels: (n,) present labels of all rows.
        scores: for "self-influence", "loss", "margin" and "random" (n,) numbers, larger is more suspicious.
        certificate: of the self-influence.
    """

    rows: Int[NDArray[np.int64], " k"]
    suggested: Shaped[NDArray[Any], " k"]
    gain: Float[NDArray[np.float64], " k"]
    labels: Shaped[NDArray[Any], " n"] = field(repr=False)
    scores: Mapping[str, Float[NDArray[np.float64], " n"]] = field(repr=False)
    certificate: uw.Certificate = field(repr=False)

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

    def suggestions(self) -> dict[int, Any]:
        """The suggested labels that differ from the present ones, by row."""
        changed = self.suggested != self.labels[self.rows]
        return dict(zip(self.rows[changed].tolist(), self.suggested[changed].tolist(), strict=True))

    def found(self, truth: Any) -> Found:
        """How many wrong labels were found, where the true ones are known.

        Args:
            truth: (n,) true labels.

        Raises:
            InvalidInput: if truth does not have n labels, or none is wrong.
        """
        true = np.asarray(truth)
        if true.shape != self.labels.shape:
            message = f"truth has shape {true.shape}, and there are {len(self.labels)} rows. Pass one label for each."
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
        )

    def __str__(self) -> str:
        lines = [
            f"{len(self.rows)} of {len(self.labels)} rows to inspect, {len(self.suggestions())} with another label "
            "suggested",
            f"{'row':>8} {'self-influence':>15} {'rank by loss':>13} {'by margin':>10}  label -> suggested",
        ]
        by_loss, by_margin = self.ranks("loss"), self.ranks("margin")
        for place, row in enumerate(self.rows[:20]):
            suggested = self.suggested[place]
            arrow = "stays" if suggested == self.labels[row] else f"-> {suggested}"
            lines.append(
                f"{row:>8} {self.scores['self-influence'][row]:>15.4g} {by_loss[place]:>13} {by_margin[place]:>10}  "
                f"{self.labels[row]} {arrow}"
            )
        return "\n".join([*lines, *([f"… and {len(self.rows) - 20} more"] if len(self.rows) > 20 else [])])

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
    """

    inspected: int
    wrong: int
    by: Mapping[str, int]
    needed: Mapping[str, int]
    suggested_right: float

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers."""
        return {
            "inspected": self.inspected,
            "wrong": self.wrong,
            "found": dict(self.by),
            "needed": dict(self.needed),
            "suggested_right": self.suggested_right,
        }

    def __str__(self) -> str:
        lines = [f"{self.wrong} wrong labels, {self.inspected} rows inspected"]
        for name, count in self.by.items():
            more = "" if name == "self-influence" else f"; as many as self-influence after {self.needed[name]} rows"
            lines.append(f"  {name:<15} finds {count} ({count / self.wrong:.0%}){more}")
        return "\n".join(
            [*lines, f"  the suggested label is the true one for {self.suggested_right:.0%} of those found"]
        )


def repair(influence: uw.Influence, *, inspect: float = 0.1, candidates: int = 3, seed: int = 0) -> Repair:
    """Which rows' labels to look at first, and the label that each should have.

    Cost: `of_self()` of all rows, and `candidates` linear systems for every row to inspect.

    Args:
        influence: of a classifier, of any number of classes.
        inspect: the share of the rows to inspect, or their number if it is a whole number ≥ 1.
        candidates: the labels considered for each row, those with the smallest loss.
        seed: of the random order.

    Raises:
        InvalidInput: if `inspect` is no share and no number of rows.
        UnsupportedModel: if the model's targets are no classes.

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
    outputs = uw.predict(influence, influence.examples).outputs
    scores = {
        "self-influence": own.values,
        "loss": _losses(influence, influence.examples),
        "margin": -_margins(outputs, np.array([names.index(label) for label in labels.tolist()])),
        "random": np.random.default_rng(seed).random(influence.n),
    }
    rows = np.argsort(-own.values, kind="stable")[:count]
    suggested, gain = _suggested(influence, rows, names, labels, min(candidates, len(names)))
    return Repair(rows, suggested, gain, labels, scores, own.certificate)


def checked_share(inspect: Any, n: int) -> int:
    """How many of n rows: a share such as 0.1, or a whole number.

    Raises:
        InvalidInput: if it is neither.
    """
    number = isinstance(inspect, int | float | np.integer | np.floating) and not isinstance(inspect, bool)
    if number and float(inspect) >= 1 and float(inspect) == int(inspect) and inspect <= n:
        return int(inspect)
    if number and 0 < inspect < 1:
        return max(1, round(float(inspect) * n))
    message = f"inspect={inspect!r}. It is a share of the rows, such as 0.1, or a number of rows from 1 to {n}."
    raise InvalidInput(message)


def _suggested(
    influence: uw.Influence, rows: NDArray[np.int64], names: list[Any], labels: NDArray[Any], count: int
) -> tuple[NDArray[Any], NDArray[np.float64]]:
    """For every row the label with the smallest loss after training with it, and how much smaller that is."""
    present = np.array([names.index(label) for label in labels[rows].tolist()])
    now = np.stack([_losses(influence, _relabelled(influence, rows, [name] * len(rows))) for name in names], 1)
    held = now[np.arange(len(rows)), present]
    after = np.full(now.shape, np.inf)
    after[np.arange(len(rows)), present] = held
    for start in range(0, len(rows), _BLOCK):
        block = np.arange(start, min(start + _BLOCK, len(rows)))
        tried = np.argsort(now[block], 1, kind="stable")[:, :count]
        for column in tried.T:
            new = [names[c] for c in column]
            asked = _relabelled(influence, rows[block], new)
            change = np.diag(influence.of_relabeling(rows[block], new, on=asked).values)
            own = column == present[block]
            after[block, column] = np.where(own, held[block], now[block, column] + change)
    best = after.argmin(1)
    return np.asarray(names)[best], held - after[np.arange(len(rows)), best]


def _relabelled(influence: uw.Influence, rows: NDArray[np.int64], names: list[Any]) -> uw.Examples:
    """These training rows with other labels, as queries."""
    return influence.examples.relabelled(rows, influence.encoder.targets(np.asarray(names)))


def _losses(influence: uw.Influence, examples: uw.Examples) -> NDArray[np.float64]:
    """The loss of every example now."""
    objective = influence.objective.reporting()
    parts = [uw.calculus.losses(objective, block.batch(slice(None))).double() for block in examples.blocks(4096)]
    return torch.cat(parts).cpu().numpy()


def _margins(outputs: NDArray[np.float64], codes: NDArray[np.int64]) -> NDArray[np.float64]:
    """The output of the label minus the largest other one; of a single output ± itself."""
    if outputs.shape[1] == 1:
        return np.where(codes == 1, 1.0, -1.0) * outputs[:, 0]
    if outputs.shape[1] <= codes.max():
        message = (
            f"{outputs.shape[1]} outputs for {codes.max() + 1} classes, as one-vs-one machines have, give no margin. "
        )
        raise UnsupportedModel(message + "Use LogisticRegression or LinearSVC.")
    own = outputs[np.arange(len(codes)), codes]
    others = np.where(np.arange(outputs.shape[1]) == codes[:, None], -np.inf, outputs)
    return own - others.max(1)
