"""Section 5.2 for discrete data: which few labels, or which examples of a pool, would turn an answer?

    flip_labels    the label changes that raise the queries' loss most (equation 3 with the same x), one after the other
    replace_rows   the training rows replaced by examples of a pool (equation 3), one after the other

Greedy: after every change the model is really trained again, and the next change is chosen there. Both start from the
control, the model that training again gives with nothing changed.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int, Shaped
from numpy.typing import NDArray
from tqdm import tqdm

import upweight as uw
from upweight.apps import notebook
from upweight.apps.mean_loss import MeanLoss, losses_of
from upweight.apps.names import name_in_text, names_in_json
from upweight.apps.outcome import (
    accuracies,
    asked,
    check_retrain,
    flips_in_words,
    newly_wrong,
    outcome_in_words,
    tested,
)
from upweight.errors import InvalidInput, UnsupportedModel, checked_count


@dataclass(frozen=True)
class Edits:
    """Discrete changes of the training data, made one after the other, each followed by training again.

    The control is the model that training again gives with nothing changed: where θ̂ was not at a minimum it says
    something else than the model as given. Changes start there, and what the control does is not their doing.

    Args:
        what: "label changed" or "row replaced".
        rows: (m,) the changed training rows, in their order.
        old: (m,) their labels before.
        new: (m,) their labels after.
        pool_rows: (m,) which examples of the pool replaced them; None for labels.
        losses: (m + 1,) mean loss of the queries by the control and after every change.
        predicted: (m,) predicted change of that loss by each change, at the model before it.
        loss_given: mean loss of the queries by the model as given.
        targets: (q,) true labels of the queries.
        said_before: (q,) labels that the model as given gave them.
        said_control: (q,) labels that the control gives them.
        said_after: (q,) labels that the model gives them after the last change.
        accuracy: of the test rows, by the model as given and after; None if there were none.
        accuracy_control: of the test rows by the control; None if there were none.
        newly_wrong: training rows that the model as given and the control call right, and the last model wrong, by
            their own labels.
        model: the influence of the last model, on the changed data.
    """

    what: str
    rows: Int[NDArray[np.int64], " m"]
    old: Shaped[NDArray[Any], " m"]
    new: Shaped[NDArray[Any], " m"]
    pool_rows: Int[NDArray[np.int64], " m"] | None
    losses: Float[NDArray[np.float64], " m_plus_1"]
    predicted: Float[NDArray[np.float64], " m"]
    loss_given: float
    targets: Shaped[NDArray[Any], " q"]
    said_before: Shaped[NDArray[Any], " q"]
    said_control: Shaped[NDArray[Any], " q"]
    said_after: Shaped[NDArray[Any], " q"]
    accuracy: tuple[float, float] | None
    accuracy_control: float | None
    newly_wrong: Int[NDArray[np.int64], " w"]
    model: uw.Influence = field(repr=False)

    @property
    def ids(self) -> Shaped[NDArray[Any], " n"] | None:
        """The names of all training rows, None where they have none."""
        return self.model.examples.ids

    @property
    def flipped(self) -> Bool[NDArray[np.bool_], " q"]:
        """Which queries the model as given and the control call right, and the last model calls wrong."""
        right = (self.said_before == self.targets) & (self.said_control == self.targets)
        return right & (self.said_after != self.targets)

    @property
    def flipped_by_control(self) -> Bool[NDArray[np.bool_], " q"]:
        """Which queries the model as given calls right, and the control, with nothing changed, calls wrong."""
        return (self.said_before == self.targets) & (self.said_control != self.targets)

    def __str__(self) -> str:
        lines = [
            f"{len(self.rows)} times {self.what}, each followed by training again.",
            *self._told,
        ]
        if len(self.rows):
            lines.append("row     from      to        predicted   really")
        elif (self.said_control != self.targets).all():
            lines.append("Every query is called wrong before anything is changed.")
        else:
            lines.append("No change is predicted to raise the loss.")
        lines += [
            f"{row:<7} {old!s:<9} {new!s:<9} {predicted:<+11.3g} {really:<+11.3g}{name_in_text(self.ids, row)}".rstrip()
            for row, old, new, predicted, really in zip(
                self.rows, self.old, self.new, self.predicted, np.diff(self.losses), strict=True
            )
        ]
        return "\n".join([*lines, *outcome_in_words(self.accuracy, self.accuracy_control, self.newly_wrong, self.ids)])

    def _repr_html_(self) -> str:
        changes = zip(self.rows, self.old, self.new, self.predicted, np.diff(self.losses), strict=True)
        lines = [
            [
                notebook.row(row, self.ids),
                notebook.plain(old),
                notebook.plain(new),
                *(notebook.plain(value, "+.3g") for value in values),
            ]
            for row, old, new, *values in changes
        ]
        head = ["row", "from", "to", "predicted rise of the mean loss", "really"]
        caption = f"{len(self.rows)} times {self.what}, each followed by training again"
        said = outcome_in_words(self.accuracy, self.accuracy_control, self.newly_wrong, self.ids)
        return notebook.shown(notebook.table(caption, head, lines), said=[*self._told, *said])

    @property
    def _told(self) -> list[str]:
        """What became of the queries, in sentences."""
        return [
            flips_in_words(self.flipped, self.flipped_by_control),
            f"Mean loss of {len(self.targets)} queries {self.loss_given:.4g}; {self.losses[0]:.4g} after training "
            f"again with nothing changed; {self.losses[-1]:.4g} after the changes.",
        ]

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain numbers, lists and text."""
        return {
            "what": self.what,
            "rows": self.rows.tolist(),
            "old": [str(label) for label in self.old],
            "new": [str(label) for label in self.new],
            "pool_rows": None if self.pool_rows is None else self.pool_rows.tolist(),
            "loss_given": self.loss_given,
            "losses": self.losses.tolist(),
            "predicted": self.predicted.tolist(),
            "queries": len(self.targets),
            "flipped": np.flatnonzero(self.flipped).tolist(),
            "flipped_by_control": np.flatnonzero(self.flipped_by_control).tolist(),
            "accuracy": None if self.accuracy is None else list(self.accuracy),
            "accuracy_control": self.accuracy_control,
            "newly_wrong": self.newly_wrong.tolist(),
            **names_in_json(self.ids, self.rows),
            **names_in_json(self.ids, self.newly_wrong, "newly_wrong_ids"),
        }


