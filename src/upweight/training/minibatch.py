"""Training by minibatches: the optimiser's step, and how the rows of an epoch become batches.

Specifications for `StackedTraining`; the arithmetic is that of torch.optim and torch's DataLoader.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy.typing import NDArray
from torch import Tensor

from upweight.errors import InvalidInput, checked_count

__all__ = ["SGD", "Adam", "Batches", "Placed", "Shuffled"]


@dataclass(frozen=True)
class SGD:
    """Stochastic gradient descent as torch.optim.SGD has it: v ← μ v + g, θ ← θ − lr v.

    Args:
        lr: step size.
        momentum: μ.
        weight_decay: λ of (λ/2)‖θ‖² over all parameters; None takes the objective's own penalty.
    """

    lr: float
    momentum: float = 0.0
    weight_decay: float | None = None

    def __post_init__(self) -> None:
        _check_numbers(self, least={"momentum": 0.0})
        if self.momentum >= 1:
            message = f"SGD got momentum={self.momentum}, with which no step is ever forgotten. Use a number below 1."
            raise InvalidInput(message)

    def damping(self, steps: int) -> float:
        """λ = (1 − μ) / (lr · steps): the damping that stopping after so many steps amounts to.

        Gradient descent has gone for the time t = lr · steps / (1 − μ), and along a direction of curvature h the part
        1 − e^{−ht} of its way; the minimum with a penalty λ = 1/t is at the part h/(h + λ). The ratio of the two is
        between 1 and 1.3 for every h, so (C + λI)⁻¹ stands for what training did, and λ is known without looking at
        any result.

        Args:
            steps: of the whole training.

        Raises:
            InvalidInput: if steps is no number ≥ 1.

        References: Ali, Kolter and Tibshirani (2019), lemma 7.

        >>> round(SGD(lr=0.01, momentum=0.9).damping(4000), 6)
        0.0025
        """
        return (1 - self.momentum) / (self.lr * checked_count(steps, "steps"))

    def slots(self) -> int:
        """How many numbers it remembers for each parameter."""
        return 1 if self.momentum else 0

    def move(self, theta: Tensor, gradient: Tensor, memory: list[Tensor], step: int) -> None:  # noqa: ARG002
        """One step, in place."""
        if self.momentum:
            gradient = memory[0].mul_(self.momentum).add_(gradient)
        theta.sub_(gradient, alpha=self.lr)


@dataclass(frozen=True)
class Adam:
    """Adam as torch.optim.Adam has it (Kingma and Ba, 2015), with bias correction.

    Args:
        lr: step size.
        betas: decay of the running means of g and g².
        eps: added to the root of the mean of g².
        weight_decay: λ of (λ/2)‖θ‖² over all parameters; None takes the objective's own penalty.

    >>> theta, adam = torch.tensor([1.0, 1.0]), Adam(lr=0.1)
    >>> adam.move(theta, torch.tensor([5.0, -0.02]), [torch.zeros(2) for _ in range(adam.slots())], step=1)
    >>> theta  # the first step has length lr, whatever the gradient
    tensor([0.9000, 1.1000])
    """

    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float | None = None

    def __post_init__(self) -> None:
        _check_numbers(self, least={"eps": 0.0})
        two = isinstance(self.betas, tuple | list) and len(self.betas) == 2
        if not two or not all(isinstance(beta, int | float) and 0 <= beta < 1 for beta in self.betas):
            message = f"betas={self.betas!r}. Pass two numbers in [0, 1), as in torch.optim.Adam: (0.9, 0.999)."
            raise InvalidInput(message)

    def slots(self) -> int:
        """How many numbers it remembers for each parameter."""
        return 2

    def move(self, theta: Tensor, gradient: Tensor, memory: list[Tensor], step: int) -> None:
        """One step, in place."""
        one, two = self.betas
        mean = memory[0].mul_(one).add_(gradient, alpha=1 - one)
        square = memory[1].mul_(two).addcmul_(gradient, gradient, value=1 - two)
        root = (square / (1 - two**step)).sqrt_().add_(self.eps)
        theta.sub_(mean / root, alpha=self.lr / (1 - one**step))


@runtime_checkable
class Batches(Protocol):
    """How the rows of an epoch become batches.

    >>> weights = np.array([1.0, 1.0, 0.0, 1.0])  # row 2 is left out
    >>> for batches in (Shuffled(2), Placed(2)):
    ...     rows, divisors = batches.epoch(weights, np.random.default_rng(0))
    ...     print(rows.tolist(), divisors)
    [[0, 1], [3, -1]] [2. 1.]
    [[2, 0], [1, 3]] [2. 2.]
    """

    @property
    def batch_size(self) -> int:
        """Places in a batch."""
        ...

    def epoch(
        self, weights: Float[NDArray[np.float64], " n"], draw: np.random.Generator
    ) -> tuple[Int[NDArray[np.int64], "t b"], Float[NDArray[np.float64], " t"]]:
        """The rows of every batch, −1 for a place without one; and the number that each batch's sum is divided by."""
        ...

    def share(self, weights: Float[NDArray[np.float64], "m n"], own: Float[NDArray[np.float64], " n"]) -> Tensor:
        """For each model what a folded penalty is multiplied by, so that R's own c(weights) acts beside these means."""
        ...


