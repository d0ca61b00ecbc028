"""Section 5.2, a robustness audit: how far can changes of training rows that nobody sees move an answer?

The paper's iteration: a step along the sign of equation 5, projection to the box, and a model that is really trained
again, until the queries flip. For audits of your own models: it says which answers hang on few rows, and which rows
deserve a second look. `vulnerability` ranks the rows.
"""

from __future__ import annotations

import os
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
from upweight.apps.names import listed, names_in_json
from upweight.apps.outcome import (
    accuracies,
    asked,
    check_retrain,
    flips_in_words,
    newly_wrong,
    outcome_in_words,
    tested,
)
from upweight.apps.vulnerability import Vulnerability, check_positive, vulnerability
from upweight.errors import InvalidInput, UnsupportedModel, checked_count, first_line

__all__ = ["Attack", "Vulnerability", "attack", "vulnerability"]

_HAIR = 1e-3  # of the box is left out, so that a changed pixel rounds to what it was
_NUMBERS = 2**22  # of features at once: 32 MB
_RISE = 0.01  # a loss that has not risen by this share for `patience` steps has stopped rising
_PROBE = 1e-3  # levels by which equation 5 is tried out
_SHOWN = 20  # changed rows in a text
_AGREE = 0.5  # share of the larger by which equation 3 and equation 5 may differ there


