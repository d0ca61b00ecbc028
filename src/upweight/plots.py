"""Pictures of results: each function draws on an Axes and returns it, and computes nothing."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from upweight.errors import require
from upweight.scores import Scores
from upweight.validate import Outcomes

if TYPE_CHECKING:
    from matplotlib.axes import Axes

BLUE, ORANGE, GREY = "#2a6f97", "#d1495b", "#8d99ae"


def agreement(scores: Scores, outcomes: Outcomes, ax: Axes | None = None, *, label: str = "predicted") -> Axes:
    """Actual against predicted change, one dot per (query, row), with the diagonal on which both are equal.

    Args:
        scores: predicted changes.
        outcomes: actual changes for some of the rows.
        ax: where to draw; None makes a new figure.
        label: name of the dots in the legend.
    """
    ax = new_axes() if ax is None else ax
    columns = {int(row): column for column, row in enumerate(scores.rows)}
    predicted = scores.values[:, [columns[int(row)] for row in outcomes.rows]].ravel()
    actual = outcomes.actual.ravel()
    low, high = float(min(predicted.min(), actual.min())), float(max(predicted.max(), actual.max()))
    margin = 0.05 * (high - low or 1.0)
    ends = np.array([low - margin, high + margin])
    ax.plot(ends, ends, color=GREY, linewidth=1, zorder=1)
    ax.scatter(predicted, actual, s=22, alpha=0.8, color=BLUE, edgecolor="white", linewidth=0.4, zorder=2, label=label)
    ax.set(
        xlim=ends,
        ylim=ends,
        xlabel=f"predicted change of {scores.measure}",
        ylabel=f"actual change of {scores.measure}",
    )
    ax.set_aspect("equal")
    ax.locator_params(nbins=6)
    ax.grid(alpha=0.25)
    return ax


def new_axes(width: float = 4.5, height: float = 4.5) -> Axes:
    """An empty Axes on its own figure, without a display."""
    figure = require("matplotlib.figure", "plot").Figure(figsize=(width, height), layout="constrained")
    return figure.subplots()
