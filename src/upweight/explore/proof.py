"""The proof that corrections helped: the same queries before and after a training on the corrected labels.

    run/proof-000042.json    after entry 42 of the log: what the training changed

Training again may do something by itself, so the model trained on the corrected labels is compared with one that was
trained again with nothing changed. Both answer the same queries, so only those that flipped say anything.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from upweight.errors import Damaged, InvalidInput, first_line
from upweight.explore import intervals
from upweight.explore.labels import Label
from upweight.runs.files import write_file

FORMAT = 1
LARGEST = 50 * 2**20  # bytes of a proof that is read
MOST_FLIPS = 10_000  # that are listed


@dataclass(frozen=True)
class Flip:
    """A query whose answer is another one after the corrections.

    Args:
        query: its number.
        label: the right one.
        before, after: what the model says without and with the corrections.
        loss_before, loss_after: its loss.
    """

    query: int
    label: Label
    before: Label
    after: Label
    loss_before: float | None
    loss_after: float | None

    @property
    def kind(self) -> str:
        """gained: it is right now; lost: it was right; other: wrong before and after."""
        return "gained" if self.after == self.label else "lost" if self.before == self.label else "other"


@dataclass(frozen=True)
class Proof:
    """What corrections did to the answers to a run's queries.

    Args:
        work: the run.
        entry: the last entry of the log that was taken in.
        at: when it was made, in UTC.
        relabelled, dropped: how many rows were corrected.
        queries: how many there are.
        right: how many are answered rightly: by the run's model, by the one trained again with nothing changed
            ("control"), and with the corrections ("after").
        gained, lost: how many were wrong in the control and are right now, and the other way round.
        low, high: 95 % interval of the difference of the accuracies, for other queries of the same kind (Tango).
        p: of McNemar's exact test.
        losses: mean loss by the three models, None where one query's is not finite.
        loss_low, loss_high: 95 % interval of the change of the mean loss (paired t).
        flips: the queries whose answers changed.
    """

    work: str
    entry: int
    at: str
    relabelled: int
    dropped: int
    queries: int
    right: Mapping[str, int]
    gained: int
    lost: int
    low: float
    high: float
    p: float
    losses: Mapping[str, float | None]
    loss_low: float | None
    loss_high: float | None
    flips: Sequence[Flip] = field(repr=False)

    def accuracy(self, model: str) -> float:
        """The share of the queries that a model answers rightly."""
        return self.right[model] / self.queries

    @property
    def difference(self) -> float:
        """The accuracy with the corrections, less that of the control."""
        return (self.gained - self.lost) / self.queries

    def says(self) -> str:
        """What was found, in a sentence or two."""
        lead = (
            f"Accuracy {self.accuracy('control'):.2%} → {self.accuracy('after'):.2%} on {self.queries:,} queries: "
            f"{self.gained} became right and {self.lost} wrong, {100 * self.difference:+.2f} points "
            f"(95 % interval {100 * self.low:+.2f} to {100 * self.high:+.2f})."
        ).replace("-", "−")
        if self.low > 0:
            return f"{lead} The corrections helped.{self._of_loss()}"
        if self.high < 0:
            return f"{lead} The corrections did harm.{self._of_loss()}"
        return f"{lead} That may be chance: ask more queries, or correct more rows.{self._of_loss()}"

    def _of_loss(self) -> str:
        """What the mean loss says beside the accuracy, where it is known to have changed."""
        before, after = self.losses["control"], self.losses["after"]
        low, high = self.loss_low, self.loss_high
        if before is None or after is None or low is None or high is None or low <= 0 <= high:
            return ""
        told = f"{low:+.3g} to {high:+.3g}".replace("-", "−")
        return f" The mean loss {'rose' if low > 0 else 'fell'}, {before:.4f} → {after:.4f} (95 % interval {told})."

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers, and what they say."""
        flips = [{**asdict(one), "kind": one.kind} for one in self.flips]
        shares = {name: self.accuracy(name) for name in self.right}
        return {**vars(self), "flips": flips, "accuracy": shares, "difference": self.difference, "says": self.says()}

    def __str__(self) -> str:
        models = {"before": "the run's model", "control": "trained again, nothing changed", "after": "corrected"}
        lines = [f"{self.relabelled} labels corrected, {self.dropped} rows dropped", ""]
        lines += [f"{'':<32} {'accuracy':>9} {'mean loss':>10}"]
        means = {key: "–" if loss is None else f"{loss:.4f}" for key, loss in self.losses.items()}
        lines += [f"{told:<32} {self.accuracy(key):>9.2%} {means[key]:>10}" for key, told in models.items()]
        return "\n".join([*lines, "", self.says(), f"McNemar's exact p = {self.p:.3g}"])


