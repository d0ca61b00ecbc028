"""A sparse matrix times several vectors, forth and back, by the quickest kernel that there is.

SciPy's own kernel takes a vector after the other, and one alone nothing takes faster. Of several torch's, which is
MKL's where torch has it, reads every entry once; it needs the transposed matrix beside the matrix.
"""

from __future__ import annotations

import warnings
from functools import cached_property
from typing import Any

import numpy as np
import scipy.sparse
import torch
from jaxtyping import Float
from torch import Tensor

SEVERAL = 3  # vectors from which torch's kernel is the faster


class Entries:
    """A CSR matrix X of float64, n × m.

    Args:
        X: the matrix.
        transposed: whether there is room for Xᵀ as a matrix of its own.
    """

    def __init__(self, X: Any, *, transposed: bool) -> None:
        self.X, self._back, self._room = X, X.T, transposed

    def across(self, V: Float[Tensor, "m k"]) -> Float[Tensor, "n k"]:
        """X V."""
        pair = self._pair if V.shape[1] >= SEVERAL else None
        return torch.from_numpy(self.X @ V.numpy()) if pair is None else pair[0] @ V

    def back(self, R: Float[Tensor, "n k"]) -> Float[Tensor, "m k"]:
        """Xᵀ R."""
        pair = self._pair if R.shape[1] >= SEVERAL else None
        return torch.from_numpy(self._back @ R.numpy()) if pair is None else pair[1] @ R

    @cached_property
    def _pair(self) -> tuple[Tensor, Tensor] | None:
        """X and Xᵀ as torch has them; None where it cannot multiply them, or there is no room."""
        narrow = self.X.indices.dtype == np.int32 and self.X.nnz > 0
        if not self._room or not narrow:
            return None
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch says once that sparse tensors may change
            try:
                pair = _in_torch(self.X), _in_torch(self._back.tocsr())
                pair[0].matmul(torch.zeros(self.X.shape[1], SEVERAL, dtype=torch.float64))
            except (RuntimeError, NotImplementedError):  # a torch without such a kernel
                return None
        return pair


def _in_torch(X: scipy.sparse.csr_matrix) -> Tensor:
    """The same matrix, sharing its memory."""
    parts = (torch.from_numpy(part) for part in (X.indptr, X.indices, X.data))
    return torch.sparse_csr_tensor(*parts, size=X.shape, dtype=torch.float64)
