"""Exact intervals for what a reviewer counts: a share, how many of all rows, and a difference on the same queries."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from upweight.errors import InvalidInput

LEVEL = 0.95


def share(hits: int, of: int, level: float = LEVEL) -> tuple[float, float]:
    """The Clopper–Pearson interval of a share: it covers with at least this probability, whatever the share is.

    References: Clopper & Pearson (1934).

    >>> [round(end, 4) for end in share(0, 10)]
    [0.0, 0.3085]
    """
    from scipy.stats import binomtest

    _check(hits, of)
    if not of:
        return 0.0, 1.0
    found = binomtest(hits, of).proportion_ci(level, "exact")
    return float(found.low), float(found.high)


def total(hits: int, drawn: int, rows: int, level: float = LEVEL) -> tuple[int, int]:
    """How many of all rows are hits, if `drawn` of them were drawn at random and not put back; exact (hypergeometric).

    The number D of hits is in the interval unless P(X ≥ hits | D) or P(X ≤ hits | D) is at most (1 − level)/2.

    >>> total(1, 20, 100)
    (1, 22)
    >>> total(3, 100, 100)
    (3, 3)
    """
    from scipy.stats import hypergeom

    _check(hits, drawn)
    _check(drawn, rows)
    tail, least, most = (1 - level) / 2, hits, rows - (drawn - hits)
    low = _first(least, most, lambda D: bool(hypergeom.sf(hits - 1, rows, D, drawn) > tail))
    high = _first(least, most, lambda D: bool(hypergeom.cdf(hits, rows, D, drawn) <= tail)) - 1
    return low, high if hypergeom.cdf(hits, rows, most, drawn) <= tail else most


def difference(gained: int, lost: int, queries: int, level: float = LEVEL) -> tuple[float, float]:
    """The interval of a difference of two accuracies on the same queries: Tango's, of inverted score tests.

    With Δ the difference, g of q queries gained and l lost, it holds the Δ for which
    |g − l − qΔ| ≤ z √(q (2p̂ + Δ(1 − Δ))), where p̂ is the likeliest share of lost ones if Δ is true. It holds 0
    exactly where McNemar's test does not reject.

    References: Tango (1998), Statistics in Medicine 17, 891–908.

    >>> [round(end, 3) for end in difference(0, 0, 100)]
    [-0.037, 0.037]
    """
    from scipy.optimize import brentq
    from scipy.stats import norm

    _check(gained + lost, queries)
    if not queries:
        return -1.0, 1.0
    z, middle = float(norm.ppf((1 + level) / 2)), (gained - lost) / queries

    def beyond(delta: float) -> float:
        spread = queries * (2 * likeliest_lost(gained, lost, queries, delta) + delta * (1 - delta))
        return abs(gained - lost - queries * delta) - z * math.sqrt(max(spread, 0.0))

    def root(near: float, far: float) -> float:
        found: Any = brentq(beyond, near, far)
        return float(found)

    def end(far: float) -> float:
        near = middle + 1e-9 * (far - middle)  # at the middle itself both sides are 0 where nothing flipped
        return far if beyond(far) <= 0 else middle if beyond(near) > 0 else root(near, far)

    return end(-1.0), end(1.0)


def likeliest_lost(gained: int, lost: int, queries: int, delta: float) -> float:
    """The share of lost queries that makes the counts likeliest, if the accuracies differ by `delta`."""
    b = (2 * queries - gained + lost) * delta - gained - lost
    root = b * b + 8 * queries * lost * delta * (1 - delta)
    return (math.sqrt(max(root, 0.0)) - b) / (4 * queries)


def mcnemar(gained: int, lost: int) -> float:
    """McNemar's exact p-value: how likely so unequal a split of the queries that flipped is, by chance.

    References: McNemar (1947).

    >>> mcnemar(5, 0)
    0.0625
    """
    from scipy.stats import binomtest

    _check(gained, gained + lost)
    return float(binomtest(gained, gained + lost, 0.5).pvalue) if gained + lost else 1.0


def _first(least: int, most: int, true: Callable[[int], bool]) -> int:
    """The first whole number from which on something is true, by halving; `most` if it never is."""
    while least < most:
        middle = (least + most) // 2
        least, most = (least, middle) if true(middle) else (middle + 1, most)
    return least


def _check(part: int, whole: int) -> None:
    """Raises unless a part is no more than its whole.

    Raises:
        InvalidInput: if it is.
    """
    if not 0 <= part <= whole:
        message = f"{part} of {whole} is no share. Count the hits among those that were looked at, 0 ≤ hits ≤ all."
        raise InvalidInput(message)