@dataclass(frozen=True)
class Shuffled:
    """A new order of all rows every epoch; rows of weight 0 are left out and the others close up.

    This is training on the subset that is left: half the rows take half the steps, and a batch's mean is over what is
    in it, as with torch's DataLoader of the subset. Use it for subsets. Note that the mean over the rows that are left
    makes a penalty that stays weigh as it did per row: scores with `penalty_per_example=True` predict exactly this.
    """

    batch_size: int

    def __post_init__(self) -> None:
        checked_count(self.batch_size, "batch_size")

    def epoch(
        self, weights: Float[NDArray[np.float64], " n"], draw: np.random.Generator
    ) -> tuple[Int[NDArray[np.int64], "t b"], Float[NDArray[np.float64], " t"]]:
        """The rows of every batch, and how many there are in it."""
        order = draw.permutation(len(weights))
        rows = _in_batches(order[weights[order] != 0], self.batch_size)
        return rows, (rows >= 0).sum(1).astype(np.float64)

    def share(self, weights: Float[NDArray[np.float64], "m n"], own: Float[NDArray[np.float64], " n"]) -> Tensor:
        """What a folded penalty is multiplied by: the mean weight of the rows that are left over that of all."""
        kept = weights != 0
        return torch.from_numpy((weights @ own) / kept.sum(1) / own.mean())


@dataclass(frozen=True)
class Placed:
    """A new order of all rows every epoch; a row of weight 0 leaves its place in the batch empty.

    The batch's sum is divided by its places, empty or not, so what is minimised is R with n unchanged, and removing
    one row changes nothing else about the training. Use it for leave-one-out: the other rows keep their batches.
    """

    batch_size: int

    def __post_init__(self) -> None:
        checked_count(self.batch_size, "batch_size")

    def epoch(
        self, weights: Float[NDArray[np.float64], " n"], draw: np.random.Generator
    ) -> tuple[Int[NDArray[np.int64], "t b"], Float[NDArray[np.float64], " t"]]:
        """The rows of every batch, and the places in it."""
        rows = _in_batches(draw.permutation(len(weights)), self.batch_size)
        return rows, (rows >= 0).sum(1).astype(np.float64)

    def share(self, weights: Float[NDArray[np.float64], "m n"], own: Float[NDArray[np.float64], " n"]) -> Tensor:
        """What a folded penalty is multiplied by: the weight that is left, Σ mᵢwᵢ / Σ wᵢ."""
        return torch.from_numpy((weights @ own) / own.sum())


def _in_batches(order: NDArray[np.int64], size: int) -> NDArray[np.int64]:
    """(t, size) rows in this order; the last batch is filled with −1."""
    steps = max(1, math.ceil(len(order) / size))
    return np.pad(order, (0, steps * size - len(order)), constant_values=-1).reshape(steps, size)


def _check_numbers(spec: SGD | Adam, least: dict[str, float]) -> None:
    bounds = {"lr": 0.0, "weight_decay": 0.0, **least}
    for name, bound in bounds.items():
        value = getattr(spec, name)
        if value is None and name == "weight_decay":
            continue
        if isinstance(value, bool) or not isinstance(value, int | float) or not bound <= value < math.inf:
            sign = ">" if name == "lr" else "≥"
            message = f"{type(spec).__name__} got {name}={value!r}. It is a finite int or float {sign} {bound:g}."
            raise InvalidInput(message)
    if spec.lr == 0:
        message = f"{type(spec).__name__} got lr=0, with which nothing is learned. Use a step size > 0."
        raise InvalidInput(message)
