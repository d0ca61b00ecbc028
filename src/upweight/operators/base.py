"""What an operator is: a symmetric map R^p → R^p that stands for the curvature ∇²R(θ̂).

    C = (1/n) Σᵢ wᵢ cᵢ + ∇²r

The penalty's Hessian is included and the sum is divided by n, like R itself. Damping is never part of an operator.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from upweight.model.sweep import Sweep


@runtime_checkable
class Operator(Protocol):
    """A symmetric linear map on R^p; vectors are the rows of a float64 (k, p) matrix.

    >>> import torch, upweight as uw
    >>> operator = uw.operators.DenseOperator(torch.tensor([[2.0, 1.0], [1.0, 3.0]]))
    >>> isinstance(operator, Operator), operator.size
    (True, 2)
    >>> V = torch.eye(2, dtype=torch.float64)
    >>> operator.apply(V).equal(operator.matrix())
    True
    """

    @property
    def size(self) -> int:
        """p."""
        ...

    def apply(self, V: Float[Tensor, "k p"]) -> Float[Tensor, "k p"]:
        """C v for every row v."""
        ...

    def matrix(self) -> Float[Tensor, "p p"]:
        """C as a dense float64 matrix."""
        ...

    def project(self, V: Float[Tensor, "k p"]) -> Float[Tensor, "k p"]:
        """V without the directions in which the objective is constant by construction."""
        ...


@runtime_checkable
class Sampled(Operator, Protocol):
    """An operator that is a mean over rows, and can be applied to a few of them.

    >>> import numpy as np, torch
    >>> from sklearn.linear_model import Ridge
    >>> import upweight as uw
    >>> X, y = [[0.0], [1.0], [2.0]], [0.0, 2.0, 2.0]
    >>> operator = uw.explain(Ridge().fit(X, y), X, y).operator
    >>> V = torch.eye(2, dtype=torch.float64)
    >>> isinstance(operator, Sampled), operator.apply_rows(V, np.arange(3)).allclose(operator.apply(V))
    (True, True)
    """

    @property
    def sweep(self) -> Sweep:
        """The examples it averages over."""
        ...

    def apply_rows(self, V: Float[Tensor, "k p"], rows: NDArray[np.int64]) -> Float[Tensor, "k p"]:
        """(1/b) Σ_{i in rows} wᵢ cᵢ v + ∇²r v: an unbiased estimate of C v when rows are drawn uniformly."""
        ...

    def largest_row_curvature(self) -> float | None:
        """An upper bound of λmax(wᵢ cᵢ + ∇²r) over single rows, when a closed form gives one."""
        ...


@runtime_checkable
class Spectral(Operator, Protocol):
    """An operator that knows its eigenvalues and can apply any function of itself.

    >>> import torch, upweight as uw
    >>> operator = uw.operators.DenseOperator(torch.diag(torch.tensor([1.0, 4.0])))
    >>> isinstance(operator, Spectral), operator.map(torch.sqrt, torch.ones(1, 2, dtype=torch.float64)).tolist()
    (True, [[1.0, 2.0]])
    """

    @property
    def eigenvalues(self) -> Float[Tensor, " p"]:
        """The eigenvalues, ascending."""
        ...

    def map(self, function: Callable[[Tensor], Tensor], V: Float[Tensor, "k p"]) -> Float[Tensor, "k p"]:
        """f(C) v for every row v, with f applied to the eigenvalues."""
        ...


@runtime_checkable
class Curvature(Protocol):
    """A specification: hyper-parameters only, bound to an objective and its data by `bind`."""

    def bind(self, sweep: Sweep) -> Operator:
        """The operator of this objective on these examples."""
        ...
