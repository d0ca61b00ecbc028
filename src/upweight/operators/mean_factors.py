"""The Kronecker factors of a linear predictor's mean curvature, and its inverse, whatever units its features are in."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from upweight.model.objective import Linear
from upweight.model.sweep import Sweep

_NOT_BENT = 1e-12  # of the largest curvature: an output may move so without changing any loss
_ROUNDING = 1e-6  # of the largest number: what is smaller is not divided by
_UNLIKE = 1e4  # times the curvature of one feature that of another may be, before units are divided out


def kronecker_inverse(
    factors: tuple[Float[Tensor, "w w"], Float[Tensor, "K K"]],
    structure: Linear,
    diagonal: Float[Tensor, " p"],
    damping: float,
) -> Callable[[Tensor], Tensor]:
    """(C + λI)⁻¹ by the eigenvectors of the two mean factors, with a penalty of this diagonal.

    The penalty is taken as the same for all parameters, or for all outputs of a feature.
    """
    K, d, intercept = structure.n_outputs, structure.n_features, structure.intercept
    strengths = augmented(diagonal[None], K, d, intercept)[0] + damping
    A, B, units = comparable(*factors, strengths)
    (a, QA), (b, QB) = torch.linalg.eigh(A), torch.linalg.eigh(B)
    penalty = float(diagonal[: K * d].mean()) + damping if units is None else 0.0
    inverse, free, alone = inverted(a, b, penalty, strengths, units)
    free = QB[:, free]

    def apply(R: Tensor) -> Tensor:
        whole = augmented(R, K, d, intercept)
        whole = whole if units is None else whole * units.to(R)
        left, right, scale = QB.to(R), QA.to(R), inverse.to(R)
        out = left @ (((left.T @ whole) @ right) * scale) @ right.T
        out = out + free.to(R) @ ((free.T.to(R) @ whole) * alone.to(R))
        out = out if units is None else out * units.to(R)
        return torch.cat([out[:, :, :d].flatten(1), out[:, :, d]], 1) if intercept else out.flatten(1)

    return apply


def mean_factors(
    rows: Sweep, h: Float[Tensor, "n m"], structure: Linear, precision: torch.dtype
) -> tuple[Float[Tensor, "w w"], Float[Tensor, "K K"]]:
    """mean(x̃x̃ᵀ) and mean(wᵢhᵢ), whose Kronecker product approximates C without its penalty.  Cost: one pass, n·w²."""
    K = structure.n_outputs
    B = torch.diag(h[:, :K].mean(0))
    if h.shape[1] > K:
        B = B - h[:, K:].T @ h[:, K:] / len(h)

    def outer(batch: Any, _: Tensor) -> Tensor:
        X = batch[0].to(precision)
        X = torch.cat([X, X.new_ones(len(X), 1)], 1) if structure.intercept else X
        return X.T @ X

    width = structure.n_features + int(structure.intercept)
    return rows.fold(outer, vectors=width // 8 + 1, label="preconditioner") / len(h), B


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
