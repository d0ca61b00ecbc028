"""Directions that no row of the data sees: columns that repeat, or add up to others, without a penalty on them.

R is constant along them, as along a gauge, but by the data and not by construction. Predictions for examples whose
columns go together as in the training rows do not depend on them, and answers of minimum norm are right for those; what
leans on such a direction (a single coefficient, an example with other combinations) is not determined by the data.

Whether a direction is flat or only nearly so cannot be read off C, which holds squares: a column that differs from
another by 1e-8 of its size leaves an eigenvalue of 1e-16, the size of rounding. vᵀ(Cv), with Cv formed by passing over
the rows, squares a small number that is known, and tells them apart.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import scipy.linalg
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from upweight.operators.base import Operator

LEANS = 1e-6  # the share of a vector beyond which it leans on a flat direction, and not on rounding
_CANDIDATE = 1e-10  # of a scaled diagonal: what may be flat
_SEEN = 1e-24  # vᵀCv of a unit vector, C scaled to a unit diagonal: rows see it to 1e-12 of their size
_REFINEMENTS = 2
(_pstrf,) = scipy.linalg.get_lapack_funcs(("pstrf",), dtype=np.float64)


@dataclass(frozen=True)
class Flat:
    """Orthonormal bases of the directions that no row sees.

    Args:
        scaled: (p, f), in units of D = 1/√diag C, where C has a unit diagonal.
        plain: (p, f), in those of θ.
        scale: (p,) D.
    """

    scaled: Float[NDArray[np.float64], "p f"]
    plain: Float[Tensor, "p f"]
    scale: Float[NDArray[np.float64], " p"]

    def project(self, V: Float[Tensor, "k p"]) -> Float[Tensor, "k p"]:
        """V without them."""
        return V - (V @ self.plain) @ self.plain.T

    @property
    def touched(self) -> NDArray[np.bool_]:
        """(p,) the parameters that they change."""
        size = np.abs(self.scaled).max(1)
        return size > LEANS * size.max()

    def leaning(self, V: Float[Tensor, "k p"]) -> Float[Tensor, " k"]:
        """The share of each v that lies along them, in the units in which no column is larger than another."""
        scaled = V.numpy() * self.scale
        size = np.linalg.norm(scaled, axis=1)
        return torch.from_numpy(np.linalg.norm(scaled @ self.scaled, axis=1) / np.where(size > 0, size, 1.0))


def directions(
    operator: Operator, scaled: Float[NDArray[np.float64], "p p"], scale: Float[NDArray[np.float64], " p"]
) -> Flat | None:
    """The flat directions of an operator; None if there are none.

    Cost: p³/3 flops and three products with C for each direction.

    Args:
        operator: C, whose products pass over the rows.
        scaled: D C D.
        scale: D.
    """
    factor, pivots, rank, _ = _pstrf(scaled, tol=_CANDIDATE, lower=1)
    p, order = len(scaled), pivots - 1
    if rank == p:
        return None
    kept, left = order[:rank], order[rank:]
    lower = np.tril(factor[:rank, :rank])
    basis = np.zeros((p, p - rank))
    basis[left, np.arange(p - rank)] = 1.0
    basis[kept] = -scipy.linalg.solve_triangular(lower, factor[rank:, :rank].T, trans=1, lower=True)
    for _ in range(_REFINEMENTS):
        basis[kept] -= scipy.linalg.cho_solve((lower, True), _applied(operator, basis, scale)[kept])
    basis = np.linalg.qr(basis)[0]
    form = basis.T @ _applied(operator, basis, scale)
    values, vectors = np.linalg.eigh((form + form.T) / 2)
    unseen = np.abs(values) <= _SEEN
    if not unseen.any():
        return None
    basis = basis @ vectors[:, unseen]
    return Flat(basis, torch.from_numpy(np.linalg.qr(basis * scale[:, None])[0]), scale)


def _applied(operator: Operator, basis: NDArray[np.float64], scale: NDArray[np.float64]) -> NDArray[np.float64]:
    """D C D times every column."""
    V = torch.from_numpy(np.ascontiguousarray((basis * scale[:, None]).T))
    return operator.apply(V).numpy().T * scale[:, None]
