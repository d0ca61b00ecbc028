"""A linear system of sparse rows without what is solved for exactly: columns of at most one entry, and the intercepts.

A column that only row i has meets the others through row i alone. With Λ what the penalty and the damping hold it by,
and σᵢ = Σ x²/Λ over such columns of the row, solving for them leaves the row the curvature

    h̃ᵢ = (hᵢ⁻¹ + diag σᵢ)⁻¹,    which is diag(ã) − ũũᵀ with ã = a/(1 + aσ), ũ = u/(1 + aσ)/√(1 − Σ σu²/(1 + aσ))

where hᵢ = diag(a) − uuᵀ. Where categories are as frequent as words, half the columns go. The intercepts, which all rows
have, go by their Schur complement. What is left is scaled to a unit diagonal (Jacobi), all outputs of a column alike:
a common shift of a softmax's outputs, which only the penalty curves, stays a direction of its own.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import scipy.sparse
import torch
from jaxtyping import Float, Int
from numpy.typing import NDArray
from torch import Tensor

from upweight.model import linear, penalties
from upweight.model.objective import L2
from upweight.operators.entries import SEVERAL, Entries
from upweight.operators.linear import LinearHessian
from upweight.runs import ranks

_COPIES = 2**30  # bytes that the columns which are left may take, once as rows and once as columns
_BLOCK = 2**22  # entries that are scaled at once
_SINGULAR = 1e-12  # of the intercepts' block: what is smaller is rounding
_ENTRY = 12  # bytes of a number and its place


@dataclass(frozen=True)
class Side:
    """A right-hand side, reduced.

    Args:
        middle: (k, K·m) of the columns that are left, scaled.
        few: (k, K, f) of those with at most one entry, over what holds them.
        rows: (n, k, K) what `few` gives the rows.
        intercepts: (k, K), or nothing.
    """

    middle: Float[Tensor, "k m"]
    few: Float[Tensor, "k K f"]
    rows: Float[Tensor, "n k K"]
    intercepts: Float[Tensor, "k b"]


@dataclass(frozen=True)
class Eliminated:
    """(C + λI) x = v for what is left of the columns.

    Args:
        shape: p, K and d.
        columns: those that are left, m of d.
        few: the other ones, f of d.
        X: (n, m) the entries that are left, scaled.
        alone: (n, f) those that are alone in their column.
        held: (K, f) Λ.
        curvatures: h̃ᵢ/n, as `linear.factors` writes it.
        scale: (m,) what the columns were multiplied by.
        diagonal: (K·m,) what the penalty and the damping add, scaled.
        border: (K, K·m) of the intercepts and what is left; empty without intercepts.
        corner: (K, K) the inverse of the intercepts' own block.
        spread: (K·m,) the inverse diagonal of the scaled matrix, where there are several outputs; else None.
        coupled: whether common shifts of the outputs are directions of their own.
        even: whether the scale is undone by the preconditioner, so that all columns are alike.
    """

    shape: tuple[int, int, int]
    columns: Int[Tensor, " m"]
    few: Int[Tensor, " f"]
    X: Entries
    alone: Any
    held: Float[Tensor, "K f"]
    curvatures: Float[Tensor, "n c"]
    scale: Float[Tensor, " m"]
    diagonal: Float[Tensor, " Km"]
    border: Float[Tensor, "b Km"]
    corner: Float[Tensor, "b b"]
    spread: Float[Tensor, " Km"] | None
    coupled: bool
    even: bool = False

    @property
    def weights(self) -> Float[Tensor, " Km"] | None:
        """What a residual is multiplied by so that every parameter has the unit 1/√diag(C + λI); None for nothing."""
        return None if self.spread is None else self.spread.sqrt()

    @property
    def wide(self) -> bool:
        """Whether more columns are left than there are rows, so that no row sees most directions."""
        return len(self.columns) > len(self.curvatures)

    @property
    def preconditioner(self) -> Callable[[Tensor], Tensor] | None:
        """`precondition`; None where it is the identity."""
        return self.precondition if self.even or self.spread is not None else None

    def product(self, Y: Float[Tensor, "k Km"]) -> Float[Tensor, "k Km"]:
        """The reduced, scaled matrix times every row."""
        along = self._predicted(Y, -(Y @ self.border.T) @ self.corner)
        return self._pulled(along).addcmul_(self.diagonal, Y)

    def precondition(self, R: Float[Tensor, "k Km"]) -> Float[Tensor, "k Km"]:
        """The inverse of its diagonal; of a softmax beside common shifts of the outputs, and its inverse on those."""
        if self.even:
            return R / self.scale.square().repeat(self.shape[1])
        if self.spread is None or not self.coupled:
            return R if self.spread is None else R * self.spread
        K = self.shape[1]
        shift = R.unflatten(1, (K, -1)).mean(1).repeat(1, K)
        inner = ((R - shift) * self.spread).unflatten(1, (K, -1))
        return (inner - inner.mean(1, keepdim=True)).flatten(1).add_(shift / self.diagonal)

    def inverse(self, V: Float[Tensor, "k p"]) -> Float[Tensor, "k p"]:
        """(C + λI)⁻¹ of every row, but for what is left, of which the diagonal is taken.  Cost: two products."""
        side = self.side(V)
        return self.whole(side, self.precondition(side.middle))

    def side(self, V: Float[Tensor, "k p"]) -> Side:
        """Right-hand sides for what is left."""
        _, K, d = self.shape
        coef = V[:, : K * d].unflatten(1, (K, d))
        few = _taken(coef, self.few) / self.held
        rows = self._of_few(few)
        curved = linear.curved(self.curvatures, rows)
        middle = (_taken(coef, self.columns) * self.scale).flatten(1) - self._back(curved)
        intercepts = V[:, K * d :] - curved.sum(0)[:, : V.shape[1] - K * d]
        return Side(middle - (intercepts @ self.corner) @ self.border, few, rows, intercepts)

    def whole(self, side: Side, Y: Float[Tensor, "k Km"]) -> Float[Tensor, "k p"]:
        """The solution of a right-hand side from that of what is left."""
        p, K, d = self.shape
        free = (side.intercepts - Y @ self.border.T) @ self.corner
        along = self._predicted(Y, free) + side.rows
        curved = linear.curved(self.curvatures, along)
        x = torch.empty(len(Y), p, dtype=torch.float64)
        coef = x[:, : K * d].unflatten(1, (K, d))
        coef.index_copy_(2, self.columns, Y.unflatten(1, (K, -1)) * self.scale)
        lifted = torch.from_numpy(self.alone.T @ curved.flatten(1).numpy())  # (f, kK)
        coef.index_copy_(2, self.few, side.few - lifted.T.unflatten(0, (len(Y), K)) / self.held)
        x[:, K * d :] = free
        return x

    def spread_out(self, Y: Float[Tensor, "k Km"]) -> Float[Tensor, "k p"]:
        """What is left in its places, and 0 elsewhere."""
        p, K, d = self.shape
        x = torch.zeros(len(Y), p, dtype=torch.float64)
        x[:, : K * d].unflatten(1, (K, d)).index_copy_(2, self.columns, Y.unflatten(1, (K, -1)))
        return x

    def taken_from(self, V: Float[Tensor, "k p"]) -> Float[Tensor, "k Km"]:
        """The places of what is left."""
        _, K, d = self.shape
        return _taken(V[:, : K * d].unflatten(1, (K, d)), self.columns).flatten(1)

    def _predicted(self, Y: Tensor, free: Tensor) -> Float[Tensor, "n k K"]:
        """What every row's outputs change by."""
        K = self.shape[1]
        along = self.X.across(Y.reshape(len(Y) * K, -1).T.contiguous()).unflatten(1, (len(Y), K))
        return along.add_(free) if free.shape[1] else along

    def _pulled(self, along: Float[Tensor, "n k K"]) -> Float[Tensor, "k Km"]:
        return self._back(linear.curved(self.curvatures, along))

    def _back(self, R: Float[Tensor, "n k K"]) -> Float[Tensor, "k Km"]:
        return self.X.back(R.flatten(1)).T.contiguous().reshape(R.shape[1], -1)

    def _of_few(self, few: Float[Tensor, "k K f"]) -> Float[Tensor, "n k K"]:
        across = np.ascontiguousarray(few.flatten(0, 1).numpy().T)
        return torch.from_numpy(self.alone @ across).unflatten(1, few.shape[:2])


