"""What is kept of values while they pass by, chunk of rows after chunk: rows that lead, sums, and how values spread.

Nothing here grows with the number of rows. Sums are added in the order of the chunks, so that the same chunks give the
same bytes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import scipy.sparse
from jaxtyping import Float, Int
from numpy.typing import NDArray

_ROWS = 1024  # looked at together
_ROOM = 256  # candidates beside the k that lead and these rows, before they are sorted
_OCTAVES = (-64, 64)  # powers of two between which values are told apart
_PARTS = 4  # bins between a power of two and the next: the first two binary digits behind the point
_CODE_BITS = 14  # of a float64: sign, exponent, two digits

_ADDED = ("total", "squares", "sums")

Histogram = tuple[
    Int[NDArray[np.int64], "q b"], Float[NDArray[np.float64], " e"]
]  # counts, and the edges of their bins


class Largest:
    """The k largest keys of every query so far, and their rows; among equal keys the earlier rows.

    Args:
        queries: how many.
        k: keys to keep.
    """

    def __init__(self, queries: int, k: int) -> None:
        self.k = k
        self._keys = np.full((queries, k + _ROWS + max(k, _ROOM)), -np.inf)
        self._rows = np.zeros(self._keys.shape, dtype=np.int64)
        self._filled = np.zeros(queries, dtype=np.int64)
        self._least = np.full(queries, -np.inf)  # what a later key has to exceed

    def state(self) -> dict[str, NDArray[Any]]:
        """All that is known, for `resume`."""
        self._settle()
        return {"keys": self._keys[:, : self.k], "rows": self._rows[:, : self.k], "filled": self._filled}

    def resume(self, state: Mapping[str, NDArray[Any]]) -> None:
        """Go on from there."""
        self._keys[:, : self.k], self._rows[:, : self.k] = state["keys"], state["rows"]
        self._filled = state["filled"].astype(np.int64)
        self._least = self._keys[:, self.k - 1].copy()

    def add(self, first: int, keys: Float[NDArray[np.float64], "c q"]) -> None:
        """Look at the keys of the rows that come next, starting at row `first`."""
        for start in range(0, len(keys), _ROWS):
            self._look(first + start, keys[start : start + _ROWS])

    def found(self) -> tuple[Int[NDArray[np.int64], "q k"], Float[NDArray[np.float64], "q k"]]:
        """Rows and keys, largest first; a query whose keys were NaN has the first rows."""
        self._settle()
        rows, keys = self._rows[:, : self.k].copy(), self._keys[:, : self.k].copy()
        nothing = self._filled < self.k
        rows[nothing], keys[nothing] = np.arange(self.k), np.nan
        return rows, keys

    def _look(self, first: int, keys: Float[NDArray[np.float64], "c q"]) -> None:
        rows, queries = np.divmod(np.flatnonzero(keys > self._least), keys.shape[1])
        if not len(rows):
            return
        order = np.argsort(queries, kind="stable")
        rows, queries = rows[order], queries[order]
        counts = np.bincount(queries, minlength=keys.shape[1])
        before = np.cumsum(counts) - counts
        places = np.arange(len(rows)) + np.repeat(self._filled - before, counts)
        self._keys[queries, places] = keys[rows, queries]
        self._rows[queries, places] = first + rows
        self._filled += counts
        if self._filled.max() + _ROWS > self._keys.shape[1]:
            self._settle()

    def _settle(self) -> None:
        """Sort the candidates, and drop all but the k that lead."""
        width = int(self._filled.max())
        order = np.argsort(-self._keys[:, :width], axis=1, kind="stable")[:, : self.k]
        for array in (self._keys, self._rows):
            array[:, : order.shape[1]] = np.take_along_axis(array, order, 1)
        self._keys[:, order.shape[1] :] = -np.inf
        self._filled = np.minimum(self._filled, self.k)
        self._least = self._keys[:, self.k - 1].copy()


class Spread:
    """How many values of every query lie in each bin of a scale that is logarithmic on either side of 0.

    Edges are ±2ᵉ(1 + j/4) for e from −64 to 63 and j from 0 to 3, and ±2⁶⁴: the upper edge of a bin is at most 25 %
    above the lower one. Between ±2⁻⁶⁴ there is one bin, beyond ±2⁶⁴ one on either side. A bin holds its edge that is
    nearer to 0, and the middle one neither of its edges.
    """

    def __init__(self, queries: int) -> None:
        self._counts = np.zeros((queries, len(EDGES)), dtype=np.int64)  # the last column is for NaN
        self._offsets = np.arange(queries) * len(EDGES)

    def add(self, values: Float[NDArray[np.float64], "c q"]) -> None:
        """Count these."""
        codes = np.ascontiguousarray(values).view(np.uint64) >> (64 - _CODE_BITS)
        bins = _BIN_OF_CODE[codes.view(np.int64)] + self._offsets
        self._counts += np.bincount(bins.ravel(), minlength=self._counts.size).reshape(self._counts.shape)

    def state(self) -> NDArray[np.int64]:
        """All that is known, for `resume`."""
        return self._counts

    def resume(self, state: NDArray[Any]) -> None:
        """Go on from there."""
        self._counts = state.astype(np.int64)

    def found(self) -> Histogram:
        """The bins from the first to the last in which there is a value."""
        counts = self._counts[:, :-1]
        filled = np.flatnonzero(counts.any(0))
        low, high = (int(filled[0]), int(filled[-1]) + 1) if len(filled) else (_MIDDLE, _MIDDLE + 1)
        return counts[:, low:high].copy(), EDGES[low : high + 1]


def aligned(parts: Sequence[Histogram]) -> Histogram:
    """The counts of several blocks of queries, one below the other, in bins that hold those of all."""
    lows = np.searchsorted(EDGES, [edges[0] for _, edges in parts])
    low, high = lows.min(), max(start + counts.shape[1] for start, (counts, _) in zip(lows, parts, strict=True))
    whole = np.zeros((sum(len(counts) for counts, _ in parts), high - low), dtype=np.int64)
    line = 0
    for start, (counts, _) in zip(lows - low, parts, strict=True):
        whole[line : line + len(counts), start : start + counts.shape[1]] = counts
        line += len(counts)
    return whole, EDGES[low : high + 1]


class Running:
    """All of this for some queries.

    Args:
        queries: how many.
        k: rows to keep on either side.
        belonging: groups of rows whose values are added up.
    """

    def __init__(self, queries: int, k: int, belonging: Belonging) -> None:
        self.largest, self.smallest = Largest(queries, k), Largest(queries, k)
        self.spread = Spread(queries)
        self.total, self.squares = np.zeros(queries), np.zeros(queries)
        self.sums = np.zeros((belonging.count, queries))
        self._belonging = belonging

    def add(self, first: int, values: Float[NDArray[np.float64], "c q"]) -> None:
        """Look at the values of the rows that come next, starting at row `first`."""
        self.largest.add(first, values)
        self.smallest.add(first, -values)
        self.spread.add(values)
        self.total += values.sum(0)
        self.squares += np.einsum("rq,rq->q", values, values)
        if len(self.sums):
            self.sums += self._belonging.rows(first, first + len(values)).T @ values

    def state(self) -> dict[str, NDArray[Any]]:
        """All that is known after some chunks, for `resume`: then the others add up to the same bits."""
        sides = {"largest": self.largest.state(), "smallest": self.smallest.state()}
        arrays = {f"{side}.{name}": array for side, state in sides.items() for name, array in state.items()}
        return {**arrays, "counts": self.spread.state(), **{name: getattr(self, name) for name in _ADDED}}

    def resume(self, state: Mapping[str, NDArray[Any]]) -> None:
        """Go on from there."""
        for side in ("largest", "smallest"):
            own = {name.removeprefix(f"{side}."): array for name, array in state.items() if name.startswith(f"{side}.")}
            getattr(self, side).resume(own)
        self.spread.resume(state["counts"])
        for name in _ADDED:
            getattr(self, name)[:] = state[name]


class Belonging:
    """Which rows are in which groups.

    Memory: a number for each row, as short as the groups are few, where no row is in two of them; else 34 bytes.

    Args:
        groups: rows; a row may be in several.
        n: number of rows.
    """

    def __init__(self, groups: Sequence[NDArray[np.int64]], n: int) -> None:
        self.count = len(groups)
        self._whole: scipy.sparse.csr_matrix | None = None
        self._of_row = np.full(n, -1, dtype=np.min_scalar_type(-1 - len(groups)))
        for number, group in enumerate(groups):
            if (self._of_row[group] >= 0).any():
                self._whole = _overlapping(groups, n)
                return
            self._of_row[group] = number

    @classmethod
    def by_number(cls, numbers: NDArray[Any], count: int) -> Belonging:
        """Of rows that are each in one of so many groups, by its number."""
        made = cls([], 0)
        made.count, made._of_row = count, numbers.astype(np.min_scalar_type(-1 - count))
        return made

    def rows(self, start: int, stop: int) -> scipy.sparse.csr_matrix:
        """(stop − start, g): 1 where a row is in a group."""
        if self._whole is not None:
            return self._whole[start:stop]
        of_row = self._of_row[start:stop]
        inside = of_row >= 0
        ends = np.concatenate([[0], np.cumsum(inside)])
        columns = of_row[inside].astype(np.int32)
        return scipy.sparse.csr_matrix(
            (np.ones(len(columns), dtype=np.int8), columns, ends), (stop - start, self.count)
        )


def _overlapping(groups: Sequence[NDArray[np.int64]], n: int) -> scipy.sparse.csr_matrix:
    """The same of all rows where one is in several groups."""
    rows = np.concatenate([np.empty(0, dtype=np.int64), *groups])
    columns = np.repeat(np.arange(len(groups)), [len(group) for group in groups])
    return scipy.sparse.csr_matrix((np.ones(len(rows), dtype=np.int8), (rows, columns)), shape=(n, len(groups)))


def _edges() -> NDArray[np.float64]:
    low, high = _OCTAVES
    upper = np.ldexp(np.tile(1 + np.arange(_PARTS) / _PARTS, high - low), np.repeat(np.arange(low, high), _PARTS))
    upper = np.append(upper, [2.0**high, np.inf])
    return np.concatenate([-upper[::-1], upper])


def _bin_of_code() -> NDArray[np.int64]:
    """The bin of a value by its first bits; one past the bins for NaN."""
    codes = np.arange(2**_CODE_BITS, dtype=np.uint64)
    values = np.abs((codes << (64 - _CODE_BITS)).view(np.float64))  # the nearest to 0 of its code
    outward = np.minimum(np.searchsorted(EDGES[_MIDDLE + 1 :], values, side="right"), _MIDDLE)  # 0 in the middle
    bins = _MIDDLE + np.where(codes < 2 ** (_CODE_BITS - 1), outward, -outward)
    return np.where(np.isnan(values), len(EDGES) - 1, bins)


EDGES = _edges()
_MIDDLE = len(EDGES) // 2 - 1  # the bin around 0
_BIN_OF_CODE = _bin_of_code()
