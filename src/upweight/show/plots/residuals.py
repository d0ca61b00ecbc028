"""Residuals of a linear model beside the leverage of its rows."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from upweight.errors import InvalidInput
from upweight.show.plots.style import BLUE, GREY, ORANGE, new_axes

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from pandas import DataFrame

Vector = NDArray[np.float64]


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
