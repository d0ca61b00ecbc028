"""Pictures of results: each function draws on an Axes and returns it, and computes nothing.

Kinds differ in shape or dashes, not by colour alone; the colours stay apart for the colour-blind.
"""

from upweight.show.plots.compared import agreement, calibration, predicted_against_actual
from upweight.show.plots.curves import damping_path, removals, shares, solved, wrong_labels
from upweight.show.plots.residuals import leverage_residual
from upweight.show.plots.rows import bars, before_and_after, class_matrix, histogram, influence_against_distance
from upweight.show.plots.style import BLUE, GREY, INK, ORANGE, new_axes, note, style

__all__ = [
    "BLUE",
    "GREY",
    "INK",
    "ORANGE",
    "agreement",
    "bars",
    "before_and_after",
    "calibration",
    "class_matrix",
    "damping_path",
    "histogram",
    "influence_against_distance",
    "leverage_residual",
    "new_axes",
    "note",
    "predicted_against_actual",
    "removals",
    "shares",
    "solved",
    "style",
    "wrong_labels",
]
