"""Products with, and approximate inverses of, the exact Hessian where rows are sparse: all cost by entries."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import scipy.sparse
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from upweight.model import linear
from upweight.model.objective import Linear

_TOGETHER = (512, 384, 256, 128, 64, 32)  # columns that may be taken together
_PAIRS = {"sparse": 5, "dense": 400}  # products that add up their Gram matrix, for each entry of X
_BLOCK = 4096  # rows that are written out at once
_JITTER = 1e-8  # of a curvature: keeps columns that repeat each other apart
_FLOOR = 1e-30  # of the largest curvature: below it no row sees a column
_ENTRIES = 2  # for each column in a chunk: with fewer, adding the sums of chunks costs more than the products


def chunk(x: Any, least: int) -> int:
    """Rows to a sum as wide as X, a power of two that depends on X alone."""
    per_row = max(1.0, x.nnz / max(1, x.shape[0]))
    return max(least, 2 ** int(np.ceil(np.log2(_ENTRIES * x.shape[1] / per_row))))


def row_bytes(x: Any, n_outputs: int) -> int:
    """Memory that a row takes in a product, per vector and once more."""
    return 8 * (4 * n_outputs + n_outputs**2) + 16 * (1 + x.nnz // max(1, x.shape[0]))


def rows(X: Any, start: int, stop: int) -> Any:
    """Rows of a CSR matrix that share its memory."""
    first, last = X.indptr[start], X.indptr[stop]
    part = scipy.sparse.csr_matrix((stop - start, X.shape[1]), dtype=X.dtype)
    # not through the constructor, which copies a view of less than half of an array, copy=False or not
    part.data, part.indices = X.data[first:last], X.indices[first:last]
    part.indptr = X.indptr[start : stop + 1] - first
    return part


def product(
    across: NDArray[np.float64], shift: Tensor | None, shape: tuple[int, int], kept: list[Tensor] | None
) -> Callable[[Any, Tensor], Tensor]:
    """Σ_b wᵢ hᵢ ⊗ x̃ᵢx̃ᵢᵀ V of a batch (x, h), with V as a (d, kK) array in memory order, which SciPy reads as it is."""
    across = np.ascontiguousarray(across)
    (d, _), (k, K) = across.shape, shape

    def of_batch(batch: Any, _: Tensor) -> Tensor:
        X, h = batch
        Z = torch.from_numpy(X @ across).reshape(-1, k, K)
        Z = Z if shift is None else Z.add_(shift)
        R = linear.curved(h, Z)
        pulled = torch.from_numpy(X.T @ R.reshape(len(R), -1).numpy())
        total = torch.empty(k, K * d + (0 if shift is None else K), dtype=torch.float64)
        total[:, : K * d].unflatten(1, (K, d)).copy_(pulled.T.unflatten(0, (k, K)))
        total[:, K * d :] = R.sum(0) if shift is not None else 0.0
        if kept is not None:  # at the end: a batch that does not fit comes again in halves
            kept.append(Z.flatten(1))
        return total

    return of_batch


def squares(X: Any, spread: Float[Tensor, "b K"]) -> Float[Tensor, "K d"]:
    """Σ_b a_b x_b², the diagonal of Σ_b a_b x_b x_bᵀ, for every output's a."""
    X = linear.wide(X)
    if not X.has_canonical_format:  # an entry in two parts squares as their sum
        X = X.copy()
        X.sum_duplicates()
    squared = scipy.sparse.csr_matrix(X.shape, dtype=X.dtype)
    squared.data, squared.indices, squared.indptr = X.data**2, X.indices, X.indptr
    return torch.from_numpy((squared.T @ spread.numpy()).T.copy())