def flip_labels(
    influence: uw.Influence,
    on: Any,
    budget: int = 10,
    *,
    test: Any = None,
    retrain: Any = None,
    seed: int = 0,
    store: str | os.PathLike[str] | None = None,
    progress: bool | None = None,
) -> Edits:
    """The label changes that raise the queries' mean loss most, one after the other, until every query is flipped.

    Each of the other classes is tried for each row that has a weight and was not changed yet (equation 3 with the same
    x), and the model is trained again after every change. It starts from the control, which is trained once with
    nothing changed; what that does is told beside the result and counts for none of the changes.

    Cost: one training; per change one linear system, one sweep with K products, and one training.

    Args:
        influence: of a classifier.
        on: (Xq, yq), the queries.
        budget: labels changed at most.
        test: (Xt, yt) other test rows, whose accuracy is told before and after.
        retrain: as for `retrained`, but no function of weights, which cannot see changed rows.
        seed: of the retrainer.
        store: a folder that keeps every change as soon as it is made, so that the same call goes on where it was
            stopped, and one with a larger budget goes on at the end; None keeps nothing.
        progress: True or False forces the bar (stderr) on or off; None shows it on a terminal only.

    Raises:
        UnsupportedModel: if targets are no classes.
        InvalidInput: if the budget is no positive whole number.
        StoreMismatch: if the folder holds other changes.

    References: Koh & Liang (2017), section 5.2 and equation 3.
    """
    names = _class_names(influence)

    def best(model: uw.Influence, queries: uw.Examples, labels: NDArray[Any], free: NDArray[np.bool_]) -> _Change:
        values = MeanLoss(model, queries).of_labels(names)
        own = labels[:, None] == np.asarray(names)
        row, place = np.unravel_index(np.where(free[:, None] & ~own, values, -np.inf).argmax(), values.shape)
        return _Change(int(row), names[place], None, float(values[row, place]))

    def make(model: uw.Influence, change: _Change) -> uw.Influence:
        return uw.edited(model, [change.row], y_new=np.array([change.label]))

    kind = _Kind("label changed", budget, best, make)
    return _greedy(kind, influence, on, test, _Again(retrain, seed, store), progress)


