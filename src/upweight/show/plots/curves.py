"""Lines: how something changes with damping, rows inspected or removed, or passes over the data."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from upweight.show.plots.style import BLUE, COLORS, DASHES, GREY, MARKERS, ORANGE, new_axes, style

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from upweight.evaluation.curves import MislabelCurve, RemovalCurve
    from upweight.influence.damping_path import DampingPath

_PLACES = 20  # at most that have a shape of their own on a line


def damping_path(path: DampingPath, ax: Axes | None = None) -> Axes:
    """How the values change along a path of dampings, and how far the preconditioner alone was from the answer.

    Where the correlation of the values with those at the next damping is near 1, the choice of λ does not matter.

    Args:
        path: what `Influence.damping_path` returns.
        ax: where to draw; None makes a new figure.
    """
    ax = new_axes(6.0, 4.0) if ax is None else ax
    look: dict[str, Any] = {"markersize": 4, "linewidth": 1.5}
    label = "correlation with the next damping"
    ax.plot(path.dampings, path.correlation_with_next, color=BLUE, marker="o", label=label, **look)
    if path.preconditioner_gaps is not None:
        worst = path.preconditioner_gaps.max(1)
        label = "preconditioner's error, alone"
        ax.plot(path.dampings, worst, color=ORANGE, marker="^", linestyle="--", label=label, **look)
    ax.set(xscale="log", xlabel="damping λ", ylabel="correlation, or share of the answer")
    ax.legend(fontsize=8, frameon=False)
    return style(ax)


def shares(
    lines: Mapping[str, tuple[ArrayLike, ArrayLike] | tuple[ArrayLike, ArrayLike, ArrayLike]],
    ax: Axes | None = None,
    *,
    x: str = "share of the training rows inspected",
    y: str = "share of the wrong labels found",
    level: tuple[float, str] | None = None,
) -> Axes:
    """Shares against the share of rows inspected, a line for each way (the paper's figure 6).

    Args:
        lines: by name, where (shares of rows), how much, and if known the standard errors.
        ax: where to draw; None makes a new figure.
        x: what the shares are of.
        y: what is reached: wrong labels found, or the accuracy of a model fitted to the corrected labels.
        level: a height with a name, such as the accuracy with true labels.
    """
    ax = new_axes(5.4, 4.2) if ax is None else ax
    for place, (name, (at, reached, *error)) in enumerate(lines.items()):
        _line(ax, place, name, np.asarray(at), np.asarray(reached), np.asarray(error[0]) if error else None)
    if level is not None:
        height, name = level
        ax.axhline(height, color=GREY, linewidth=1, linestyle=(0, (1, 1)), zorder=1)
        words: dict[str, Any] = {"xytext": (0, 3), "textcoords": "offset points", "ha": "right", "fontsize": 8}
        ax.annotate(name, (ax.get_xlim()[1], height), **words)
    ax.set(xlabel=x, ylabel=y)
    ax.xaxis.set_major_formatter(lambda value, _: f"{100 * value:.0f}%")
    ax.legend(fontsize=8, frameon=False)
    return style(ax)


def wrong_labels(curves: Mapping[str, MislabelCurve], ax: Axes | None = None, *, until: float = 1.0) -> Axes:
    """The share of the wrong labels found against the share of rows inspected, as `mislabel_auc` found it.

    Args:
        curves: by name.
        ax: where to draw; None makes a new figure.
        until: the last share of rows that is shown.

    >>> import upweight as uw
    >>> ax = wrong_labels({"self-influence": uw.mislabel_auc([0.9, 0.1, 0.8, 0.3], [0, 2])})
    >>> ax.get_legend_handles_labels()[1]
    ['self-influence (AUC 1.00)']
    """
    lines = {
        f"{name} (AUC {curve.auc:.2f})": (np.arange(1, len(curve.found) + 1) / len(curve.found), curve.found)
        for name, curve in curves.items()
    }
    ax = shares(lines, ax)
    ax.set(xlim=(0, until), ylim=(0, 1.02))
    return ax


def removals(curve: RemovalCurve, ax: Axes | None = None) -> Axes:
    """The mean change of the queries after removing the k rows that are said to help most, a line for each way.

    Args:
        curve: what `removal_curve` returns; lines carry the standard errors over queries.
        ax: where to draw; None makes a new figure.

    >>> import upweight as uw
    >>> from sklearn.linear_model import Ridge
    >>> X, y = np.arange(8.0)[:, None], np.arange(8.0) ** 1.5
    >>> influence = uw.explain(Ridge().fit(X, y), X, y)
    >>> curve = uw.removal_curve(influence, influence.on_loss([[9.0]], [27.0]), ([[9.0]], [27.0]), counts=(1, 3))
    >>> ax = removals(curve)
    >>> ax.get_legend_handles_labels()[1]
    ['scores', 'random']
    """
    ax = new_axes(5.4, 4.2) if ax is None else ax
    for place, name in enumerate(curve.changes):
        error = curve.standard_error(name)
        _line(ax, place, name, curve.counts, curve.mean(name), error if np.isfinite(error).all() else None)
    ax.axhline(0, color=GREY, linewidth=0.8, zorder=1)
    ax.set(xlabel="rows removed", ylabel=f"mean change of the query's {curve.measure}")
    ax.legend(fontsize=8, frameon=False)
    return style(ax)


def solved(
    residuals: Mapping[str, ArrayLike | tuple[ArrayLike, ArrayLike]],
    ax: Axes | None = None,
    *,
    promised: float | None = None,
    x: str = "products with the curvature",
) -> Axes:
    """How the relative residual falls while a system is solved, a line for each solver.

    Args:
        residuals: by name, the residuals one after the other, or (where, residuals).
        ax: where to draw; None makes a new figure.
        promised: the residual at which a solver stops.
        x: what is counted below.
    """
    ax = new_axes(5.4, 4.2) if ax is None else ax
    for place, (name, told) in enumerate(residuals.items()):
        at, sizes = told if isinstance(told, tuple) else (np.arange(len(np.asarray(told))), told)
        _line(ax, place, name, np.asarray(at), np.asarray(sizes), None)
    if promised is not None:
        ax.axhline(promised, color=GREY, linewidth=1, linestyle=(0, (1, 1)), zorder=1, label=f"promised, {promised:g}")
    ax.set(yscale="log", xlabel=x, ylabel="relative residual")
    ax.legend(fontsize=8, frameon=False)
    return style(ax)


def _line(ax: Axes, place: int, name: str, at: NDArray[Any], reached: NDArray[Any], error: NDArray[Any] | None) -> None:
    """One line: its place in the order says its colour, dashes and shapes."""
    kind = place % len(COLORS)
    look: dict[str, Any] = {"color": COLORS[kind], "linestyle": DASHES[kind], "linewidth": 1.7, "label": name}
    look |= {"marker": MARKERS[kind], "markersize": 4.5, "markevery": max(1, len(at) // _PLACES)}
    if error is None:
        ax.plot(at, reached, **look)
    else:
        ax.errorbar(at, reached, error, capsize=2, **look)