def frequent_inverse(
    X: Any, spread: Float[Tensor, "n K"], diagonal: Float[Tensor, " p"], structure: Linear
) -> Callable[[Tensor], Tensor]:
    """C⁻¹ without what couples outputs, or columns of which one is rare: a matrix of the frequent columns, a diagonal.

    Cost: that of a few products for one vector, once.

    Args:
        X: (n, d) sparse.
        spread: the diagonals of wᵢhᵢ.
        diagonal: of C + λI.
        structure: of the predictor; an intercept counts as the most frequent column.
    """
    K, d = structure.n_outputs, structure.n_features
    largest = float(diagonal.max())
    seen = diagonal > _FLOOR * max(largest, 0.0)
    scale = torch.where(seen, diagonal, largest if largest > 0 else 1.0).rsqrt()
    columns = frequent(X, K)
    if len(columns) == 0:
        return lambda R: R * (scale * scale)
    places = torch.from_numpy(columns)
    places = places + d * torch.arange(K)[:, None]  # (K, m) numbers of parameters
    if structure.intercept:
        places = torch.cat([places, torch.arange(K * d, K * d + K)[:, None]], 1)
    few = _with_ones(X[:, columns], structure.intercept)
    inverses = torch.stack([_block_inverse(few, spread[:, j], diagonal, scale, places[j]) for j in range(K)])
    flat = places.flatten()

    def apply(R: Tensor) -> Tensor:
        Y = R * scale
        together = Y[:, flat].unflatten(1, places.shape).to(inverses)
        Y[:, flat] = torch.einsum("bkm,kmn->bkn", together, inverses).flatten(1).to(Y)
        return Y.mul_(scale)

    return apply


def frequent(X: Any, outputs: int = 1) -> NDArray[np.int64]:
    """The columns with most entries: as many as cost no more than a few passes to multiply with each other.

    Every output has a matrix of them, with its own weights.
    """
    n, d = X.shape
    worth = {kind: ratio * X.nnz / outputs for kind, ratio in _PAIRS.items()}
    counts = np.bincount(X.indices, minlength=d)
    order = np.argsort(-counts, kind="stable")
    for most in _TOGETHER:
        if most > d or most**3 > worth["dense"]:
            continue
        if n * most**2 <= worth["dense"] or _pairs(X, order[:most]) <= worth["sparse"]:
            return np.sort(order[:most])
    return np.arange(0)


def _pairs(X: Any, columns: NDArray[np.int64]) -> int:
    """Σ of the squared number of entries that every row has in these columns."""
    chosen = np.zeros(X.shape[1], dtype=np.int64)
    chosen[columns] = 1
    along = np.diff(np.concatenate([[0], np.cumsum(chosen[X.indices])])[X.indptr])
    return int((along * along).sum())


def _gram(few: Any, spread: NDArray[np.float64]) -> NDArray[np.float64]:
    """Σ_b a_b x_b x_bᵀ, through whichever of sparse and dense rows costs less."""
    n, m = few.shape
    ratio = _PAIRS["dense"] / _PAIRS["sparse"]
    if _pairs(few, np.arange(m)) * ratio <= n * m**2:
        half = few.copy()
        half.data *= np.repeat(spread, np.diff(few.indptr))
        return (few.T @ half).toarray()
    total = np.zeros((m, m))
    for start in range(0, n, _BLOCK):
        dense = few[start : start + _BLOCK].toarray()
        total += (dense * spread[start : start + _BLOCK, None]).T @ dense
    return total


def _with_ones(few: Any, intercept: bool) -> Any:
    """Columns, and behind them one of ones where there is an intercept."""
    ones = [np.ones((few.shape[0], 1))] if intercept else []
    return scipy.sparse.hstack([few.astype(np.float64), *ones], format="csr")


def _block_inverse(few: Any, spread: Tensor, diagonal: Tensor, scale: Tensor, places: Tensor) -> Tensor:
    """The inverse of the scaled matrix of one output's frequent columns; the identity where it is not positive."""
    block = torch.from_numpy(_gram(few, spread.numpy())) / len(spread)
    held = diagonal[places] - block.diagonal()  # what the penalty and the damping add
    scaled = (block + torch.diag(held)) * scale[places] * scale[places][:, None]
    scaled += _JITTER * torch.eye(len(scaled), dtype=scaled.dtype)
    factor, failed = torch.linalg.cholesky_ex(scaled)
    return torch.eye(len(scaled), dtype=scaled.dtype) if int(failed) else torch.cholesky_inverse(factor)
