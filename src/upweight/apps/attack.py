"""Section 5.2, a robustness audit: how far can changes of training rows that nobody sees move an answer?

    vulnerability   equation 5 over all rows: the predicted rise of a query's loss if a row moves by half a level
    attack          the paper's iteration: a step along the sign of equation 5, projection to the box, and a model
                    that is really trained again, until the queries flip

For audits of your own models: it says which answers hang on few rows, and which rows deserve a second look.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int, Shaped
from numpy.typing import NDArray
from tqdm import tqdm

import upweight as uw
from upweight.errors import InvalidInput, UnsupportedModel, checked_count

_HAIR = 1e-3  # of the box is left out, so that a changed pixel rounds to what it was
_NUMBERS = 2**24  # of equation 5 at once: 128 MB
_RISE = 0.01  # a loss that has not risen by this share for `patience` steps has stopped rising
_PROBE = 1e-3  # levels by which equation 5 is tried out
_AGREE = 0.5  # share of the larger by which equation 3 and equation 5 may differ there


@dataclass(frozen=True)
class Vulnerability:
    """How far a change that nobody sees could move each query's loss, to first order.

    values[q, i] = half · level · ‖∂L(query q)/∂xᵢ‖₁: the largest predicted rise of the loss if every number of row i's
    input may move by half a level (equation 5; bounds of the inputs are left out).

    Args:
        rows: (r,) training rows.
        values: (q, r) predicted rises of the losses, in nats.
        query_losses: (q,) losses now.
        labels: (r,) of the rows, or None where targets are no classes.
        k: how many rows `__str__` and `to_dict` show.
    """

    rows: Int[NDArray[np.int64], " r"]
    values: Float[NDArray[np.float64], "q r"] = field(repr=False)
    query_losses: Float[NDArray[np.float64], " q"]
    labels: Shaped[NDArray[Any], " r"] | None = field(default=None, repr=False)
    k: int = 5

    @property
    def by_row(self) -> Float[NDArray[np.float64], " r"]:
        """Each row's score: the mean over the queries of how far it could move their losses."""
        return self.values.mean(0)

    @property
    def by_query(self) -> Float[NDArray[np.float64], " q"]:
        """Each query's score: how far the one row that can move it most could."""
        return self.values.max(1)

    def top(self, k: int | None = None, query: int | None = None) -> Int[NDArray[np.int64], " k"]:
        """The k rows that could move a query most, or all queries on average."""
        k = self.k if k is None else checked_count(k, "k")
        values = self.by_row if query is None else self.values[query]
        return self.rows[np.argsort(-values, kind="stable")[:k]]

    def __str__(self) -> str:
        place = {int(row): j for j, row in enumerate(self.rows)}
        lines = [
            f"{len(self.rows)} rows and {len(self.query_losses)} queries. A row could raise a query's loss by at most "
            f"{self.values.max():.3g} (mean over rows {self.values.mean():.3g}; mean loss now "
            f"{self.query_losses.mean():.3g}).",
            "row     label     could raise the mean loss by",
        ]
        for row in self.top():
            label = "" if self.labels is None else str(self.labels[place[int(row)]])
            lines.append(f"{row:<7} {label:<9} {self.by_row[place[int(row)]]:.3g}")
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """The k most vulnerable rows, and every query's score."""
        place = {int(row): j for j, row in enumerate(self.rows)}
        return {
            "rows": [{"row": int(row), "score": float(self.by_row[place[int(row)]])} for row in self.top()],
            "queries": self.by_query.tolist(),
            "query_losses": self.query_losses.tolist(),
        }