def eliminated(operator: LinearHessian, damping: float) -> Eliminated | None:
    """What is left of the system; None where a coefficient is not held, or there is no room for a copy of the entries.

    Cost: that of some ten products.
    """
    objective, sweep, structure = operator.sweep.objective, operator.sweep, operator.sweep.objective.linear
    copies = _copies(operator, damping)
    if structure is None or not copies or not bool((operator.curvatures[:, : structure.n_outputs] >= 0).all()):
        return None
    K, d, n, h = structure.n_outputs, structure.n_features, sweep.n, operator.curvatures
    strengths = penalties.diagonal(objective) + damping
    held, X = strengths[: K * d].unflatten(0, (K, d)), linear.wide(sweep.examples.x)
    counts = np.bincount(X.indices, minlength=d)
    few, columns = np.flatnonzero(counts <= 1), np.flatnonzero(counts > 1)
    alone, left = _columns(X, few), _columns(X, columns)
    softened = _softened(torch.cat([h[:, :K] / n, h[:, K:] / n**0.5], 1), alone, held[:, few], K)
    own = operator.diagonal()[: K * d].unflatten(0, (K, d))[:, columns] + damping
    scale = own.mean(0).rsqrt()
    _scale_columns(left, scale.numpy())
    entries = Entries(left, transposed=copies > 1)
    coupled = K > 1 and operator.shift is not None
    bordered = _bordered(operator, entries, softened, strengths[K * d :], K)
    if bordered is None:
        return None
    return Eliminated(
        shape=(operator.size, K, d),
        columns=torch.from_numpy(columns),
        few=torch.from_numpy(few),
        X=entries,
        alone=alone,
        held=held[:, few],
        curvatures=softened,
        scale=scale,
        diagonal=(held[:, columns] * scale * scale).flatten(),
        border=bordered[0],
        corner=bordered[1],
        spread=(1 / (own * scale * scale)).flatten() if K > 1 else None,
        coupled=coupled,
    )