@dataclass(frozen=True)
class Attack:
    """What a crafted change of some training inputs really does, after training again.

    The control is the model that training again gives with nothing changed: where θ̂ was not at a minimum it says
    something else than the model as given. The attack starts there, and what the control does is not its doing.

    Args:
        rows: (r,) the changed training rows.
        before: (r, *x) their inputs.
        after: (r, *x) their changed inputs: those with which every query is called wrong, or else those with the
            largest mean loss of the queries that was met.
        losses: mean loss of the queries by the control and after every step, each of a really trained model.
        predicted: what equation 5 predicted for every step's rise of the loss.
        step: the place in `losses` of what is returned; 0 if no step raised the loss.
        loss_given: mean loss of the queries by the model as given.
        targets: (q,) true labels of the queries, or None where targets are no classes.
        said_before: (q,) labels that the model as given gave them.
        said_control: (q,) labels that the control gives them.
        said_after: (q,) labels that the retrained model gives them.
        level: the size of one level in the inputs' units.
        random_loss: mean loss after a change of the same rows to random corners of the same box.
        feature_change: (r,) ‖h(after) − h(before)‖₂ in the features that the objective sees.
        feature_scale: (r,) distance of each row's features from the mean of its class before.
        accuracy: of the test rows, by the model as given and after; None if there were none.
        accuracy_control: of the test rows by the control; None if there were none.
        newly_wrong: training rows that the model as given and the control call right, and the retrained model wrong.
        rounds_back: whether every changed number rounds to the level that it had before; levels are counted from the
            smallest training input.
        model: the influence of the retrained model, on the changed data.
    """

    rows: Int[NDArray[np.int64], " r"]
    before: Float[NDArray[np.float64], "r ..."] = field(repr=False)
    after: Float[NDArray[np.float64], "r ..."] = field(repr=False)
    losses: list[float] = field(repr=False)
    predicted: list[float] = field(repr=False)
    step: int
    loss_given: float
    targets: Shaped[NDArray[Any], " q"] | None
    said_before: Shaped[NDArray[Any], " q"] | None
    said_control: Shaped[NDArray[Any], " q"] | None
    said_after: Shaped[NDArray[Any], " q"] | None
    level: float
    random_loss: float
    feature_change: Float[NDArray[np.float64], " r"]
    feature_scale: Float[NDArray[np.float64], " r"]
    accuracy: tuple[float, float] | None
    accuracy_control: float | None
    newly_wrong: Int[NDArray[np.int64], " m"]
    rounds_back: bool
    model: uw.Influence = field(repr=False)

    @property
    def ids(self) -> Shaped[NDArray[Any], " n"] | None:
        """The names of all training rows, None where they have none."""
        return self.model.examples.ids

    @property
    def flipped(self) -> Bool[NDArray[np.bool_], " q"]:
        """Which queries the model as given and the control call right, and the retrained model calls wrong."""
        if self.targets is None:
            return np.zeros(0, dtype=bool)
        right = (self.said_before == self.targets) & (self.said_control == self.targets)
        return right & (self.said_after != self.targets)

    @property
    def flipped_by_control(self) -> Bool[NDArray[np.bool_], " q"]:
        """Which queries the model as given calls right, and the control, with nothing changed, calls wrong."""
        if self.targets is None:
            return np.zeros(0, dtype=bool)
        return (self.said_before == self.targets) & (self.said_control != self.targets)

    @property
    def loss(self) -> tuple[float, float]:
        """The mean loss of the queries after training on the rows as they were, and on the changed rows."""
        return self.losses[0], self.losses[self.step]

    @property
    def largest(self) -> float:
        """The largest change of a number, in levels."""
        return float(np.abs(self.after - self.before).max() / self.level)

    @property
    def lengths(self) -> Float[NDArray[np.float64], " r"]:
        """‖after − before‖₂ of every row, in the inputs' units."""
        return np.linalg.norm((self.after - self.before).reshape(len(self.rows), -1), axis=1)

    def __str__(self) -> str:
        same = "rounds to the same levels" if self.rounds_back else "does not round to the same levels"
        steps = len(self.losses) - 1
        size = f"changed by at most {self.largest:.4g} levels ({same}), {steps} steps"
        if not steps:
            size = "stay as they were, for every query is called wrong before any is changed"
        elif not self.step:
            size = f"stay as they were, for none of {steps} steps raised the loss"
        q = "the queries" if self.targets is None else f"{len(self.targets)} queries"
        lines = [
            f"Rows {listed(self.ids, self.rows, _SHOWN)} {size}.",
            f"Mean loss of {q} {self.loss_given:.4g}; {self.loss[0]:.4g} after training again with nothing changed; "
            f"{self.loss[1]:.4g} on the changed rows; {self.random_loss:.4g} by a random change of that size.",
            "Features moved by "
            + ", ".join(f"{a:.3g} of {b:.3g}" for a, b in zip(self.feature_change, self.feature_scale, strict=True))
            + " (distance to the mean of the class).",
        ]
        if self.targets is not None:
            lines.insert(1, flips_in_words(self.flipped, self.flipped_by_control))
        return "\n".join([*lines, *outcome_in_words(self.accuracy, self.accuracy_control, self.newly_wrong, self.ids)])

    def _repr_html_(self) -> str:
        first, *rest = str(self).split("\n")
        head = ["mean loss of the queries", "nats"]
        losses = {
            "the model as given": self.loss_given,
            "training again with nothing changed": self.loss[0],
            "training on the changed rows": self.loss[1],
            "a random change of that size": self.random_loss,
        }
        lines = [[notebook.plain(name), notebook.plain(value, ".4g")] for name, value in losses.items()]
        moved = zip(self.rows, self.lengths, self.feature_change, self.feature_scale, strict=True)
        rows = [
            [notebook.row(row, self.ids), *(notebook.plain(value, ".3g") for value in values)] for row, *values in moved
        ]
        columns = ["row", "‖change‖ of the input", "features moved by", "distance to the mean of the class"]
        parts = notebook.table("Attack on training inputs", head, lines), notebook.table("", columns, rows)
        said = [line for line in rest if not line.startswith(("Mean loss", "Features moved"))]
        return notebook.shown(*parts, said=[first, *said])

    def to_dict(self) -> dict[str, Any]:
        """Everything but the inputs, as plain numbers and lists."""
        return {
            "rows": self.rows.tolist(),
            "flipped": np.flatnonzero(self.flipped).tolist(),
            "flipped_by_control": np.flatnonzero(self.flipped_by_control).tolist(),
            "queries": None if self.targets is None else len(self.targets),
            "loss_given": self.loss_given,
            "loss_before": self.loss[0],
            "loss_after": self.loss[1],
            "loss_random": self.random_loss,
            "steps": len(self.losses) - 1,
            "step": self.step,
            "largest_in_levels": self.largest,
            "lengths": self.lengths.tolist(),
            "rounds_back": self.rounds_back,
            "feature_change": self.feature_change.tolist(),
            "feature_scale": self.feature_scale.tolist(),
            "accuracy": None if self.accuracy is None else list(self.accuracy),
            "accuracy_control": self.accuracy_control,
            "newly_wrong": self.newly_wrong.tolist(),
            **names_in_json(self.ids, self.rows),
            **names_in_json(self.ids, self.newly_wrong, "newly_wrong_ids"),
        }


