"""What a model trained on a random part of the data really does, and how well scores predict it.

    predicted[q, s] = Σ_{i not in subset s} values[q, i]        the change of query q's measure when those rows go
    actual[q, s]    = mean over seeds of the measure after training on subset s

`lds` compares the two.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from jaxtyping import Bool, Float
from numpy.typing import NDArray
from torch import Tensor

from upweight.data import markup
from upweight.errors import InvalidInput, checked_count
from upweight.influence.face import Influence
from upweight.training.course import Course, digest
from upweight.training.retrainers import Retrain
from upweight.training.trials import Job, Measured, Trials


def random_subsets(n: int, count: int, fraction: float = 0.5, seed: int = 0) -> Bool[NDArray[np.bool_], "s n"]:
    """`count` random subsets of n rows as masks of what is kept, each of round(fraction · n) different rows.

    Args:
        n: number of training rows.
        count: number of subsets.
        fraction: share of the rows that each keeps.
        seed: of the draw.

    Raises:
        InvalidInput: if a subset would hold no row, or all of them.

    >>> random_subsets(6, 2).sum(1)
    array([3, 3])
    """
    checked_count(n, "n")
    checked_count(count, "count")
    size = round(fraction * n) if isinstance(fraction, int | float) else 0
    if not 1 <= size < n:
        message = (
            f"fraction={fraction} of {n} rows keeps {size} of them. A subset keeps at least one row and not all: use a "
            "fraction such as 0.5."
        )
        raise InvalidInput(message)
    draw = np.random.default_rng(seed)
    masks = np.zeros((count, n), dtype=bool)
    for line in masks:
        line[draw.choice(n, size, replace=False)] = True
    return masks


@dataclass(frozen=True)
class SubsetOutcomes:
    """The measure of every query after training on every subset of the rows, for every seed.

    Args:
        values: (q, s, m) measure of query q after training on subset s with seed m.
        subsets: (s, n) masks of the rows that were kept.
        seeds: (m,) the seeds.
        measure: what was measured on the query, in words.
        query_values: (q,) the measure of the model as it is; None if unknown.
    """

    values: Float[NDArray[np.float64], "q s m"]
    subsets: Bool[NDArray[np.bool_], "s n"] = field(repr=False)
    seeds: tuple[int, ...] = (0,)
    measure: str = "loss"
    query_values: Float[NDArray[np.float64], " q"] | None = None

    def __post_init__(self) -> None:
        shape = (len(self.subsets), len(self.seeds))
        if self.values.ndim != 3 or self.values.shape[1:] != shape:
            message = (
                f"values has shape {self.values.shape}, and there are {shape[0]} subsets and {shape[1]} seeds. Its "
                "axes are (query, subset, seed)."
            )
            raise InvalidInput(message)

    @property
    def mean(self) -> Float[NDArray[np.float64], "q s"]:
        """The mean over seeds."""
        return self.values.mean(2)

    def with_seeds(self, count: int) -> SubsetOutcomes:
        """The outcomes of the first `count` seeds only.

        Raises:
            InvalidInput: if there are fewer.
        """
        if checked_count(count, "count") > len(self.seeds):
            message = f"count={count}, and there are {len(self.seeds)} seeds. Ask for 1 to {len(self.seeds)}."
            raise InvalidInput(message)
        return SubsetOutcomes(
            self.values[:, :, :count], self.subsets, self.seeds[:count], self.measure, self.query_values
        )

    def _repr_html_(self) -> str:
        return markup.facts("What training on subsets really did", [(self.measure, repr(self))])

    def __repr__(self) -> str:
        queries, subsets, seeds = self.values.shape
        kept = self.subsets.mean()
        return (
            f"SubsetOutcomes({queries} queries × {subsets} subsets of {kept:.0%} of {self.subsets.shape[1]} rows × "
            f"{seeds} seeds: {self.measure})"
        )


def subset_retraining(
    influence: Influence,
    on: tuple[Any, ...],
    subsets: Any,
    retrain: Retrain | Any = None,
    *,
    seed: int = 0,
    seeds: int = 1,
    measure: Callable[[Any, Any], Tensor] | None = None,
    store: str | os.PathLike[str] | None = None,
    progress: bool | None = None,
) -> SubsetOutcomes:
    """Train again on every subset of the rows, and measure every query.

    Cost: subsets × seeds trainings; side by side where the retrainer has a `many`, such as StackedTraining, and on the
    workers of `joblib.parallel_config` where there are some.

    Args:
        influence: whose objective and data are trained again.
        on: (Xq, yq), the queries.
        subsets: what is kept: (s, n) booleans such as `random_subsets(n, 100)`, or lists of rows.
        retrain: as for leave_one_out; a kept row has weight 1, another weight 0.
        seed: the first seed.
        seeds: trainings of every subset, with seed, seed + 1, …; a noise ceiling needs at least two.
        measure: scalar of (params, example); None is the loss.
        store: a folder that keeps the outcome of every finished training, so that the same call resumes there, and one
            with more seeds goes on; None keeps nothing.
        progress: True or False forces the progress bar on or off; None shows it on a terminal only.

    Raises:
        InvalidInput: if subsets, seeds, queries or the retrainer cannot be used; RowOutOfRange if a row does not exist.
        StoreMismatch: if the folder holds the outcomes of other data, models, subsets, retrainers or seeds.
        WorkerError: if a training cannot be sent to a worker of joblib's, or the worker ends before it does.
    """
    masks = _masks(influence, subsets)
    checked_count(seeds, "seeds", hint="2 or more for a noise ceiling")
    trials = Trials.of(influence, on, retrain, measure)
    now = trials.now()
    told = f"{len(masks)}, {digest(np.packbits(masks))}"
    question = {"work": "subset_retraining", "subsets": told, "seed": seed, **trials.question(influence, on)}
    course = Course(influence, store, question)
    course.agree("query_values", now)

    def job(number: int) -> Job:
        return masks[number % len(masks)], seed + number // len(masks)

    blocks = trials.blocks(seeds, len(masks))
    after = course.each(Measured(trials, trials.at), job, blocks, label="subsets", progress=progress)
    values = np.stack(after, 1).reshape(len(now), seeds, len(masks)).transpose(0, 2, 1)
    return SubsetOutcomes(np.ascontiguousarray(values), masks, tuple(range(seed, seed + seeds)), trials.measure, now)


def _masks(influence: Influence, subsets: Any) -> NDArray[np.bool_]:
    """(s, n) booleans of what is kept.

    Raises:
        InvalidInput: if a subset is empty, names a row twice, or keeps no weight.
    """
    array = subsets if isinstance(subsets, np.ndarray | Tensor) else None
    if array is not None and array.ndim == 2 and str(array.dtype).endswith("bool") and array.shape[1] != influence.n:
        message = (
            f"subsets has shape {tuple(array.shape)}, and there are {influence.n} rows. Masks have one column for each "
            f"training row, as those of random_subsets({influence.n}, 100) have."
        )
        raise InvalidInput(message)
    listed = [line.numpy() for line in array] if isinstance(array, Tensor) else subsets
    members = influence.examples.groups(listed)
    masks = np.zeros((len(members), influence.n), dtype=bool)
    for mask, rows in zip(masks, members, strict=True):
        mask[rows] = True
    return masks