@dataclass(frozen=True)
class Attack:
    """What a crafted change of some training inputs really does, after training again.

    Args:
        rows: (r,) the changed training rows.
        before: (r, *x) their inputs.
        after: (r, *x) their changed inputs, those with the largest mean loss of the queries that was met.
        losses: mean loss of the queries at the start and after every step, each of a really trained model.
        predicted: what equation 5 predicted for every step's rise of the loss.
        targets: (q,) true labels of the queries, or None where targets are no classes.
        said_before: (q,) labels that the model gave them.
        said_after: (q,) labels that the retrained model gives them.
        level: the size of one level in the inputs' units.
        random_loss: mean loss after a change of the same rows to random corners of the same box.
        feature_change: (r,) ‖h(after) − h(before)‖₂ in the features that the objective sees.
        feature_scale: (r,) distance of each row's features from the mean of its class before.
        accuracy: of the test rows, before and after; None if there were none.
        newly_wrong: training rows that the model called right before, and calls wrong after.
        rounds_back: whether every changed number rounds to the level that it had before.
        model: the influence of the retrained model, on the changed data.
    """

    rows: Int[NDArray[np.int64], " r"]
    before: Float[NDArray[np.float64], "r ..."] = field(repr=False)
    after: Float[NDArray[np.float64], "r ..."] = field(repr=False)
    losses: list[float] = field(repr=False)
    predicted: list[float] = field(repr=False)
    targets: Shaped[NDArray[Any], " q"] | None
    said_before: Shaped[NDArray[Any], " q"] | None
    said_after: Shaped[NDArray[Any], " q"] | None
    level: float
    random_loss: float
    feature_change: Float[NDArray[np.float64], " r"]
    feature_scale: Float[NDArray[np.float64], " r"]
    accuracy: tuple[float, float] | None
    newly_wrong: Int[NDArray[np.int64], " m"]
    rounds_back: bool
    model: uw.Influence = field(repr=False)

    @property
    def flipped(self) -> Bool[NDArray[np.bool_], " q"]:
        """Which queries the model called right before, and the retrained model calls wrong."""
        if self.targets is None:
            return np.zeros(0, dtype=bool)
        return (self.said_before == self.targets) & (self.said_after != self.targets)

    @property
    def loss(self) -> tuple[float, float]:
        """The mean loss of the queries before, and after training on the changed rows."""
        return self.losses[0], max(self.losses)

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
        lines = [
            f"Rows {', '.join(map(str, self.rows))} changed by at most {self.largest:.4g} levels ({same}), "
            f"{len(self.losses) - 1} steps.",
            f"Mean loss of {'the queries' if self.targets is None else f'{len(self.targets)} queries'} "
            f"{self.loss[0]:.4g} → {self.loss[1]:.4g}; {self.random_loss:.4g} by a random change of that size.",
            "Features moved by "
            + ", ".join(f"{a:.3g} of {b:.3g}" for a, b in zip(self.feature_change, self.feature_scale, strict=True))
            + " (distance to the mean of the class).",
        ]
        if self.targets is not None:
            lines.insert(1, f"Flipped {self.flipped.sum()} of {len(self.targets)} queries, after training again.")
        if self.accuracy is not None:
            lines.append(f"Accuracy on the test rows {self.accuracy[0]:.4g} → {self.accuracy[1]:.4g}.")
        if len(self.newly_wrong):
            lines.append(f"Training rows that are now called wrong: {', '.join(map(str, self.newly_wrong[:10]))}.")
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """Everything but the inputs, as plain numbers and lists."""
        return {
            "rows": self.rows.tolist(),
            "flipped": np.flatnonzero(self.flipped).tolist(),
            "queries": None if self.targets is None else len(self.targets),
            "loss_before": self.loss[0],
            "loss_after": self.loss[1],
            "loss_random": self.random_loss,
            "steps": len(self.losses) - 1,
            "largest_in_levels": self.largest,
            "lengths": self.lengths.tolist(),
            "rounds_back": self.rounds_back,
            "feature_change": self.feature_change.tolist(),
            "feature_scale": self.feature_scale.tolist(),
            "accuracy": None if self.accuracy is None else list(self.accuracy),
            "newly_wrong": self.newly_wrong.tolist(),
        }


