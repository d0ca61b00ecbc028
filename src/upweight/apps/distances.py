"""Euclidean distances of queries to rows, dense or sparse, in blocks of columns."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import scipy.sparse
from jaxtyping import Float
from numpy.typing import NDArray

from upweight.errors import InvalidInput

_BLOCK = 2**24  # numbers of the inputs that are turned into floats at once
_NEAR = 1e-4  # of ‖a‖² + ‖b‖²: pairs nearer than that lose digits in ‖a‖² + ‖b‖² − 2ab


def distances(Xq: Any, X: Any) -> Float[NDArray[np.float64], "q n"]:
    """Euclidean distances between queries and rows, over all numbers of an input.

    By ‖a‖² + ‖b‖² − 2ab around the mean of X, and by the differences themselves for pairs so near that rounding would
    show; equal inputs are at distance 0.

    Cost: 2·q·n·d flops.

    Raises:
        InvalidInput: if an input is no array, or the two have different numbers of columns.
    """
    A, B = _lines(Xq, "Xq"), _lines(X, "X")
    if A.shape[1] != B.shape[1]:
        message = f"A query has {A.shape[1]} numbers and a training row {B.shape[1]}. Pass both in the same form."
        raise InvalidInput(message)
    if scipy.sparse.issparse(A) or scipy.sparse.issparse(B):
        A, B = _csr(A), _csr(B)
    gram = np.zeros((A.shape[0], B.shape[0]))
    own, other = np.zeros(A.shape[0]), np.zeros(B.shape[0])
    for a, b in _column_blocks(A, B):
        product = a @ b.T
        gram += product.toarray() if scipy.sparse.issparse(product) else product
        own += _squares(a)
        other += _squares(b)
    both = own[:, None] + other
    squares = both - 2 * gram
    near = np.nonzero(squares < _NEAR * both)
    each = (A.nnz + B.nnz) // sum(gram.shape) + 1 if scipy.sparse.issparse(A) else A.shape[1]
    size = max(1, _BLOCK // max(1, each))
    for start in range(0, len(near[0]), size):
        queries, rows = (place[start : start + size] for place in near)
        squares[queries, rows] = _squares(_floats(A[queries]) - _floats(B[rows]))
    return np.sqrt(np.maximum(squares, 0))


def _column_blocks(A: Any, B: Any) -> Iterator[tuple[Any, Any]]:
    """Some columns at a time, as floats; dense ones, and the full ones of sparse inputs, around the mean of B."""
    if scipy.sparse.issparse(B):
        full = B.getnnz(0) > B.shape[0] / 2
        yield _floats(A[:, ~full]), _floats(B[:, ~full])
        A, B = A[:, full].toarray(), B[:, full].toarray()
    width = max(1, _BLOCK // max(A.shape[0], B.shape[0]))
    for start in range(0, A.shape[1], width):
        a, b = _floats(A[:, start : start + width]), _floats(B[:, start : start + width])
        centre = b.mean(0)
        yield a - centre, b - centre


def _lines(X: Any, name: str) -> Any:
    if scipy.sparse.issparse(X):
        return _csr(X)
    array = np.asarray(X.to_numpy() if hasattr(X, "to_numpy") else X)
    if array.ndim < 2 or array.dtype.kind not in "biuf":
        message = f"{name} has shape {array.shape} and dtype {array.dtype}. Distances need rows of numbers; without X= "
        raise InvalidInput(message + "they are measured between what the objective sees.")
    return array.reshape(len(array), -1)


def _csr(X: Any) -> Any:
    return scipy.sparse.csr_matrix(X)


def _floats(X: Any) -> Any:
    return X.astype(np.float64)


def _squares(X: Any) -> NDArray[np.float64]:
    return np.asarray(X.multiply(X).sum(1)).reshape(-1) if scipy.sparse.issparse(X) else np.einsum("ij,ij->i", X, X)
