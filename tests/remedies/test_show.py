"""What is said to type by upweight/show, typed."""

from __future__ import annotations

import numpy as np

import upweight as uw
from refusals import refused
from small import XQ, ZQ, ridge


def test_the_picture_of_leverages_is_of_a_summary():
    influence = ridge()
    with refused("frame has no column ", "Pass what influence.summary_frame() returns"):
        uw.plots.leverage_residual(influence.on_loss(XQ, ZQ).top(3))
    frame = influence.summary_frame()
    axes = uw.plots.leverage_residual(frame)
    dots = np.asarray(axes.collections[0].get_offsets())
    assert np.allclose(dots, frame[["leverage", "studentized_residual"]])
