"""What was predicted beside what really happened."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import ArrayLike

from upweight.show.plots.style import BLUE, GREY, ORANGE, new_axes, style

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from upweight.evaluation.leave_one_out import Outcomes
    from upweight.influence.scores import Scores


def agreement(scores: Scores, outcomes: Outcomes, ax: Axes | None = None, *, label: str = "predicted") -> Axes:
    """Actual against predicted change, one dot per (query, row), with the diagonal on which both are equal.

    Args:
        scores: predicted changes.
        outcomes: actual changes for some of the rows.
        ax: where to draw; None makes a new figure.
        label: name of the dots in the legend.
    """
    columns = {int(row): column for column, row in enumerate(scores.rows)}
    predicted = scores.values[:, [columns[int(row)] for row in outcomes.rows]]
    ax = predicted_against_actual(predicted, outcomes.actual, ax, label=label)
    ax.set(xlabel=f"predicted change of {scores.measure}", ylabel=f"actual change of {scores.measure}")
    return ax


def predicted_against_actual(
    predicted: ArrayLike,
    actual: ArrayLike,
    ax: Axes | None = None,
    *,
    color: str = BLUE,
    label: str = "predicted",
    equal: bool = True,
) -> Axes:
    """Numbers against numbers in one unit, with the diagonal on which both are equal (the paper's figures 2 and 3).

    Args:
        predicted: any shape.
        actual: the same shape.
        ax: where to draw; None makes a new figure.
        color: of the dots.
        label: name of the dots in the legend.
        equal: whether both axes have the same ends and scale.
    """
    ax = new_axes() if ax is None else ax
    x, y = np.asarray(predicted, dtype=float).ravel(), np.asarray(actual, dtype=float).ravel()
    shown = np.isfinite(x) & np.isfinite(y)
    x, y = x[shown], y[shown]
    low, high = float(np.min([x, y], initial=0)), float(np.max([x, y], initial=0))
    if x.size:
        low, high = float(min(x.min(), y.min())), float(max(x.max(), y.max()))
    ends = np.array([low, high]) + 0.06 * (high - low or 1.0) * np.array([-1, 1])
    ax.axline((0, 0), slope=1, color=GREY, linewidth=1, zorder=1)
    crowded = len(x) > 200
    edge = 0 if crowded else 0.35
    ax.scatter(x, y, s=16, alpha=0.75, color=color, edgecolor="white", linewidth=edge, zorder=2, label=label)
    if equal:
        ax.set(xlim=ends, ylim=ends, aspect="equal")
    ax.locator_params(nbins=6)
    return style(ax)


def calibration(errors: ArrayLike, standard_errors: ArrayLike, ax: Axes | None = None, *, measure: str = "") -> Axes:
    """How far numbers were off against the standard error that they gave themselves, with the lines of 1 and 2 of them.

    Of honest standard errors about 68 % of the dots lie within the first pair of lines and 95 % within the second.

    Args:
        errors: value − truth, any shape.
        standard_errors: of the same shape.
        ax: where to draw; None makes a new figure.
        measure: what the values are of, in words.
    """
    ax = new_axes(5.0, 4.0) if ax is None else ax
    size, off = np.asarray(standard_errors, dtype=float).ravel(), np.asarray(errors, dtype=float).ravel()
    right = 1.05 * float(np.max(size[np.isfinite(size)], initial=0.0) or 1.0)
    for times, dashes in ((1, "--"), (2, ":")):
        for sign in (-1, 1):
            label = f"± {times} standard error{'s' if times > 1 else ''}" if sign > 0 else None
            ax.plot([0, right], [0, sign * times * right], color=ORANGE, linestyle=dashes, linewidth=1.2, label=label)
    ax.axhline(0, color=GREY, linewidth=0.8, zorder=1)
    ax.scatter(size, off, s=16, alpha=0.7, color=BLUE, linewidth=0, zorder=2)
    unit = f" of {measure}" if measure else ""
    ax.set(xlim=(0, right), xlabel=f"standard error{unit}", ylabel=f"error{unit}")
    ax.legend(fontsize=8, frameon=False)
    return style(ax)