def vulnerability(
    influence: uw.Influence, on: Any, *, rows: Any = None, level: float = 1 / 255, half: float = 0.5, k: int = 5
) -> Vulnerability:
    """Rank training rows by how far a change of less than half a level of their inputs can move queries.

    Cost: equation 5 of every row for every query: for a network one forward pass and q backward passes per row.

    Args:
        influence: of a model whose inputs can be moved: not of a kernel.
        on: (Xq, yq), the queries.
        rows: the training rows; None means all.
        level: the size of one level in the inputs' units: 1 for pixels 0 … 255, 1/255 for pixels 0 … 1.
        half: how far a number may move, in levels.
        k: how many rows `__str__` shows.

    Raises:
        UnsupportedModel: if the objective's inputs are not the user's, as for kernels.
        InvalidInput: if a setting is no positive number.

    References: Koh & Liang (2017), section 5.2 and equation 5.
    """
    _check_positive(level=level, half=half)
    checked_count(k, "k")
    chosen = np.arange(influence.n) if rows is None else np.unique(np.atleast_1d(np.asarray(rows)))
    first = influence.of_perturbing(chosen[:1], on=on)
    queries, numbers = len(first), max(1, first.size)
    block = max(1, _NUMBERS // numbers)
    norms = np.concatenate(
        [
            np.abs(influence.of_perturbing(chosen[i : i + block], on=on))
            .reshape(queries, -1, numbers // queries)
            .sum(2)
            for i in range(0, len(chosen), block)
        ],
        axis=1,
    )
    return Vulnerability(
        chosen, half * level * norms, _losses(influence, on), uw.training_labels(influence, chosen), k=k
    )


def attack(
    influence: uw.Influence,
    on: Any,
    *,
    rows: Any = 1,
    level: float = 1 / 255,
    half: float = 0.5,
    bounds: tuple[float, float] | None = None,
    step: float = 0.02,
    iterations: int = 100,
    patience: int = 20,
    test: Any = None,
    retrain: Any = None,
    seed: int = 0,
    progress: bool | None = None,
) -> Attack:
    """Change training rows so little that nobody sees it, so that the queries' loss rises after training again.

        x ← Π(x + step · level · sign ∂L(queries)/∂x),     Π: |x − x₀| < half · level and low ≤ x ≤ high

    After every step features are recomputed, the model is trained again, and equation 5 is solved anew there. It ends
    when every query is called wrong, when the loss has not risen by 1 % for `patience` steps, or after `iterations`.

    Cost: per step equation 5 of the rows, their features, and one training from the last parameters.

    Args:
        influence: of a model whose inputs can be moved, at a minimum: an estimator, or a network with a head.
        on: (Xq, yq), the queries; the mean of their losses is raised.
        rows: the training rows themselves, as a list; or a whole number k: the k most vulnerable of all rows.
        level: the size of one level in the inputs' units: 1 for pixels 0 … 255, 1/255 for pixels 0 … 1.
        half: how far a number may move, in levels; a thousandth of it is left out, so that 0.5 rounds back.
        bounds: smallest and largest valid input; None takes those of the training inputs.
        step: in levels.
        iterations: at most so many steps.
        patience: steps without a rise of the loss after which it ends.
        test: (Xt, yt) other test rows, whose accuracy is told before and after.
        retrain: as for `retrained`.
        seed: of the random change that the result is compared with, and of the retrainer.
        progress: True or False forces the bar (stderr) on or off; None shows it on a terminal only.

    Raises:
        InvalidInput: if a setting does not fit, or the training inputs are no dense array of numbers.
        UnsupportedModel: if inputs cannot be moved, or are transformed on their way to the estimator.

    References: Koh & Liang (2017), section 5.2.
    """
    _check_positive(level=level, half=half, step=step)
    checked_count(iterations, "iterations")
    checked_count(patience, "patience")
    if isinstance(rows, int | np.integer):
        count = checked_count(int(rows), "rows")
        rows = vulnerability(influence, on, level=level, half=half).top(count)
    rows = influence.examples.rows(rows)
    box = _Box.around(uw.training_inputs(influence), rows, bounds, half, level)
    _check_directions(influence, rows, box, on)
    state = _climb(influence, rows, box, on, step * level, iterations, patience, retrain, seed, progress)
    corner = box.project(box.center + half * level * np.random.default_rng(seed).choice([-1.0, 1.0], box.center.shape))
    by_chance = _trained(influence, rows, corner, box, retrain, seed)
    labels = uw.query_labels(influence, on)
    h, new = uw.features(influence), uw.features(state.model)
    return Attack(
        rows=rows,
        before=box.center,
        after=state.x,
        losses=state.losses,
        predicted=state.predicted,
        targets=labels,
        said_before=None if labels is None else uw.predict(influence, _inputs(influence, on)).labels,
        said_after=None if labels is None else uw.predict(state.model, _inputs(influence, on)).labels,
        level=level,
        random_loss=float(_losses(by_chance, on).mean()),
        feature_change=np.linalg.norm(new[rows] - h[rows], axis=1),
        feature_scale=_distances_to_class_means(influence, h, rows),
        accuracy=accuracies(influence, state.model, test),
        newly_wrong=newly_wrong(influence, state.model),
        rounds_back=bool((np.rint((state.x - box.low) / level) == np.rint((box.center - box.low) / level)).all()),
        model=state.model,
    )


def accuracies(before: uw.Influence, after: uw.Influence, test: Any) -> tuple[float, float] | None:
    """The accuracy of two models on (Xt, yt); None without them."""
    if test is None:
        return None
    X, y = test
    return uw.predict(before, X).accuracy(y), uw.predict(after, X).accuracy(y)


def newly_wrong(before: uw.Influence, after: uw.Influence) -> Int[NDArray[np.int64], " m"]:
    """Training rows whose label one model says and the other, on its own data, does not; none without classes."""
    old, new = uw.training_labels(before), uw.training_labels(after)
    if old is None or new is None:
        return np.zeros(0, dtype=np.int64)
    said, says = (uw.predict(model, model.examples).labels for model in (before, after))
    return np.flatnonzero((said == old) & (says != new))


@dataclass(frozen=True)
class _Box:
    """What changed inputs may be.

    Args:
        center: (r, *x) the inputs before.
        half: how far a number may be from there, in the inputs' units.
        low: the smallest valid input.
        high: the largest.
        dtype: of the inputs as they are given to the model.
    """

    center: Float[NDArray[np.float64], "r ..."]
    half: float
    low: float
    high: float
    dtype: np.dtype[Any]

    @classmethod
    def around(cls, X: Any, rows: Any, bounds: Any, half: float, level: float) -> _Box:
        """The box around some rows of X."""
        array = np.asarray(X)
        if array.ndim < 2 or array.dtype.kind not in "fiub":
            message = (
                f"The training inputs are a {type(X).__name__} of shape {array.shape}, and only dense arrays of "
                "numbers can be changed a little. Explain the model on such an array; for discrete data use "
                "`flip_labels`."
            )
            raise InvalidInput(message)
        low, high = bounds if bounds is not None else (float(array.min()), float(array.max()))
        center = np.asarray(array[rows], dtype=np.float64)
        if not low < high or center.min() < low or center.max() > high:
            message = (
                f"bounds are {low:g} to {high:g}, and the rows' inputs reach from {center.min():g} to "
                f"{center.max():g}. Pass bounds=(smallest, largest) that hold all inputs."
            )
            raise InvalidInput(message)
        dtype = array.dtype if array.dtype.kind == "f" else np.dtype(np.float32)
        return cls(center, half * level * (1 - _HAIR), float(low), float(high), dtype)

    def project(self, x: NDArray[np.float64]) -> NDArray[np.float64]:
        """The nearest point of the box."""
        inside = np.clip(x, self.center - self.half, self.center + self.half)
        return np.clip(inside, self.low, self.high)


@dataclass(frozen=True)
class _State:
    x: NDArray[np.float64]
    model: uw.Influence
    losses: list[float]
    predicted: list[float]


def _climb(
    influence: uw.Influence,
    rows: NDArray[np.int64],
    box: _Box,
    on: Any,
    step: float,
    iterations: int,
    patience: int,
    retrain: Any,
    seed: int,
    progress: bool | None,
) -> _State:
    """The iteration; of all points that were met the one with the largest loss."""
    x, model = box.center, influence
    best, losses, predicted = (x, model), [float(_losses(model, on).mean())], []
    mark, since = 0.0, 0
    bar = tqdm(range(iterations), desc="attack", disable=None if progress is None else not progress, leave=False)
    for _ in bar:
        gradient = model.of_perturbing(rows, on=on).mean(0)
        moved = box.project(x + step * np.sign(gradient))
        predicted.append(float((gradient * (moved - x)).sum()))
        x, model = moved, _trained(model, rows, moved, box, retrain, seed)
        losses.append(float(_losses(model, on).mean()))
        if losses[-1] > max(losses[:-1]):
            best = (x, model)
        since = 0 if losses[-1] > (1 + _RISE) * mark else since + 1
        mark = max(mark, losses[-1])
        bar.set_postfix(loss=f"{losses[-1]:.4g}")
        if since >= patience or _all_wrong(model, on):
            break
    bar.close()
    return _State(*best, losses, predicted)


def _trained(
    model: uw.Influence, rows: Any, x: NDArray[np.float64], box: _Box, retrain: Any, seed: int
) -> uw.Influence:
    return uw.retrained(uw.edited(model, rows, X_new=x.astype(box.dtype)), retrain=retrain, seed=seed)


def _losses(influence: uw.Influence, on: Any) -> NDArray[np.float64]:
    """(q,) losses of the queries."""
    values = influence.of_groups([[0]], on=on).query_values
    if values is None:
        message = "The losses of these queries are not known."
        raise UnsupportedModel(message)
    return values


def _inputs(influence: uw.Influence, on: Any) -> Any:
    """The queries as examples, for `predict`."""
    return influence.queries(on)


def _all_wrong(influence: uw.Influence, on: Any) -> bool:
    labels = uw.query_labels(influence, on)
    return labels is not None and bool((uw.predict(influence, _inputs(influence, on)).labels != labels).all())


def _check_directions(influence: uw.Influence, rows: NDArray[np.int64], box: _Box, on: Any) -> None:
    """Equation 5 must be by the inputs that are given: what it says of a tiny step, equation 3 must say too.

    Raises:
        UnsupportedModel: if the two disagree, as where a Pipeline transforms inputs before the estimator.
    """
    gradient = influence.of_perturbing(rows, on=on).mean(0)
    if gradient.shape == box.center.shape:
        move = _PROBE * 2 * box.half * np.sign(gradient)
        expected = float((gradient * move).sum())
        targets = influence.examples.targets()
        labels = uw.training_labels(influence, rows)
        if labels is None:
            labels = None if targets is None else targets.numpy()[rows]
        x = (box.center + move).astype(box.dtype if box.dtype.itemsize > 4 else np.float32)
        found = float(influence.of_replacing(rows, x, labels, on=on).values.mean(0).sum())
        if abs(found - expected) <= _AGREE * max(abs(expected), abs(found)) + 1e-15:
            return
        what = f"a small step changes the loss by {expected:.3g} to first order, and by {found:.3g} as a replacement"
    else:
        what = f"it has shape {gradient.shape} and the rows' inputs have {box.center.shape}"
    message = (
        f"Equation 5 is not by the inputs that the model takes: {what}. Usual reason: a Pipeline transforms them "
        "before the estimator. Explain the final estimator on transformed inputs, or a network that holds the "
        "transformation."
    )
    raise UnsupportedModel(message)


def _distances_to_class_means(
    influence: uw.Influence, features: NDArray[np.float64], rows: NDArray[np.int64]
) -> NDArray[np.float64]:
    """(r,) how far each row's features are from the mean of its class, or of all rows where there are no classes."""
    labels = uw.training_labels(influence)
    means = [features[slice(None) if labels is None else labels == labels[row]].mean(0) for row in rows]
    return np.linalg.norm(features[rows] - np.stack(means), axis=1)


def _check_positive(**settings: float) -> None:
    for name, value in settings.items():
        if not np.isfinite(value) or value <= 0:
            message = f"{name} is {value!r}, and must be a positive number."
            raise InvalidInput(message)