@dataclass(frozen=True)
class Answers:
    """What a model says about the queries.

    Args:
        labels: (q,) its answers.
        losses: (q,) of each.
    """

    labels: NDArray[Any]
    losses: NDArray[np.float64]


def proof(
    truth: NDArray[Any], before: Answers, control: Answers, after: Answers, **told: Any
) -> Proof:  # fmt: skip
    """What was found, from the answers of three models.

    Args:
        truth: (q,) the right labels.
        before: of the run's model.
        control: of the one trained again with nothing changed.
        after: of the one trained on the corrected labels.
        told: work, entry, at, relabelled, dropped.
    """
    models = {"before": before, "control": control, "after": after}
    right = {name: np.asarray(one.labels == truth) for name, one in models.items()}
    gained = int((right["after"] & ~right["control"]).sum())
    lost = int((right["control"] & ~right["after"]).sum())
    low, high = intervals.difference(gained, lost, len(truth))
    with np.errstate(invalid="ignore"):  # two losses without end differ by no number
        loss_low, loss_high = _change(after.losses - control.losses)
    flipped = np.flatnonzero(control.labels != after.labels)[:MOST_FLIPS].tolist()
    flips = [
        Flip(
            query,
            _plain(truth[query]),
            _plain(control.labels[query]),
            _plain(after.labels[query]),
            _finite(control.losses[query]),
            _finite(after.losses[query]),
        )
        for query in flipped
    ]
    return Proof(
        queries=len(truth),
        right={name: int(one.sum()) for name, one in right.items()},
        gained=gained,
        lost=lost,
        low=low,
        high=high,
        p=intervals.mcnemar(gained, lost),
        losses={name: _finite(one.losses.mean()) for name, one in models.items()},
        loss_low=loss_low,
        loss_high=loss_high,
        flips=flips,
        **told,
    )


def write(found: Proof, folder: Path) -> Path:
    """The proof as a file of the run; one of the same reviews is replaced."""
    file = folder / f"proof-{found.entry:06d}.json"
    plain = {"format": FORMAT, **vars(found), "flips": [asdict(one) for one in found.flips]}
    write_file(file, json.dumps(plain, allow_nan=False).encode())
    return file


def read(folder: Path, work: str) -> tuple[list[Proof], list[str]]:
    """The proofs of a run, the newest last; and of each file that is none of this run's why it is left out."""
    found, refused = [], []
    for file in sorted(folder.glob("proof-*.json")):
        try:
            found.append(opened(file, work))
        except Damaged as error:
            refused.append(str(error))
    return found, refused


def opened(file: Path, work: str) -> Proof:
    """The proof in a file.

    Raises:
        Damaged: if it is none, or another run's.
    """
    try:
        if file.is_symlink() or file.stat().st_size > LARGEST:
            _say("it is a link, or too large")
        told = json.loads(file.read_text(encoding="utf-8"))
        if told.pop("format") != FORMAT or told["work"] != work:
            _say("it belongs to another run, or another version")
        flips = [Flip(**one) for one in told.pop("flips")]
        found = Proof(**told, flips=flips)
        _compare(found)
        str(found)
    except (ValueError, TypeError, LookupError, AttributeError, ArithmeticError, RecursionError) as error:
        message = (
            f"{file} is no proof of this run ({first_line(error)}). Delete it, and make it again: upweight prove STUDY "
            "--run RUN."
        )
        raise Damaged(message) from error
    return found


def _compare(found: Proof) -> None:
    """Raises unless the numbers of a proof follow from each other."""
    ends = intervals.difference(found.gained, found.lost, found.queries)
    right = found.right["after"] - found.right["control"]
    whole = all(isinstance(one.query, int) and 0 <= one.query < found.queries for one in found.flips)
    if right != found.gained - found.lost or not whole or not np.allclose(ends, (found.low, found.high)):
        _say("its numbers do not follow from each other")


def _say(reason: str) -> None:
    """Raises with a reason.

    Raises:
        InvalidInput: always.
    """
    raise InvalidInput(reason)


def _change(differences: NDArray[np.float64]) -> tuple[float | None, float | None]:
    """The 95 % interval of a mean, by Student's t."""
    from scipy.stats import t

    if len(differences) < 2 or not np.isfinite(differences).all():
        return None, None
    half = float(
        t.ppf((1 + intervals.LEVEL) / 2, len(differences) - 1) * differences.std(ddof=1) / math.sqrt(len(differences))
    )
    return float(differences.mean()) - half, float(differences.mean()) + half


def _plain(label: Any) -> Label:
    plain = label.item() if isinstance(label, np.generic) else label
    return plain if isinstance(plain, str | int | float) and not isinstance(plain, bool) else str(plain)


def _finite(value: Any) -> float | None:
    return float(value) if math.isfinite(value) else None
