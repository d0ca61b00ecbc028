"""What models say of the training rows that were trained without them: given by the user, or trained here."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from upweight.errors import InvalidInput
from upweight.influence.classes import Classes
from upweight.influence.face import Influence
from upweight.training.counterfactuals import retrained
from upweight.training.predictions import classes, predict, training_labels


@dataclass(frozen=True)
class Folds:
    """Rows dealt out, so that one model after the other can be trained without a share of them.

    Args:
        count: of the shares.
        seed: of the deal.
        of: (n,) the share of each row.
    """

    count: int
    seed: int
    of: NDArray[np.int64] = field(repr=False)

    @property
    def told(self) -> dict[str, int]:
        """What trainings of these folds are known by."""
        return {"folds": self.count, "seed": self.seed}

    def codes(self, influence: Influence) -> NDArray[np.int64]:
        """(n,) what the models say, as places of `classes(influence)`.  Cost: so many trainings."""
        places = {name: place for place, name in enumerate(classes(influence) or ())}
        found = np.empty(influence.n, dtype=np.int64)
        for number in range(self.count):
            rows = np.flatnonzero(self.of == number)
            labels = predict(retrained(influence, without=rows), influence.examples.subset(rows)).labels
            assert labels is not None  # outputs are classes
            found[rows] = [places[label] for label in labels.tolist()]
        return found


def asked(influence: Influence, said: Any, *, seed: int = 0) -> NDArray[Any] | Folds | None:
    """(n,) labels that were given out of fold, folds to train without, or None where nobody asked for either.

    Args:
        influence: of a classifier.
        said: (n,) labels, (n, K) probabilities in the order of the classes, a number of folds, or None.
        seed: of the folds, which hold the same share of every class, as nearly as that can be.

    Raises:
        InvalidInput: if it is something else, the model's outputs are no classes, or a class has one row only.
    """
    if said is None:
        return None
    names, n = classes(influence), influence.n
    if names is None:
        message = f"The outputs of {influence.objective.name} are no classes, so nothing is said out of fold. Leave "
        raise InvalidInput(message + "out_of_fold out.")
    if isinstance(said, int | np.integer) and not isinstance(said, bool):
        return _dealt(influence, int(said), seed)
    found = np.asarray(said)
    if found.shape == (n, len(names)) and found.dtype.kind == "f" and np.isfinite(found).all():
        return np.asarray(names)[found.argmax(1)]
    if found.shape == (n,) and set(found.tolist()) <= set(names):
        return found
    message = (
        f"out_of_fold has shape {found.shape} of {found.dtype}, and the model has {n:,} rows and {len(names)} classes: "
        f"{', '.join(map(str, names[:8]))}. Pass a label of these for each row, the probabilities that "
        'cross_val_predict(model, X, y, method="predict_proba") gives, or a number of folds, such as 5.'
    )
    raise InvalidInput(message)


def _dealt(influence: Influence, count: int, seed: int) -> Folds:
    """Every class dealt out evenly, those of its rows first that weigh anything.

    Raises:
        InvalidInput: if there are not at least 2 folds, not so many rows, or one row only of a class.
    """
    n = influence.n
    if not 2 <= count <= n:
        message = f"out_of_fold={count} folds of {n:,} rows. Pass a number of folds from 2 to {n}, such as 5."
        raise InvalidInput(message)
    _refuse_single(influence, count)
    labels = training_labels(influence)
    codes = np.zeros(n, np.int64) if labels is None else np.unique(labels, return_inverse=True)[1]
    order = np.random.default_rng(seed).permutation(n)
    order = order[np.lexsort((influence.examples.weights[order] <= 0, codes[order]))]  # stable: in the order of chance
    folds = np.empty(n, np.int64)
    folds[order] = np.arange(n) % count
    return Folds(count, seed, folds)


def _refuse_single(influence: Influence, count: int) -> None:
    """Raises where fit() would know one class less without one row.

    Raises:
        InvalidInput: then.
    """
    known = Classes.of(influence.system)
    single = np.flatnonzero(known.counts == 1) if known is not None else []
    if known is None or not len(single):
        return
    name = known.names[int(single[0])]
    row = int(np.flatnonzero((known.numbers == single[0]) & (known.weights > 0))[0])
    more = f", and so have {len(single) - 1} other classes" if len(single) > 1 else ""
    message = (
        f"Class {name!r} has one row, number {row}{more}: of the {count} models of out_of_fold={count} the one that is "
        f"trained without it would know {len(known.names) - 1} classes instead of {len(known.names)}. Such a label is "
        "mostly written otherwise elsewhere: correct it, or merge the class with another, and fit again; or pass "
        "labels: out_of_fold=cross_val_predict(model, X, y, cv=KFold(5, shuffle=True))."
    )
    raise InvalidInput(message)
