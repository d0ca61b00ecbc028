"""How far an approximate solution can be from the exact one, proven from what an iteration has at hand.

With A ⪰ μI, r = v − A x and the error e = A⁻¹v − x = A⁻¹r, every z gives a bound, for with ρ = r − A z

    ‖e‖²_A = rᵀA⁻¹r = ρᵀA⁻¹ρ + 2 ρᵀz + zᵀA z  ≤  ‖ρ‖²/μ + zᵀ(r + ρ)

z = 0 says ‖r‖/√μ. The best z of the Krylov space that conjugate gradients have built, where (A − μ) A z equals
(A − μ) r seen from that space, says what Gauss–Radau quadrature with a node at μ does (Golub and Meurant). `Searched`
holds the one block of directions that z needs, made as the space is. As any z will do, rounding, a preconditioner that
varies, or directions that were dropped make the bound larger and never wrong.

A number g·x is then off by |g·e|, and for any Z = W Y whose image is known

    |g·e| ≤ |z·r| + ‖g − A z‖ ‖e‖_A/√μ

References: Golub and Meurant (2010), Matrices, Moments and Quadrature, chapter 12; Meurant and Tichý (2013).
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

_ROUNDING = 1e-12  # of the largest: directions that are smaller are left out of z, which may be any


class Searched:
    """The directions U, with their images A U, among which z is looked for: made conjugate in aᵀ A (A − μ) b.

    Memory: two vectors of length p per query.

    Args:
        lowest: μ, which no eigenvalue of A is below.
    """

    def __init__(self, lowest: float) -> None:
        self.lowest = lowest
        self.U: Float[Tensor, "k p"] | None = None
        self.image: Float[Tensor, "k p"] | None = None

    def follow(self, P: Float[Tensor, "k p"], Q: Float[Tensor, "k p"]) -> None:
        """Takes in the next directions of a descent and their images Q = A P."""
        if self.U is None or self.image is None:
            self.U, self.image = P.clone(), Q.clone()
            return
        across = (Q - self.lowest * P) @ self.image.T
        mixing = across @ _inverse((self.image - self.lowest * self.U) @ self.image.T)
        self.U, self.image = P - mixing @ self.U, Q - mixing @ self.image

    def energy(self, R: Float[Tensor, "k p"]) -> Float[Tensor, " k"]:
        """A bound on ‖e‖_A for every residual r = v − A x."""
        plain = R.square().sum(1) / self.lowest
        if self.U is None or self.image is None:
            return plain.sqrt()
        bent = self.image - self.lowest * self.U
        Y = R @ bent.T @ _inverse(bent @ self.image.T)  # Z = Y U
        rest = R - Y @ self.image
        found = rest.square().sum(1) / self.lowest + ((Y @ self.U) * (R + rest)).sum(1)
        return torch.minimum(plain, found).clamp(min=0).sqrt()


def of_values(
    G: Float[Tensor, "r p"],
    X: Float[Tensor, "k p"],
    R: Float[Tensor, "k p"],
    V: Float[Tensor, "k p"],
    energy: Float[Tensor, " k"],
    lowest: float,
) -> Float[Tensor, " k"]:
    """A bound on the norm of (g·e) over the gradients g, for every x with v − A x = r and ‖e‖_A ≤ energy.

    Z is looked for in the span of all x, whose images V − R are known.
    """
    image = V - R
    size = image.norm(dim=1, keepdim=True).clamp(min=torch.finfo(image.dtype).tiny)
    X, image = X / size, image / size
    Y = G @ image.T @ _inverse(image @ image.T)
    rest = G - Y @ image
    known = ((Y @ X) @ R.T).norm(dim=0)
    found = known + _spectral(rest) * energy / lowest**0.5
    return torch.minimum(found, _spectral(G) * energy / lowest**0.5)


def _inverse(gram: Float[Tensor, "k k"]) -> Float[Tensor, "k k"]:
    """The inverse of a Gram matrix, without the directions that are rounding."""
    values, Q = torch.linalg.eigh((gram + gram.T) / 2)
    good = values > _ROUNDING * values[-1:].clamp(min=0)
    good &= values > 0
    return (Q[:, good] / values[good]) @ Q[:, good].T


def _spectral(G: Float[Tensor, "r p"]) -> float:
    """The largest singular value of a few long rows."""
    return float(torch.linalg.eigvalsh(G @ G.T)[-1].clamp(min=0).sqrt())
