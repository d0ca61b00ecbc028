"""What leads among the values of a query or a row: the largest of either sign, and how all are spread."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

_BINS = 60
_SAMPLED = 50_000  # values by which the ends of a histogram are found


def largest(
    values: NDArray[np.float64], k: int, chosen: NDArray[np.int64] | None = None
) -> tuple[NDArray[np.int64], ...]:
    """(helpful, harmful): places of the k largest values above 0 and of the k smallest below, the strongest first.

    Args:
        values: of all; NaN are left out.
        k: how many of either sign at most.
        chosen: places that are looked at, ascending; None for all.
    """
    looked = values if chosen is None else values[chosen]
    found = []
    for sign in (-1.0, 1.0):
        keys = sign * looked
        few = np.argpartition(keys, k - 1)[:k] if k < len(keys) else np.arange(len(keys))
        edge = few[keys[few] < 0]
        order = edge[np.lexsort((edge, keys[edge]))]
        found.append(order if chosen is None else chosen[order])
    return tuple(found)


def spread(values: NDArray[np.float64]) -> dict[str, Any]:
    """A histogram: the outermost thousandth on either side stands in the outermost bins, and is counted."""
    known = values if not np.isnan(values[:_BINS]).any() and np.isfinite(values.sum()) else values[np.isfinite(values)]
    if not known.size:
        return {"counts": [], "edges": [], "beyond": 0}
    few = known[:: max(1, len(known) // _SAMPLED)]
    low, high = (float(edge) for edge in np.quantile(few, [0.001, 0.999]))
    if low == high:
        low, high = low - 0.5, high + 0.5
    places = ((known - low) * (_BINS / (high - low))).clip(0, _BINS - 1).astype(np.int64)
    counts = np.bincount(places, minlength=_BINS)
    beyond = int(np.count_nonzero(known < low) + np.count_nonzero(known > high))
    return {"counts": counts.tolist(), "edges": np.linspace(low, high, _BINS + 1).tolist(), "beyond": beyond}
