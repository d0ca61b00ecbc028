"""The recurrence of preconditioned conjugate gradients for many right-hand sides at once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor


@dataclass
class Progress:
    """Where a descent has come to.

    Args:
        x: (k, p) solutions so far.
        residual: (k, p) what the recurrence believes is left, v − A x.
        direction: (k, p) the last directions.
        steps: products made.
        smallest: (k,) the smallest curvature pᵀAp / pᵀp that was met.
        stopped: the row that met a curvature ≤ 0 (or NaN), or None.
    """

    x: Float[Tensor, "k p"]
    residual: Float[Tensor, "k p"]
    direction: Float[Tensor, "k p"]
    steps: int
    smallest: Float[Tensor, " k"]
    stopped: int | None = None


def descend(
    product: Callable[[Tensor], Tensor],
    precondition: Callable[[Tensor], Tensor] | None,
    x: Float[Tensor, "k p"],
    residual: Float[Tensor, "k p"],
    goal: Float[Tensor, " k"],
    max_steps: int,
    direction: Float[Tensor, "k p"] | None = None,
    *,
    scale: Float[Tensor, " p"] | None = None,
    weights: Float[Tensor, " p"] | None = None,
    besides: Callable[[Tensor], Tensor] | None = None,
    watch: Callable[[Tensor], None] | None = None,
    follow: Callable[[Tensor, Tensor], None] | None = None,
    look: Callable[[Tensor, Tensor], bool] | None = None,
) -> Progress:
    """Conjugate gradients from x, with v − A x = residual, until ‖residual‖ ≤ goal for every row, or max_steps.

    Each row has its own recurrence; all share every product, and a row that has arrived leaves it. With a
    preconditioner M the direction is M r + β p with Polak and Ribière's β = (r − r_before)·M r / r_before·M r_before,
    which stays right when M varies a little from call to call (flexible CG: Notay, 2000).

    Args:
        product: A v for every row v.
        precondition: M r for every row; None is the identity.
        x: the starting points.
        residual: v − A x at them.
        goal: the norm at which a row has arrived.
        max_steps: products to make at most.
        direction: the directions to go on from, for a continued run without preconditioner.
        scale: what turns x into the parameters, in whose units the smallest curvature is counted.
        weights: what residuals are multiplied by before their norm is compared with the goal; None for nothing.
        besides: from residuals whose norms have all arrived to numbers that must, too.
        watch: is told the norms of the residuals after every product.
        follow: is told the directions and their images.
        look: is told x and the next directions after every product, and may end the descent there.
    """
    x, R = x.clone(), residual.clone()
    smallest = torch.full((len(R),), torch.inf, dtype=R.dtype)
    left = norms(R, weights)
    active = torch.nonzero(left > goal)[:, 0]
    Z = R if precondition is None else torch.zeros_like(R)
    if precondition is not None and len(active):
        Z[active] = positive(precondition(R[active]), R[active])[0]
    P = Z.clone() if direction is None else direction.clone()
    rho = dots(R, Z)
    for step in range(max_steps):
        active = torch.nonzero(left > goal)[:, 0]
        if len(active) == 0 and besides is not None:
            active = torch.nonzero(besides(R) > goal)[:, 0]
        if len(active) == 0:
            return Progress(x, R, P, step, smallest)
        every = len(active) == len(R)
        y, p, r = (x, P, R) if every else (x[active], P[active], R[active])  # copies, where some have arrived
        image = product(p)
        if follow is not None:
            follow(p, image)
        curvature = dots(p, image)
        unscaled = p if scale is None else p * scale
        quotient = curvature / dots(unscaled, unscaled)
        lowest = quotient if every else torch.minimum(smallest[active], quotient)
        smallest = torch.minimum(smallest, lowest) if every else smallest.index_copy(0, active, lowest)
        if not bool((quotient > 0).all()):
            return Progress(
                x, R, P, step + 1, smallest, stopped=int(active[int(quotient.nan_to_num(-torch.inf).argmin())])
            )
        last = rho if every else rho[active]
        length = ((last if precondition is None else dots(p, r)) / curvature)[:, None]
        before = None if precondition is None else r.clone()
        y.addcmul_(length, p)
        r.addcmul_(length, image, value=-1)
        z, along = (r, dots(r, r)) if precondition is None else positive(precondition(r), r)
        gained = along if before is None else dots(r - before, z)
        p.mul_((gained / last.clamp(min=1e-300))[:, None]).add_(z)
        rho = along if every else rho.index_copy(0, active, along)
        if not every:
            x[active], P[active], R[active] = y, p, r
        own = along.sqrt() if precondition is None and weights is None else norms(r, weights)
        left = own if every else left.index_copy(0, active, own)
        if watch is not None:
            watch(left)
        if look is not None and look(x, P):
            return Progress(x, R, P, step + 1, smallest)
    return Progress(x, R, P, max_steps, smallest)


def norms(R: Float[Tensor, "k p"], weights: Float[Tensor, " p"] | None = None) -> Float[Tensor, " k"]:
    """‖r‖ of every row, or ‖r·w‖."""
    weighed = R if weights is None else R * weights
    return dots(weighed, weighed).sqrt()


def positive(Z: Float[Tensor, "k p"], R: Float[Tensor, "k p"]) -> tuple[Float[Tensor, "k p"], Float[Tensor, " k"]]:
    """M r where the preconditioner gave a direction of descent, r itself where rounding left it none; and its r · z."""
    along = dots(Z, R)
    good = along > 0  # False for NaN too
    if bool(good.all()):
        return Z, along
    Z = torch.where(good[:, None], Z, R)
    return Z, dots(Z, R)


def dots(A: Float[Tensor, "k p"], B: Float[Tensor, "k p"]) -> Float[Tensor, " k"]:
    """a · b of every row, without the products in memory."""
    return torch.stack([torch.dot(a, b) for a, b in zip(A, B, strict=True)]) if len(A) else A.new_zeros(0)
