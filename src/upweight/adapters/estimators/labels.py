"""Labels as the losses expect them: class numbers, signs or numbers; and the weights of classes."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from upweight.data.arrays import as_array, check_finite
from upweight.errors import InvalidInput, UnsupportedModel, require


def class_numbers(labels: Any, classes: NDArray[Any]) -> NDArray[np.int64]:
    """Labels as numbers of `classes`.

    Raises:
        InvalidInput: if a label was never seen in fit().
    """
    array = np.asarray(labels.to_numpy() if hasattr(labels, "to_numpy") else labels)
    if array.ndim == 2 and array.shape[1] == 1:
        array = array[:, 0]
    if array.ndim != 1:
        message = f"y has shape {array.shape}; labels form one column. Pass one label per row."
        raise InvalidInput(message)
    if array.dtype.kind == "f":
        check_finite(array, "y")
    if array.dtype == np.int64 and _are_numbers(array, classes):
        return array
    if array.dtype.kind in "biuf" and classes.dtype.kind in "biuf":  # sorted, as fit() leaves them
        found = np.searchsorted(classes, array).clip(max=len(classes) - 1)
        known = classes[found] == array
    else:
        numbers = {label: number for number, label in enumerate(classes.tolist())}
        found = np.array([numbers.get(label, -1) for label in array.tolist()], dtype=np.int64)
        known = found >= 0
    if not known.all():
        unseen = sorted({repr(label) for label in array[~known].tolist()})
        message = (
            f"y holds labels that fit() never saw: {', '.join(unseen[:5])}. The model knows "
            f"{', '.join(map(repr, classes.tolist()[:10]))}. Pass labels of the same type as fit() was given."
        )
        raise InvalidInput(message)
    return found


def _are_numbers(labels: NDArray[np.int64], classes: NDArray[Any]) -> bool:
    """Whether labels are 0 … K − 1 already; then none of them is copied."""
    plain = classes.dtype.kind in "iu" and np.array_equal(classes, np.arange(len(classes)))
    return plain and bool(labels.size) and int(labels.min()) >= 0 and int(labels.max()) < len(classes)


def refuse_several_labels(y: Any, name: str) -> None:
    """Raises for classifiers of several labels per row.

    Raises:
        UnsupportedModel: if y has several columns.
    """
    if np.ndim(y) > 1 and np.shape(y)[1] > 1:
        message = f"{name} on several labels per row is not supported. Fit one model per label."
        raise UnsupportedModel(message)


def numbers(labels: Any) -> NDArray[np.float64]:
    """Labels that are numbers."""
    return np.asarray(as_array(labels, "y"), dtype=np.float64)


def of_outputs(count: int, targets: Callable[[Any], NDArray[Any]] = numbers) -> Callable[[Any], NDArray[np.float64]]:
    """Turns labels into (n, count) numbers, one for each output of the model."""

    def shaped(labels: Any) -> NDArray[np.float64]:
        values = targets(labels).astype(np.float64)
        if values.size != len(values) * count:
            message = f"y has shape {values.shape}, and the model was fitted with {count} output(s)."
            raise InvalidInput(message + " Pass y as in fit().")
        return values.reshape(len(values), count)

    return shaped


def of_classes(model: Any) -> Callable[[Any], NDArray[np.int64]]:
    """Turns labels into class numbers."""
    return lambda labels: class_numbers(labels, model.classes_)


def class_weight_vector(model: Any, y: Any, sample_weight: Any = None) -> NDArray[np.float64]:
    """(K,) the weight that class_weight gives to each class, as fit() computed it."""
    classes = model.classes_
    if model.class_weight is None:
        return np.ones(len(classes))
    compute = require("sklearn.utils.class_weight", "sklearn").compute_class_weight
    labels = classes[class_numbers(y, classes)]
    extra = (
        {"sample_weight": sample_weight}
        if sample_weight is not None and "sample_weight" in inspect.signature(compute).parameters
        else {}
    )
    return np.array(compute(model.class_weight, classes=classes, y=labels, **extra), dtype=np.float64)


def by_class(per_class: NDArray[np.float64]) -> Callable[[NDArray[Any]], NDArray[np.float64]]:
    """The weight of each class number."""
    if bool((per_class == 1).all()):
        return lambda targets: np.broadcast_to(1.0, len(targets))
    return lambda targets: per_class[np.asarray(targets).astype(np.int64).reshape(-1)]
