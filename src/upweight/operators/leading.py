"""An approximate inverse of the exact Hessian of a linear predictor: exact where the data are, Kronecker elsewhere.

With Q the eigenvectors of mean(x̃x̃ᵀ), the space of parameters splits into the leading directions of every output,
I ⊗ Q_r, and the rest. On the first the curvature is written out, (Kr) × (Kr), from a subsample of rows; on the second
it is mean(h) ⊗ mean(x̃x̃ᵀ), diagonal in its own eigenvectors. Real data have few leading directions, so this is almost
C⁻¹. Features whose units differ much are divided by them first (`comparable`).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from upweight.data.arrays import as_tensor
from upweight.model import penalties
from upweight.model.objective import Linear
from upweight.operators.linear import LinearHessian
from upweight.operators.mean_factors import augmented, comparable, inverted

_JITTER = 1e-7  # of the largest curvature: keeps directions that the subsample does not see positive


def leading_inverse(operator: LinearHessian, damping: float, rank: int) -> Callable[[Tensor], Tensor] | None:
    """v → ≈ (C + λI)⁻¹ v, from the operator's own rows; None if their curvature is not positive, or float32 too coarse.

    Cost: n·d² + K²n·rank² + (K·rank)³ flops, once.

    Args:
        operator: over the rows to use; a subsample of the whole.
        damping: λ.
        rank: leading directions of x̃ that are taken exactly.
    """
    objective = operator.sweep.objective
    structure = objective.linear
    assert structure is not None  # LinearHessian has a linear predictor
    K, d = structure.n_outputs, structure.n_features
    strengths = augmented(penalties.diagonal(objective)[None], K, d, structure.intercept)[0] + damping  # (K, w)
    A, B, units = comparable(*operator.mean_factors(), strengths)
    if not bool(torch.isfinite(A.float()).all()):
        return None
    (a, Q), (b, QB) = torch.linalg.eigh(A.float()), torch.linalg.eigh(B)
    a, Q = a.double(), Q.double()
    penalty = float(strengths.mean()) if units is None else 0.0  # or inside A
    elsewhere, free, alone = inverted(a, b, penalty, strengths, units)
    free = QB[:, free]
    rank = min(rank, len(a))
    within = Q[:, -rank:] if units is None else units[:, None] * Q[:, -rank:]
    block = _exact_block(operator, within, strengths)
    block += torch.kron(free @ free.T, float(block.diagonal().max()) * torch.eye(rank, dtype=block.dtype))
    factor, failed = torch.linalg.cholesky_ex(block)
    if int(failed):
        return None
    exact = torch.cholesky_inverse(factor)
    elsewhere[:, -rank:] = 0
    Q32, QB32, exact32, elsewhere32 = (M.float() for M in (Q, QB, exact, elsewhere))

    def apply(R: Tensor) -> Tensor:
        whole = augmented(R, K, d, structure.intercept)
        whole = whole if units is None else whole * units.to(R)
        size = whole.flatten(1).norm(dim=1).clamp(min=1e-300)[:, None, None]
        inside = (whole / size).float() @ Q32  # (k, K, w) in the eigenbasis
        lead = inside[:, :, -rank:].flatten(1) @ exact32
        out = QB32 @ ((QB32.T @ inside) * elsewhere32)
        out[:, :, -rank:] = lead.reshape(len(R), K, rank)
        whole = (out @ Q32.T).to(R) * size + free.to(R) @ ((free.T.to(R) @ whole) * alone.to(R))
        whole = whole if units is None else whole * units.to(R)
        return torch.cat([whole[:, :, :d].flatten(1), whole[:, :, d]], 1) if structure.intercept else whole.flatten(1)

    return apply


def _exact_block(operator: LinearHessian, Q: Tensor, strengths: Tensor) -> Tensor:
    """(I ⊗ Qᵀ)(C + λI)(I ⊗ Q), (K·rank, K·rank)."""
    structure: Linear = operator.sweep.objective.linear  # type: ignore[assignment]
    K, rank = structure.n_outputs, Q.shape[1]
    X = as_tensor(operator.sweep.examples.x).to(torch.float32)
    inside = X @ Q[: structure.n_features].float()
    if structure.intercept:
        inside = inside + Q[-1].float()
    h = operator.curvatures.float() / len(inside)
    block = torch.zeros(K * rank, K * rank)
    if h.shape[1] > K:
        coupled = (h[:, K:, None] * len(inside) ** 0.5 * inside[:, None, :]).reshape(len(inside), -1)
        block -= coupled.T @ coupled
    for k in range(K):
        at = slice(k * rank, (k + 1) * rank)
        block[at, at] += inside.T @ (inside * h[:, k, None])
    block = block.double()
    for k in range(K):
        block[k * rank : (k + 1) * rank, k * rank : (k + 1) * rank] += (Q.T * strengths[k]) @ Q
    block.diagonal().add_(_JITTER * float(block.diagonal().max()))
    return block
