"""A StackedTraining as the source of trajectories: many models trained side by side, and each of them recorded."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from upweight.errors import InvalidInput, UnsupportedModel
from upweight.influence.face import Influence
from upweight.training.counterfactuals import factors_of
from upweight.training.minibatch import SGD
from upweight.training.moves import RULES
from upweight.training.stacked import BoundStackedTraining, Stack, StackedTraining
from upweight.training.trajectory import Part, Spread, State, Step, Trajectory, flat


def recorded(
    training: StackedTraining,
    influence: Influence,
    seeds: Sequence[int] = (0,),
    *,
    weights: Float[NDArray[np.float64], " n"] | None = None,
) -> list[Trajectory]:
    """Trainings on the rows of an influence, side by side and recorded: one for each seed.

    They are those of `training` as an evaluation would run it. `uw.through(one)` differentiates one of them, for
    queries that are given as to the influence.

    Args:
        training: the procedure, without dropout.
        influence: whose objective and rows they are; where its θ̂ came from does not matter, unless they start there.
        seeds: of the first parameters and the order of the rows.
        weights: (n,) factors of the rows' weights, the same for all; None means ones.

    Raises:
        UnsupportedModel: if the module drops something by chance, so that no step could be made again.
        InvalidInput: if weights or seeds do not fit.

    >>> import torch, upweight as uw
    >>> X, y = torch.randn(20, 3, generator=torch.Generator().manual_seed(0)), torch.arange(20) % 2
    >>> influence = uw.explain(torch.nn.Linear(3, 2), X, y, loss=torch.nn.functional.cross_entropy)
    >>> training = uw.StackedTraining(uw.minibatch.SGD(0.1), uw.minibatch.Shuffled(5), epochs=2)
    >>> runs = uw.recorded(training, influence, [0, 1])
    >>> [uw.through(run, since=0).on_loss(X[:2], y[:2]).values.shape for run in runs]
    [(2, 20), (2, 20)]
    """
    bound = training.bind(influence)
    if bound.masks:
        chances = ", ".join(f"p={p:g}" for _, p in bound.masks)
        message = (
            f"A training with dropout ({chances}) is not recorded: the derivative would be of steps without it, which "
            "are others. Let the factory build the module in evaluation mode, factory=lambda: net().eval(), and train "
            "that; scores at the end of any training are uw.explain(model, …)."
        )
        raise UnsupportedModel(message)
    line = factors_of(influence, None, weights)
    several = isinstance(seeds, Sequence | np.ndarray) and len(seeds) > 0
    if not several or not all(isinstance(seed, int | np.integer) for seed in seeds):
        message = f"seeds={seeds!r}. A training is recorded for each of a list of seeds, such as [0, 1, 2]."
        raise InvalidInput(message)
    watches: list[_Watch] = []
    for start in range(0, len(seeds), training.together):
        some = seeds[start : start + training.together]
        watch = _Watch(bound, len(some))
        bound.watched(np.tile(line, (len(some), 1)), some, watch)
        watch.ended()
        watches.append(watch)
    shares = _shares(bound, line)
    return [_trajectory(bound, influence, watch, model, shares) for watch in watches for model in range(watch.models)]


class _Watch:
    """Rows and states of models that are trained side by side."""

    def __init__(self, bound: BoundStackedTraining, models: int) -> None:
        self.models, self.slots = models, len(_rule(bound).state)
        self.steps: list[tuple[Tensor, Tensor]] = []
        self.kept: Spread[tuple[Stack, dict[str, list[Tensor]]]] = Spread({})

    def __call__(self, theta: Stack, memory: dict[str, list[Tensor]], rows: Tensor, w: Tensor) -> None:
        """A step is about to be made."""
        self.last = theta, memory  # they are moved in place
        self.kept.passed(len(self.steps), self._state)
        self.steps.append((rows.clone(), w.double()))

    def ended(self) -> None:
        """All steps are made."""
        self.kept.states[len(self.steps)] = self._state()

    def _state(self) -> tuple[Stack, dict[str, list[Tensor]]]:
        theta, memory = self.last
        return (
            {name: block.clone() for name, block in theta.items()},
            {name: [slot.clone() for slot in slots] for name, slots in memory.items()},
        )

    def state(self, at: int, model: int) -> State:
        """Of one of the models."""
        theta, memory = self.kept.states[at]
        parameters = {name: block[model].cpu() for name, block in theta.items()}
        remembered = {
            name: tuple(slot[model].cpu() for slot in slots) or (torch.zeros_like(parameters[name]),) * self.slots
            for name, slots in memory.items()
        }
        return State(parameters, remembered)

    def made(self, model: int, settings: dict[str, float]) -> list[Step]:
        """The steps of one of the models; places of a batch without a row are left out."""
        found = []
        for rows, w in self.steps:
            there = w[model] != 0 if w[model].any() else torch.ones(len(w[model]), dtype=torch.bool)
            part = Part(rows[model][there].numpy(), 1.0, w[model][there].numpy())
            found.append(Step((part,), (settings,)))
        return found


def _trajectory(
    bound: BoundStackedTraining, influence: Influence, watch: _Watch, model: int, shares: NDArray[np.float64] | None
) -> Trajectory:
    states = {at: watch.state(at, model) for at in watch.kept.states}
    names = list(bound.objective.blocks)
    final = bound.objective.at(flat(states[len(watch.steps)].parameters, names))

    def reading(**settings: Any) -> Influence:
        return Influence(final, influence.examples, encoder=influence.encoder, **{**influence.settings, **settings})

    return Trajectory(
        optimiser=type(bound.spec.optimizer).__name__,
        rule=_rule(bound),
        steps=watch.made(model, _settings(bound)),
        states=states,
        group_of=dict.fromkeys(names, 0),
        clip=None,
        reading=reading,
        rounding=float(torch.finfo(bound.reference.dtype).eps),
        shares=shares,
    )


def _rule(bound: BoundStackedTraining) -> Any:
    return RULES[torch.optim.SGD if isinstance(bound.spec.optimizer, SGD) else torch.optim.Adam]


def _settings(bound: BoundStackedTraining) -> dict[str, float]:
    """What a parameter group of torch would say."""
    own = bound.spec.optimizer
    decay = own.weight_decay or 0.0
    if isinstance(own, SGD):
        return {"lr": own.lr, "momentum": own.momentum, "dampening": 0.0, "weight_decay": decay, "nesterov": 0.0}
    return {"lr": own.lr, "beta1": own.betas[0], "beta2": own.betas[1], "eps": own.eps, "weight_decay": decay}


def _shares(bound: BoundStackedTraining, line: NDArray[np.float64]) -> NDArray[np.float64] | None:
    """(n,) what each row contributes to the factor of the penalty; None where the penalty stays."""
    if bound.spec.optimizer.weight_decay is not None:
        return np.zeros(len(line))  # the optimiser's decay is in its place
    if not bound.objective.folded:
        return None
    each = line * bound.own
    return each / each.sum() * float(bound.spec.batches.share(line[None], bound.own)[0])