def attack(
    influence: uw.Influence,
    on: Any,
    *,
    rows: Any = None,
    count: int | None = None,
    level: float = 1 / 255,
    half: float = 0.5,
    bounds: tuple[float, float] | None = None,
    step: float = 0.02,
    iterations: int = 100,
    patience: int = 20,
    test: Any = None,
    retrain: Any = None,
    seed: int = 0,
    store: str | os.PathLike[str] | None = None,
    progress: bool | None = None,
) -> Attack:
    """Change training rows so little that nobody sees it, so that the queries' loss rises after training again.

        x ← Π(x + step · level · sign ∂L(queries)/∂x),     Π: |x − x₀| < half · level and low ≤ x ≤ high

    It starts from the control, the model that training again gives with nothing changed. After every step features are
    recomputed, the model is trained again, and equation 5 is solved anew there. It ends when every query is called
    wrong, when the loss has not risen by 1 % for `patience` steps, or after `iterations`.

    Cost: two trainings; per step equation 5 of the rows, their features, and one training from the last parameters.

    Args:
        influence: of a model whose inputs can be moved: an estimator, or a network with a head.
        on: (Xq, yq), the queries; the mean of their losses is raised.
        rows: the training rows, as everywhere: one number, several, or a mask; None takes the most vulnerable.
        count: without `rows`, how many of the most vulnerable of all rows; None means one.
        level: the size of one level in the inputs' units: 1 for pixels 0 … 255, 1/255 for pixels 0 … 1.
        half: how far a number may move, in levels; a thousandth of it is left out, so that 0.5 rounds back.
        bounds: smallest and largest valid input; None takes those of the training inputs.
        step: in levels.
        iterations: at most so many steps.
        patience: steps without a rise of the loss after which it ends.
        test: (Xt, yt) other test rows, whose accuracy is told before and after.
        retrain: as for `retrained`, but no function of weights, which cannot see changed rows.
        seed: of the random change that the result is compared with, and of the retrainer.
        store: a folder that keeps every step as soon as it is done, so that the same call goes on where it was stopped,
            and one with more iterations goes on at the end; None keeps nothing.
        progress: True or False forces the bar (stderr) on or off; None shows it on a terminal only.

    Raises:
        InvalidInput: if a setting does not fit, or the training inputs are no dense array of numbers.
        RowOutOfRange: if a row does not exist.
        UnsupportedModel: if inputs cannot be moved, or are transformed on their way to the estimator.
        StoreMismatch: if the folder holds another attack.

    References: Koh & Liang (2017), section 5.2.
    """
    check_positive(level=level, half=half, step=step)
    check_retrain(retrain)
    checked_count(iterations, "iterations")
    checked_count(patience, "patience")
    if rows is not None and count is not None:
        message = f"rows={rows!r} and count={count!r} were both given. Name the rows, or say how many of the most "
        raise InvalidInput(message + "vulnerable to take.")
    queries, others = influence.queries(on), tested(influence, test)
    k = checked_count(1 if count is None else count, "count")
    if influence.examples.dataset is not None:
        message = "The training rows are a Dataset, and only those of arrays can be changed a little. Explain the "
        raise InvalidInput(message + "model on arrays X and y.")
    if rows is not None:
        rows = influence.examples.rows(rows)
    question = {"work": "attack", "rows": None if rows is None else rows.tolist(), "count": k, "level": level}
    question |= {"half": half, "bounds": bounds, "step": step, "seed": seed, **asked(influence, queries)}
    course = uw.Course(influence, store, question, retrain)
    control = course.retrained(influence, retrain=retrain, seed=seed)
    if rows is None:
        ranked = partial(vulnerability, control, queries, level=level, half=half)
        rows = course.numbers(lambda: ranked().top(k)).astype(np.int64)
    box = _Box.around(uw.training_inputs(influence), rows, bounds, half, level)
    trials = _Trials(rows, box, queries, uw.query_labels(influence, queries), retrain, seed, course)
    start = trials.point(box.center, control)
    _check_directions(control, rows, box, queries)
    corner = box.project(box.center + half * level * np.random.default_rng(seed).choice([-1.0, 1.0], box.center.shape))
    random_loss = trials.trained(control, corner).loss
    losses, predicted, end, place = _climb(start, trials, step * level, iterations, patience, progress)
    accuracy, accuracy_control = accuracies((influence, control, end.model), others)
    return Attack(
        rows=rows,
        before=box.center,
        after=end.x,
        losses=losses,
        predicted=predicted,
        step=place,
        loss_given=float(losses_of(influence, queries).mean()),
        targets=trials.targets,
        said_before=uw.predict(influence, queries).labels if trials.targets is not None else None,
        said_control=start.said,
        said_after=end.said,
        level=level,
        random_loss=random_loss,
        feature_change=_feature_change(influence, end.model, rows),
        feature_scale=_distances_to_class_means(influence, rows),
        accuracy=accuracy,
        accuracy_control=accuracy_control,
        newly_wrong=newly_wrong((influence, control, end.model), uw.training_labels(influence)),
        rounds_back=box.rounds_back(end.x, level),
        model=end.model,
    )


