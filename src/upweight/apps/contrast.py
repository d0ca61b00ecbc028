"""The question of Cadamuro, Gilad-Bachrach and Zhu (2016): for a wrong prediction, which few labels would correct it?

control  the model trained again with nothing changed: what that does alone is credited to no change
order    rows by their first-order effect on the margin between the predicted and the right class
predict  outputs after the first k of them, corrected for what first order leaves out
confirm  the smallest such k really made, and the model really trained again
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

import upweight as uw
from upweight.apps.answers import Answer, Contrast
from upweight.apps.changes import Change, Relabelled, Removed
from upweight.apps.outcome import asked
from upweight.apps.solving import solved
from upweight.errors import InvalidInput, UnsupportedModel, UpweightError, checked_count, first_line

_ROUNDS = 40
_STEPS = 2
_OF = "the outputs of a query"  # what systems are solved for
_SAME = 1e-3  # of ‖θ̂‖: as long as training again moves θ̂ by less, the curvature at θ̂ serves


def contrast(
    influence: uw.Influence,
    on: Any,
    *,
    most: int | None = None,
    refits: int = 1,
    retrain: Any = None,
    store: str | os.PathLike[str] | None = None,
    progress: bool | None = None,
) -> Contrast:
    """For wrong predictions: the smallest set of label changes predicted to make each right, really made and refitted.

    A row's label becomes the query's right one; that changes the outputs of the query by
    −(1/n) J (C + λI)⁻¹ (w′∇L(x, y′) − w∇L(x, y)), J their Jacobian. Rows are taken by their effect on the margin
    between the strongest other class and the right one. For linear predictors a set is judged by the outputs after two
    Newton steps that keep the curvature at θ̂, the first of which is first order, each with a line search; for other
    models by first order alone. The set is the shortest start of that order that is judged to be enough: the smallest
    set there is, where effects add up. If the refit does not correct the prediction, `corrected` says so.

    The control: the model is first trained again with nothing changed, which does next to nothing where training had
    ended at a minimum. Effects and predictions start from there. A query that this alone makes right gets an answer
    without rows, and does not count as corrected.

    Cost: the control's training; per query K linear systems and a sweep; about log₂ k judgements of four gradients and
    two systems; `refits` trainings. Queries are answered on the workers of `joblib.parallel_config` where there are
    some.

    Args:
        influence: of a classifier.
        on: (Xq, yq), with the labels that are wanted; queries that have them already are passed over.
        most: rows in a set at most; None means half of the training rows.
        refits: trainings per query. The first confirms the predicted set; if it does not correct the prediction, the
            others try larger sets, and the first that does is `grown`.
        retrain: as for leave_one_out.
        store: a folder that keeps every answer as soon as it is found, so that the same call goes on where it was
            stopped; None keeps nothing.
        progress: True or False forces the bar (stderr) on or off; None shows it on a terminal only.

    Raises:
        InvalidInput: if no query is wrong, or the settings cannot be used.
        UnsupportedModel: if the outputs are no classes, or those of pairs of classes (one against one).
        StoreMismatch: if the folder holds other answers.
        WorkerError: if a training cannot be sent to a worker of joblib's, or the worker ends before it does.

    References: Cadamuro, Gilad-Bachrach and Zhu (2016); Koh & Liang (2017), section 6.

    >>> from sklearn.linear_model import LogisticRegression
    >>> X, y = [[0.0], [1.0], [2.0], [3.0], [4.0], [5.0]], [0, 0, 1, 0, 1, 1]
    >>> influence = uw.explain(LogisticRegression(tol=1e-8).fit(X, y), X, y)
    >>> contrast(influence, ([[2.0]], [1])).answers[0].rows.tolist()
    [0]
    """
    again = _Again(retrain, store)
    return _contrast(influence, on, Relabelled, "labels changed", most, refits, again, progress)


def contrast_by_removal(
    influence: uw.Influence,
    on: Any,
    *,
    most: int | None = None,
    refits: int = 1,
    retrain: Any = None,
    store: str | os.PathLike[str] | None = None,
    progress: bool | None = None,
) -> Contrast:
    """For wrong predictions: the smallest set of rows whose removal is predicted to make each right, really removed.

    As `contrast`, with rows removed: each changes the query's outputs by (w/n) J (C + λI)⁻¹ ∇L.

    Args:
        influence: of a classifier.
        on: (Xq, yq), with the labels that are wanted; queries that have them already are passed over.
        most: as for contrast.
        refits: as for contrast.
        retrain: as for leave_one_out.
        store: as for contrast.
        progress: as for contrast.

    Raises:
        InvalidInput: if no query is wrong, or the settings cannot be used.
        UnsupportedModel: if the outputs are no classes, or those of pairs of classes (one against one).
        StoreMismatch: if the folder holds other answers.
        WorkerError: if a training cannot be sent to a worker of joblib's, or the worker ends before it does.
    """
    again = _Again(retrain, store)
    return _contrast(influence, on, Removed, "rows removed", most, refits, again, progress)


@dataclass(frozen=True)
class _Again:
    """How the model is trained again: the retrainer, and the folder that keeps what was found."""

    retrain: Any
    store: Any


@dataclass(frozen=True)
class _Control:
    """The model trained again with nothing changed, from which changes are judged.

    Args:
        influence: of that model; of the model as it is where it could not be trained again.
        curvature: the influence whose prepared solver serves.
        refused: why it could not be trained again, "" if it was.
    """

    influence: uw.Influence
    curvature: uw.Influence
    refused: str = ""

    @classmethod
    def of(cls, influence: uw.Influence, retrain: Any, course: uw.Course) -> _Control:
        """Trained, as the first part of a course.

        Raises:
            InvalidInput: if `retrain` is no retrainer.
        """
        try:
            again = course.retrained(influence, retrain=retrain)
        except InvalidInput:
            raise
        except UpweightError as error:
            return cls(influence, influence, first_line(error))
        theta, now = again.objective.theta, influence.objective.theta
        same = float((theta - now).norm()) <= _SAME * float(now.norm())
        return cls(again, influence if same else again)


@dataclass(frozen=True)
class _Query:
    """One wrong prediction: what is said about it with nothing changed, and what changing each candidate does to that.

    Args:
        control: the model with nothing changed.
        x: the query.
        change: what may be done to the training rows.
        wanted: the number of its right class.
        outputs: (C,) one output per class, of the control.
        effects: (c, C) their first-order changes.
    """

    control: _Control
    x: uw.Examples
    change: Change
    wanted: int
    outputs: NDArray[np.float64]
    effects: NDArray[np.float64]

    def predicted(self, places: list[int]) -> NDArray[np.float64]:
        """The outputs after changing these candidates."""
        start = self.control.influence
        if start.objective.linear is None:
            return self.outputs + self.effects[places].sum(0)
        rows, theta = self.change.candidates[places], start.objective.theta
        gradient = self.change.gradient(start.objective, rows)
        for step_number in range(_STEPS):
            if step_number:
                gradient = self._gradient(theta, rows)
            step = -solved(self.control.curvature, gradient[None], _OF)[0]
            before, behind = float(gradient @ step), float(self._gradient(theta + step, rows) @ step)
            length = before / (before - behind) if behind > 2 * before / 3 else 3.0  # where the slope along it is 0
            theta = theta + min(length, 3.0) * step
        moved = uw.Influence(start.objective.at(theta), start.examples, encoder=start.encoder)
        return uw.predict(moved, self.x).per_class()[0]

    def _gradient(self, theta: Float[Tensor, " p"], rows: NDArray[np.int64]) -> Float[Tensor, " p"]:
        """∇R at θ on the changed data, less what training leaves of ∇R where nothing is changed."""
        start = self.control.influence
        there = start.objective.at(theta)
        now = uw.Influence(there, start.examples, encoder=start.encoder)
        return now.risk_gradient - start.risk_gradient + self.change.gradient(there, rows)

    def margin(self, outputs: NDArray[np.float64]) -> tuple[int, float]:
        """The strongest other class, and by how much it is ahead."""
        others = np.where(np.arange(len(outputs)) == self.wanted, -np.inf, outputs)
        rival = int(np.argmax(others))
        return rival, float(outputs[rival] - outputs[self.wanted])

    def extended(self, places: list[int], outputs: NDArray[np.float64]) -> list[int]:
        """More candidates until first order makes up for what these outputs lack; the same ones if none helps."""
        rival, ahead = self.margin(outputs)
        effect = self.effects[:, rival] - self.effects[:, self.wanted]
        effect[places] = np.inf
        order = np.argsort(effect, kind="stable")
        order = order[effect[order] < 0]
        enough = np.flatnonzero(np.cumsum(effect[order]) < -ahead)
        return places + order[: enough[0] + 1 if len(enough) else len(order)].tolist()

    def smallest(self, most: int) -> tuple[list[int], float]:
        """The shortest start of the order that is predicted to be enough, and its margin; none if `most` is not."""
        places: list[int] = []
        outputs = self.outputs
        for _ in range(_ROUNDS):
            longer = self.extended(places, outputs)
            exhausted = len(longer) == len(places) or len(places) >= most
            places = longer[:most]
            if exhausted:
                return [], self.margin(outputs)[1]
            outputs = self.predicted(places)
            if self.margin(outputs)[1] < 0:
                break
        else:
            return [], self.margin(outputs)[1]
        low, high, ahead = 0, len(places), self.margin(outputs)[1]
        while high - low > 1:
            middle = (low + high) // 2
            there = self.margin(self.predicted(places[:middle]))[1]
            low, high, ahead = (low, middle, there) if there < 0 else (middle, high, ahead)
        return places[:high], ahead


def _contrast(
    influence: uw.Influence,
    on: Any,
    kind: Callable[[uw.Influence, Any, uw.Influence], Change],
    words: str,
    most: int | None,
    refits: int,
    again: _Again,
    progress: bool | None,
) -> Contrast:
    limit = max(1, influence.n // 2) if most is None else checked_count(most, "most", hint="1 is a single row")
    checked_count(refits, "refits", hint="1 confirms the predicted set")
    queries, said, wanted = _read(influence, on)
    question = {"work": f"contrast, {words}", "wanted": wanted.tolist(), "most": limit, "refits": refits}
    course = uw.Course(influence, again.store, question | asked(influence, queries), again.retrain)
    control = _Control.of(influence, again.retrain, course)
    alone = uw.predict(control.influence, queries)
    ids = queries.ids
    before = [
        replace(answer, ids=influence.examples.ids, query_id=None if ids is None else ids[answer.query])
        for answer in _unchanged(control, said, alone, wanted)
    ]
    open_ones = [answer for answer in before if not answer.corrected_alone]
    work = _Work(control, partial(kind, influence), queries, alone, (limit, refits), again.retrain, {})
    found = course.each(
        work,
        open_ones.__getitem__,
        [[k] for k in range(len(open_ones))],
        label=f"contrast, {words}",
        unit="answer",
        progress=progress,
    )
    names, labels = list(said.names or ()), uw.training_labels(influence)
    known = {
        answer.query: _answered(answer, numbers, names, labels)
        for answer, numbers in zip(open_ones, found, strict=True)
    }
    return Contrast(words, tuple(known.get(answer.query, answer) for answer in before))


@dataclass(frozen=True)
class _Work:
    """What finds answers, for some queries at a time.

    Args:
        control: the model with nothing changed.
        kind: (label, influence of the control) → what may be done to the training rows.
        queries: all of them.
        said: what the control says about them.
        limits: rows in a set at most, and trainings for each query.
        retrain: the retrainer.
        changes: what may be done for every label that was wanted so far.
    """

    control: _Control
    kind: Callable[[Any, uw.Influence], Change]
    queries: uw.Examples
    said: uw.Predictions
    limits: tuple[int, int]
    retrain: Any
    changes: dict[Any, Change]

    def __call__(self, answers: Sequence[Answer]) -> list[Float[NDArray[np.float64], " k"]]:
        """The answers to these queries, as numbers."""
        names = list(self.said.names or ())
        found = []
        for answer in answers:
            number, target = answer.query, answer.wanted
            if target not in self.changes:
                self.changes[target] = self.kind(target, self.control.influence)
            change, x = self.changes[target], self.queries.subset(np.array([number]))
            S = solved(self.control.curvature, _jacobian(self.control.influence, x), _OF)
            outputs = self.said.per_class()[number]
            query = _Query(self.control, x, change, names.index(target), outputs, _spread(change.effects(S)))
            found.append(_numbers(_answer(query, answer, *self.limits, self.retrain), names))
        return found


def _numbers(answer: Answer, names: list[Any]) -> Float[NDArray[np.float64], " k"]:
    """What was found for one query as numbers: a label by its place, −1 for None, and a text letter by letter."""
    place = -1 if answer.after is None else names.index(answer.after)
    grown = -1 if answer.grown is None else len(answer.grown)
    head = [answer.predicted, answer.actual, place, len(answer.rows), grown]
    tail = () if answer.grown is None else answer.grown
    return np.array([*head, *answer.rows, *tail, *map(ord, answer.refused)], dtype=np.float64)


def _answered(answer: Answer, numbers: Float[NDArray[np.float64], " k"], names: list[Any], labels: Any) -> Answer:
    """The answer with what these numbers say."""
    place, k, m = numbers[2:5].astype(int).tolist()
    rows, grown, letters = np.split(numbers[5:].astype(np.int64), [k, k + max(m, 0)])
    return replace(
        answer,
        rows=rows,
        labels=np.asarray(labels)[rows].tolist(),
        predicted=float(numbers[0]),
        actual=float(numbers[1]),
        after=None if place < 0 else np.asarray(names)[place],
        grown=None if m < 0 else grown,
        refused="".join(map(chr, letters)),
    )


def _unchanged(control: _Control, said: uw.Predictions, alone: uw.Predictions, wanted: NDArray[Any]) -> list[Answer]:
    """The answers before any change, one for every wrong prediction."""
    assert said.labels is not None  # outputs are classes
    assert alone.labels is not None
    now, then, nan = -said.margins(wanted), -alone.margins(wanted), float("nan")
    found = []
    for number in np.flatnonzero(said.labels != wanted):
        label, margin, ahead = alone.labels[number], float(now[number]), float(then[number])
        if control.refused:
            label, ahead = None, nan
        head = (int(number), said.labels[number], wanted[number], np.zeros(0, dtype=np.int64), [])
        found.append(Answer(*head, margin, ahead, label, ahead, nan, None, refused=control.refused))
    return found


def _answer(query: _Query, answer: Answer, most: int, refits: int, retrain: Any) -> Answer:
    """With the predicted set for one query, really made."""
    places, predicted = query.smallest(most)
    rows = query.change.candidates[places]
    answer = replace(answer, rows=rows, predicted=predicted)
    for attempt in range(refits if places and not answer.refused else 0):
        rows = query.change.candidates[places]
        try:
            after = query.change.made(rows, retrain)
        except UpweightError as error:
            return replace(answer, refused=first_line(error))
        said = uw.predict(after, query.x)
        assert said.labels is not None  # outputs are classes
        outputs = said.per_class()[0]
        if attempt == 0:
            answer = replace(answer, actual=query.margin(outputs)[1], after=said.labels[0])
        elif said.labels[0] == answer.wanted:
            answer = replace(answer, grown=rows)
        if said.labels[0] == answer.wanted:
            break
        longer = query.extended(places, outputs)[:most]
        if len(longer) == len(places):
            break
        places = longer
    return answer


def _read(influence: uw.Influence, on: Any) -> tuple[uw.Examples, uw.Predictions, NDArray[Any]]:
    """The queries, what the model says about them, and the labels that are wanted.

    Raises:
        InvalidInput: if labels are no classes, or all are right.
        UnsupportedModel: if outputs are not one per class.
    """
    if not isinstance(on, tuple) or len(on) != 2:
        message = f"on is a {type(on).__name__}. Pass the pair (Xq, yq) with the labels that are wanted."
        raise InvalidInput(message)
    queries = influence.encoder.examples(on[0])
    said = uw.predict(influence, queries)
    if said.labels is None or said.names is None:
        message = (
            f"The outputs of {influence.objective.name} are no classes, so no prediction is wrong or right. Pass the "
            "influence of a classifier."
        )
        raise UnsupportedModel(message)
    said.per_class()  # refuses pairs of classes
    wanted = np.asarray(on[1])
    wanted = wanted[:, 0] if wanted.shape == (len(queries), 1) else wanted
    unknown = sorted({str(label) for label in wanted.tolist() if label not in said.names}) if wanted.ndim == 1 else []
    if wanted.shape != said.labels.shape or unknown:
        message = (
            f"yq has shape {wanted.shape} and {len(said.labels)} labels are needed"
            + (f"; {', '.join(unknown[:5])} is no class of the model" if unknown else "")
            + f". Pass one label for each query, of the classes {', '.join(map(str, said.names[:10]))}."
        )
        raise InvalidInput(message)
    if (said.labels == wanted).all():
        message = (
            f"All {len(wanted)} predictions have the labels that are wanted already, so there is nothing to correct. "
            "Pass queries that the model gets wrong: uw.predict(influence, Xq).labels != yq."
        )
        raise InvalidInput(message)
    return queries, said, wanted


def _spread(effects: NDArray[np.float64]) -> NDArray[np.float64]:
    """A single output stands for the second class, beside 0 for the first."""
    return np.concatenate([np.zeros_like(effects), effects], 1) if effects.shape[1] == 1 else effects


def _jacobian(influence: uw.Influence, x: uw.Examples) -> Float[Tensor, "K p"]:
    """The gradient of each output of one query."""
    objective, structure = influence.objective, influence.objective.linear
    if structure is not None:
        line = torch.from_numpy(uw.features(influence, x))
        coef = torch.block_diag(*[line] * structure.n_outputs)
        return torch.cat([coef, torch.eye(structure.n_outputs, dtype=line.dtype)], 1) if structure.intercept else coef
    outputs = objective.outputs
    assert outputs is not None  # the model has made predictions
    batch = (x if x.x is None else x.carrying(x.x, np.zeros(1))).batch(slice(None))  # outputs look at x only

    def gradient(k: int) -> Tensor:
        one = objective.measuring(lambda params, example: outputs(params, example).reshape(-1)[k])
        return uw.calculus.gradients(replace(one, route=objective.route), batch)

    return torch.cat([gradient(k) for k in range(uw.predict(influence, x).outputs.shape[1])]).double()
