"""Values of rows: against distance, as bars, as a histogram, by class; and pictures before and after an attack."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike

from upweight.show.plots.style import BLUE, COLORS, GREY, INK, MARKERS, ORANGE, new_axes, style

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def influence_against_distance(
    values: ArrayLike,
    distances: ArrayLike,
    ax: Axes | None = None,
    *,
    kinds: Mapping[str, ArrayLike] | None = None,
    marked: Sequence[int] = (),
    measure: str = "loss",
) -> Axes:
    """The value of every training row against its distance from the query, above 0 where it helps (figures 1 and 4).

    Args:
        values: (n,) of one query.
        distances: (n,) from it.
        ax: where to draw; None makes a new figure.
        kinds: by name, which rows are of a kind, as masks: such as those of the query's class and the others.
        marked: rows with a ring around them, such as the most helpful.
        measure: what the values are of, in words.
    """
    ax = new_axes(6.0, 4.2) if ax is None else ax
    y, x = np.asarray(values, dtype=float), np.asarray(distances, dtype=float)
    ax.axhline(0, color=GREY, linewidth=0.8, zorder=1)
    for place, (name, mask) in enumerate((kinds or {"training row": np.ones(len(y), dtype=bool)}).items()):
        who = np.asarray(mask, dtype=bool)
        look: dict[str, Any] = {"color": COLORS[place % 5], "marker": MARKERS[place % 5], "label": name}
        ax.scatter(x[who], y[who], s=14, alpha=0.6, linewidth=0, zorder=2, **look)
    if len(marked):
        ring: dict[str, Any] = {"facecolor": "none", "edgecolor": INK, "linewidth": 1.0, "s": 50}
        ax.scatter(x[list(marked)], y[list(marked)], zorder=3, label=f"{len(marked)} most helpful", **ring)
    ax.set(xlabel="distance from the query", ylabel=f"change of the query's {measure} if removed")
    ax.ticklabel_format(axis="y", scilimits=(-2, 3))
    ax.legend(fontsize=8, frameon=False)
    return style(ax)


def bars(
    names: Sequence[str],
    values: ArrayLike,
    ax: Axes | None = None,
    *,
    quiet: ArrayLike | None = None,
    x: str = "change of the query's loss if removed",
) -> Axes:
    """Signed numbers as bars, from the first name at the top: to the right and blue above 0, to the left and red below.

    Args:
        names: (k,) what each is.
        values: (k,) numbers.
        ax: where to draw; None makes a new figure.
        quiet: (k,) which are not meant, as a mask: they are grey.
        x: what the numbers are.
    """
    ax = new_axes(6.0, 4.8) if ax is None else ax
    numbers = np.asarray(values, dtype=float)
    aside = np.zeros(len(numbers), dtype=bool) if quiet is None else np.asarray(quiet, dtype=bool)
    colors = [GREY if off else BLUE if value > 0 else ORANGE for value, off in zip(numbers, aside, strict=True)]
    place = np.arange(len(numbers))[::-1]
    ax.barh(place, numbers, color=colors, height=0.7)
    ax.axvline(0, color=GREY, linewidth=0.8)
    ax.set_yticks(place, list(names), fontsize=8)
    ax.set_xlabel(x)
    return style(ax)


def histogram(
    values: ArrayLike,
    ax: Axes | None = None,
    *,
    marked: ArrayLike | None = None,
    bins: int | Sequence[float] = 50,
    x: str = "change of the query's loss if removed",
    label: str = "marked",
) -> Axes:
    """How many rows have which value, on a logarithmic scale on which single rows are seen.

    Of self-influence, rows that are marked (labels known to be wrong) should lie far to the right.

    Args:
        values: any shape; those that are not finite are left out.
        ax: where to draw; None makes a new figure.
        marked: of the same shape, which values are drawn once more, hatched.
        bins: how many, or their edges.
        x: what the values are.
        label: what the marked ones are.
    """
    ax = new_axes(5.4, 4.0) if ax is None else ax
    numbers = np.asarray(values, dtype=float).ravel()
    known = np.isfinite(numbers)
    _, edges, _ = ax.hist(numbers[known], bins=bins, color=BLUE, label="all")  # type: ignore[arg-type]
    if marked is not None:
        who = np.asarray(marked, dtype=bool).ravel() & known
        look: dict[str, Any] = {"facecolor": "none", "edgecolor": ORANGE, "hatch": "////", "linewidth": 1.0}
        ax.hist(numbers[who], bins=edges, label=label, **look)  # type: ignore[arg-type]
        ax.legend(fontsize=8, frameon=False)
    ax.axvline(0, color=GREY, linewidth=0.8)
    ax.set(yscale="log", xlabel=x, ylabel="rows")
    return style(ax)


def class_matrix(
    matrix: ArrayLike, rows: Sequence[str], columns: Sequence[str], ax: Axes | None = None, *, unit: str = ""
) -> Axes:
    """Influence of classes on classes: a cell for each pair, with its number, blue above 0 and red below.

    Args:
        matrix: (a, b) such as sums over the training rows of a class, mean over the queries of another.
        rows: (a,) names, of the queries' classes.
        columns: (b,) names, of the training rows' classes.
        ax: where to draw; None makes a new figure.
        unit: what the numbers are.
    """
    ax = new_axes(1.6 + 0.7 * len(columns), 1.4 + 0.5 * len(rows)) if ax is None else ax
    numbers = np.asarray(matrix, dtype=float)
    largest = float(np.nanmax(np.abs(numbers), initial=0.0)) or 1.0
    ax.imshow(numbers, cmap="RdBu", vmin=-1.6 * largest, vmax=1.6 * largest, aspect="auto")
    for (line, column), value in np.ndenumerate(numbers):
        ax.text(column, line, f"{value:+.2g}", ha="center", va="center", fontsize=8, color=INK)
    ax.set_xticks(range(len(columns)), list(columns), fontsize=8)
    ax.set_yticks(range(len(rows)), list(rows), fontsize=8)
    ax.set(xlabel="training rows of", ylabel="queries of", title=unit)
    return ax


def before_and_after(
    before: ArrayLike, after: ArrayLike, axes: Sequence[Axes] | None = None, *, said: tuple[str, str] = ("", "")
) -> list[Axes]:
    """A training picture before an attack, after it, and the difference made visible (the paper's figure 5).

    Args:
        before: (H, W) or (H, W, 3), in any scale that both share.
        after: the same shape.
        axes: three places to draw; None makes a new figure.
        said: what the model says of its query before and after, such as "fish, 97 %".
    """
    if axes is None:
        figure = new_axes(7.5, 2.9).figure
        figure.clear()
        axes = list(figure.subplots(1, 3))  # type: ignore[union-attr]
    first, last = np.asarray(before, dtype=float), np.asarray(after, dtype=float)
    low, high = float(min(first.min(), last.min())), float(max(first.max(), last.max()))
    change = last - first
    largest = float(np.abs(change).max()) or 1.0
    shown = [(first - low) / (high - low or 1.0), (last - low) / (high - low or 1.0), 0.5 + 0.5 * change / largest]
    titles = (f"before\n{said[0]}", f"after\n{said[1]}", f"difference × {(high - low) / (2 * largest):.0f}\n")
    for ax, picture, title in zip(axes, shown, titles, strict=True):
        ax.imshow(picture, cmap="Greys", vmin=0, vmax=1)
        ax.set(xticks=[], yticks=[])
        ax.set_title(title.rstrip("\n"), fontsize=9, color=INK)
    return list(axes)
