"""What a computation costs, counted where it happens: every call of a library, by the sizes of what it is given.

Nothing here knows the cost model that chooses a solver. torch's operations are seen by a dispatch mode; LAPACK, BLAS
and sparse products that are called past torch are wrapped where upweight calls them. Seconds are those of a machine
that makes 25 (float64) or 50 (float32) billion operations or moves 8 GB in one: the slower of the two for each call.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from unittest.mock import patch

import numpy as np
import scipy.linalg
import scipy.sparse
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from upweight.operators import linear
from upweight.solvers import direct, dual

FLOPS, BYTES = 25e9, 8e9
_SPARSE = (scipy.sparse.csr_matrix, scipy.sparse.csc_matrix)


@dataclass
class Counted:
    """Floating-point operations, bytes moved, and the seconds that they take on the machine above."""

    flops: float = 0.0
    bytes: float = 0.0
    seconds: float = 0.0

    def add(self, flops, moved, *, double=True):
        self.flops += flops
        self.bytes += moved
        self.seconds += max(flops / (FLOPS if double else 2 * FLOPS), moved / BYTES)


@contextmanager
def counting() -> Iterator[Counted]:
    """Counts what is computed inside."""
    found = Counted()
    with ExitStack() as stack:
        for where, name, cost in _CALLS:
            stack.enter_context(patch.object(where, name, _counted(getattr(where, name), cost, found)))
        for kind in _SPARSE:
            stack.enter_context(patch.object(kind, "__matmul__", _counted(kind.__matmul__, _sparse_product, found)))
        stack.enter_context(patch.object(linear, "_of_one_vector", _of_one_vector(found)))
        stack.enter_context(patch.object(dual, "_grams", _grams(found)))
        stack.enter_context(_Torch(found))
        yield found


def _counted(function, cost, found):
    def call(*given, **named):
        out = function(*given, **named)
        found.add(*cost(*given))
        return out

    return call


def _size(*arrays):
    return float(sum(array.nbytes for array in arrays))


def _lapack(power, share):
    """share · p³ or p² operations with a matrix of p rows, the first array that is given."""

    def cost(*given):
        matrix = next(one for one in given if isinstance(one, np.ndarray))
        return share * len(matrix) ** power, _size(matrix)

    return cost


def _triangular(share):
    def cost(*given):
        matrix, sides = next(one for one in given if not isinstance(one, float)), given[-1]
        matrix = matrix[0] if isinstance(matrix, tuple) else matrix
        return share * len(matrix) * sides.size, _size(matrix, sides)

    return cost


def _syrk(_, half):
    rows, columns = half.shape
    return float(rows) ** 2 * columns, _size(half)


def _sparse_product(X, other):
    if scipy.sparse.issparse(other):
        left, right = np.diff(X.tocsc().indptr), np.diff(other.tocsr().indptr)
        pairs = float(left @ right.astype(float))
        return 2 * pairs, 12.0 * pairs
    vectors = other.size / max(1, X.shape[1])
    return 2 * X.nnz * vectors, 12.0 * X.nnz + 8.0 * X.nnz * vectors + 16.0 * X.shape[0] * vectors


_CALLS = [
    (linear, "_syrk", _syrk),
    (direct, "_potrf", _lapack(3, 1 / 3)),
    (direct, "_pocon", _lapack(2, 10.0)),
    (direct, "_potrs", _triangular(2.0)),
    (direct, "_trsm", _triangular(1.0)),
    (direct, "_trmm", _triangular(1.0)),
    (direct, "_symm", _triangular(2.0)),
    (scipy.linalg, "cho_factor", _lapack(3, 1 / 3)),
    (scipy.linalg, "cho_solve", _triangular(2.0)),
    (scipy.linalg, "solve_triangular", _triangular(1.0)),
]


def _of_one_vector(found):
    own = linear._of_one_vector

    def made(*given):
        product = own(*given)

        def call(batch, w):
            X = batch[0]
            found.add(4.0 * X.numel(), X.numel() * X.element_size(), double=given[2] == torch.float64)
            return product(batch, w)

        return call

    return made


def _grams(found):
    own = dual._grams

    def made(X, inverse, Y):
        for same, gram in own(X, inverse, Y):
            if not scipy.sparse.issparse(X):
                found.add(2.0 * gram.numel() * X.shape[1], 8.0 * (X.numel() + Y.numel()))
            yield same, gram

    return made


class _Torch(TorchDispatchMode):
    """Counts torch's operations; views cost nothing."""

    def __init__(self, found):
        super().__init__()
        self.found = found

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        given = [leaf for leaf in tree_leaves(args) if isinstance(leaf, torch.Tensor)]
        made = [leaf for leaf in tree_leaves(out) if isinstance(leaf, torch.Tensor)]
        name = function.overloadpacket.__name__
        if not made or function.is_view or name in _FREE:
            return out
        moved = sum(_bytes(tensor) for tensor in (*given, *made))
        sparse = next((tensor for tensor in given if tensor.layout == torch.sparse_csr), None)
        cost = _TORCH.get(name) if sparse is None else lambda given: 2.0 * sparse.values().numel() * given[-1].shape[-1]
        flops = 0.0 if cost is None else cost(given)
        if name.startswith("convolution"):  # of the output, or of its gradient for every gradient that is made
            side, weight, times = (made[0], given[1], 1) if name == "convolution" else (given[0], given[2], len(made))
            flops = 2.0 * times * side.numel() * weight[0].numel()
        self.found.add(flops, moved, double=made[0].dtype == torch.float64)
        return out


def _bytes(tensor):
    """Of a sparse matrix its entries and their places."""
    if tensor.layout == torch.sparse_csr:
        return 12.0 * tensor.values().numel()
    return tensor.numel() * tensor.element_size()


def _product(given):
    left, right = given[-2:]
    return 2.0 * left.numel() * (right.shape[-1] if right.ndim > 1 else 1)


def _cube(share):
    return lambda given: share * given[0].shape[-1] ** 2 * given[0].shape[-2]


_FREE = {"empty", "detach", "_to_copy_", "lift_fresh", "resolve_conj", "empty_like", "_unsafe_view", "alias"}
_TORCH = {
    "mm": _product,
    "addmm": _product,
    "bmm": _product,
    "baddbmm": _product,
    "mv": _product,
    "addmv": _product,
    "dot": lambda given: 2.0 * given[0].numel(),
    "_linalg_eigh": _cube(9.0),
    "linalg_cholesky_ex": _cube(1 / 3),
    "cholesky_inverse": _cube(2 / 3),
    "linalg_inv_ex": _cube(2.0),
    "linalg_qr": _cube(4.0),
    "_linalg_svd": _cube(20.0),
    "cholesky_solve": lambda given: 2.0 * given[0].numel() * given[1].shape[-1],
}
