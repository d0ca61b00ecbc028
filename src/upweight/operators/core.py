"""A sparse positive matrix, solved for level by level until what is left is dense.

A level is columns of few neighbours, no two of them neighbours of each other, so that their own block is a diagonal D.
Solving for them leaves the others S − Nᵀ D⁻¹ N, with N what the level has in common with them, and joins the neighbours
of every column to each other. Levels go on as long as they cost less than the same columns would in a dense matrix:
where columns are one-hot and their levels as frequent as words, seven of twenty columns are left, and all are joined.
With B what the levels do to a vector, and S the core that is left,

    A⁻¹ = B diag(I, S⁻¹) Bᵀ,

so that a sparse row's form xᵀA⁻¹x needs its few entries of xᵀB, and those entries of S⁻¹ that belong to two of them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import scipy.sparse
from jaxtyping import Float, Int
from numpy.typing import NDArray

PAIRS = 2**28  # entries that two columns of one row may have together, all rows counted, before levels are thought of
FLOPS = 30e9  # of a core's dense matrices in a second
SECONDS = 1e-7  # that an entry takes which a level changes or copies, and rows ask for later
_WIDER = 2.0  # times the neighbours of columns that have few: those that may share a level with them
_LEAST = 8  # neighbours that are few in any case
_FEW = 0.01  # the share of columns whose neighbours are the fewest
_AT_ONCE = 2**21  # entries of S⁻¹ that are asked for at once
_DENSE = 8  # a row with more than this part of the core's columns is multiplied with all of S⁻¹
_ENTRY = 12  # bytes of a number and its place
_COPIES = 3  # of what a level leaves while the next is made; later B takes the place of one
_SINGULAR = 1e-12  # of a diagonal of ones: what is smaller is rounding


@dataclass(frozen=True)
class Core:
    """A⁻¹ = B diag(I, S⁻¹) Bᵀ.

    Args:
        solved: (m, e) the columns of B for what is solved for.
        kept: (m, c) those for the core.
        rest: (c, c) S.
    """

    solved: Any
    kept: Any
    rest: Any


@dataclass(frozen=True)
class Counted:
    """What a core will cost, by the pattern of the entries alone.

    Args:
        size: columns of the core.
        entries: of the largest matrix that a level leaves.
        seconds: on one core of a processor, S⁻¹ included.
    """

    size: int
    entries: int
    seconds: float

    @property
    def flops(self) -> float:
        """Of S⁻¹."""
        return float(self.size) ** 3

    @property
    def memory(self) -> float:
        """Bytes: S⁻¹, and beside it what the last level leaves and B."""
        return 8.0 * self.size**2 + _COPIES * _ENTRY * self.entries


@dataclass(frozen=True)
class _Level:
    """Columns that are solved for at once: `columns` and `others` of what was left, D, and N over it."""

    columns: Int[NDArray[np.int64], " e"]
    others: Int[NDArray[np.int64], " c"]
    diagonal: Float[NDArray[np.float64], " e"]
    shared: Any


def around(matrix: Any) -> Core | None:
    """The levels of a symmetric CSR matrix whose diagonal is 1, and its core; None where it is not positive."""
    levels: list[_Level] = []
    left = matrix
    for level, rest, _ in _levels(matrix):
        if rest.shape[0] and float(rest.diagonal().min()) <= _SINGULAR:
            return None
        levels.append(level)
        left = rest
    found = _lifted(levels, left.shape[0])
    solved = matrix.shape[0] - left.shape[0]
    return Core(found[:, :solved].tocsr(), found[:, solved:].tocsr(), left)


def pairs(X: Any) -> float:
    """Σ of the squared number of entries of every row, with an intercept."""
    return float(((np.diff(X.indptr) + 1.0) ** 2).sum())


def counted(X: Any, intercept: bool, most: float | int = np.inf, room: float | int = np.inf) -> Counted:
    """The core of XᵀDX + Λ, whatever the positive D and Λ are.  Cost: that of the levels, without S⁻¹.

    Levels that have filled what they leave while twice `most` columns are still there, as those of hashed columns do,
    are not followed: the core is going to have more than that. Nor are those that leave what takes more bytes than
    `room`.
    """
    weights = np.linspace(1, np.e, X.shape[0])  # no two terms cancel
    matrix = gram(pattern(X), weights, np.ones(X.shape[1] + int(intercept)), intercept)
    left, entries, seconds = matrix, matrix.nnz, SECONDS * pairs(X)
    for _, rest, took in _levels(matrix):
        left, entries, seconds = rest, max(entries, rest.nnz), seconds + took
        full = left.nnz > max(matrix.nnz, (most / 2) ** 2) and left.shape[0] > 2 * most
        if full or _COPIES * _ENTRY * left.nnz > room:
            break
    return Counted(left.shape[0], int(entries), seconds + left.shape[0] ** 3 / FLOPS)


def counting(X: Any) -> float:
    """Bytes of XᵀX at most: what `counted` starts with."""
    return _ENTRY * min(pairs(X), (X.shape[1] + 1.0) ** 2)


def pattern(X: Any) -> Any:
    """X with ones for its entries."""
    ones = scipy.sparse.csr_matrix(X.shape, dtype=np.float64)
    ones.data, ones.indices, ones.indptr = np.ones(len(X.indices)), X.indices, X.indptr
    return ones


def gram(X: Any, weights: Float[NDArray[np.float64], " n"], held: NDArray[np.float64], intercept: bool) -> Any:
    """XᵀDX + Λ as a CSR matrix, X with a column of ones behind it where there is an intercept."""
    X = with_ones(X, intercept)
    return (X.T @ scaled(X, weights) + scipy.sparse.diags(held)).tocsr()


def scaled(X: Any, factors: NDArray[np.float64]) -> Any:
    """A CSR matrix whose rows are multiplied by numbers."""
    found = scipy.sparse.csr_matrix(X.shape, dtype=np.float64)  # its constructor would look at all of them
    found.data, found.indices, found.indptr = X.data * np.repeat(factors, np.diff(X.indptr)), X.indices, X.indptr
    return found


def with_ones(X: Any, intercept: bool) -> Any:
    """A CSR matrix, with a column of ones behind it where there is an intercept."""
    return scipy.sparse.hstack([X, np.ones((X.shape[0], 1))], format="csr") if intercept else X


def forms(Y: Any, inverse: Float[NDArray[np.float64], "c c"]) -> Float[NDArray[np.float64], " b"]:
    """yᵀS⁻¹y of sparse rows, through those entries of S⁻¹ that a row asks for, or all where it asks for many."""
    size, width = len(inverse), np.diff(Y.indptr)
    found = np.zeros(Y.shape[0])
    dense = np.flatnonzero(width * _DENSE > size)
    step = max(1, _AT_ONCE // max(1, size))
    for some in (dense[start : start + step] for start in range(0, len(dense), step)):
        rows = Y[some].toarray()
        found[some] = np.einsum("bc,bc->b", rows @ inverse, rows)
    flat = inverse.reshape(-1)
    for rows, most in _of_like_width(np.flatnonzero((width > 0) & (width * _DENSE <= size)), width):
        places, numbers = _padded(Y, rows, most)
        entries = flat.take(places[:, :, None] * size + places[:, None, :])
        found[rows] = np.einsum("bi,bi->b", np.matmul(entries, numbers[:, :, None])[:, :, 0], numbers)
    return found


def _of_like_width(
    rows: Int[NDArray[np.int64], " b"], width: NDArray[Any]
) -> Iterator[tuple[Int[NDArray[np.int64], " s"], int]]:
    """The rows in parts that ask for as many entries as are taken at once, and the most of one row in each."""
    rows = rows[np.argsort(width[rows], kind="stable")]
    start = 0
    while start < len(rows):
        fitting = np.arange(1, len(rows) - start + 1) * width[rows[start:]].astype(np.int64) ** 2 <= _AT_ONCE
        stop = start + max(1, int(fitting.sum()))
        yield rows[start:stop], int(width[rows[stop - 1]])
        start = stop


def _padded(Y: Any, rows: NDArray[np.int64], most: int) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """The places and numbers of sparse rows, behind which stand zeros."""
    first, width = Y.indptr[rows].astype(np.int64), np.diff(Y.indptr)[rows]
    taken = np.arange(most) < width[:, None]
    at = np.where(taken, first[:, None] + np.arange(most), 0)
    return np.where(taken, Y.indices[at], 0).astype(np.int64), np.where(taken, Y.data[at], 0.0)


def _levels(matrix: Any) -> Iterator[tuple[_Level, Any, float]]:
    """Level after level, with what each leaves and the seconds it takes."""
    left, draw = matrix, np.random.default_rng(0)
    while left.shape[0] > 1:
        chosen = _apart(left, draw)
        size, widths = left.shape[0], np.diff(left.indptr)[chosen] - 1.0
        seconds = SECONDS * (float((widths**2).sum()) + left.nnz)
        if seconds > (float(size) ** 3 - float(size - len(chosen)) ** 3) / FLOPS:
            return
        others = np.setdiff1d(np.arange(size), chosen)
        own = left[chosen]
        diagonal, shared = own[:, chosen].diagonal(), own[:, others]
        half = scaled(shared, np.abs(diagonal).clip(1e-300) ** -0.5)
        left = (left[others][:, others] - half.T @ half).tocsr()
        yield _Level(chosen, others, diagonal, shared), left, seconds


def _apart(matrix: Any, draw: np.random.Generator) -> Int[NDArray[np.int64], " e"]:
    """Columns of few neighbours, no two of them neighbours of each other."""
    width = np.diff(matrix.indptr)
    few = int(np.partition(width, int(_FEW * len(width)))[int(_FEW * len(width))])
    able = np.flatnonzero(width <= max(_WIDER * few, _LEAST))
    order = np.full(len(width), np.iinfo(np.int64).max)
    order[able[np.lexsort((draw.permutation(len(able)), width[able]))]] = np.arange(len(able))
    some = matrix[able]
    met = order[some.indices]
    own = np.repeat(order[able], np.diff(some.indptr))
    met[met == own] = np.iinfo(np.int64).max
    return able[order[able] < np.minimum.reduceat(met, some.indptr[:-1])]


def _lifted(levels: list[_Level], core: int) -> Any:
    """B, with the columns of the core behind those of the levels, the last level first."""
    found: Any = scipy.sparse.identity(core, format="csr")
    for level in reversed(levels):
        e, size = len(level.columns), found.shape[0] + len(level.columns)
        lowered = scaled(level.shared, -1 / level.diagonal)
        own = scipy.sparse.hstack([scipy.sparse.diags(level.diagonal**-0.5), lowered @ found], format="csr")
        rest: Any = scipy.sparse.hstack([scipy.sparse.csr_matrix((size - e, e)), found], format="csr")
        place = np.empty(size, np.int64)
        place[np.concatenate([level.others, level.columns])] = np.arange(size)
        whole: Any = scipy.sparse.vstack([rest, own], format="csr")
        found = whole[place]
    return found
