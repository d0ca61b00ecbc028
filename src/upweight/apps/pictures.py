"""Pictures of what the apps find: each function draws on an Axes and returns it, and computes nothing."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from upweight import plots
from upweight.apps.names import called, short
from upweight.errors import InvalidInput, first_line

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from upweight.apps.contrast import Contrast
    from upweight.apps.mismatch import Mismatch
    from upweight.apps.repair import Repair
    from upweight.apps.understand import Understanding


def save(ax: Axes, file: Path) -> None:
    """Write the figure of `ax`; the suffix of the file says the format, its folder is made.

    Raises:
        InvalidInput: if matplotlib does not know the suffix.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    try:
        ax.figure.savefig(file, dpi=150)  # type: ignore[union-attr]
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
    if found.labels is None or found.targets is None:
        kinds = None
    else:
        own = found.labels == found.targets[query]
        kinds = {f"{found.targets[query]}, as the query": own, "another class": ~own}
    ax = plots.influence_against_distance(
        found.scores.values[query],
        (found.feature_distances if in_features else found.distances)[query],
        ax,
        kinds=kinds,
        marked=found.helpful(query).rows.tolist(),
        measure=found.scores.measure,
    )
    ax.set_xlabel(f"distance from the query, in {'features' if in_features else 'inputs'}")
    return ax


def responsible(found: Mismatch, ax: Axes | None = None) -> Axes:
    """The rows that help and harm most as bars, with the features they hold beside the rows that stand out.

    Args:
        found: what `mismatch` returns.
        ax: where to draw; None makes a new figure.
    """
    rows = np.concatenate([found.helpful.rows, found.harmful.rows[::-1]])
    values = np.concatenate([found.helpful.values, found.harmful.values[::-1]])
    return plots.bars(
        [f"row {called(found.scores.ids, row)}" for row in rows],
        values,
        ax,
        quiet=~np.isin(rows, found.responsible),
        x=f"change of the queries' mean {found.scores.measure} if the row is removed",
    )


def feature_effects(found: Mismatch, ax: Axes | None = None, *, k: int = 10) -> Axes:
    """Equation 5 of the k features that matter most, one bar for each row that stands out.

    Bars are of what the rows hold (the derivative times the row's own value) where that is known, else the derivative.

    Args:
        found: what `mismatch` returns.
        ax: where to draw; None makes a new figure.
        k: how many features.

    Raises:
        InvalidInput: if the model has no equation 5.
    """
    effects = found.features
    if effects is None:
        message = (
            "These results have no features: no row stands out, or equation 5 is not defined, as for kernels. Use "
            "pictures.responsible."
        )
        raise InvalidInput(message)
    ax = plots.new_axes(6.0, 4.8) if ax is None else ax
    chosen = effects.top(min(k, len(effects.names)))[::-1]
    table = effects.by_row if effects.held_by_row is None else effects.held_by_row
    place, height = np.arange(len(chosen)), 0.8 / len(effects.rows)
    harmful = set(found.harmful.responsible.tolist())
    for at, row in enumerate(effects.rows):
        color = plots.ORANGE if int(row) in harmful else plots.BLUE
        shift = height * ((len(effects.rows) - 1) / 2 - at)
        ax.barh(
            place + shift,
            table[at, chosen],
            height=height,
            color=color,
            alpha=1 - 0.5 * at / len(effects.rows),
            label=f"row {called(found.scores.ids, row)}",
        )
    ax.axvline(0, color=plots.GREY, linewidth=0.8)
    ax.set_yticks(place, [effects.names[j] for j in chosen], fontsize=8)
    times = "" if effects.held_by_row is None else " × its value"
    ax.set_xlabel(f"derivative of the queries' mean {found.scores.measure} by the feature{times}")
    if len(effects.rows) <= 8:
        ax.legend(fontsize=8, frameon=False)
    ax.grid(alpha=0.25, axis="x")
    return ax


def margins(found: Contrast, ax: Axes | None = None) -> Axes:
    """Every query's margin now, as predicted after its set of changes, and as it really is; below 0 is corrected.

    Beside them the control: the margin after training again with nothing changed.

    Args:
        found: what `contrast` returns.
        ax: where to draw; None makes a new figure.
    """
    ax = plots.new_axes(6.0, 4.2) if ax is None else ax
    place = np.arange(len(found.answers))
    now = np.array([answer.margin for answer in found.answers])
    actual = np.array([answer.actual for answer in found.answers])
    predicted = np.array([answer.predicted for answer in found.answers])
    for at, before, after in zip(place, now, actual, strict=True):
        ax.plot([at, at], [before, after], color=plots.GREY, linewidth=1, zorder=1)
    ax.scatter(place, now, s=20, color=plots.GREY, label="now", zorder=2)
    ax.scatter(place, predicted, s=44, facecolor="none", edgecolor="black", linewidth=0.9, label="predicted", zorder=3)
    ax.scatter(place, actual, s=20, color=plots.BLUE, label="trained again", zorder=4)
    control = np.array([answer.control for answer in found.answers])
    ax.scatter(place, control, s=36, marker="_", color=plots.ORANGE, label="nothing changed", zorder=2)
    ax.axhline(0, color=plots.GREY, linewidth=0.8)
    sizes = [len(answer.rows) or "–" for answer in found.answers]
    names = [answer.query if answer.query_id is None else short(answer.query_id) for answer in found.answers]
    ax.set_xticks(place, [f"{name}\n{size}" for name, size in zip(names, sizes, strict=True)], fontsize=8)
    ax.set(xlabel=f"query, and its number of {found.change}", ylabel="margin of the wrong class")
    ax.legend(fontsize=8, frameon=False)
    ax.grid(alpha=0.25, axis="y")
    return ax


def wrong_labels_found(found: Repair, truth: Any, ax: Axes | None = None) -> Axes:
    """The share of the wrong labels found against the share of rows inspected, for every score.

    Args:
        found: what `repair` returns.
        truth: (n,) true labels.
        ax: where to draw; None makes a new figure.
    """
    wrong = np.asarray(truth) != found.labels
    at = np.arange(1, len(wrong) + 1) / len(wrong)
    lines = {name: (at, np.cumsum(wrong[found.order(name)]) / max(1, int(wrong.sum()))) for name in found.scores}
    ax = plots.shares(lines, ax)
    ax.axvline(len(found.rows) / len(wrong), color=plots.GREY, linewidth=0.8, linestyle=":")
    ax.set(xlim=(0, 0.6), ylim=(0, 1.02))
    return ax
