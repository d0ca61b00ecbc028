"""Colours, shapes and dashes that all plots share, and an empty Axes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from upweight.errors import require

if TYPE_CHECKING:
    from matplotlib.axes import Axes

BLUE, ORANGE, GREY, INK = "#2a6f97", "#d1495b", "#8d99ae", "#2b2d42"
COLORS = (BLUE, ORANGE, "#c98a0b", INK, GREY)
MARKERS = ("o", "^", "s", "D", "v")
DASHES = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)))


def new_axes(width: float = 4.5, height: float = 4.5) -> Axes:
    """An empty Axes on its own figure, without a display."""
    figure = require("matplotlib.figure", "plot").Figure(figsize=(width, height), layout="constrained")
    return figure.subplots()


def style(ax: Axes, *, title: str = "") -> Axes:
    """The look of the paper's figures: no box, a faint grid, dark ink."""
    for side in ("top", "right"):
        ax.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        ax.spines[side].set_color(GREY)
    ax.grid(alpha=0.25, linewidth=0.6)
    ax.set_axisbelow(True)
    ax.tick_params(colors=INK, labelsize=8.5, color=GREY)
    ax.xaxis.label.set(color=INK, size=9.5)
    ax.yaxis.label.set(color=INK, size=9.5)
    if title:
        ax.set_title(title, loc="left", fontsize=10.5, color=INK, fontweight="bold")
    return ax


def note(ax: Axes, text: str, *, x: float = 0.04, y: float = 0.96, color: str = INK) -> None:
    """A few numbers in a corner of the axes."""
    box = {"facecolor": "white", "edgecolor": "none", "alpha": 0.75, "pad": 1.5}
    words: dict[str, Any] = {"va": "top", "ha": "left", "fontsize": 9, "color": color, "linespacing": 1.5, "zorder": 5}
    ax.text(x, y, text, transform=ax.transAxes, bbox=box, **words)
