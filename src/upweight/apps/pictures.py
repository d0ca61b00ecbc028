"""Pictures of what the apps find: each function draws on an Axes and returns it, and computes nothing."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from upweight import plots
from upweight.errors import InvalidInput, first_line

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from upweight.apps.understand import Understanding


def save(ax: Axes, file: Path) -> None:
    """Write the figure of `ax`; the suffix of the file says the format, its folder is made.

    Raises:
        InvalidInput: if matplotlib does not know the suffix.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    try:
        ax.get_figure(root=True).savefig(file, dpi=150)  # type: ignore[union-attr]
    except ValueError as error:
        message = f"No picture was written to {file}: {first_line(error)}. End the name in .png, .svg or .pdf."
        raise InvalidInput(message) from error


def influence_against_distance(
    found: Understanding, query: int = 0, ax: Axes | None = None, *, in_features: bool = False
) -> Axes:
    """The value of every training row against its distance from one query; the most helpful rows are ringed.

    Args:
        found: what `understand` returns.
        query: which of its queries.
        ax: where to draw; None makes a new figure.
        in_features: whether distance is between features, not between inputs.
    """
    ax = plots.new_axes(6.0, 4.2) if ax is None else ax
    values = found.scores.values[query]
    distance = (found.feature_distances if in_features else found.distances)[query]
    if found.labels is None or found.targets is None:
        parts = [(np.ones(len(values), dtype=bool), plots.BLUE, "training row")]
    else:
        own = found.labels == found.targets[query]
        parts = [(own, plots.BLUE, f"{found.targets[query]}, as the query"), (~own, plots.ORANGE, "another class")]
    ax.axhline(0, color=plots.GREY, linewidth=0.8, zorder=1)
    for who, color, label in parts:
        ax.scatter(distance[who], values[who], s=14, alpha=0.6, color=color, linewidth=0, label=label, zorder=2)
    top = found.helpful(query)
    ax.scatter(
        distance[top.rows],
        top.values,
        s=48,
        facecolor="none",
        edgecolor="black",
        linewidth=0.9,
        zorder=3,
        label=f"{len(top.rows)} most helpful",
    )
    place = "features" if in_features else "inputs"
    ax.set(
        xlabel=f"distance from the query, in {place}", ylabel=f"change of the query's {found.scores.measure} if removed"
    )
    ax.ticklabel_format(axis="y", scilimits=(-2, 3))
    ax.legend(fontsize=8, frameon=False)
    ax.grid(alpha=0.25)
    return ax
