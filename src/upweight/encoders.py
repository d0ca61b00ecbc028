"""How queries and new labels become examples: what an adapter knows about a model's inputs."""

from __future__ import annotations

from typing import Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from upweight.errors import InvalidInput
from upweight.examples import Examples, as_array, as_tensor


@runtime_checkable
class Encoder(Protocol):
    """Turns a user's X and y into what the objective's loss takes."""

    def examples(self, X: Any, y: Any = None) -> Examples:
        """X and y as the training examples were made."""
        ...

    def targets(self, y: Any) -> Tensor:
        """Labels as the training targets were made."""
        ...

    def class_weights(self, y: Tensor) -> NDArray[np.float64]:
        """The factor in wᵢ that depends on an encoded target; ones if there is none."""
        ...


class PlainEncoder:
    """Inputs and targets are used as they are."""

    def examples(self, X: Any, y: Any = None) -> Examples:
        """X and y as examples."""
        return whole_examples(X, y) or Examples(X, y)

    def targets(self, y: Any) -> Tensor:
        """y as a tensor."""
        return as_tensor(as_array(y, "y_new"))

    def class_weights(self, y: Tensor) -> NDArray[np.float64]:
        """Ones."""
        return np.ones(len(y))


def whole_examples(X: Any, y: Any, sample_weight: Any = None) -> Examples | None:
    """X itself if it is Examples already, else None.

    Raises:
        InvalidInput: if X is Examples and targets or weights are given beside it.
    """
    if not isinstance(X, Examples):
        return None
    if y is not None or sample_weight is not None:
        name = "y" if y is not None else "sample_weight"
        message = f"X is Examples, which hold their own targets and weights, and {name} was given too. Omit it."
        raise InvalidInput(message)
    return X
