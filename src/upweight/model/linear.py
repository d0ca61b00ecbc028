"""Closed-form calculus of objectives with a linear predictor, η = coef · x + intercept.

With r = ∂ℓ/∂η (K,) and h = ∂²ℓ/∂η² (K, K), and x̃ = (x, 1):

    ∇L = r ⊗ x̃        ∇²L = h ⊗ x̃ x̃ᵀ        ∂/∂x (s·∇L) = coefᵀ h (s x̃) + s_coefᵀ r

All functions take a batch (x, y) with x dense (b, d) or SciPy CSR, and vectors as rows of (k, p), where a row is
(coef (K, d), intercept (K,)) flattened. Sums run over the batch; the penalty is never included. X is read in its own
memory layout; nothing of size b × p is formed except by `gradients`, which is asked for it by name.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import scipy.sparse
import torch
from jaxtyping import Float
from torch import Tensor

from upweight.errors import InvalidInput
from upweight.model.objective import Linear, Objective

_WIDE, _FEW = 256, 64  # a float64 product of rows this wide with so few columns runs 1.3 to 2 times as fast transposed


def predictor(objective: Objective, X: Any) -> Float[Tensor, "b K"]:
    """η for a batch of inputs."""
    coef, intercept = _parts(_structure(objective), objective.theta[None])
    return (times(X, coef[0].T) + intercept[0]) if intercept is not None else times(X, coef[0].T)


def losses(objective: Objective, batch: Any) -> Float[Tensor, " b"]:
    """The loss of every example."""
    X, y = _inputs(objective, batch)
    return _structure(objective).loss.value(predictor(objective, X), y)


def value_and_gradient(objective: Objective, batch: Any, weights: Float[Tensor, " b"]) -> Float[Tensor, " m"]:
    """Σ_b w_b L_b, and behind it the p numbers of Σ_b w_b ∇L_b, from one predictor."""
    X, y = _inputs(objective, batch)
    eta, loss = predictor(objective, X), _structure(objective).loss
    slope = loss.slope(eta, y) * weights[:, None]
    return torch.cat([(loss.value(eta, y) @ weights)[None], transposed(objective, X, slope[:, None])[0]])


def slopes(objective: Objective, batch: Any) -> Float[Tensor, "b K"]:
    """∂ℓ/∂η of every example."""
    X, y = _inputs(objective, batch)
    return _structure(objective).loss.slope(predictor(objective, X), y)


def curvatures(objective: Objective, batch: Any) -> Float[Tensor, "b K K"]:
    """∂²ℓ/∂η² of every example."""
    X, y = _inputs(objective, batch)
    return _structure(objective).loss.curvature(predictor(objective, X), y)


def factors(objective: Objective, batch: Any, weights: Float[Tensor, " b"]) -> Float[Tensor, "b m"]:
    """The curvatures w_b ∂²ℓ/∂η² = diag(a) − u uᵀ of every example: a, and beside it u where outputs are coupled.

    m is K, or 2K with coupled outputs.  The weight is folded in, as w·a and √w·u.
    """
    X, y = _inputs(objective, batch)
    return _factors(objective, predictor(objective, X), y, weights)


def _factors(objective: Objective, eta: Tensor, y: Tensor, weights: Tensor) -> Tensor:
    loss = _structure(objective).loss
    if loss.coupling is None:
        return weights[:, None] * torch.diagonal(loss.curvature(eta, y), dim1=1, dim2=2)
    a, u = loss.coupling(eta, y)
    return torch.cat([weights[:, None] * a, weights.sqrt()[:, None] * u], 1)


def derivatives(objective: Objective, batch: Any, weights: Float[Tensor, " b"]) -> Float[Tensor, "b m"]:
    """∂ℓ/∂η (K numbers) and, beside it, `factors`, from one predictor."""
    X, y = _inputs(objective, batch)
    eta = predictor(objective, X)
    return torch.cat([_structure(objective).loss.slope(eta, y), _factors(objective, eta, y, weights)], 1)


def curved(h: Float[Tensor, "b m"], Z: Float[Tensor, "b k K"]) -> Float[Tensor, "b k K"]:
    """(diag(a) − u uᵀ) z for every example and vector, with h from `factors`."""
    K = Z.shape[2]
    if h.shape[1] == K:
        return Z * h[:, None, :]
    u = h[:, None, K:]
    return Z * h[:, None, :K] - u * (Z * u).sum(2, keepdim=True)


def gradients(objective: Objective, batch: Any) -> Float[Tensor, "b p"]:
    """∇L of every example, dense."""
    X, _ = _inputs(objective, batch)
    return sloped(objective, X, slopes(objective, batch))


def sloped(objective: Objective, X: Any, r: Float[Tensor, "b K"]) -> Float[Tensor, "b p"]:
    """∇L of examples whose slopes r are known, dense."""
    dense = torch.from_numpy(X.toarray()) if scipy.sparse.issparse(X) else X
    if r.shape[1] == 1:
        G = r.new_empty(len(r), objective.size)
        torch.mul(r, dense, out=G[:, : dense.shape[1]])
        G[:, dense.shape[1] :] = r
        return G
    coef = (r[:, :, None] * dense[:, None, :]).flatten(1)
    return torch.cat([coef, r], 1) if _structure(objective).intercept else coef


def squares(objective: Objective, batch: Any) -> Float[Tensor, " b"]:
    """‖∇L‖² = ‖r‖² ‖x̃‖² of every example; no gradient is written out."""
    X, _ = _inputs(objective, batch)
    return (slopes(objective, batch) ** 2).sum(1) * _lengths(objective, X)


def weighed_squares(objective: Objective, batch: Any, weights: Float[Tensor, " p"]) -> Float[Tensor, " b"]:
    """Σⱼ wⱼ(∇L)ⱼ² of every example; no gradient is written out."""
    X, _ = _inputs(objective, batch)
    coef, intercept = _parts(_structure(objective), weights[None])
    squared = X.multiply(X).tocsr() if scipy.sparse.issparse(X) else X * X
    sizes = times(squared, coef[0].T.contiguous())
    return (slopes(objective, batch) ** 2 * (sizes if intercept is None else sizes + intercept[0])).sum(1)


def dots(objective: Objective, batch: Any, V: Float[Tensor, "k p"]) -> Float[Tensor, "b k"]:
    """∇Lᵀ v for every example and vector."""
    X, _ = _inputs(objective, batch)
    return sloped_dots(objective, X, slopes(objective, batch), V)


def sloped_dots(objective: Objective, X: Any, R: Float[Tensor, "b K"], V: Float[Tensor, "k p"]) -> Float[Tensor, "b k"]:
    """∇Lᵀ v of examples whose slopes R are known."""
    return torch.einsum("bkj,bj->bk", directional(objective, X, V), R)


def pull(objective: Objective, batch: Any, R: Float[Tensor, "k b"]) -> Float[Tensor, "k p"]:
    """Σ_b R[k, b] ∇L_b."""
    X, _ = _inputs(objective, batch)
    return transposed(objective, X, R.T[:, :, None] * slopes(objective, batch)[:, None, :])


def hvp(
    objective: Objective, batch: Any, V: Float[Tensor, "k p"], weights: Float[Tensor, " b"]
) -> Float[Tensor, "k p"]:
    """Σ_b w_b ∇²L_b V, which for a linear predictor is also the Gauss–Newton product."""
    X, _ = _inputs(objective, batch)
    return transposed(objective, X, curved(factors(objective, batch, weights), directional(objective, X, V)))


def input_gradients(objective: Objective, batch: Any, S: Float[Tensor, "k p"]) -> Float[Tensor, "k b d"]:
    """∂/∂x of s·∇L(x) for every vector and example."""
    X, _ = _inputs(objective, batch)
    coef, _ = _parts(_structure(objective), objective.theta[None])
    vectors, _ = _parts(_structure(objective), S)
    hZ = torch.einsum("bij,bkj->kbi", curvatures(objective, batch), directional(objective, X, S))
    return hZ @ coef[0] + slopes(objective, batch) @ vectors


def mixed_products(objective: Objective, batch: Any, deltas: Float[Tensor, "b d"]) -> Float[Tensor, "b p"]:
    """[∇ₓ∇_θ L] δ = h (coef δ) ⊗ x̃ + r ⊗ δ for every example."""
    X, _ = _inputs(objective, batch)
    coef, _ = _parts(_structure(objective), objective.theta[None])
    moved = torch.einsum("bij,bj->bi", curvatures(objective, batch), deltas @ coef[0].T)
    dense = torch.from_numpy(X.toarray()) if scipy.sparse.issparse(X) else X
    on_coef = moved[:, :, None] * dense[:, None, :] + slopes(objective, batch)[:, :, None] * deltas[:, None, :]
    return torch.cat([on_coef.flatten(1), moved], 1) if _structure(objective).intercept else on_coef.flatten(1)


def directional(objective: Objective, X: Any, V: Float[Tensor, "k p"]) -> Float[Tensor, "b k K"]:
    """The change of η when θ moves along each row of V: (v x̃)."""
    structure = _structure(objective)
    coef, intercept = _parts(structure, V)
    Z = times(X, coef.reshape(-1, structure.n_features).T).reshape(X.shape[0], len(V), structure.n_outputs)
    return Z if intercept is None else Z + intercept


def unit_solutions(objective: Objective, X: Any) -> Float[Tensor, "bK p"]:
    """The right-hand sides e_j ⊗ x̃ for every example and output j: rows b·K + j."""
    structure = _structure(objective)
    dense = torch.from_numpy(X.toarray()) if scipy.sparse.issparse(X) else X
    eye = torch.eye(structure.n_outputs, dtype=torch.float64)
    coef = torch.einsum("ij,bd->bijd", eye, dense.double()).reshape(len(dense) * structure.n_outputs, -1)
    return torch.cat([coef, eye.repeat(len(dense), 1)], 1) if structure.intercept else coef


def largest_curvature(objective: Objective, batch: Any) -> Float[Tensor, " b"]:
    """λmax(∇²L_b) = λmax(h_b) ‖x̃_b‖² of every example, exactly."""
    X, _ = _inputs(objective, batch)
    return torch.linalg.eigvalsh(curvatures(objective, batch))[:, -1] * _lengths(objective, X)


def _lengths(objective: Objective, X: Any) -> Float[Tensor, " b"]:
    """‖x̃‖² of every row."""
    if scipy.sparse.issparse(X):
        squares = torch.from_numpy(np.asarray(X.multiply(X).sum(1), dtype=np.float64).reshape(-1))
    else:
        squares = (X * X).sum(1)
    return squares + float(_structure(objective).intercept)


def _structure(objective: Objective) -> Linear:
    assert objective.linear is not None  # whoever calls has asked
    return objective.linear


def _inputs(objective: Objective, batch: Any) -> tuple[Any, Tensor]:
    """x in float64 (dense or CSR) and y, with the number of features checked."""
    if not isinstance(batch, tuple | list):
        message = f"{objective.name} needs examples (x, y), and these have no y. Pass the targets too: (X, y)."
        raise InvalidInput(message)
    X, y = batch
    d = _structure(objective).n_features
    if X.shape[1:] != (d,):
        message = (
            f"X has rows of shape {tuple(X.shape[1:])}, and the model was fitted on ({d},). Apply the same "
            "preprocessing as in fit()."
        )
        raise InvalidInput(message)
    return wide(X), y


def wide(X: Any) -> Any:
    """A batch of inputs in float64, dense or CSR."""
    return X.astype("float64", copy=False) if scipy.sparse.issparse(X) else X.to(torch.float64)


def _parts(structure: Linear, V: Tensor) -> tuple[Tensor, Tensor | None]:
    """Rows of (k, p) as coef (k, K, d) and intercept (k, K)."""
    split = structure.n_outputs * structure.n_features
    coef = V[:, :split].reshape(len(V), structure.n_outputs, structure.n_features)
    return coef, V[:, split:] if structure.intercept else None


def times(X: Any, A: Tensor) -> Tensor:
    """X A for a dense or sparse X."""
    if scipy.sparse.issparse(X):
        return torch.from_numpy(X @ A.numpy())
    if X.dtype == torch.float64 and X.shape[1] >= _WIDE and 1 < A.shape[1] <= _FEW:
        return (A.T @ X.T).T.contiguous()
    return X @ A


def transposed(objective: Objective, X: Any, R: Float[Tensor, "b k K"]) -> Float[Tensor, "k p"]:
    """Σ_b R[b] ⊗ x̃_b for every vector."""
    k = R.shape[1]
    flat = R.reshape(len(R), -1)
    product = torch.from_numpy((X.T @ flat.numpy()).T.copy()) if scipy.sparse.issparse(X) else flat.T @ X
    coef = product.reshape(k, -1)
    return torch.cat([coef, R.sum(0)], 1) if _structure(objective).intercept else coef
