"""A training as data: the rows and the optimiser's numbers of every step, and parameters now and then."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field
from typing import Generic, TypeVar

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from upweight.influence.face import Influence
from upweight.training.moves import Memory, Rule

_MOST = 64  # states that are kept; every other one is dropped when there are more
T = TypeVar("T")


@dataclass(frozen=True)
class Part:
    """A batch whose mean loss, times a number, went into a step's gradient; or a sum of losses by weights of its own.

    Args:
        rows: (b,) its training rows.
        scale: what the mean loss was multiplied by.
        weights: (b,) what each row's loss was multiplied by in the sum, before `scale`; None takes the mean of the
            batch as its criterion has it.
    """

    rows: NDArray[np.int64]
    scale: float = 1.0
    weights: Float[NDArray[np.float64], " b"] | None = None


@dataclass(frozen=True)
class Step:
    """A step of the optimiser.

    Args:
        parts: the batches of its gradient; several where gradients were accumulated.
        groups: the numbers of every parameter group in force.
    """

    parts: tuple[Part, ...]
    groups: tuple[dict[str, float], ...]

    def told(self) -> list[tuple[list[int], float, list[float] | None]]:
        """The rows, the scale and the weights of every batch, as plain numbers."""
        return [
            (part.rows.tolist(), part.scale, None if part.weights is None else part.weights.tolist())
            for part in self.parts
        ]


@dataclass(frozen=True)
class State:
    """Parameters and what the optimiser remembers of them, by name, before a step."""

    parameters: dict[str, Tensor]
    memory: dict[str, tuple[Tensor, ...]]


class Spread(Generic[T]):
    """Up to 64 states of a training whose length is not known, evenly spread.

    Args:
        states: where they are kept, by the number of the step that they are before.
    """

    def __init__(self, states: MutableMapping[int, T]) -> None:
        self.states = states
        self.every = 1

    def passed(self, step: int, made: Callable[[], T]) -> None:
        """Keep the state before a step, if its turn has come."""
        if step % self.every:
            return
        self.states[step] = made()
        if len(self.states) > _MOST:
            self.every *= 2
            for at in [at for at in self.states if at % self.every]:
                del self.states[at]


@dataclass(frozen=True)
class Trajectory:
    """A training that has ended, for `through` to go back along; made by `Recording` and `recorded`.

    Args:
        optimiser: its name.
        rule: its step.
        steps: all of them.
        states: parameters and moments before some of the steps, the first and the end among them.
        group_of: the parameter group of every block that was trained.
        clip: max_norm of the gradient's clipping; None clips nothing.
        reading: from settings of `explain` to the Influence of the trained model on its rows.
        rounding: how coarse the numbers of the training were, as a share of them.
        summed: whether the criterion of a batch is a sum, not a mean.
        shares: (n,) what each row contributes to the factor of the penalty, which goes with the rows; None for a
            penalty that stays.
    """

    optimiser: str
    rule: Rule
    steps: Sequence[Step]
    states: Mapping[int, State] = field(repr=False)
    group_of: Mapping[str, int] = field(repr=False)
    clip: float | None
    reading: Callable[..., Influence] = field(repr=False)
    rounding: float
    summed: bool = False
    shares: Float[NDArray[np.float64], " n"] | None = field(default=None, repr=False)

    def __len__(self) -> int:
        return len(self.steps)

    @property
    def adaptive(self) -> bool:
        """Whether the optimiser has a second moment."""
        return len(self.rule.state) > 1

    @property
    def digest(self) -> str:
        """What the training was, in a few letters: its rows, settings, first and last parameters."""
        told = hashlib.sha256(repr([(step.told(), step.groups) for step in self.steps]).encode())
        if self.shares is not None:
            told.update(self.shares.tobytes())
        for at in (0, len(self.steps)):
            for name, block in self.states[at].parameters.items():
                told.update(name.encode() + block.contiguous().view(torch.uint8).numpy().tobytes())
        return told.hexdigest()[:16]

    def begun(self, at: int, names: Sequence[str]) -> tuple[Tensor, Memory]:
        """θ and the memory that were kept before a step, flat in the order of these blocks."""
        state = self.states[at]
        slots = range(len(self.rule.state))
        memory = ({name: state.memory[name][slot] for name in names} for slot in slots)
        return flat(state.parameters, names), tuple(flat(one, names) for one in memory)

    def segments(self, since: int) -> Iterator[tuple[int, int]]:
        """From state to state, the last first, as far back as `since`."""
        ends = sorted(self.states)
        for start, stop in zip(ends[-2::-1], ends[:0:-1], strict=True):
            if stop > since:
                yield start, stop


def flat(blocks: Mapping[str, Tensor], names: Sequence[str]) -> Tensor:
    """Blocks by their names, as one vector in this order, in float64."""
    return torch.cat([blocks[name].reshape(-1).double() for name in names])