def replace_rows(
    influence: uw.Influence,
    pool: tuple[Any, Any],
    on: Any,
    budget: int = 10,
    *,
    test: Any = None,
    retrain: Any = None,
    seed: int = 0,
    store: str | os.PathLike[str] | None = None,
    progress: bool | None = None,
) -> Edits:
    """Training rows replaced by examples of a pool so that the queries' mean loss rises most, until all are flipped.

    The best pair of all rows and all examples by equation 3 is made, and the model is trained again. A row, and an
    example, is used once; rows of weight 0 are not used. It starts from the control, which is trained once with nothing
    changed; what that does is told beside the result and counts for none of the replacements.

    Cost: one training; per change one linear system, a sweep over the rows and one over the pool, and one training.

    Args:
        influence: of a classifier.
        pool: (Xp, yp), candidates as the model takes them (arrays, a sparse matrix, a DataFrame) and their labels.
        on: (Xq, yq), the queries.
        budget: rows replaced at most.
        test: (Xt, yt) other test rows, whose accuracy is told before and after.
        retrain: as for `retrained`, but no function of weights, which cannot see changed rows.
        seed: of the retrainer.
        store: a folder that keeps every change as soon as it is made, so that the same call goes on where it was
            stopped, and one with a larger budget goes on at the end; None keeps nothing.
        progress: True or False forces the bar (stderr) on or off; None shows it on a terminal only.

    Raises:
        UnsupportedModel: if targets are no classes, or the model does not take new inputs, as kernel machines.
        InvalidInput: if the budget is no positive whole number, or the pool is no pair of equally long arrays.
        StoreMismatch: if the folder holds other changes.

    References: Koh & Liang (2017), equation 3.
    """
    _class_names(influence)
    Xp, yp = _pool(pool)
    influence.encoder.check_new(Xp)  # kernel features may not hold them
    candidates = influence.queries((Xp, yp))
    labels = uw.query_labels(influence, candidates)
    assert labels is not None  # classes were asked for
    used: list[int] = []

    def best(model: uw.Influence, queries: uw.Examples, _: NDArray[Any], free: NDArray[np.bool_]) -> _Change:
        unused = np.setdiff1d(np.arange(len(yp)), used)
        if not len(unused):
            return _Change(-1, None, None, -np.inf)
        values, place = MeanLoss(model, queries).of_replacing_each(candidates.subset(unused))
        row, j = int(np.where(free, values, -np.inf).argmax()), int(unused[place])
        return _Change(row, labels[j], j, float(values[row]))

    def make(model: uw.Influence, change: _Change) -> uw.Influence:
        j = change.pool_row
        assert j is not None  # `best` chose one
        used.append(j)
        return uw.edited(model, [change.row], X_new=_lines(Xp, j), y_new=yp[[j]])

    kind = _Kind("row replaced", budget, best, make, candidates.fingerprint())
    return _greedy(kind, influence, on, test, _Again(retrain, seed, store), progress)


@dataclass(frozen=True)
class _Change:
    """One change: the row, its new label, the example of the pool it becomes, and the predicted rise of the loss."""

    row: int
    label: Any
    pool_row: int | None
    value: float

    def numbers(self, names: list[Any]) -> list[float]:
        """The change as numbers, its label by its place in the names of the classes; −1 stands for None."""
        place = -1 if self.label is None else names.index(self.label)
        return [self.row, place, -1 if self.pool_row is None else self.pool_row, self.value]

    @classmethod
    def read(cls, numbers: NDArray[np.float64], names: list[Any]) -> _Change:
        """The change that these numbers are."""
        row, place, pool_row = (int(number) for number in numbers[:3])
        label = None if place < 0 else names[place]
        return cls(row, label, None if pool_row < 0 else pool_row, float(numbers[3]))


