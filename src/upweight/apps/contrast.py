"""The question of Cadamuro, Gilad-Bachrach and Zhu (2016): for a wrong prediction, which few labels would correct it?

order    rows by their first-order effect on the margin between the predicted and the right class
predict  outputs after the first k of them, corrected for what first order leaves out
confirm  the smallest such k really made, and the model really trained again
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy.typing import NDArray
from torch import Tensor

import upweight as uw
from upweight.errors import InvalidInput, NotConverged, UnsupportedModel, UpweightError, checked_count, first_line

_CHUNK = 4096
_ROUNDS = 40
_STEPS = 2


@dataclass(frozen=True)
class Answer:
    """The set for one query. Margins are the largest output of another class minus that of the right one: < 0 is right.

    Args:
        query: its number among the queries.
        label: what the model says now.
        wanted: the label that was asked for.
        rows: (k,) training rows, the strongest first; none if no set within the limit is predicted to be enough.
        labels: (k,) their labels before.
        margin: now.
        predicted: predicted margin after the change; with no rows, after the largest set that was tried.
        actual: the margin after training again; NaN if that was not done.
        after: what the retrained model says, None if it was not trained.
        grown: a larger set that really corrects, found with further refits; None if it was not asked for or found.
        refused: why training again failed, "" if it did not.
    """

    query: int
    label: Any
    wanted: Any
    rows: Int[NDArray[np.int64], " k"]
    labels: list[Any] = field(repr=False)
    margin: float
    predicted: float
    actual: float
    after: Any
    grown: Int[NDArray[np.int64], " m"] | None = None
    refused: str = ""

    @property
    def corrected(self) -> bool:
        """Whether the predicted set really corrects the prediction."""
        return bool(self.after is not None and self.after == self.wanted)

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain numbers, lists and text."""
        return {
            "query": self.query,
            "label": str(self.label),
            "wanted": str(self.wanted),
            "rows": self.rows.tolist(),
            "labels": [str(label) for label in self.labels],
            "margin": self.margin,
            "predicted": self.predicted,
            "actual": self.actual,
            "after": None if self.after is None else str(self.after),
            "corrected": self.corrected,
            "grown": None if self.grown is None else self.grown.tolist(),
            "refused": self.refused,
        }


