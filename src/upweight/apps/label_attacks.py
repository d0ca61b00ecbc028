"""Section 5.2 for discrete data: which few labels, or which examples of a pool, would turn an answer?

    flip_labels    the label changes that raise the queries' loss most (equation 3 with the same x), one after the other
    replace_rows   the training rows replaced by examples of a pool (equation 3), one after the other

Greedy: after every change the model is really trained again, and the next change is chosen there.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int, Shaped
from numpy.typing import NDArray
from tqdm import tqdm

import upweight as uw
from upweight.apps.attack import accuracies, newly_wrong
from upweight.errors import InvalidInput, UnsupportedModel, checked_count

_FEW = 8  # of the best rows, and of the best examples of a pool, whose pairs are compared


@dataclass(frozen=True)
class Edits:
    """Discrete changes of the training data, made one after the other, each followed by training again.

    Args:
        what: "label changed" or "row replaced".
        rows: (m,) the changed training rows, in their order.
        old: (m,) their labels before.
        new: (m,) their labels after.
        pool_rows: (m,) which examples of the pool replaced them; None for labels.
        losses: (m + 1,) mean loss of the queries at the start and after every change.
        predicted: (m,) predicted change of that loss by each change, at the model before it.
        targets: (q,) true labels of the queries.
        said_before: (q,) labels that the model gave them.
        said_after: (q,) labels that the model gives them after the last change.
        accuracy: of the test rows, before and after; None if there were none.
        newly_wrong: training rows that the model called right before, and calls wrong after, by their own labels.
        model: the influence of the last model, on the changed data.
    """

    what: str
    rows: Int[NDArray[np.int64], " m"]
    old: Shaped[NDArray[Any], " m"]
    new: Shaped[NDArray[Any], " m"]
    pool_rows: Int[NDArray[np.int64], " m"] | None
    losses: Float[NDArray[np.float64], " m_plus_1"]
    predicted: Float[NDArray[np.float64], " m"]
    targets: Shaped[NDArray[Any], " q"]
    said_before: Shaped[NDArray[Any], " q"]
    said_after: Shaped[NDArray[Any], " q"]
    accuracy: tuple[float, float] | None
    newly_wrong: Int[NDArray[np.int64], " w"]
    model: uw.Influence = field(repr=False)

    @property
    def flipped(self) -> Bool[NDArray[np.bool_], " q"]:
        """Which queries the model called right before, and the last model calls wrong."""
        return (self.said_before == self.targets) & (self.said_after != self.targets)

    def __str__(self) -> str:
        lines = [
            f"{len(self.rows)} times {self.what}, each followed by training again: flipped {self.flipped.sum()} of "
            f"{len(self.targets)} queries; mean loss {self.losses[0]:.4g} → {self.losses[-1]:.4g}.",
            "row     from      to        predicted   really",
        ]
        lines += [
            f"{row:<7} {old!s:<9} {new!s:<9} {predicted:<+11.3g} {really:+.3g}"
            for row, old, new, predicted, really in zip(
                self.rows, self.old, self.new, self.predicted, np.diff(self.losses), strict=True
            )
        ]
        if self.accuracy is not None:
            lines.append(f"Accuracy on the test rows {self.accuracy[0]:.4g} → {self.accuracy[1]:.4g}.")
        if len(self.newly_wrong):
            lines.append(f"Training rows that are now called wrong: {', '.join(map(str, self.newly_wrong[:10]))}.")
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain numbers, lists and text."""
        return {
            "what": self.what,
            "rows": self.rows.tolist(),
            "old": [str(label) for label in self.old],
            "new": [str(label) for label in self.new],
            "pool_rows": None if self.pool_rows is None else self.pool_rows.tolist(),
            "losses": self.losses.tolist(),
            "predicted": self.predicted.tolist(),
            "queries": len(self.targets),
            "flipped": np.flatnonzero(self.flipped).tolist(),
            "accuracy": None if self.accuracy is None else list(self.accuracy),
            "newly_wrong": self.newly_wrong.tolist(),
        }


