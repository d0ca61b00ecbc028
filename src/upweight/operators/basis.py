"""The eigenvectors and eigenvalues of one block of a Kronecker curvature, and what is turned by them.

A block's matrices are (g, o, i): g groups of channels, o outputs, i inputs. Their eigenvectors are Q_left (g, o, o) and
Q_right (g, i, i), in columns, and the eigenvalues (g, o, i) belong to products of both.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from upweight.model.products import product


@dataclass(frozen=True)
class Basis:
    """Eigenvectors and eigenvalues of one block of C.

    Args:
        name: of the parameters, for people.
        at: the place in flat θ of every entry of the block's matrices.
        left, right: eigenvectors in columns; None stands for unit vectors.
        values: what the data give each pair of eigenvectors.
        penalty: what the penalty gives it: the diagonal of its Hessian in this basis.
    """

    name: str
    at: Int[Tensor, "g o i"]
    left: Float[Tensor, "g o a"] | None
    right: Float[Tensor, "g i c"] | None
    values: Float[Tensor, "g o i"]
    penalty: Float[Tensor, "g o i"]

    @property
    def eigenvalues(self) -> Float[Tensor, "g o i"]:
        """Of C on this block, without damping."""
        return self.values + self.penalty

    def rotated(self, M: Float[Tensor, "k g o i"]) -> Float[Tensor, "k g a c"]:
        """Q_leftᵀ M Q_right."""
        M = M if self.right is None else _times(M, self.right)
        return M if self.left is None else self.left.mT @ M

    def back(self, M: Float[Tensor, "k g o i"]) -> Float[Tensor, "k g o i"]:
        """Q_left M Q_rightᵀ."""
        M = M if self.right is None else _times(M, self.right.mT)
        return M if self.left is None else self.left @ M

    def only(self, at: Int[Tensor, " some"]) -> tuple[Basis, Int[Tensor, " some"]]:
        """The eigenvectors that these pairs (flat numbers in (g, o, i)) need, and their numbers among them."""
        _, o, i = self.at.shape
        group, rest = at // (o * i), at % (o * i)
        kept, places, sizes = [], [], []
        for Q, numbers, size in ((self.left, rest // i, o), (self.right, rest % i, i)):
            used, place = numbers.unique(return_inverse=True) if Q is not None else (None, numbers)
            kept.append(Q if used is None or Q is None else Q[:, :, used].contiguous())
            places.append(place)
            sizes.append(size if used is None else len(used))
        smaller = replace(self, left=kept[0], right=kept[1])
        return smaller, (group * sizes[0] + places[0]) * sizes[1] + places[1]

    def like(self, reference: Tensor) -> Basis:
        """The same eigenvectors in another precision, on another device."""
        moved = [None if Q is None else Q.to(reference) for Q in (self.left, self.right)]
        return replace(self, left=moved[0], right=moved[1])


def eigen(factor: Tensor) -> tuple[Float[Tensor, "g i"], Float[Tensor, "g i i"] | None]:
    """Eigenvalues, not negative, and eigenvectors of (g, i, i) factors, in their place; of a diagonal itself and None.

    Vectors lie one after the other, as LAPACK leaves them.
    """
    if factor.ndim == 2:
        return factor.clamp(min=0), None
    eigenvalues, Q = torch.linalg.eigh(factor, UPLO="U")
    return eigenvalues.clamp(min=0), factor.mT.copy_(Q)


def within(strengths: Tensor, left: Tensor | None, right: Tensor | None) -> Float[Tensor, "g o i"]:
    """The diagonal of Qᵀ diag(strengths) Q; the same numbers where they are the same for the whole block."""
    if bool((strengths == strengths.flatten()[0]).all()):
        return strengths.clone()
    out = strengths if right is None else strengths @ right.square()
    return out if left is None else left.square().mT @ out


def _times(M: Float[Tensor, "k g o i"], right: Float[Tensor, "g i c"]) -> Float[Tensor, "k g o c"]:
    """M Q, by one product if there is one group."""
    return product(M, right[0]) if len(right) == 1 else M @ right


def columns(x: Float[Tensor, "*lead g t i"], Q: Float[Tensor, "g i j"]) -> Float[Tensor, "*lead g t j"]:
    """x Q for every group, by one product if there is one."""
    if len(Q) == 1:
        return product(x, Q[0])
    moved = x.movedim(-3, 0)  # (g, lead, t, i)
    return (moved.flatten(1, -2) @ Q).reshape(*moved.shape[:-1], Q.shape[-1]).movedim(0, -3)