@dataclass(frozen=True)
class _Box:
    """What changed inputs may be.

    Args:
        center: (r, *x) the inputs before.
        half: how far a number may be from there, in the inputs' units.
        low: the smallest valid input.
        high: the largest.
        origin: the smallest training input, from which levels are counted.
        dtype: of the inputs as they are given to the model.
    """

    center: Float[NDArray[np.float64], "r ..."]
    half: float
    low: float
    high: float
    origin: float
    dtype: np.dtype[Any]

    @classmethod
    def around(cls, X: Any, rows: Any, bounds: Any, half: float, level: float) -> _Box:
        """The box around some rows of X."""
        array = np.asarray(X)
        if array.ndim < 2 or array.dtype.kind not in "fiub":
            message = (
                f"The training inputs are a {type(X).__name__} of shape {tuple(getattr(X, 'shape', array.shape))}, and "
                "only dense arrays of numbers can be changed a little. Explain the model on such an array; for "
                "discrete data use `flip_labels`."
            )
            raise InvalidInput(message)
        smallest = float(array.min())
        low, high = bounds if bounds is not None else (smallest, float(array.max()))
        center = np.asarray(array[rows], dtype=np.float64)
        if not low < high or center.min() < low or center.max() > high:
            message = (
                f"bounds are {low:g} to {high:g}, and the rows' inputs reach from {center.min():g} to "
                f"{center.max():g}. Pass bounds=(smallest, largest) that hold all inputs."
            )
            raise InvalidInput(message)
        dtype = array.dtype if array.dtype.kind == "f" else np.dtype(np.float32)
        return cls(center, half * level * (1 - _HAIR), float(low), float(high), smallest, dtype)

    def project(self, x: NDArray[np.float64]) -> NDArray[np.float64]:
        """The nearest point of the box."""
        inside = np.clip(x, self.center - self.half, self.center + self.half)
        return np.clip(inside, self.low, self.high)

    def rounds_back(self, x: NDArray[np.float64], level: float) -> bool:
        """Whether every number rounds to the level that it had before."""
        now, before = (np.rint((values - self.origin) / level) for values in (x, self.center))
        return bool((now == before).all())


@dataclass(frozen=True)
class _Point:
    """Inputs that were tried: the model trained on them, the queries' mean loss there and what it says of them."""

    x: NDArray[np.float64]
    model: uw.Influence
    loss: float
    said: NDArray[Any] | None
    all_wrong: bool


@dataclass(frozen=True)
class _Trials:
    """How inputs are tried: the model is trained again, and asked; `course` keeps what was found."""

    rows: NDArray[np.int64]
    box: _Box
    queries: uw.Examples
    targets: NDArray[Any] | None
    retrain: Any
    seed: int
    course: uw.Course

    def gradient(self, point: _Point) -> NDArray[np.float64]:
        """Equation 5 at a point: the derivative of the queries' mean loss by the rows' inputs."""
        return self.course.numbers(lambda: MeanLoss(point.model, self.queries).by_inputs(self.rows))

    def trained(self, model: uw.Influence, x: NDArray[np.float64]) -> _Point:
        """The model trained again with these inputs, from the parameters of another."""
        changed = uw.edited(model, self.rows, X_new=x.astype(self.box.dtype))
        return self.point(x, self.course.retrained(changed, retrain=self.retrain, seed=self.seed))

    def point(self, x: NDArray[np.float64], model: uw.Influence) -> _Point:
        """What a model says."""
        loss = float(losses_of(model, self.queries).mean())
        if self.targets is None:
            return _Point(x, model, loss, None, all_wrong=False)
        said = uw.predict(model, self.queries).labels
        return _Point(x, model, loss, said, all_wrong=bool((said != self.targets).all()))