def kept_bytes(operator: LinearHessian, damping: float, vectors: int) -> int:
    """Memory that the copies of the entries take where systems of so many vectors are solved."""
    copies, structure = _copies(operator, damping), operator.sweep.objective.linear
    if structure is None or not copies:
        return 0
    several = vectors * structure.n_outputs >= SEVERAL
    return (copies if several else 1) * _ENTRY * operator.sweep.examples.x.nnz  # type: ignore[union-attr]


def _copies(operator: LinearHessian, damping: float) -> int:
    """How many copies of the entries there may be: as rows, and as columns; 0 where nothing can be eliminated."""
    objective, sweep = operator.sweep.objective, operator.sweep
    if not operator.sparse or ranks.several() or sweep.batch_size is not None:
        return 0
    structure = objective.linear
    if structure is None or not isinstance(objective.penalty, L2 | None):
        return 0
    strengths = penalties.diagonal(objective)[: structure.n_outputs * structure.n_features] + damping
    if not bool((strengths > 0).all()):
        return 0
    return min(2, sweep.at_most(_COPIES, 4) // max(1, _ENTRY * sweep.examples.x.nnz))  # type: ignore[union-attr]


def _taken(coef: Float[Tensor, "k K d"], columns: Int[Tensor, " m"]) -> Float[Tensor, "k K m"]:
    """These columns, in a twentieth of the time that `index_select` takes along the last axis."""
    return torch.gather(coef, 2, columns.expand(*coef.shape[:2], -1))


def _columns(X: Any, chosen: NDArray[np.int64]) -> Any:
    """Some columns of a CSR matrix, as one of their own whose numbers are a copy."""
    if len(chosen) == X.shape[1]:
        return X.copy()  # whoever sorts the user's X sorts it in place
    place = np.full(X.shape[1], -1, dtype=X.indices.dtype)
    place[chosen] = np.arange(len(chosen))
    places = place.take(X.indices)
    kept = np.flatnonzero(places >= 0)
    before = np.searchsorted(kept, X.indptr).astype(X.indptr.dtype)
    return _matrix(X.data.take(kept), places.take(kept), before, (X.shape[0], len(chosen)))


def _matrix(data: Any, indices: Any, indptr: Any, shape: tuple[int, int]) -> Any:
    """A CSR matrix of these arrays; SciPy's constructor would look at all of them."""
    made = scipy.sparse.csr_matrix(shape, dtype=np.float64)
    made.data, made.indices, made.indptr = data, indices, indptr
    return made


def _scale_columns(X: Any, scale: NDArray[np.float64]) -> None:
    """X · diag(scale), in place."""
    for start in range(0, X.nnz, _BLOCK):
        part = slice(start, start + _BLOCK)
        X.data[part] *= scale[X.indices[part]]


def _softened(h: Tensor, alone: Any, held: Float[Tensor, "K f"], K: int) -> Float[Tensor, "n c"]:
    """h̃ᵢ."""
    if not alone.nnz:
        return h
    squared = _matrix(alone.data**2, alone.indices, alone.indptr, alone.shape)
    sigma = torch.from_numpy(squared @ np.ascontiguousarray((1 / held).T.numpy()))  # (n, K)
    less = 1 / (1 + h[:, :K] * sigma)
    if h.shape[1] == K:
        return h * less
    u = h[:, K:] * less
    rest = 1 - (sigma * h[:, K:] * u).sum(1, keepdim=True)
    return torch.cat([h[:, :K] * less, u * rest.clamp(min=torch.finfo(h.dtype).tiny).rsqrt()], 1)


def _bordered(
    operator: LinearHessian, X: Entries, h: Tensor, strengths: Float[Tensor, " b"], K: int
) -> tuple[Float[Tensor, "b Km"], Float[Tensor, "b b"]] | None:
    """The intercepts' rows of the scaled matrix, and the inverse of their own block, a gauge direction filled.

    Without intercepts both are empty; None where rows do not determine them.
    """
    if not len(strengths):
        return torch.zeros(0, K * X.X.shape[1], dtype=torch.float64), torch.zeros(0, 0, dtype=torch.float64)
    eye = torch.eye(K, dtype=torch.float64)
    of_outputs = linear.curved(h, eye.expand(len(h), K, K))  # (n, K, K)
    border = X.back(of_outputs.flatten(1)).T.reshape(K, -1)
    places = torch.zeros(K, operator.size, dtype=torch.float64)
    places[:, -K:] = eye
    gauge = eye - operator.project(places)[:, -K:]
    block = of_outputs.sum(0) + torch.diag(strengths)
    block = block + float(block.diagonal().max()) * gauge
    spectrum = torch.linalg.eigvalsh(block)
    return (border, torch.linalg.inv(block)) if float(spectrum[0]) > _SINGULAR * float(spectrum[-1]) else None
