"""The exact curvature matrix and its spectrum."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor

from upweight.errors import InvalidInput
from upweight.model.sweep import Sweep
from upweight.operators.base import Curvature
from upweight.operators.implicit import Hessian


@dataclass(frozen=True)
class Dense:
    """Another curvature as an explicit p × p float64 matrix, with its spectrum.

    Cost: p products once, 8p² bytes; afterwards a product is one matrix multiplication and no sweep.

    Args:
        of: the curvature to write out.
    """

    of: Curvature = field(default_factory=Hessian)

    def bind(self, sweep: Sweep) -> DenseOperator:
        """The operator of this objective on these examples.

        Raises:
            InvalidInput: if `of` is no curvature.
        """
        if isinstance(self.of, type) or not hasattr(self.of, "bind"):
            message = f"Dense(of={self.of!r}) is not a curvature. Pass an object, such as Dense(Hessian())."
            raise InvalidInput(message)
        operator = self.of.bind(sweep)
        return DenseOperator(operator.matrix(), operator.project)


class DenseOperator:
    """A symmetric matrix; its eigendecomposition is computed when first asked for.

    >>> operator = DenseOperator(torch.tensor([[2.0, 1.0], [1.0, 2.0]]))
    >>> operator.eigenvalues.tolist()
    [1.0, 3.0]
    >>> operator.map(torch.reciprocal, torch.tensor([[3.0, 0.0]], dtype=torch.float64))  # C⁻¹v
    tensor([[ 2.0000, -1.0000]], dtype=torch.float64)
    """

    def __init__(self, matrix: Float[Tensor, "p p"], project: Callable[[Tensor], Tensor] | None = None) -> None:
        self._matrix = matrix.double()
        self._project = project
        self._spectrum: tuple[Tensor, Tensor] | None = None

    @property
    def size(self) -> int:
        """p."""
        return len(self._matrix)

    @property
    def eigenvalues(self) -> Float[Tensor, " p"]:
        """The eigenvalues, ascending.  Cost: O(p³), once."""
        return self._eigh()[0]

    def apply(self, V: Float[Tensor, "k p"]) -> Float[Tensor, "k p"]:
        """C v for every row v."""
        return V @ self._matrix

    def map(self, function: Callable[[Tensor], Tensor], V: Float[Tensor, "k p"]) -> Float[Tensor, "k p"]:
        """f(C) v for every row v."""
        eigenvalues, Q = self._eigh()
        return ((V @ Q) * function(eigenvalues)) @ Q.T

    def matrix(self) -> Float[Tensor, "p p"]:
        """C; a copy, which may be changed."""
        return self._matrix.clone()

    def project(self, V: Float[Tensor, "k p"]) -> Float[Tensor, "k p"]:
        """V without the objective's gauge directions."""
        return V if self._project is None else self._project(V)

    def _eigh(self) -> tuple[Tensor, Tensor]:
        if self._spectrum is None:
            eigenvalues, Q = torch.linalg.eigh(self._matrix)
            self._spectrum = (eigenvalues, Q)
        return self._spectrum
