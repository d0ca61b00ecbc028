"""What models say of the training rows that were trained without them: given by the user, or trained here."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from upweight.errors import InvalidInput
from upweight.influence.face import Influence
from upweight.training.counterfactuals import retrained
from upweight.training.predictions import classes, predict, training_labels


def labels_of(influence: Influence, said: Any, *, seed: int = 0) -> NDArray[Any] | None:
    """(n,) labels that were given out of fold; None where nobody asked for them.

    Args:
        influence: of a classifier.
        said: (n,) labels, (n, K) probabilities in the order of the classes, a number of folds, or None.
        seed: of the folds, which hold the same share of every class, as nearly as that can be.

    Raises:
        InvalidInput: if it is something else, or the model's outputs are no classes.
    """
    if said is None:
        return None
    names, n = classes(influence), influence.n
    if names is None:
        message = f"The outputs of {influence.objective.name} are no classes, so nothing is said out of fold. Leave "
        raise InvalidInput(message + "out_of_fold out.")
    if isinstance(said, int | np.integer) and not isinstance(said, bool):
        return _trained(influence, int(said), seed)
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


def _trained(influence: Influence, count: int, seed: int) -> NDArray[Any]:
    """The labels by models that were trained without a fold each.  Cost: so many trainings.

    Raises:
        InvalidInput: if there are not at least 2 folds, or not so many rows.
    """
    if not 2 <= count <= influence.n:
        message = (
            f"out_of_fold={count} folds of {influence.n:,} rows. Pass a number of folds from 2 to {influence.n}, such "
            "as 5."
        )
        raise InvalidInput(message)
    labels = training_labels(influence)
    codes = np.zeros(influence.n, np.int64) if labels is None else np.unique(labels, return_inverse=True)[1]
    order = np.random.default_rng(seed).permutation(influence.n)
    order = order[np.argsort(codes[order], kind="stable")]  # class by class, so that each is dealt out evenly
    fold = np.empty(influence.n, np.int64)
    fold[order] = np.arange(influence.n) % count
    parts = []
    for number in range(count):
        rows = np.flatnonzero(fold == number)
        told = predict(retrained(influence, without=rows), influence.examples.subset(rows)).labels
        assert told is not None  # outputs are classes
        parts.append((rows, told))
    found = np.empty(influence.n, dtype=np.result_type(*(told for _, told in parts)))
    for rows, told in parts:
        found[rows] = told
    return found