def flip_labels(
    influence: uw.Influence,
    on: Any,
    budget: int = 10,
    *,
    test: Any = None,
    retrain: Any = None,
    seed: int = 0,
    progress: bool | None = None,
) -> Edits:
    """The label changes that raise the queries' mean loss most, one after the other, until every query is flipped.

    Each of the other classes is tried for each row that was not changed yet (`of_relabeling`), and the model is trained
    again after every change.

    Cost: per change K − 1 sweeps, one linear system per query, and one training.

    Args:
        influence: of a classifier, at a minimum.
        on: (Xq, yq), the queries.
        budget: labels changed at most.
        test: (Xt, yt) other test rows, whose accuracy is told before and after.
        retrain: as for `retrained`.
        seed: of the retrainer.
        progress: True or False forces the bar (stderr) on or off; None shows it on a terminal only.

    Raises:
        UnsupportedModel: if targets are no classes.
        InvalidInput: if the budget is no positive whole number.

    References: Koh & Liang (2017), section 5.2 and equation 3.
    """
    names = _class_names(influence)

    def best(model: uw.Influence, free: NDArray[np.int64]) -> _Change:
        labels = uw.training_labels(model, free)
        found = [_Change(-1, None, None, -np.inf)]
        for name in names:
            rows = free[labels != name]
            if len(rows):
                values = model.of_relabeling(rows, np.full(len(rows), name), on=on).values.mean(0)
                found.append(_Change(int(rows[values.argmax()]), name, None, float(values.max())))
        return max(found, key=lambda change: change.value)

    def make(model: uw.Influence, change: _Change) -> uw.Influence:
        return uw.edited(model, [change.row], y_new=np.array([change.label]))

    return _greedy("label changed", influence, on, budget, best, make, test, retrain, seed, progress)


def replace_rows(
    influence: uw.Influence,
    pool: tuple[Any, Any],
    on: Any,
    budget: int = 10,
    *,
    test: Any = None,
    retrain: Any = None,
    seed: int = 0,
    progress: bool | None = None,
) -> Edits:
    """Training rows replaced by examples of a pool so that the queries' mean loss rises most, until all are flipped.

    Equation 3 for a row and a new example is what removing the row does plus what adding the example does, so the best
    few of each are paired, and the best pair by equation 3 itself is made. A row, and an example, is used once.

    Cost: per change two sweeps, two linear systems per query, and one training.

    Args:
        influence: of a classifier, at a minimum.
        pool: (Xp, yp), arrays of candidates with their labels.
        on: (Xq, yq), the queries.
        budget: rows replaced at most.
        test: (Xt, yt) other test rows, whose accuracy is told before and after.
        retrain: as for `retrained`.
        seed: of the retrainer.
        progress: True or False forces the bar (stderr) on or off; None shows it on a terminal only.

    Raises:
        UnsupportedModel: if targets are no classes.
        InvalidInput: if the budget is no positive whole number, or the pool is no pair of equally long arrays.

    References: Koh & Liang (2017), equation 3.
    """
    _class_names(influence)
    Xp, yp = _pool(pool)
    used: list[int] = []

    def best(model: uw.Influence, free: NDArray[np.int64]) -> _Change:
        unused = np.setdiff1d(np.arange(len(yp)), used)
        if not len(unused):
            return _Change(-1, None, None, -np.inf)
        removing = model.of_groups([[row] for row in free], on=on).values.mean(0)
        adding = model.of_adding(Xp[unused], yp[unused], on=on).values.mean(0)
        rows = free[np.argsort(-removing, kind="stable")[:_FEW]]
        new = unused[np.argsort(-adding, kind="stable")[:_FEW]]
        pairs = np.array([(row, j) for row in rows for j in new])
        values = model.of_replacing(pairs[:, 0], Xp[pairs[:, 1]], yp[pairs[:, 1]], on=on).values.mean(0)
        row, j = pairs[values.argmax()]
        return _Change(int(row), yp[j], int(j), float(values.max()))

    def make(model: uw.Influence, change: _Change) -> uw.Influence:
        j = change.pool_row
        assert j is not None  # `best` chose one
        used.append(j)
        return uw.edited(model, [change.row], X_new=Xp[[j]], y_new=yp[[j]])

    return _greedy("row replaced", influence, on, budget, best, make, test, retrain, seed, progress)