@dataclass(frozen=True)
class _Kind:
    """A kind of change.

    Args:
        what: in words.
        budget: how many.
        best: (model, queries, labels of all rows, (n,) which rows are free) → the next change.
        make: (model, change) → the influence of the changed data.
        pool: a fingerprint of the examples that may replace rows, "" if there are none.
    """

    what: str
    budget: int
    best: Callable[[uw.Influence, uw.Examples, NDArray[Any], NDArray[np.bool_]], _Change]
    make: Callable[[uw.Influence, _Change], uw.Influence]
    pool: str = ""


@dataclass(frozen=True)
class _Again:
    """How the model is trained again: the retrainer, its seed, and the folder that keeps what it found."""

    retrain: Any
    seed: int
    store: Any


def _greedy(kind: _Kind, influence: uw.Influence, on: Any, test: Any, again: _Again, progress: bool | None) -> Edits:
    """Choose a change, make it, train again; until all queries are wrong, no change helps, or the budget is spent."""
    checked_count(kind.budget, "budget")
    check_retrain(again.retrain)
    queries, others = influence.queries(on), tested(influence, test)
    targets, labels = uw.query_labels(influence, queries), uw.training_labels(influence)
    assert targets is not None  # classes were asked for
    assert labels is not None
    before, labels_after = _said(influence, queries), labels.copy()
    question = {"work": kind.what, "pool": kind.pool, "seed": again.seed, **asked(influence, queries)}
    course = uw.Course(influence, again.store, question, again.retrain)
    trained = partial(course.retrained, retrain=again.retrain, seed=again.seed)
    names, model = _class_names(influence), trained(influence)
    control = model
    said = said_control = _said(control, queries)
    changes: list[_Change] = []
    losses = [float(losses_of(control, queries).mean())]
    free = influence.examples.weights > 0
    shown = None if progress is None else not progress
    bar = tqdm(range(kind.budget), desc=kind.what, disable=shown, leave=False)
    for _ in bar:
        if (said != targets).all() or not free.any():
            break
        best = partial(kind.best, model, queries, labels_after, free)
        change = _Change.read(course.numbers(lambda best=best: best().numbers(names)), names)
        if change.value <= 0:
            break
        model = trained(kind.make(model, change))
        changes.append(change)
        free[change.row], labels_after[change.row] = False, change.label
        said = _said(model, queries)
        losses.append(float(losses_of(model, queries).mean()))
        bar.set_postfix(loss=f"{losses[-1]:.4g}")
    bar.close()
    rows = np.array([change.row for change in changes], dtype=np.int64)
    accuracy, accuracy_control = accuracies((influence, control, model), others)
    return Edits(
        what=kind.what,
        rows=rows,
        old=labels[rows],
        new=labels_after[rows],
        pool_rows=None
        if kind.what == "label changed"
        else np.array([change.pool_row for change in changes], dtype=np.int64),
        losses=np.array(losses),
        predicted=np.array([change.value for change in changes], dtype=np.float64),
        loss_given=float(losses_of(influence, queries).mean()),
        targets=targets,
        said_before=before,
        said_control=said_control,
        said_after=said,
        accuracy=accuracy,
        accuracy_control=accuracy_control,
        newly_wrong=newly_wrong((influence, control, model), labels, labels_after),
        model=model,
    )


def _said(influence: uw.Influence, queries: uw.Examples) -> Shaped[NDArray[Any], " q"]:
    labels = uw.predict(influence, queries).labels
    assert labels is not None  # classes were asked for
    return labels


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
    """The pool, whose lines can be taken, and its labels.

    Raises:
        InvalidInput: if it is no pair of equally long arrays.
    """
    if not isinstance(pool, tuple) or len(pool) != 2:
        message = f"pool is a {type(pool).__name__}. Pass the pair pool=(Xp, yp) of arrays."
        raise InvalidInput(message)
    parts = (part.tocsr() if hasattr(part, "tocsr") else part for part in pool)  # COO has no lines to take
    X, y = (part if hasattr(part, "__getitem__") and hasattr(part, "shape") else np.asarray(part) for part in parts)
    if X.shape[0] != len(y) or not len(y):
        message = f"The pool has {X.shape[0]} inputs and {len(y)} labels. Pass one label for each, at least one."
        raise InvalidInput(message)
    return X, np.asarray(y)


def _lines(X: Any, row: int) -> Any:
    """One example of a pool, as the pool is given."""
    return (X.iloc if hasattr(X, "iloc") else X)[[row]]
