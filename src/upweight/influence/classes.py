"""The classes of a scikit-learn classifier's rows: without all rows of one, fit() would solve another problem."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from jaxtyping import Float
from numpy.typing import NDArray

from upweight.influence.system import System


@dataclass(frozen=True)
class Classes:
    """The classes of a scikit-learn classifier's rows. Without all rows of one there is another problem, or no minimum.

    Args:
        names: (K,) labels.
        numbers: (n,) the class number of each row.
        weights: (n,) wᵢ.
    """

    names: list[Any]
    numbers: NDArray[np.int64]
    weights: NDArray[np.float64]

    @classmethod
    def of(cls, system: System) -> Classes | None:
        """None where targets are no class numbers: regressors, modules, and RidgeClassifier, which regresses on ±1."""
        names = getattr(getattr(system.encoder, "estimator", None), "classes_", None)
        if names is None or system.examples.y is None:
            return None
        numbers = np.asarray(system.examples.y)
        if numbers.ndim != 1 or numbers.dtype.kind != "i":
            return None
        return cls(np.asarray(names).tolist(), numbers, np.asarray(system.examples.weights))

    def without(self, group: NDArray[np.int64]) -> str:
        """What to say if a group holds all rows of a class; "" if it does not.  Cost: the group's size."""
        members = group[self.weights[group] > 0]
        taken = np.bincount(self.numbers[members], minlength=len(self.counts))
        if not bool(((taken == self.counts) & (taken > 0)).any()):
            return ""
        weights = np.ones(len(self.weights))
        weights[group] = 0
        return self.lost(weights)

    @cached_property
    def counts(self) -> NDArray[np.int64]:
        """The rows of every class that weigh anything."""
        return np.bincount(self.numbers[self.weights > 0], minlength=len(self.names))

    def lost(self, weights: Float[NDArray[np.float64], " n"]) -> str:
        """What to say about the classes that have no weight left, and their rows; "" if there are none."""
        before = self.weights > 0
        left = before & (np.asarray(weights) > 0)
        present = np.unique(self.numbers[left])
        lost = np.setdiff1d(np.arange(len(self.names)), present)
        if not len(lost):
            return ""
        gone = np.flatnonzero(before & ~left & np.isin(self.numbers, lost)).tolist()
        rows = ", ".join(map(str, gone[:5])) + (f" and {len(gone) - 5} more" if len(gone) > 5 else "")
        start = f"Without row(s) {rows} no" if gone else "With the labels as they are now, no"
        return (
            f"{start} row of class {', '.join(repr(self.names[k]) for k in lost)} is left, so fit() "
            f"solves another problem, of {len(present)} instead of {len(self.names)} classes. "
            "Leave out or change other rows, or merge the class with another and fit again."
        )


def class_of_rows(system: System) -> tuple[list[Any], NDArray[Any]] | None:
    """The names of the classes, and the number of every row's.

    None where targets are no class numbers, or would have to be read from a Dataset.
    """
    known = Classes.of(system)
    y = system.examples.y
    if known is not None:
        return known.names, known.numbers
    if y is None or getattr(system.encoder, "estimator", None) is not None:
        return None
    targets = np.asarray(y)
    if targets.ndim != 1 or targets.dtype.kind not in "iub":
        return None
    values, numbers = np.unique(targets, return_inverse=True)
    return values.tolist(), numbers
