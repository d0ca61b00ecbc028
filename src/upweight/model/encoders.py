"""How queries and new labels become examples: what an adapter knows about a model's inputs."""

from __future__ import annotations

from typing import Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from upweight.data.arrays import as_array, as_tensor
from upweight.data.examples import Examples
from upweight.errors import InvalidInput
from upweight.model.objective import L2, Objective


@runtime_checkable
class Refitting(Protocol):
    """Training once more by the code that trained the model, with other weights."""

    @property
    def preferred(self) -> bool:
        """Whether this, and not the minimum of the objective near θ̂, is what training ends at."""
        ...

    @property
    def whole(self) -> Objective | None:
        """The objective whose parameters it returns, when θ̂'s own leaves some out (the zeros of a lasso)."""
        ...

    def __call__(self, weights: NDArray[np.float64], share: float, *, folded: bool, seed: int) -> tuple[Any, L2 | None]:
        """The parameters for these total weights wᵢ, whose sum is `share` of what it was; `folded` scales r by it.

        Beside them the penalty, where it depends on what training found.
        """
        ...


class Movable:
    """Small changes of a user's inputs, and derivatives by them; here they are the objective's own inputs."""

    def widened(self, gradients: NDArray[np.float64]) -> NDArray[np.float64]:
        """(q, r, *inputs) derivatives by the objective's inputs as (q, r, *x) derivatives by the user's."""
        return gradients

    def narrowed(self, deltas: Tensor) -> Tensor:
        """(r, *x) small changes of the user's inputs as (r, *inputs) changes of the objective's."""
        return deltas


@runtime_checkable
class Encoder(Protocol):
    """Turns a user's X and y into what the objective's loss takes.

    `refit` trains again as the model was trained, None where only the objective is known; `feature_names` are those
    of the inputs that eq. 5 moves, None where they have none.
    """

    @property
    def refit(self) -> Refitting | None:
        """How the model is trained again."""
        ...

    @property
    def feature_names(self) -> list[str] | None:
        """One name for each column of the inputs."""
        ...

    def unselected(self) -> Encoder:
        """The encoder for `refit.whole`: with the inputs that the objective leaves out."""
        ...

    def movable(self, rows: NDArray[np.int64]) -> Movable:
        """How derivatives by the objective's inputs of training rows become those by the user's; raises without."""
        ...

    def edited(self, rows: NDArray[np.int64], X: Any, y: Any) -> Encoder:
        """The encoder of a training set in which these rows have other inputs and labels; None keeps what they have."""
        ...

    def reweighted(self, share: float) -> Encoder:
        """The encoder of a training set whose weights sum to `share` of what they did."""
        ...

    def check_new(self, X: Any) -> None:
        """Raises for inputs that can be queries, but no training rows."""
        ...

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

    refit: Refitting | None = None
    feature_names: list[str] | None = None

    def unselected(self) -> PlainEncoder:
        """Itself."""
        return self

    def movable(self, rows: NDArray[np.int64]) -> Movable:  # noqa: ARG002
        """The derivatives as they are."""
        return Movable()

    def edited(self, rows: NDArray[np.int64], X: Any, y: Any) -> PlainEncoder:  # noqa: ARG002
        """Itself."""
        return self

    def reweighted(self, share: float) -> PlainEncoder:  # noqa: ARG002
        """Itself."""
        return self

    def check_new(self, X: Any) -> None:
        """Nothing to say."""

    def examples(self, X: Any, y: Any = None) -> Examples:
        """X and y as examples."""
        return whole_examples(X, y) or Examples(X, y)

    def targets(self, y: Any) -> Tensor:
        """y as a tensor."""
        return as_tensor(as_array(y, "y_new"))

    def class_weights(self, y: Tensor) -> NDArray[np.float64]:
        """Ones."""
        return np.ones(len(y))


def whole_examples(X: Any, y: Any, sample_weight: Any = None, ids: Any = None) -> Examples | None:
    """X itself if it is Examples already, else None.

    Raises:
        InvalidInput: if X is Examples and targets, weights or names are given beside it.
    """
    if not isinstance(X, Examples):
        return None
    given = {"y": y, "sample_weight": sample_weight, "ids": ids}
    name = next((name for name, value in given.items() if value is not None), None)
    if name is not None:
        message = f"X is Examples, which hold their own targets, weights and names, and {name} was given too. Omit it."
        raise InvalidInput(message)
    return X


def training_examples(data: Any, encoder: Encoder, ids: Any = None) -> Examples:
    """Training data as examples, by these names: Examples, an (X, y) pair, a Dataset, or X alone.

    Raises:
        InvalidInput: if they are anything else, or Examples are given names that they hold themselves.
    """
    whole = whole_examples(data, None, ids=ids)
    if whole is not None:
        return whole
    if isinstance(data, tuple) and not 1 <= len(data) <= 2:
        message = f"examples is a tuple of {len(data)}. Pass the pair (X, y), Examples, a Dataset, or X alone."
        raise InvalidInput(message)
    examples = encoder.examples(*data) if isinstance(data, tuple) else encoder.examples(data)
    return examples if ids is None else examples.named(ids)
