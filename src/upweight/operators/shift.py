"""Directions that change no prediction: the same vector added to every class of a softmax."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True)
class Shift:
    """The common shift of each feature's K coefficients, an eigenspace of C of its own.

    Args:
        outputs: K.
        curvature: (d,) C's value there: the penalty's strength.
    """

    outputs: int
    curvature: Float[Tensor, " d"]

    def part(self, V: Float[Tensor, "k p"]) -> Float[Tensor, "k p"]:
        """The part of V that is a common shift."""
        K, d = self.outputs, len(self.curvature)
        out = torch.zeros_like(V)
        out[:, : K * d] = V[:, : K * d].reshape(len(V), K, d).mean(1).repeat(1, K)
        return out

    def curved(self, V: Float[Tensor, "k p"]) -> Float[Tensor, "k p"]:
        """C v for shifts v."""
        return V * self._everywhere(V)

    def solved(self, V: Float[Tensor, "k p"], damping: float) -> Float[Tensor, "k p"]:
        """(C + λI)⁻¹ v for shifts v."""
        return V / (self._everywhere(V) + damping)

    def fill(self, matrix: Float[Tensor, "p p"]) -> None:
        """Give shifts the curvature that their coefficients have on average, in place; the rest is untouched."""
        K, d = self.outputs, len(self.curvature)
        size = matrix.diagonal()[: K * d].reshape(K, d).mean(0)
        for k in range(K):
            for j in range(K):
                matrix[k * d : (k + 1) * d, j * d : (j + 1) * d].diagonal().add_(size / K)

    def _everywhere(self, V: Tensor) -> Tensor:
        whole = torch.ones(V.shape[1], dtype=V.dtype)
        whole[: self.outputs * len(self.curvature)] = self.curvature.repeat(self.outputs)
        return whole


def shift_invariant(h: Tensor, K: int) -> bool:
    """Whether every hᵢ maps (1, …, 1) to 0, so that its diagonal follows from the rest."""
    a, u = h[:, :K], h[:, K:]
    return bool(((a - u * u.sum(1, keepdim=True)).abs() <= 1e-12 * a.abs().max()).all())