@dataclass(frozen=True)
class _Change:
    """One change: the row, its new label, the example of the pool it becomes, and the predicted rise of the loss."""

    row: int
    label: Any
    pool_row: int | None
    value: float


def _greedy(
    what: str,
    influence: uw.Influence,
    on: Any,
    budget: int,
    best: Any,
    make: Any,
    test: Any,
    retrain: Any,
    seed: int,
    progress: bool | None,
) -> Edits:
    """Choose a change, make it, train again; until all queries are wrong, no change helps, or the budget is spent."""
    checked_count(budget, "budget")
    targets, before = uw.query_labels(influence, on), _said(influence, on)
    assert targets is not None  # classes were asked for
    model, changes, losses = influence, [], [_loss(influence, on)]
    old: list[Any] = []
    bar = tqdm(range(budget), desc=what, disable=None if progress is None else not progress, leave=False)
    for _ in bar:
        if (_said(model, on) != targets).all():
            break
        change = best(model, np.setdiff1d(np.arange(influence.n), [done.row for done in changes]))
        if change.value <= 0:
            break
        old += uw.training_labels(model, [change.row]).tolist()  # type: ignore[union-attr]
        model = uw.retrained(make(model, change), retrain=retrain, seed=seed)
        changes.append(change)
        losses.append(_loss(model, on))
        bar.set_postfix(loss=f"{losses[-1]:.4g}")
    bar.close()
    return Edits(
        what=what,
        rows=np.array([change.row for change in changes], dtype=np.int64),
        old=np.array(old),
        new=np.array([change.label for change in changes]),
        pool_rows=None
        if what == "label changed"
        else np.array([change.pool_row for change in changes], dtype=np.int64),
        losses=np.array(losses),
        predicted=np.array([change.value for change in changes]),
        targets=targets,
        said_before=before,
        said_after=_said(model, on),
        accuracy=accuracies(influence, model, test),
        newly_wrong=newly_wrong(influence, model),
        model=model,
    )


def _said(influence: uw.Influence, on: Any) -> Shaped[NDArray[Any], " q"]:
    labels = uw.predict(influence, influence.queries(on)).labels
    assert labels is not None  # classes were asked for
    return labels


def _loss(influence: uw.Influence, on: Any) -> float:
    values = influence.of_groups([[0]], on=on).query_values
    return float("nan") if values is None else float(values.mean())


def _class_names(influence: uw.Influence) -> list[Any]:
    """The classes.

    Raises:
        UnsupportedModel: if targets are no classes.
    """
    names = uw.classes(influence)
    if names is None:
        message = (
            f"The targets of {influence.objective.name} are no classes, so no label can be flipped. Use `attack`, "
            "which moves inputs, or influence.of_replacing."
        )
        raise UnsupportedModel(message)
    return names


def _pool(pool: Any) -> tuple[Any, NDArray[Any]]:
    """The pool as an array and labels.

    Raises:
        InvalidInput: if it is no pair of equally long arrays.
    """
    if not isinstance(pool, tuple) or len(pool) != 2:
        message = f"pool is a {type(pool).__name__}. Pass the pair pool=(Xp, yp) of arrays."
        raise InvalidInput(message)
    X, y = (part if hasattr(part, "__getitem__") and hasattr(part, "shape") else np.asarray(part) for part in pool)
    if X.shape[0] != len(y) or not len(y):
        message = f"The pool has {X.shape[0]} inputs and {len(y)} labels. Pass one label for each, at least one."
        raise InvalidInput(message)
    return X, np.asarray(y)
