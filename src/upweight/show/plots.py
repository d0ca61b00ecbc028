"""Pictures of results: each function draws on an Axes and returns it, and computes nothing."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from upweight.errors import InvalidInput, require
from upweight.evaluation.leave_one_out import Outcomes
from upweight.influence.damping_path import DampingPath
from upweight.influence.scores import Scores

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from pandas import DataFrame

Vector = NDArray[np.float64]
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


def damping_path(path: DampingPath, ax: Axes | None = None) -> Axes:
    """How the values change along a path of dampings, and how far the preconditioner alone was from the answer.

    Where the correlation of the values with those at the next damping is near 1, the choice of λ does not matter.

    Args:
        path: what `Influence.damping_path` returns.
        ax: where to draw; None makes a new figure.
    """
    ax = new_axes(6.0, 4.0) if ax is None else ax
    style = {"marker": "o", "markersize": 4, "linewidth": 1.5}
    ax.plot(path.dampings, path.correlation_with_next, color=BLUE, label="correlation with the next damping", **style)
    if path.preconditioner_gaps is not None:
        worst = path.preconditioner_gaps.max(1)
        ax.plot(path.dampings, worst, color=ORANGE, label="preconditioner's error, alone", **style)
    ax.set(xscale="log", xlabel="damping λ", ylabel="correlation, or share of the answer")
    ax.legend(fontsize=8, frameon=False)
    ax.grid(alpha=0.25)
    return ax


def leverage_residual(
    frame: DataFrame, ax: Axes | None = None, *, cooks: tuple[float, ...] = (0.5, 1.0), labels: int = 5
) -> Axes:
    """Studentised residual against leverage, one dot per training row, with contours of equal Cook's distance.

    Without a penalty the contours are exact: D = r² h/((1 − h)·Σh) with r the internally studentised residual, which
    for squared loss is t√(df/(df − 1 + t²)) of the external t drawn here, df = n − Σh. With a penalty and squared loss
    they are near. Dots beyond a contour have a larger Cook's distance.

    Args:
        frame: what `Influence.summary_frame` returns; rows with NaN are left out.
        ax: where to draw; None makes a new figure.
        cooks: the Cook's distances whose contours are drawn, where they pass through the picture.
        labels: how many rows get their name, or number, beside them, those with the largest Cook's distance first.

    Raises:
        InvalidInput: if the frame lacks a column.
    """
    missing = {"leverage", "studentized_residual", "cooks_distance", "loo_residual"} - set(frame.columns)
    if missing:
        message = f"frame has no column {', '.join(sorted(missing))}. Pass what influence.summary_frame() returns."
        raise InvalidInput(message)
    ax = new_axes(6.0, 4.5) if ax is None else ax
    h, t = frame["leverage"].to_numpy(), frame["studentized_residual"].to_numpy()
    shown = np.isfinite(h) & np.isfinite(t)
    right = 1.1 * float(h[shown].max(initial=0.01))
    top = 1.15 * float(np.abs(t[shown]).max(initial=1.0))
    external = bool(frame["loo_residual"].notna().any())
    edf = float(h.sum())
    df = len(frame) - edf if external else np.inf
    for distance, style in zip(cooks, ("--", ":", "-.", "-") * len(cooks), strict=False):
        at, size = _contour(distance, edf, df, right)
        if at.size and size.min() < top:
            ax.plot(
                at, size, color=ORANGE, linewidth=1, linestyle=style, zorder=1, label=f"Cook's distance {distance:g}"
            )
            ax.plot(at, -size, color=ORANGE, linewidth=1, linestyle=style, zorder=1)
    ax.axhline(0, color=GREY, linewidth=1, zorder=1)
    ax.scatter(h[shown], t[shown], s=16, alpha=0.6, color=BLUE, edgecolor="white", linewidth=0.3, zorder=2)
    distances = np.where(shown, frame["cooks_distance"].to_numpy(), -np.inf)
    for row in np.argsort(-distances, kind="stable")[: min(labels, int(shown.sum()))]:
        ax.annotate(str(frame.index[row]), (h[row], t[row]), xytext=(4, 3), textcoords="offset points", fontsize=8)
    if ax.get_legend_handles_labels()[0]:
        ax.legend(fontsize=8, frameon=False, loc="best")
    ax.set(xlim=(0, right), ylim=(-top, top), xlabel="leverage", ylabel="studentised residual")
    ax.grid(alpha=0.25)
    return ax


def _contour(distance: float, edf: float, df: float, right: float) -> tuple[Vector, Vector]:
    """Leverages and studentised residuals > 0 at which D = `distance`; df = ∞ for internal residuals."""
    h = np.linspace(right / 400, min(right, 0.999), 400)
    square = distance * edf * (1 - h) / h  # internal r²
    h, square = h[square < df], square[square < df]
    return h, np.sqrt(square if np.isinf(df) else square * (df - 1) / (df - square))


def new_axes(width: float = 4.5, height: float = 4.5) -> Axes:
    """An empty Axes on its own figure, without a display."""
    figure = require("matplotlib.figure", "plot").Figure(figsize=(width, height), layout="constrained")
    return figure.subplots()
