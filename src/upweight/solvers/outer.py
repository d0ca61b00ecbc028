"""Quadratic forms of gradients that are outer products, v = r ⊗ x̃, by pairs of outputs instead of p² flops a row.

A softmax has Σ_k r_k = 0, so that with M = (C + λI)⁻¹ in blocks M_ij of outputs, and K the last of them,

    vᵀMv = Σ_{i ≤ j < K} r_i r_j x̃ᵀ S_ij x̃        N_ij = M_ij − M_iK − M_Kj + M_KK,   S_ij = N_ij + N_jiᵀ, S_ii = N_ii

and x̃ᵀSx̃ needs of a matrix only one triangle, its off-diagonal entries doubled: (K − 1)K/2 pairs at w² flops each, where
substitution takes (Kw)². Columns of X that are 0 in every row drop out.

Whether the explicit inverse has digits enough is not guessed. With DAD = FFᵀ for A = C + λI, Ŝ what was computed as its
inverse and u = F⁻¹Dv, vᵀMv = ‖u‖² and |vᵀM̂v − vᵀMv| = |uᵀEu| ≤ ‖E‖ vᵀMv for every v, where E = FᵀŜF − I and
M̂ = DŜD. For ten Gaussian vectors ω,

    ‖E‖₂ ≤ 10 √(2/π) max ‖Eω‖ with probability 1 − 10⁻¹⁰        (Halko, Martinsson and Tropp 2011, lemma 4.1)

and evaluating the form in float64 adds no more than m 2⁻⁵³ ‖|Ŝ|‖₂ ‖|DAD|‖₂ (1 + √K)², with
m terms in a sum, where ‖B‖₂ ≤ max (Bx)ᵢ/xᵢ for B ≥ 0 and any x > 0 (Collatz and Wielandt). `bound` is the sum of both.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import scipy.linalg
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from upweight.model.objective import Linear

PROMISE = 1e-6  # the largest relative error of a form
_BLOCK = 96  # columns of x̃ whose products are taken at once
_DRAWS = 10
_UNIT = 2.0**-53
(_potri,) = scipy.linalg.get_lapack_funcs(("potri",), dtype=np.float64)
(_trmv,) = scipy.linalg.get_blas_funcs(("trmv",), dtype=np.float64)


@dataclass(frozen=True)
class OuterForms:
    """(r ⊗ x̃)ᵀ (C + λI)⁻¹ (r ⊗ x̃) of many rows.

    Args:
        active: the columns of x̃ that are not 0 in every row.
        blocks: first and last column of a block, and the upper triangles of all pairs in these columns.
        pairs: i and j of every pair.
        intercept: whether x̃ = (x, 1).
        bound: of the relative error.
    """

    active: NDArray[np.int64]
    blocks: list[tuple[int, int, Float[Tensor, "e c"]]]
    pairs: tuple[list[int], list[int]]
    intercept: bool
    bound: float

    def own(self, X: Tensor, R: Float[Tensor, "b K"]) -> Float[Tensor, " b"]:
        """The form of every row."""
        wide = torch.cat([X, X.new_ones(len(X), 1)], 1) if self.intercept else X
        x = wide[:, torch.from_numpy(self.active)].double()
        i, j = self.pairs
        total = x.new_zeros(len(x), len(i))
        for start, stop, triangles in self.blocks:
            along = (x[:, :stop] @ triangles).reshape(len(x), len(i), stop - start)
            total += torch.bmm(along, x[:, start:stop, None])[:, :, 0]
        return (total * R[:, i] * R[:, j]).sum(1)


def outer_forms(
    packed: NDArray[np.float64],
    scale: NDArray[np.float64],
    structure: Linear,
    active: NDArray[np.int64],
) -> OuterForms:
    """What gives the forms of rows whose r adds up to 0.  Cost: 2p³/3 flops, 8p² bytes, and K²w² flops and bytes.

    Args:
        packed: the factor F of D (C + λI) D in the lower triangle, and what was factorised above it.
        scale: D.
        structure: how many outputs and features.
        active: the columns of x̃ that are not 0 in every row.
    """
    K, d = structure.n_outputs, structure.n_features
    norm = _radius(partial(_symmetric, np.abs(np.triu(packed, 1))), len(packed))  # of DAD
    inverse = _potri(packed.copy(order="F"), lower=1, overwrite_c=1)[0]
    for start in range(0, len(inverse), 1024):  # the upper triangle is the lower one's
        stop = min(start + 1024, len(inverse))
        square = np.tril(inverse[start:stop, start:stop])
        inverse[start:stop, start:stop] = square + np.tril(square, -1).T
        inverse[start:stop, stop:] = inverse[stop:, start:stop].T
    width = d + int(structure.intercept)
    terms = width + _BLOCK + width // _BLOCK + K**2  # that are added up one after the other
    rounding = terms * _UNIT * _radius(np.abs(inverse).__matmul__, len(inverse)) * norm * (1 + math.sqrt(K)) ** 2
    bound = _missing(packed, inverse) + rounding
    inverse *= scale[:, None]
    inverse *= scale
    places = [np.concatenate([np.arange(k * d, (k + 1) * d), [K * d + k]])[:width][active] for k in range(K)]

    def block(i: int, j: int) -> Any:
        return inverse[np.ix_(places[i], places[j])]

    last = K - 1
    edge, corner = [block(i, last) for i in range(last)], block(last, last)
    i, j = (list(side) for side in zip(*((i, j) for i in range(last) for j in range(i, last)), strict=True))
    triangles = np.empty((len(i), len(active), len(active)))
    for number, (a, b) in enumerate(zip(i, j, strict=True)):
        between = block(a, b) - edge[a] - edge[b].T + corner
        whole = between if a == b else between + between.T
        triangles[number] = np.triu(whole + whole.T, 1) + np.diag(np.diagonal(whole))
    cuts = [(start, min(start + _BLOCK, len(active))) for start in range(0, len(active), _BLOCK)]
    blocks = [
        (
            start,
            stop,
            torch.from_numpy(np.ascontiguousarray(triangles[:, :stop, start:stop].transpose(1, 0, 2))).flatten(1),
        )
        for start, stop in cuts
    ]
    return OuterForms(active, blocks, (i, j), structure.intercept, bound)


def _symmetric(above: NDArray[np.float64], x: NDArray[np.float64]) -> NDArray[np.float64]:
    """B x with a unit diagonal and what is above it."""
    return above @ x + above.T @ x + x


def _radius(product: Callable[[NDArray[np.float64]], NDArray[np.float64]], p: int) -> float:
    """An upper bound of the norm of a symmetric matrix without negative entries: max (Bx)ᵢ/xᵢ for any x > 0."""
    x, bound = np.ones(p), math.inf
    for _ in range(_DRAWS):
        image = product(x)
        bound = min(bound, float((image / x).max()))
        x = image / image.max()
    return bound


def _missing(packed: NDArray[np.float64], inverse: NDArray[np.float64]) -> float:
    """A bound of ‖FᵀM̂F − I‖₂ that holds with probability 1 − 10⁻¹⁰."""
    draw, worst = np.random.default_rng(0), 0.0
    for _ in range(_DRAWS):
        vector = draw.normal(size=len(packed))
        image = _trmv(packed, inverse @ _trmv(packed, vector, lower=1), lower=1, trans=1) - vector
        worst = max(worst, float(np.linalg.norm(image)))
    return 10 * math.sqrt(2 / math.pi) * worst
