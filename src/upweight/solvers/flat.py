"""Directions that no row of the data sees: columns that repeat, or add up to others, without a penalty on them.

R is constant along them, as along a gauge, but by the data and not by construction. Predictions for examples whose
columns go together as in the training rows do not depend on them, and answers of minimum norm are right for those; what
leans on such a direction (a single coefficient, an example with other combinations) is not determined by the data.

Whether a direction is flat or only nearly so cannot be read off C, which holds squares: a column that differs from
another by 1e-8 of its size leaves an eigenvalue of 1e-16, the size of rounding. vᵀ(Cv), with Cv formed by passing over
the rows, squares a small number that is known, and tells them apart.

Cholesky finds the directions by its pivots (`directions`), an iteration by probes (`probed`): for a random v, solving
C x = C v, which has a solution whatever C is, leaves of v what C does not see, v − x.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import scipy.linalg
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from upweight.errors import NotPositiveDefinite
from upweight.operators.base import Operator
from upweight.solvers.recurrence import descend

LEANS = 1e-6  # the share of a vector beyond which it leans on a flat direction, and not on rounding
_CANDIDATE = 1e-10  # of a scaled diagonal: what may be flat
_SEEN = 1e-24  # vᵀCv of a unit vector, C scaled to a unit diagonal: rows see it to 1e-12 of their size
_REFINEMENTS = 2
PROBES = (2, 32)  # random vectors: a few tell that there is nothing, which is the usual case
_PASSES = 4  # over what is left of them, each to _SOLVED of it
_SOLVED = 1e-8
_NOTHING = 1e-5  # of a random vector: what is left where everything is seen
_TOO_SMALL = 1e-12  # vᵀCv of a unit vector, C scaled: too small to divide by, as for Cholesky
_ROUNDING = 1e-7  # of the largest of the probes that are left: what they span no more
(_pstrf,) = scipy.linalg.get_lapack_funcs(("pstrf",), dtype=np.float64)


@dataclass(frozen=True)
class Flat:
    """Orthonormal bases of the directions that no row sees.

    Args:
        scaled: (p, f), in units of D = 1/√diag C, where C has a unit diagonal.
        plain: (p, f), in those of θ.
        scale: (p,) D.
    """

    scaled: Float[NDArray[np.float64], "p f"]
    plain: Float[Tensor, "p f"]
    scale: Float[NDArray[np.float64], " p"]

    def project(self, V: Float[Tensor, "k p"]) -> Float[Tensor, "k p"]:
        """V without them."""
        return V - (V @ self.plain) @ self.plain.T

    def beside(self, operator: Operator) -> Seen:
        """An operator without them."""
        return Seen(operator, self)

    @property
    def touched(self) -> NDArray[np.bool_]:
        """(p,) the parameters that they change."""
        size = np.abs(self.scaled).max(1)
        return size > LEANS * size.max()

    def leaning(self, V: Float[Tensor, "k p"]) -> Float[Tensor, " k"]:
        """The share of each v that lies along them, in the units in which no column is larger than another."""
        scaled = V.numpy() * self.scale
        size = np.linalg.norm(scaled, axis=1)
        return torch.from_numpy(np.linalg.norm(scaled @ self.scaled, axis=1) / np.where(size > 0, size, 1.0))


@dataclass(frozen=True)
class Seen:
    """An operator on what rows see."""

    operator: Operator
    flat: Flat

    @property
    def size(self) -> int:
        """p."""
        return self.operator.size

    def apply(self, V: Float[Tensor, "k p"]) -> Float[Tensor, "k p"]:
        """C v for every row v."""
        return self.operator.apply(V)

    def matrix(self) -> Float[Tensor, "p p"]:
        """C."""
        return self.operator.matrix()

    def project(self, V: Float[Tensor, "k p"]) -> Float[Tensor, "k p"]:
        """V without the gauge and the flat directions."""
        return self.flat.project(self.operator.project(V))


def directions(
    operator: Operator, scaled: Float[NDArray[np.float64], "p p"], scale: Float[NDArray[np.float64], " p"]
) -> Flat | None:
    """The flat directions of an operator; None if there are none.

    Cost: p³/3 flops and three products with C for each direction.

    Args:
        operator: C, whose products pass over the rows.
        scaled: D C D.
        scale: D.
    """
    factor, pivots, rank, _ = _pstrf(scaled, tol=_CANDIDATE, lower=1)
    p, order = len(scaled), pivots - 1
    if rank == p:
        return None
    kept, left = order[:rank], order[rank:]
    lower = np.tril(factor[:rank, :rank])
    basis = np.zeros((p, p - rank))
    basis[left, np.arange(p - rank)] = 1.0
    basis[kept] = -scipy.linalg.solve_triangular(lower, factor[rank:, :rank].T, trans=1, lower=True)
    for _ in range(_REFINEMENTS):
        basis[kept] -= scipy.linalg.cho_solve((lower, True), _applied(operator, basis, scale)[kept])
    return _unseen(operator, np.linalg.qr(basis)[0], scale)


def probed(operator: Operator, diagonal: Float[Tensor, " p"], max_steps: int) -> Flat | None:
    """The flat directions of an operator that is known by its products; None if there are none.

    As many as `PROBES[-1]` of them say that there may be more.

    Cost: a conjugate gradient of two vectors, without a preconditioner, where there are none; a few of 32 where there
    are.

    Args:
        operator: C, whose products pass over the rows.
        diagonal: its diagonal.
        max_steps: of each conjugate gradient.

    Raises:
        NotPositiveDefinite: if a curvature is not 0 and too small to divide by.
    """
    scale = torch.where(diagonal > 0, diagonal, 1.0).rsqrt()
    few, many = PROBES
    left = _left_of_probes(operator, scale, few, max_steps)
    if len(left) == few:
        left = _left_of_probes(operator, scale, many, max_steps)
    if not len(left):
        return None
    _, sizes, rows = np.linalg.svd(left.numpy(), full_matrices=False)
    flat = _unseen(operator, rows[sizes > _ROUNDING * sizes[0]].T, scale.numpy())
    if flat is not None and flat.plain.shape[1] < many:  # and beside them nothing that is nearly flat
        _left_of_probes(flat.beside(operator), scale, few, max_steps)
    return flat


def _left_of_probes(operator: Operator, scale: Tensor, count: int, max_steps: int) -> Float[Tensor, "k p"]:
    """What D C D does not see of random vectors, one unit vector from each; none where it sees everything.

    Raises:
        NotPositiveDefinite: if a curvature along one is not 0 and too small to divide by.
    """

    def product(Y: Tensor) -> Tensor:
        return operator.project(operator.apply(Y * scale)) * scale

    def unit(Y: Tensor) -> tuple[Tensor, Tensor]:
        Y = operator.project(Y * scale) / scale  # without the gauge, which is flat too
        size = Y.norm(dim=1)
        return Y / size.clamp(min=1e-300)[:, None], size

    draw = torch.Generator().manual_seed(0)
    Y, _ = unit(torch.randn(count, len(scale), generator=draw, dtype=torch.float64))
    share, lowest = torch.ones(count, dtype=torch.float64), torch.full((count,), torch.inf, dtype=torch.float64)
    for passes in range(_PASSES + 1):
        image = product(Y)
        form = (Y * image).sum(1).abs()
        lowest = torch.minimum(lowest, form)
        gone = (share <= _NOTHING) | ((form > _SEEN) if passes == _PASSES else False)
        if bool((gone & (lowest < _TOO_SMALL)).any()):
            raise _refusal(float(lowest[gone].min()))
        Y, image, form, share, lowest = (kept[~gone] for kept in (Y, image, form, share, lowest))
        if bool((form <= _SEEN).all()):
            break
        goal = _SOLVED * image.norm(dim=1)
        Y, size = unit(Y - descend(product, None, torch.zeros_like(Y), image, goal, max_steps).x)
        share = share * size
    return Y


def _refusal(curvature: float) -> NotPositiveDefinite:
    message = (
        f"C has a curvature of {curvature:.3g} where every column alone has 1, which is singular to rounding. "
        "Features are probably nearly collinear, or far from 0 compared with their spread; centring and scaling "
        "(StandardScaler) cures the latter. Drop or standardise features, or fit with a penalty; see influence.check()."
    )
    return NotPositiveDefinite(message)


def _unseen(
    operator: Operator, basis: Float[NDArray[np.float64], "p k"], scale: Float[NDArray[np.float64], " p"]
) -> Flat | None:
    """What no row sees of the span of a basis whose columns are orthonormal in units of D."""
    form = basis.T @ _applied(operator, basis, scale)
    values, vectors = np.linalg.eigh((form + form.T) / 2)
    unseen = np.abs(values) <= _SEEN
    if not unseen.any():
        return None
    basis = basis @ vectors[:, unseen]
    return Flat(basis, torch.from_numpy(np.linalg.qr(basis * scale[:, None])[0]), scale)


def _applied(operator: Operator, basis: NDArray[np.float64], scale: NDArray[np.float64]) -> NDArray[np.float64]:
    """D C D times every column."""
    V = torch.from_numpy(np.ascontiguousarray((basis * scale[:, None]).T))
    return operator.apply(V).numpy().T * scale[:, None]
