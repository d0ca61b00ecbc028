"""The Kronecker factors of a linear predictor's curvature, whatever units its features are in."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

_NOT_BENT = 1e-12  # of the largest curvature: an output may move so without changing any loss
_ROUNDING = 1e-6  # of the largest number: what is smaller is not divided by
_UNLIKE = 1e4  # times the curvature of one feature that of another may be, before units are divided out


def comparable(
    A: Float[Tensor, "w w"], B: Float[Tensor, "K K"], strengths: Float[Tensor, "K w"]
) -> tuple[Float[Tensor, "w w"], Float[Tensor, "K K"], Float[Tensor, " w"] | None]:
    """The mean factors, and None; or, where features differ much in their units, those of features without units.

    Small units would be rounding to the eigenvectors of large ones. Feature j is then divided by the square root of its
    curvature and penalty, which is inside A too; what it is multiplied by comes back.
    """
    weight = max(float(B.diagonal().mean()), 1e-300)
    held = weight * A.diagonal() + strengths.mean(0)
    held = torch.where(held > 0, held, held.max())
    if not float(held.max()) > _UNLIKE * float(held.min()):
        return A, B, None
    units = held.rsqrt()
    return (A + torch.diag(strengths.mean(0) / weight)) * units[:, None] * units, B, units


def inverted(
    a: Float[Tensor, " w"],
    b: Float[Tensor, " K"],
    penalty: float,
    strengths: Float[Tensor, "K w"],
    units: Float[Tensor, " w"] | None,
) -> tuple[Float[Tensor, "K w"], Tensor, Float[Tensor, " w"]]:
    """1/(b ⊗ a + penalty), which b are 0 where the penalty is too small to be divided by, and what then holds those.

    Softmax has such an output, on which no loss depends: its curvature is each feature's penalty alone.
    """
    floor = max(penalty, _ROUNDING * float(a.max() * b.max()), 1e-300)
    free = (b <= _NOT_BENT * b.max()) & (penalty < floor)
    inverse = 1 / (torch.where(free, b.max(), b).clamp(min=0)[:, None] * a.clamp(min=0) + floor)
    held = strengths.mean(0) * (1.0 if units is None else units**2)
    return inverse, free, 1 / held.clamp(min=_ROUNDING * floor)


def augmented(R: Tensor, K: int, d: int, intercept: bool) -> Tensor:
    """(k, p) as (k, K, w): the coefficients of every output, and its intercept behind them."""
    whole = R[:, : K * d].reshape(len(R), K, d)
    return torch.cat([whole, R[:, K * d :, None]], 2) if intercept else whole
