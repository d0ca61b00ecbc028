"""Queries without a value, for they ask for what the training rows do not determine, and what is said of them."""

from __future__ import annotations

from typing import Any

import numpy as np
from jaxtyping import Float, Int
from numpy.typing import NDArray

import upweight as uw
from upweight.apps.names import listed

_NAMED = 5  # queries in a sentence


def undetermined(scores: uw.Scores) -> Int[NDArray[np.int64], " m"]:
    """The queries whose values are NaN."""
    return np.flatnonzero(np.isnan(scores.values).any(1))


def left_out_line(values: Float[NDArray[np.float64], "q r"], ids: Any = None) -> str:
    """How many queries have no value, which by their names, and why; empty if all have one."""
    queries = np.flatnonzero(np.isnan(values).any(1))
    if not len(queries):
        return ""
    one, asked = len(queries) == 1, len(values)
    return (
        f"{len(queries)} of {asked} queries {'has no value and is' if one else 'have no value and are'} left out: "
        f"{'query' if one else 'queries'} {listed(ids, queries, _NAMED)}. The training rows do not "
        "determine what the model says there: usually some columns repeat or add up to others in every training "
        "row, and not in the query. Drop a column and fit again, or fit with a penalty."
    )
