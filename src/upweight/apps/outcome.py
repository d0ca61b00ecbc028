"""What a change of the training rows did, told beside a control: training again with nothing changed."""

from __future__ import annotations

from typing import Any

import numpy as np
from jaxtyping import Bool, Int, Shaped
from numpy.typing import NDArray

import upweight as uw
from upweight.apps.names import listed
from upweight.errors import InvalidInput


def check_retrain(retrain: Any) -> None:
    """Refuse a function of weights, which cannot see that rows have changed.

    Raises:
        InvalidInput: if it is one.
    """
    if retrain is not None and not hasattr(retrain, "bind"):
        message = (
            f"retrain is {retrain!r}, a function of weights, which does not see which rows have changed and would give "
            "the same model again. Pass an object that is bound to the changed data, such as uw.Newton(), uw.LBFGS() "
            "or uw.Refit(), or None."
        )
        raise InvalidInput(message)


def asked(influence: uw.Influence, queries: uw.Examples) -> dict[str, Any]:
    """What the trainings of an app that solves systems depend on beside the rows, for the folder that keeps them."""
    settings = {"curvature": repr(influence.curvature), "solver": repr(influence.solver)}
    return {"queries": queries.fingerprint(), **settings, "damping": influence.settings["damping"]}


def tested(influence: uw.Influence, test: Any) -> tuple[uw.Examples, Any] | None:
    """(Xt, yt) with the inputs read once for all models; None without them.

    Raises:
        InvalidInput: if it is no such pair, or the model's outputs are no classes.
    """
    if test is None:
        return None
    if not isinstance(test, tuple | list) or len(test) != 2:
        message = f"test is a {type(test).__name__}. Pass the pair test=(Xt, yt) of inputs and labels."
        raise InvalidInput(message)
    if uw.classes(influence) is None:
        message = "The model's outputs are no classes, so test rows have no accuracy. Leave test out."
        raise InvalidInput(message)
    return influence.encoder.examples(test[0]), test[1]


def accuracies(
    models: tuple[uw.Influence, uw.Influence, uw.Influence], test: tuple[uw.Examples, Any] | None
) -> tuple[tuple[float, float] | None, float | None]:
    """Of (given, control, after) on test rows: the first and the last, and the control's; None without rows."""
    if test is None:
        return None, None
    given, control, after = (uw.predict(model, test[0]).accuracy(test[1]) for model in models)
    return (given, after), control


def newly_wrong(
    models: tuple[uw.Influence, uw.Influence, uw.Influence],
    labels: Shaped[NDArray[Any], " n"] | None,
    labels_after: Shaped[NDArray[Any], " n"] | None = None,
) -> Int[NDArray[np.int64], " m"]:
    """Training rows that (given, control) both call right, and `after` on its own data calls wrong; none without
    classes.
    """
    if labels is None:
        return np.zeros(0, dtype=np.int64)
    given, control, after = (uw.predict(model, model.examples).labels for model in models)
    now = labels if labels_after is None else labels_after
    return np.flatnonzero((given == labels) & (control == labels) & (after != now))


def flips_in_words(flipped: Bool[NDArray[np.bool_], " q"], alone: Bool[NDArray[np.bool_], " q"]) -> str:
    """How many queries a change flips, and how many the control flips without it."""
    return (
        f"Flipped {flipped.sum()} of {len(flipped)} queries, after training again; training again with nothing changed "
        f"flips {alone.sum()}."
    )


def outcome_in_words(
    accuracy: tuple[float, float] | None,
    control: float | None,
    wrong: Int[NDArray[np.int64], " m"],
    ids: Shaped[NDArray[Any], " n"] | None,
) -> list[str]:
    """What else a change does: accuracy on the test rows, and training rows that are called wrong, by their names."""
    lines = []
    if accuracy is not None:
        lines.append(
            f"Accuracy on the test rows {accuracy[0]:.4g}; {control:.4g} after training again with nothing changed; "
            f"{accuracy[1]:.4g} after the change."
        )
    if len(wrong):
        lines.append(f"Training rows that are now called wrong: {listed(ids, wrong, 10)}.")
    return lines
