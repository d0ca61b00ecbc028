"""Block conjugate gradients: all queries search in one space, which every one of them widens.

A step looks for the best x of every query in the span of all directions (k of them), so that k queries need far fewer
products than each for itself. Directions are made orthonormal at every step and those that depend on the others are
dropped, so that equal queries, queries that have arrived and exact answers break nothing. Householder's QR does it: a
Gram matrix has half the digits, and what it drops or blurs costs conjugacy, hence many steps.
References: O'Leary (1980); Ji and Li (2017), the breakdown-free block conjugate gradient method.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from upweight.solvers.recurrence import Progress, norms, positive

_DEPENDENT = 1e-13  # share of a direction that those before it do not span, below which it is dropped: rounding
_SUSPECT = 1e-12  # of the Gram matrix: half the digits are enough to suspect
_SAME = 1e-10  # of the largest singular value: what is smaller is rounding between copies
_LONG_ARRIVED = (
    1e-3  # of the goal: a query that is so near adds no direction; dropping it sooner costs the others steps
)


def descend_together(
    product: Callable[[Tensor], Tensor],
    precondition: Callable[[Tensor], Tensor] | None,
    x: Float[Tensor, "k p"],
    residual: Float[Tensor, "k p"],
    goal: Float[Tensor, " k"],
    max_steps: int,
    direction: Float[Tensor, "k p"] | None = None,
    *,
    weights: Float[Tensor, " p"] | None = None,
    watch: Callable[[Tensor], None] | None = None,
    follow: Callable[[Tensor, Tensor], None] | None = None,
    look: Callable[[Tensor, Tensor], bool] | None = None,
) -> Progress:
    """As `recurrence.descend`, in one shared space.

    With P the orthonormal directions as rows, Q = P A and G = P A Pᵀ, a step is

        x += (R Pᵀ G⁻¹) P,   r −= (R Pᵀ G⁻¹) Q,   P ← orthonormal(M r − (M r) Qᵀ G⁻¹ P)

    It uses no identity of the recurrence but r = v − A x, so a preconditioner may vary from call to call.

    Args:
        product: A v for every row v.
        precondition: M r for every row; None is the identity.
        x: the starting points.
        residual: v − A x at them.
        goal: the norm at which a row has arrived.
        max_steps: products to make at most.
        direction: directions to go on from; rows of zeros are none.
        weights: what residuals are multiplied by before their norm is compared with the goal; None for nothing.
        watch: is told the norms of the residuals after every product.
        follow: is told the directions and their images.
        look: is told x and the next directions after every product, and may end the descent there.
    """
    x, R = x.clone(), residual.clone()
    smallest = torch.full((len(R),), torch.inf, dtype=R.dtype)
    if bool((norms(R, weights) <= goal).all()):
        return Progress(x, R, R.clone(), 0, smallest)
    P = orthonormal(_preconditioned(precondition, R) if direction is None else direction)
    for step in range(max_steps):
        Q = product(P)
        if follow is not None:
            follow(P, Q)
        G = P @ Q.T
        lowest, along = _lowest((G + G.T) / 2)
        factor, failed = torch.linalg.cholesky_ex((G + G.T) / 2)
        if not lowest > 0 or bool(failed):
            return Progress(x, R, _padded(along @ P, R), step + 1, smallest.clamp(max=lowest), stopped=0)
        smallest = smallest.clamp(max=lowest)
        length = torch.cholesky_solve(P @ R.T, factor).T  # (k, directions)
        x += length @ P
        R -= length @ Q
        left = norms(R, weights)
        if watch is not None:
            watch(left)
        if bool((left <= goal).all()):
            return Progress(x, R, _padded(P, R), step + 1, smallest)
        near = left <= _LONG_ARRIVED * goal
        Z = _preconditioned(precondition, R[~near] if bool(near.any()) else R)
        P = orthonormal(Z - torch.cholesky_solve(Q @ Z.T, factor).T @ P)
        if look is not None and look(x, _padded(P, R)):
            return Progress(x, R, _padded(P, R), step + 1, smallest)
    return Progress(x, R, _padded(P, R), max_steps, smallest)


def spanning(V: Float[Tensor, "k p"]) -> tuple[Float[Tensor, "r p"], Float[Tensor, "k r"]]:
    """Orthonormal rows and a mixing with V = mixing @ rows; V and the identity where its rows are independent."""
    size = V.norm(dim=1, keepdim=True)
    Y = V / size.clamp(min=1e-300)
    spectrum = torch.linalg.eigvalsh(Y @ Y.T)
    if float(spectrum[0]) > _SUSPECT * float(spectrum[-1]):
        return V, torch.eye(len(V), dtype=V.dtype)
    U, S, W = torch.linalg.svd(Y, full_matrices=False)
    least = _SAME * float(S[0]) + 1e-300
    kept = least < S
    if bool(kept.all()) and len(S) == len(V):
        return V, torch.eye(len(V), dtype=V.dtype)
    return W[kept], size * U[:, kept] * S[kept]


def orthonormal(Y: Float[Tensor, "k p"]) -> Float[Tensor, "r p"]:
    """Orthonormal rows that span the rows of Y, without those that hardly add anything."""
    size = Y.norm(dim=1, keepdim=True)
    rows = (Y / size.clamp(min=1e-300))[size[:, 0] > 0]
    while True:
        columns, triangle = torch.linalg.qr(rows.T)
        adds = triangle.diagonal().abs() > _DEPENDENT
        if bool(adds.all()):
            return columns.T.contiguous()
        rows = rows[adds]  # a column that is noise takes a part of later rows along, so the factors are made again


def _preconditioned(precondition: Callable[[Tensor], Tensor] | None, R: Tensor) -> Tensor:
    return R if precondition is None else positive(precondition(R), R)[0]


def _lowest(G: Tensor) -> tuple[float, Tensor]:
    """The smallest curvature in a space, and where in it that is met; NaN if a product was."""
    if not bool(torch.isfinite(G).all()):
        return float("nan"), torch.eye(len(G), dtype=G.dtype)[:1]
    values, U = torch.linalg.eigh(G)
    return float(values[0]), U[:, :1].T


def _padded(P: Tensor, R: Tensor) -> Tensor:
    """P with rows of zeros, as many as R has."""
    return torch.cat([P, R.new_zeros(len(R) - len(P), R.shape[1])]) if len(P) < len(R) else P[: len(R)]
