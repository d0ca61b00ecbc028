"""How the rows that an estimator sees become inputs of its objective: as they are, some columns, kernel features."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from upweight.errors import UnsupportedModel

_OUTSIDE = 1e-6  # of ‖φ(x)‖², beyond rounding


@runtime_checkable
class Inputs(Protocol):
    """A map from rows of X to inputs of the objective."""

    def __call__(self, X: Any) -> Any:
        """The inputs of these rows."""
        ...

    def widened(self, gradients: NDArray[np.float64]) -> NDArray[np.float64]:
        """(q, r, inputs) derivatives by the inputs, as (q, r, d) derivatives by X."""
        ...

    def narrowed(self, deltas: Tensor) -> Tensor:
        """(r, d) small changes of X as changes of the inputs."""
        ...

    def check_movable(self) -> None:
        """Raises where there are no derivatives by X."""
        ...


@dataclass(frozen=True)
class AsGiven:
    """The rows themselves."""

    def __call__(self, X: Any) -> Any:
        """X."""
        return X

    def widened(self, gradients: NDArray[np.float64]) -> NDArray[np.float64]:
        """As they are."""
        return gradients

    def narrowed(self, deltas: Tensor) -> Tensor:
        """As they are."""
        return deltas

    def check_movable(self) -> None:
        """Nothing to say."""


@dataclass(frozen=True)
class Columns:
    """The columns of the active set; the others have no effect.

    Args:
        active: column numbers.
        width: d, the number of columns of X.
    """

    active: NDArray[np.int64]
    width: int

    def __call__(self, X: Any) -> Any:
        """The active columns."""
        return X[:, self.active]

    def widened(self, gradients: NDArray[np.float64]) -> NDArray[np.float64]:
        """With zeros for the columns that have no effect."""
        out = np.zeros((*gradients.shape[:-1], self.width))
        out[..., self.active] = gradients
        return out

    def narrowed(self, deltas: Tensor) -> Tensor:
        """Without those of columns that have no effect."""
        return deltas[:, self.active] if deltas.shape[1:] == (self.width,) else deltas

    def check_movable(self) -> None:
        """Nothing to say."""


@dataclass(frozen=True)
class Features:
    """Features φ(x) = k(x, X) T of a kernel: inner products of training rows are the Gram matrix, to its rank.

    Args:
        kernel: rows → their kernel with every training row, (b, n).
        transform: T (n, rank).
        name: of the estimator, for its refusals.
        itself: one row → k(x, x); None where the kernel of other rows with themselves is not known.
    """

    kernel: Callable[[Any], NDArray[np.float64]]
    transform: NDArray[np.float64]
    name: str
    itself: Callable[[Any], float] | None = None

    def __call__(self, X: Any) -> NDArray[np.float64]:
        """(b, rank) features."""
        return np.asarray(self.kernel(X), dtype=np.float64) @ self.transform

    def widened(self, gradients: NDArray[np.float64]) -> NDArray[np.float64]:
        """Not defined; `check_movable` has said so."""
        return gradients

    def narrowed(self, deltas: Tensor) -> Tensor:
        """Not defined; `check_movable` has said so."""
        return deltas

    def check_movable(self) -> None:
        """Raises: moving a training row moves the kernel itself.

        Raises:
            UnsupportedModel: always.
        """
        message = (
            f"{self.name} is explained through {self.transform.shape[1]} features of its kernel, which themselves move "
            "with the training rows, so equation 5 is not defined in them. Fit on the moved rows and compare, or "
            "explain a model of the columns themselves: Ridge, SVC(kernel='linear')."
        )
        raise UnsupportedModel(message)

    def check_new(self, X: Any) -> None:
        """Raises unless the features hold these rows: ‖φ(x)‖² = k(x, x), as for training rows and their mixtures.

        Raises:
            UnsupportedModel: if a row reaches out of what the training rows span.
        """
        if self.itself is None:
            message = (
                f"{self.name}(kernel='precomputed') knows no kernel of a new row with itself, so none can join it. "
            )
            raise UnsupportedModel(message + "Fit on the changed rows and explain that model.")
        held = (self(X) ** 2).sum(1)
        whole = np.array([self.itself(X[row : row + 1]) for row in range(len(held))])
        outside = 1 - held / np.maximum(whole, np.finfo(np.float64).tiny)
        worst = int(outside.argmax())
        if outside[worst] > _OUTSIDE:
            message = (
                f"{self.name} is explained through {self.transform.shape[1]} features of its kernel, which span its "
                f"training rows. New row {worst} lies outside of them with {outside[worst]:.2g} of its ‖φ‖², so what "
                "it would do as a training row cannot be seen there. Fit on the changed rows and explain that model, "
                "or use features that stay: make_pipeline(Nystroem(…), Ridge(…))."
            )
            raise UnsupportedModel(message)
