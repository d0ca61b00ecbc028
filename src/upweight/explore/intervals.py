"""Exact intervals for what a reviewer counts: a share, how many of all rows, and a difference on the same queries.

With NumPy and the standard library alone: the explorer does without SciPy, against which these are tested.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

from upweight.errors import InvalidInput

LEVEL = 0.95
_HALVINGS = 60


def share(hits: int, of: int, level: float = LEVEL) -> tuple[float, float]:
    """The Clopper–Pearson interval of a share: it covers with at least this probability, whatever the share is.

    It holds p unless P(X ≥ hits | p) or P(X ≤ hits | p) is less than (1 − level)/2.

    References: Clopper & Pearson (1934).

    >>> [round(end, 4) for end in share(0, 10)]
    [0.0, 0.3085]
    """
    _check(hits, of)
    tail = (1 - level) / 2
    low = 0.0 if not hits else _root(lambda p: _binomial(np.arange(hits, of + 1), of, p) - tail, 0.0, 1.0)
    high = 1.0 if hits == of else _root(lambda p: tail - _binomial(np.arange(hits + 1), of, p), 0.0, 1.0)
    return low, high


def total(hits: int, drawn: int, rows: int, level: float = LEVEL) -> tuple[int, int]:
    """How many of all rows are hits, if `drawn` of them were drawn at random and not put back; exact (hypergeometric).

    The number D of hits is in the interval unless P(X ≥ hits | D) or P(X ≤ hits | D) is at most (1 − level)/2.

    >>> total(1, 20, 100)
    (1, 22)
    >>> total(3, 100, 100)
    (3, 3)
    """
    _check(hits, drawn)
    _check(drawn, rows)
    tail, least, most = (1 - level) / 2, hits, rows - (drawn - hits)

    def within(first: int, last: int, D: int) -> float:
        return _hypergeometric(np.arange(max(first, drawn - (rows - D), 0), min(last, D, drawn) + 1), D, drawn, rows)

    low = _first(least, most, lambda D: within(hits, drawn, D) > tail)
    high = _first(least, most + 1, lambda D: most < D or within(0, hits, D) <= tail) - 1
    return low, high


def difference(gained: int, lost: int, queries: int, level: float = LEVEL) -> tuple[float, float]:
    """The interval of a difference of two accuracies on the same queries: Tango's, of inverted score tests.

    With Δ the difference, g of q queries gained and l lost, it holds the Δ for which
    |g − l − qΔ| ≤ z √(q (2p̂ + Δ(1 − Δ))), where p̂ is the likeliest share of lost ones if Δ is true. It holds 0
    exactly where McNemar's test does not reject.

    References: Tango (1998), Statistics in Medicine 17, 891–908.

    >>> [round(end, 3) for end in difference(0, 0, 100)]
    [-0.037, 0.037]
    """
    _check(gained + lost, queries)
    if not queries:
        return -1.0, 1.0
    z, middle = NormalDist().inv_cdf((1 + level) / 2), (gained - lost) / queries

    def beyond(delta: float) -> float:
        spread = queries * (2 * likeliest_lost(gained, lost, queries, delta) + delta * (1 - delta))
        return abs(gained - lost - queries * delta) - z * math.sqrt(max(spread, 0.0))

    def end(far: float) -> float:
        near = middle + 1e-9 * (far - middle)  # at the middle itself both sides are 0 where nothing flipped
        return far if beyond(far) <= 0 else middle if beyond(near) > 0 else _root(beyond, near, far)

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
    flips, fewer = gained + lost, min(gained, lost)
    _check(fewer, flips)
    return min(1.0, 2 * _binomial(np.arange(fewer + 1), flips, 0.5))


def _binomial(counts: NDArray[np.int64], of: int, p: float) -> float:
    """P(X is one of the counts) for a binomial X."""
    if p in (0.0, 1.0):
        return float((counts == round(of * p)).any())
    return float(np.exp(_ways(of, counts) + counts * math.log(p) + (of - counts) * math.log1p(-p)).sum())


def _hypergeometric(counts: NDArray[np.int64], hits: int, drawn: int, rows: int) -> float:
    """P(X is one of the counts) for X hits among those drawn."""
    return float(np.exp(_ways(hits, counts) + _ways(rows - hits, drawn - counts) - _ways(rows, np.int64(drawn))).sum())


def _ways(of: int, counts: NDArray[np.int64] | np.int64) -> NDArray[np.float64]:
    """Logarithms of binomial coefficients."""
    logs = _log_factorials(max(1024, 1 << of.bit_length()))
    return logs[of] - logs[counts] - logs[of - counts]


@lru_cache(maxsize=2)
def _log_factorials(n: int) -> NDArray[np.float64]:
    return np.concatenate([[0.0], np.cumsum(np.log(np.arange(1, n + 1, dtype=np.float64)))])


def _root(rising: Callable[[float], float], near: float, far: float) -> float:
    """Where a function that is below 0 at `near` and above it at `far` is 0."""
    for _ in range(_HALVINGS):
        middle = (near + far) / 2
        near, far = (middle, far) if rising(middle) <= 0 else (near, middle)
    return (near + far) / 2


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