def _climb(
    start: _Point, trials: _Trials, step: float, iterations: int, patience: int, progress: bool | None
) -> tuple[list[float], list[float], _Point, int]:
    """The iteration: losses, predicted rises, the point with all queries wrong or the largest loss, and its place."""
    point, end, place = start, start, 0
    losses: list[float] = [start.loss]
    predicted: list[float] = []
    mark, since = 0.0, 0
    bar = tqdm(range(iterations), desc="attack", disable=None if progress is None else not progress, leave=False)
    for _ in bar:
        if point.all_wrong or since >= patience:
            break
        gradient = trials.gradient(point)
        moved = trials.box.project(point.x + step * np.sign(gradient))
        predicted.append(float((gradient * (moved - point.x)).sum()))
        point = trials.trained(point.model, moved)
        losses.append(point.loss)
        if point.all_wrong or point.loss > max(losses[:-1]):
            end, place = point, len(losses) - 1
        since = 0 if point.loss > (1 + _RISE) * mark else since + 1
        mark = max(mark, point.loss)
        bar.set_postfix(loss=f"{point.loss:.4g}")
    bar.close()
    return losses, predicted, end, place


def _check_directions(influence: uw.Influence, rows: NDArray[np.int64], box: _Box, queries: uw.Examples) -> None:
    """Equation 5 must be by the inputs that are given: what it says of a tiny step, equation 3 must say too.

    Raises:
        UnsupportedModel: if the two disagree, as where a Pipeline transforms inputs before the estimator.
    """
    gradient = MeanLoss(influence, queries).by_inputs(rows)
    reason = (
        "a Pipeline transforms them before the estimator. Explain the final estimator on transformed inputs, or a "
        "network that holds the transformation."
    )
    if gradient.shape == box.center.shape:
        move = _PROBE * 2 * box.half * np.sign(gradient)
        expected = float((gradient * move).sum())
        x = (box.center + move).astype(box.dtype if box.dtype.itemsize > 4 else np.float32)
        try:
            found = float(influence.of_replacing(rows, x, _targets(influence, rows), on=queries).values.mean(0).sum())
        except InvalidInput as error:  # transformers that take other columns
            what = f"the rows' inputs are refused as new ones ({first_line(error)})"
        else:
            if abs(found - expected) <= _AGREE * max(abs(expected), abs(found)) + 1e-15:
                return
            what = (
                f"a small step changes the loss by {expected:.3g} to first order, and by {found:.3g} as a replacement"
            )
    else:
        what = f"it has shape {gradient.shape} and the rows' inputs have {box.center.shape}"
        reason = "the estimator, such as a lasso, uses some of the columns only. Fit it on those columns."
    message = f"Equation 5 is not by the inputs that the model takes: {what}. Usual reason: {reason}"
    raise UnsupportedModel(message)


def _targets(influence: uw.Influence, rows: NDArray[np.int64]) -> Any:
    """The targets of training rows as a user gives them: an estimator's labels by their names."""
    if getattr(influence.encoder, "estimator", None) is not None and uw.classes(influence) is not None:
        return uw.training_labels(influence, rows)
    targets = influence.examples.targets()
    return None if targets is None else targets.cpu().numpy()[rows]


def _feature_change(before: uw.Influence, after: uw.Influence, rows: NDArray[np.int64]) -> NDArray[np.float64]:
    """(r,) how far the features of these rows have moved."""
    old, new = (uw.features(model, model.examples.subset(rows)) for model in (before, after))
    return np.linalg.norm(new - old, axis=1)


def _distances_to_class_means(influence: uw.Influence, rows: NDArray[np.int64]) -> NDArray[np.float64]:
    """(r,) how far each row's features are from the mean of its class, or of all rows where there are no classes."""
    examples, labels = influence.examples, uw.training_labels(influence)
    own = uw.features(influence, examples.subset(rows))
    codes = np.zeros(influence.n, dtype=np.int64) if labels is None else np.unique(labels, return_inverse=True)[1]
    asked, place = np.unique(codes[rows], return_inverse=True)
    member = (codes == asked[:, None]).astype(np.float64)  # (classes asked for, n)
    total, start = np.zeros((len(asked), own.shape[1])), 0
    for block in examples.blocks(max(1, _NUMBERS // own.shape[1])):
        total += member[:, start : start + len(block)] @ uw.features(influence, block)
        start += len(block)
    return np.linalg.norm(own - (total / member.sum(1, keepdims=True))[place], axis=1)