@dataclass(frozen=True)
class Contrast:
    """For every wrong prediction the smallest set of changes predicted to correct it, and what they really did.

    Args:
        change: what is done to a row, in words.
        answers: one for every query that is wrong; queries that are right have none.
    """

    change: str
    answers: tuple[Answer, ...]

    @property
    def corrected(self) -> int:
        """How many predictions their sets really correct."""
        return sum(answer.corrected for answer in self.answers)

    @property
    def corrected_rate(self) -> float:
        """That as a share of all wrong predictions."""
        return self.corrected / len(self.answers)

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
        """The median of actual over predicted change of the margin: 1 is right; NaN where nothing was trained."""
        ratios = [(a.actual - a.margin) / (a.predicted - a.margin) for a in self.answers if np.isfinite(a.actual)]
        return float(np.median(ratios)) if ratios else float("nan")

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain numbers, lists and text."""
        return {
            "change": self.change,
            "queries": len(self.answers),
            "corrected": self.corrected,
            "corrected_rate": self.corrected_rate,
            "median_set_size": self.median_set_size,
            "calibration": self.calibration,
            "answers": [answer.to_dict() for answer in self.answers],
        }

    def __str__(self) -> str:
        lines = [
            f"{len(self.answers)} wrong predictions, {self.change}: {self.corrected} ({self.corrected_rate:.0%}) are "
            f"really corrected after training again; median set {self.median_set_size:g} rows; actual over predicted "
            f"change of the margin {self.calibration:.2f}"
        ]
        return "\n".join([*lines, *(_said(answer) for answer in self.answers)])


def contrast(
    influence: uw.Influence, on: Any, *, most: int | None = None, refits: int = 1, retrain: Any = None
) -> Contrast:
    """For wrong predictions: the smallest set of label changes predicted to make each right, really made and refitted.

    A row's label becomes the query's right one; that changes the outputs of the query by
    −(1/n) J (C + λI)⁻¹ (w′∇L(x, y′) − w∇L(x, y)), J their Jacobian. Rows are taken by their effect on the margin
    between the strongest other class and the right one. For linear predictors a set is judged by the outputs after two
    Newton steps that keep the curvature at θ̂, the first of which is first order, each with a line search; for other
    models by first order alone. The set is the shortest start of that order that is judged to be enough: the smallest
    set there is, where effects add up. If the refit does not correct the prediction, `corrected` says so.

    Cost: per query K linear systems and a sweep; about log₂ k judgements of four gradients and two systems; `refits`
    trainings.

    Args:
        influence: of a classifier.
        on: (Xq, yq), with the labels that are wanted; queries that have them already are passed over.
        most: rows in a set at most; None means half of the training rows.
        refits: trainings per query. The first confirms the predicted set; if it does not correct the prediction, the
            others try larger sets, and the first that does is `grown`.
        retrain: as for leave_one_out.

    Raises:
        InvalidInput: if no query is wrong, or the settings cannot be used.
        UnsupportedModel: if the model's outputs are not one per class.

    References: Cadamuro, Gilad-Bachrach and Zhu (2016); Koh & Liang (2017), section 6.

    >>> from sklearn.linear_model import LogisticRegression
    >>> X, y = [[0.0], [1.0], [2.0], [3.0], [4.0], [5.0]], [0, 0, 1, 0, 1, 1]
    >>> influence = uw.explain(LogisticRegression(tol=1e-8).fit(X, y), X, y)
    >>> contrast(influence, ([[2.0]], [1])).answers[0].rows.tolist()
    [3]
    """
    return _contrast(influence, on, _Relabelled, "labels changed", most, refits, retrain)


def contrast_by_removal(
    influence: uw.Influence, on: Any, *, most: int | None = None, refits: int = 1, retrain: Any = None
) -> Contrast:
    """For wrong predictions: the smallest set of rows whose removal is predicted to make each right, really removed.

    As `contrast`, with rows removed: each changes the query's outputs by (w/n) J (C + λI)⁻¹ ∇L.

    Args:
        influence: of a classifier.
        on: (Xq, yq), with the labels that are wanted; queries that have them already are passed over.
        most: as for contrast.
        refits: as for contrast.
        retrain: as for leave_one_out.

    Raises:
        InvalidInput: if no query is wrong, or the settings cannot be used.
        UnsupportedModel: if the model's outputs are not one per class.
    """
    return _contrast(influence, on, _Removed, "rows removed", most, refits, retrain)


class _Change(Protocol):
    """What may be done to training rows for one wanted label."""

    candidates: NDArray[np.int64]

    def effects(self, S: Float[Tensor, "K p"]) -> Float[NDArray[np.float64], "c K"]:
        """The first-order change of the K outputs by changing each candidate."""
        ...

    def gradient(self, objective: uw.Objective, rows: NDArray[np.int64]) -> Float[Tensor, " p"]:
        """By how much ∇R changes, at the parameters of this objective."""
        ...

    def made(self, rows: NDArray[np.int64], retrain: Any) -> uw.Influence:
        """The model that is trained on the changed data."""
        ...


class _Relabelled:
    """Rows of other classes get the wanted label."""

    def __init__(self, influence: uw.Influence, wanted: Any) -> None:
        self.influence, self.wanted = influence, wanted
        self.candidates = np.flatnonzero(uw.training_labels(influence) != wanted)

    def effects(self, S: Float[Tensor, "K p"]) -> Float[NDArray[np.float64], "c K"]:
        """−(1/n) S · (w′∇L(x, y′) − w∇L(x, y))."""
        parts = []
        for start in range(0, len(self.candidates), _CHUNK):
            rows = self.candidates[start : start + _CHUNK]
            batch, weights = self._new(rows)
            new = weights[:, None] * uw.calculus.dots(self.influence.objective, batch, S).double()
            parts.append(_dots(self.influence, rows, S) - new)
        return torch.cat(parts).numpy() / self.influence.n

    def gradient(self, objective: uw.Objective, rows: NDArray[np.int64]) -> Float[Tensor, " p"]:
        """(1/n) Σ (w′∇L(x, y′) − w∇L(x, y))."""
        batch, weights = self._new(rows)
        new = uw.calculus.pull(objective, batch, weights[None])[0].double()
        return new / self.influence.n - _pulled(self.influence, objective, rows)

    def made(self, rows: NDArray[np.int64], retrain: Any) -> uw.Influence:
        """Trained with the new labels."""
        return uw.retrained(uw.edited(self.influence, rows, y_new=np.full(len(rows), self.wanted)), retrain=retrain)

    def _new(self, rows: NDArray[np.int64]) -> tuple[Any, Tensor]:
        targets = self.influence.encoder.targets(np.full(len(rows), self.wanted))
        new = self.influence.examples.relabelled(rows, targets)
        weights = self.influence.examples.sample_weight[rows] * self.influence.class_weights(new)
        return new.batch(slice(None)), torch.from_numpy(weights)


class _Removed:
    """Rows are left out."""

    def __init__(self, influence: uw.Influence, wanted: Any) -> None:  # noqa: ARG002
        self.influence = influence
        self.candidates = np.flatnonzero(influence.examples.weights > 0)

    def effects(self, S: Float[Tensor, "K p"]) -> Float[NDArray[np.float64], "c K"]:
        """(w/n) S · (∇L + the row's share of the penalty)."""
        influence = self.influence
        weights = torch.from_numpy(influence.examples.weights[self.candidates])
        parts = [
            _dots(influence, self.candidates[start : start + _CHUNK], S)
            for start in range(0, len(self.candidates), _CHUNK)
        ]
        return (torch.cat(parts) + weights[:, None] * (S @ influence.penalty_share)).numpy() / influence.n

    def gradient(self, objective: uw.Objective, rows: NDArray[np.int64]) -> Float[Tensor, " p"]:
        """−(1/n) Σ w (∇L + share)."""
        influence = self.influence
        at = uw.Influence(objective, influence.examples, encoder=influence.encoder)
        share = at.penalty_share * float(influence.examples.weights[rows].sum()) / influence.n
        return -_pulled(influence, objective, rows) - share

    def made(self, rows: NDArray[np.int64], retrain: Any) -> uw.Influence:
        """Trained without them."""
        return uw.retrained(self.influence, without=rows, retrain=retrain)


@dataclass(frozen=True)
class _Query:
    """One wrong prediction: its outputs now, and what changing each candidate does to them."""

    influence: uw.Influence
    X: Any  # its input, as the model takes it
    change: _Change
    wanted: int
    outputs: NDArray[np.float64]  # (K,)
    effects: NDArray[np.float64]  # (c, K)

    def predicted(self, places: list[int]) -> NDArray[np.float64]:
        """The outputs after changing these candidates."""
        if self.influence.objective.linear is None:
            return self.outputs + self.effects[places].sum(0)
        influence, rows = self.influence, self.change.candidates[places]
        theta = influence.objective.theta
        for _ in range(_STEPS):
            gradient = self._gradient(theta, rows)
            step = -_solved(influence, gradient[None])[0]
            before, behind = float(gradient @ step), float(self._gradient(theta + step, rows) @ step)
            length = before / (before - behind) if behind > 2 * before / 3 else 3.0  # where the slope along it is 0
            theta = theta + min(length, 3.0) * step
        moved = uw.Influence(influence.objective.at(theta), influence.examples, encoder=influence.encoder)
        return _outputs(moved, self.X)[0]

    def _gradient(self, theta: Float[Tensor, " p"], rows: NDArray[np.int64]) -> Float[Tensor, " p"]:
        """∇R at θ on the changed data; what is left of it at θ̂, if training stopped early, is there too."""
        there = self.influence.objective.at(theta)
        now = uw.Influence(there, self.influence.examples, encoder=self.influence.encoder)
        return now.risk_gradient + self.change.gradient(there, rows)

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
    kind: Callable[[uw.Influence, Any], _Change],
    words: str,
    most: int | None,
    refits: int,
    retrain: Any,
) -> Contrast:
    limit = max(1, influence.n // 2) if most is None else checked_count(most, "most")
    checked_count(refits, "refits", hint="1 confirms the predicted set")
    names, labels, wanted = _read(influence, on)
    changes: dict[Any, _Change] = {}
    answers = []
    for number in np.flatnonzero(labels != wanted):
        target = wanted[number]
        if target not in changes:
            changes[target] = kind(influence, target)
        X = _one(on[0], int(number))
        outputs = _outputs(influence, X)[0]
        S = _solved(influence, _jacobian(influence, X, wanted[number : number + 1]))
        effects = _spread(changes[target].effects(S))
        query = _Query(influence, X, changes[target], names.index(target), outputs, effects)
        answers.append(_answer(query, int(number), labels[number], target, limit, refits, retrain))
    return Contrast(words, tuple(answers))


def _answer(query: _Query, number: int, label: Any, wanted: Any, most: int, refits: int, retrain: Any) -> Answer:
    """The predicted set for one query, really made."""
    places, predicted = query.smallest(most)
    rows = query.change.candidates[places]
    before = np.asarray(uw.training_labels(query.influence))[rows].tolist()
    now = query.margin(query.outputs)[1]
    answer = Answer(number, label, wanted, rows, before, now, predicted, float("nan"), None)
    for attempt in range(refits if places else 0):
        rows = query.change.candidates[places]
        try:
            after = query.change.made(rows, retrain)
        except UpweightError as error:
            return replace(answer, refused=first_line(error))
        outputs = _outputs(after, query.X)[0]
        ahead = query.margin(outputs)[1]
        said = uw.predict(after, query.X).labels
        assert said is not None  # outputs are classes
        if attempt == 0:
            answer = replace(answer, actual=ahead, after=said[0])
        elif said[0] == wanted:
            answer = replace(answer, grown=rows)
        if said[0] == wanted:
            break
        longer = query.extended(places, outputs)[:most]
        if len(longer) == len(places):
            break
        places = longer
    return answer


def _read(influence: uw.Influence, on: Any) -> tuple[list[Any], NDArray[Any], NDArray[Any]]:
    """The classes, what the model says about them, and the labels that are wanted.

    Raises:
        InvalidInput: if labels are no classes, or all are right.
        UnsupportedModel: if outputs are not one per class.
    """
    names = uw.classes(influence)
    if not isinstance(on, tuple) or len(on) != 2:
        message = f"on is a {type(on).__name__}. Pass the pair (Xq, yq) with the labels that are wanted."
        raise InvalidInput(message)
    said = uw.predict(influence, on[0])
    if names is None or said.labels is None:
        message = (
            f"The outputs of {influence.objective.name} are no classes, so no prediction is wrong or right. Pass the "
            "influence of a classifier."
        )
        raise UnsupportedModel(message)
    if said.outputs.shape[1] not in (1, len(names)):
        message = (
            f"{influence.objective.name} has {said.outputs.shape[1]} outputs for {len(names)} classes, as one-vs-one "
            "machines do, and a margin needs one per class. Use LinearSVC or LogisticRegression."
        )
        raise UnsupportedModel(message)
    wanted = np.asarray(on[1])
    unknown = sorted({str(label) for label in wanted.tolist() if label not in names})
    if wanted.shape != said.labels.shape or unknown:
        message = (
            f"yq has shape {wanted.shape} and {len(said.labels)} labels are needed"
            + (f"; {', '.join(unknown[:5])} is no class of the model" if unknown else "")
            + f". The classes are {', '.join(map(str, names[:10]))}."
        )
        raise InvalidInput(message)
    if (said.labels == wanted).all():
        message = (
            f"All {len(wanted)} predictions have the labels that are wanted already, so there is nothing to correct. "
            "Pass queries that the model gets wrong: uw.predict(influence, Xq).labels != yq."
        )
        raise InvalidInput(message)
    return names, said.labels, wanted


def _one(X: Any, number: int) -> Any:
    """One query's input, as the model takes it."""
    if hasattr(X, "tocsr"):
        X = X.tocsr()
    return (X.iloc if hasattr(X, "iloc") else X)[number : number + 1]


def _outputs(influence: uw.Influence, X: Any) -> NDArray[np.float64]:
    """One output per class."""
    return _spread(uw.predict(influence, X).outputs)


def _spread(outputs: NDArray[np.float64]) -> NDArray[np.float64]:
    """A single output stands for the second class, beside 0 for the first."""
    return np.concatenate([np.zeros_like(outputs), outputs], 1) if outputs.shape[1] == 1 else outputs


def _jacobian(influence: uw.Influence, X: Any, y: Any) -> Float[Tensor, "K p"]:
    """The gradient of each output of one query."""
    objective, structure = influence.objective, influence.objective.linear
    if structure is not None:
        x = torch.from_numpy(uw.features(influence, X))
        coef = torch.block_diag(*[x] * structure.n_outputs)
        return torch.cat([coef, torch.eye(structure.n_outputs, dtype=x.dtype)], 1) if structure.intercept else coef
    outputs = objective.outputs
    assert outputs is not None  # the model has made predictions
    batch = influence.encoder.examples(X, y).batch(slice(None))

    def gradient(k: int) -> Tensor:
        one = objective.measuring(lambda params, example: outputs(params, example).reshape(-1)[k])
        return uw.calculus.gradients(replace(one, route=objective.route), batch)

    return torch.cat([gradient(k) for k in range(uw.predict(influence, X).outputs.shape[1])]).double()


def _solved(influence: uw.Influence, V: Float[Tensor, "k p"]) -> Float[Tensor, "k p"]:
    """(C + λI)⁻¹ v for every row v.

    Raises:
        NotConverged: if the solver did not keep its promise.
    """
    solution = influence.prepared.solve(V)
    if not solution.converged:
        message = (
            f"{influence.solver} left a relative residual of {float(solution.residual.max()):.2g} for the outputs of a "
            "query. Raise the damping, or use an exact solver: explain(..., solver=uw.solvers.Cholesky())."
        )
        raise NotConverged(message, solution)
    return solution.x


def _dots(influence: uw.Influence, rows: NDArray[np.int64], S: Float[Tensor, "K p"]) -> Float[Tensor, "r K"]:
    """w S · ∇L of training rows."""
    weights = torch.from_numpy(influence.examples.weights[rows])
    return weights[:, None] * uw.calculus.dots(influence.objective, influence.examples.batch(rows), S).double()


def _pulled(influence: uw.Influence, objective: uw.Objective, rows: NDArray[np.int64]) -> Float[Tensor, " p"]:
    """(1/n) Σ w ∇L of training rows, at the parameters of this objective."""
    weights = torch.from_numpy(influence.examples.weights[rows])
    return uw.calculus.pull(objective, influence.examples.batch(rows), weights[None])[0].double() / influence.n


def _said(answer: Answer) -> str:
    """One query's answer, in words."""
    head = f"  query {answer.query}, {answer.label} instead of {answer.wanted}: "
    if not len(answer.rows):
        return head + "no set within the limit is predicted to be enough"
    shown = ", ".join(map(str, answer.rows[:6])) + ("" if len(answer.rows) <= 6 else ", …")
    outcome = "really corrected" if answer.corrected else f"NOT confirmed: {answer.refused or answer.after}"
    more = "" if answer.grown is None else f"; {len(answer.grown)} rows do"
    return head + (
        f"{len(answer.rows)} rows ({shown}); margin {answer.margin:+.3g}, predicted {answer.predicted:+.3g}, actual "
        f"{answer.actual:+.3g}; {outcome}{more}"
    )
