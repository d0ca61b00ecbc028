"""Which order of inspection finds wrong labels, estimated where nobody knows which are wrong.

Some labels are flipped on purpose, the model is trained again on them, and every order is asked where it puts those
rows. A planted flip counts as found if fewer than k rows that were not planted come before it, k the rows to inspect:
so planted flips take no place from each other, and what is wrong already takes the same places in every order.

The estimate is for wrong labels like the planted ones: rows drawn with equal chance, each with any of the other
classes. Mistakes that somebody makes on hard rows only, or in one class only, may be found better by another order.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int
from numpy.typing import NDArray
from scipy.stats import binomtest

import upweight as uw
from upweight.apps import notebook
from upweight.apps.outcome import asked
from upweight.errors import InvalidInput, UnsupportedModel

SHARE = 0.03  # of the labels that are flipped at a time: few enough to leave the model as it is
_ENOUGH, _FEWEST, _MOST = 200, 3, 10  # flips in all that are worth planting, and between which numbers of plantings
_Z = 1.96  # of a 95 % interval
_STREAM = 5_408  # keeps planted rows apart from those that somebody drew with the same small seed

Orders = Mapping[str, Float[NDArray[np.float64], " n"]]


@dataclass(frozen=True)
class Planted:
    """Which planted flips each order found.

    Args:
        hits: for every order (m,) whether each of the m planted flips was among the rows to inspect.
        plantings: how often labels were flipped and the model was trained.
        inspected: the rows to inspect.
    """

    hits: Mapping[str, Bool[NDArray[np.bool_], " m"]] = field(repr=False)
    plantings: int
    inspected: int

    @property
    def flips(self) -> int:
        """How many labels were flipped, over all plantings."""
        return len(next(iter(self.hits.values())))

    @property
    def best(self) -> str:
        """The order that found most; of equals the one that is named first."""
        return max(self.hits, key=lambda name: int(self.hits[name].sum()))

    def share(self, order: str) -> tuple[float, float, float]:
        """The share of the planted flips that an order found, and its 95 % interval (Wilson's)."""
        found = binomtest(int(self.hits[order].sum()), self.flips)
        interval = found.proportion_ci(method="wilson")
        return float(found.statistic), float(interval.low), float(interval.high)

    def behind(self, order: str) -> tuple[float, float]:
        """By how much an order is behind the best in that share, and half the 95 % interval of this difference.

        Both are asked about the same flips, so the difference is known better than either share.
        """
        difference = self.hits[self.best].astype(float) - self.hits[order]
        return float(difference.mean()), float(_Z * difference.std() / len(difference) ** 0.5)

    def _repr_html_(self) -> str:
        return notebook.shown(planted_table(self))

    def to_dict(self) -> dict[str, Any]:
        """The comparison as plain numbers."""
        orders = {}
        for name in self.hits:
            (share, low, high), (behind, half) = self.share(name), self.behind(name)
            orders[name] = {"found": share, "interval": [low, high], "behind": behind, "behind_half_interval": half}
        return {"flips": self.flips, "plantings": self.plantings, "inspected": self.inspected, "orders": orders}

    def __str__(self) -> str:
        lines = [f"{'planted flips found by':<24} {'share':>6} {'95 % interval':>15}  behind {self.best}"]
        for name in self.hits:
            (share, low, high), (behind, half) = self.share(name), self.behind(name)
            less = "" if name == self.best else f"{behind:.1%} ± {half:.1%}"
            lines.append(f"  {name:<22} {share:>6.1%} {f'{low:.1%} – {high:.1%}':>15}  {less}".rstrip())
        return "\n".join(lines)


def planted_table(found: Planted) -> str:
    """What each order found, as a table in HTML."""
    lines = []
    for name in found.hits:
        (share, low, high), (behind, half) = found.share(name), found.behind(name)
        less = "" if name == found.best else f"{behind:.1%} ± {half:.1%}"
        cells = (name, f"{share:.1%}", f"{low:.1%} – {high:.1%}", less)
        lines.append([notebook.plain(cell) for cell in cells])
    head = ["order", "planted flips found", "95 % interval", f"behind {found.best}"]
    return notebook.table(f"{found.flips:,} flips made on purpose, {found.inspected:,} rows inspected", head, lines)


def planted(
    influence: uw.Influence,
    count: int,
    orders: Callable[[uw.Influence], Orders],
    names: Sequence[str],
    *,
    plantings: int | None,
    retrain: Any,
    seed: int,
    store: Any = None,
) -> Planted:
    """How many labels flipped on purpose each order finds among its first `count` rows.

    Args:
        influence: of a classifier.
        count: rows to inspect.
        orders: from an influence to scores, larger is more suspicious.
        names: of these scores.
        plantings: how often; None takes 3, or for few rows as many as plant 200 flips in all, at most 10.
        retrain: as for `repair`.
        seed: of the flips.
        store: a folder that keeps what every planting told; None keeps nothing.

    Raises:
        InvalidInput: if there are no labels to flip, or the retrainer cannot train on other labels.
        NotConverged: if training does not reach a minimum.
        UnsupportedModel: if nobody said how to train this model again.
        StoreMismatch: if the folder holds other plantings.
        WorkerError: if a training cannot be sent to a worker of joblib's, or the worker ends before it does.
    """
    objective = influence.objective
    if retrain is None and objective.linear is None and influence.encoder.refit is None:
        message = (
            f"nothing says how {objective.name} is trained. Pass retrain=, an object with bind(influence) such as "
            "uw.LBFGS() or uw.StackedTraining(…)"
        )
        raise UnsupportedModel(message)
    free = _free(influence)
    flips = max(1, min(round(SHARE * influence.n), len(free)))
    times = min(_MOST, max(_FEWEST, -(-_ENOUGH // flips))) if plantings is None else plantings
    question = {"work": "planted flips", "inspected": count, "orders": list(names), "scores": orders, "seed": seed}
    question |= asked(influence, influence.examples)
    course = uw.Course(influence, store, question, retrain)
    work = _Planting(influence, free, flips, count, orders, tuple(names), retrain, seed)
    progress = influence.sweep.progress
    one_by_one = [[number] for number in range(times)]
    told = np.concatenate(course.each(work, int, one_by_one, label="planted flips", progress=progress), 1)
    return Planted(dict(zip(names, told > 0, strict=True)), times, count)


@dataclass(frozen=True)
class _Planting:
    """What flips labels, trains, and asks every order.

    Args:
        influence: of the model before.
        free: rows whose label may be flipped.
        flips: how many are.
        count: rows to inspect.
        orders: from an influence to scores.
        names: of these scores.
        retrain: the retrainer.
        seed: of the flips and of the training.
    """

    influence: uw.Influence
    free: Int[NDArray[np.int64], " m"]
    flips: int
    count: int
    orders: Callable[[uw.Influence], Orders]
    names: tuple[str, ...]
    retrain: Any
    seed: int

    def __call__(self, plantings: Sequence[int]) -> list[Float[NDArray[np.float64], "o r"]]:
        """For each of these plantings which flips every order finds: 1, or 0."""
        return [self._told(planting) for planting in plantings]

    def _told(self, planting: int) -> Float[NDArray[np.float64], "o r"]:
        draw = np.random.default_rng([self.seed, planting, _STREAM])
        rows = draw.choice(self.free, self.flips, replace=False)
        spoilt = uw.edited(self.influence, rows, y_new=_others(self.influence, rows, draw))
        scores = self.orders(uw.retrained(spoilt, retrain=self.retrain, seed=self.seed + planting))
        return np.stack([_found(scores[name], rows, self.count) for name in self.names]).astype(np.float64)


def _free(influence: uw.Influence) -> Int[NDArray[np.int64], " m"]:
    """The rows whose label may be flipped: those that weigh, but one of each class, so that no class is lost.

    Raises:
        InvalidInput: if there are none.
    """
    labels = uw.training_labels(influence)
    assert labels is not None  # it is a classifier
    weighing = np.flatnonzero(influence.examples.weights > 0)
    _, first = np.unique(labels[weighing], return_index=True)
    free = np.delete(weighing, first)
    if not len(free) or len(uw.classes(influence) or ()) < 2:
        message = (
            f"no label of the {len(weighing)} rows can be flipped so that every class keeps a row. Name an order, such "
            "as by='self-influence'"
        )
        raise InvalidInput(message)
    return free


def _others(influence: uw.Influence, rows: NDArray[np.int64], draw: np.random.Generator) -> NDArray[Any]:
    """For each row a class at random that is not its own."""
    names, labels = uw.classes(influence), uw.training_labels(influence, rows)
    assert names is not None  # it is a classifier
    assert labels is not None
    present = np.array([names.index(label) for label in labels.tolist()])
    return np.asarray(names)[(present + draw.integers(1, len(names), len(rows))) % len(names)]


def _found(
    scores: Float[NDArray[np.float64], " n"], rows: NDArray[np.int64], count: int
) -> Bool[NDArray[np.bool_], " r"]:
    """For each planted row whether fewer than `count` rows that were not planted come before it."""
    order = np.argsort(-scores, kind="stable")
    before = np.cumsum(~np.isin(order, rows))  # a planted row adds nothing at its own place
    places = np.empty(len(order), dtype=np.int64)
    places[order] = before
    return places[rows] < count
