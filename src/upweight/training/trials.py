"""Training again and measuring the queries: the step that every comparison with what really happens shares.

A trial is one job (the rows that are kept, seed) → θ → the measure of every query at θ. A retrainer that can train many
models at once is given as many jobs as it takes together.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from upweight.data.trees import tree_map
from upweight.errors import InvalidInput, first_line
from upweight.influence.face import Influence
from upweight.model import calculus, routes
from upweight.model.objective import Objective
from upweight.runs import identity
from upweight.training.predictions import decision
from upweight.training.retrainers import BoundRefit, Retrain, RetrainMany, bound

Job = tuple[NDArray[np.bool_], int]  # (n,) the rows that are kept, and the seed
_PROBED = 3  # queries on which a measure is tried


@dataclass(frozen=True)
class Trials:
    """A retrainer, and where its parameters are measured.

    Args:
        train: (weights, seed) → θ.
        objective: the objective that θ belongs to.
        measured: the same with the measure in place of the loss.
        queries: the batch of queries.
        measure: what is measured, in words.
        retrainer: the retrainer, in words.
        decide: from outputs to class numbers; None where outputs are no classes.
        by_user: whether the retrainer is a function of the user's.
    """

    train: Retrain
    objective: Objective
    measured: Objective
    queries: Any
    measure: str
    retrainer: str
    decide: Callable[[NDArray[np.float64]], NDArray[np.int64]] | None = None
    by_user: bool = False

    @classmethod
    def of(
        cls, influence: Influence, on: Any, retrain: Any, measure: Callable[[Any, Any], Tensor] | None = None
    ) -> Trials:
        """What is trained and measured for these queries.

        Raises:
            InvalidInput: if the queries or the retrainer cannot be used.
        """
        influence.queries(on)  # refuses what is no query
        train = bound(retrain, influence)
        refit = isinstance(train, BoundRefit)
        objective, asked = train.stage(on) if refit else (influence.objective, influence.queries(on))
        queries = asked.batch(slice(None))
        if measure is None:
            measured, name = objective.reporting(), objective.measure
        else:
            measured = routes.probe(objective.measuring(measure), tree_map(lambda leaf: leaf[:_PROBED], queries))
            name = measured.name
        return cls(
            train, objective, measured, queries, name, in_words(retrain, train), decision(influence), train is retrain
        )

    def now(self) -> Float[NDArray[np.float64], " q"]:
        """The measure of every query at θ̂, the model as it is."""
        return calculus.losses(self.measured, self.queries).double().cpu().numpy()

    def at(self, params: Any) -> Float[NDArray[np.float64], " q"]:
        """The measure of every query at what a retrainer returned."""
        there = placed(self.measured, params, by_user=self.by_user, like=self.objective)
        return calculus.losses(there, self.queries).double().cpu().numpy()

    def labels(self, params: Any = None) -> NDArray[np.int64] | None:
        """The class that the model gives every query, at θ̂ or at other parameters; None where outputs are no classes.

        Class numbers are places in `upweight.classes`.
        """
        if self.decide is None:
            return None
        objective = self.objective
        if params is not None:
            objective = placed(objective, params, by_user=self.by_user)
        return self.decide(calculus.outputs(objective, self.queries).double().cpu().numpy())

    def said(self, theta: Any) -> Float[NDArray[np.float64], "k q"]:
        """The measure of every query at what a retrainer returned; below it the class of each where there is one."""
        labels = self.labels(theta)
        return np.stack([self.at(theta), *([] if labels is None else [labels.astype(np.float64)])])

    def question(self, influence: Influence, on: Any) -> dict[str, Any]:
        """What outcomes depend on beside the influence and the rows that are kept, for a folder of them."""
        return {"queries": influence.queries(on).fingerprint(), "measure": self.measure, "retrain": self.retrainer}

    def blocks(self, seeds: int, per_seed: int) -> list[range]:
        """The numbers of the jobs, seed after seed, that are trained together: always the same, and of one seed."""
        together = self.train.together if isinstance(self.train, RetrainMany) else 1
        ends = range(0, seeds * per_seed, per_seed)
        return [
            range(start, min(start + together, end + per_seed))
            for end in ends
            for start in range(end, end + per_seed, together)
        ]


@dataclass(frozen=True)
class Measured:
    """The work of a block of trials: a result for each job, or the error that training without these rows ends in.

    Args:
        trials: what is trained and measured.
        what: from what a retrainer returned to numbers.
        failing: errors that stand in the place of a result; others end the run.
    """

    trials: Trials
    what: Callable[[Any], NDArray[np.float64]]
    failing: tuple[type[Exception], ...] = ()

    def __call__(self, jobs: Sequence[Job]) -> list[NDArray[np.float64] | Exception]:
        """The results of these jobs."""
        thetas = trained(self.trials.train, jobs, self.failing)
        return [theta if isinstance(theta, Exception) else self.what(theta) for theta in thetas]


def trained(train: Retrain, jobs: Sequence[Job], failing: tuple[type[Exception], ...] = ()) -> list[Any]:
    """θ of every job in order, at once where the retrainer can.

    Args:
        train: the retrainer.
        jobs: rows that are kept and seeds.
        failing: errors that stand in the place of a θ, but not of one from all rows, without which nothing is known.

    Raises:
        InvalidInput: if a retrainer that takes many jobs returns another number of models.
    """
    if not isinstance(train, RetrainMany):
        return [_trained(train, kept, seed, failing) for kept, seed in jobs]
    with seeded(jobs[0][1]):
        models = train.many(np.stack([kept for kept, _ in jobs]).astype(np.float64), [seed for _, seed in jobs])
    if len(models) != len(jobs):
        message = f"retrain.many returned {len(models)} models for {len(jobs)} lines of weights. Return one for each."
        raise InvalidInput(message)
    return list(models)


def _trained(train: Retrain, kept: NDArray[np.bool_], seed: int, failing: tuple[type[Exception], ...]) -> Any:
    try:
        with seeded(seed):
            return train(kept.astype(np.float64), seed)
    except failing as error:
        if kept.all():
            raise
        return error


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """The global random states of torch, NumPy and Python at a seed, and as they were afterwards.

    What a training draws belongs to the training, wherever and after whatever it is run.
    """
    seed, devices = int(seed), range(torch.cuda.device_count() if torch.cuda.is_initialized() else 0)
    numpy_state, python_state = np.random.get_state(), random.getstate()
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        np.random.seed(seed % 2**32)
        random.seed(seed)
        try:
            yield
        finally:
            np.random.set_state(numpy_state)
            random.setstate(python_state)


def placed(objective: Objective, returned: Any, *, by_user: bool, like: Objective | None = None) -> Objective:
    """The objective at what a retrainer returned: θ, a state dict, or a module, whose buffers come along.

    Args:
        objective: what is to be evaluated there.
        returned: by the retrainer.
        by_user: whether the retrainer is a function of the user's, which may have changed buffers too. Those of this
            library train with the buffers as they are.
        like: the objective whose parameters they are, if it is another one.

    Raises:
        InvalidInput: if they do not fit θ̂, or buffers that training changes are missing.
    """
    like = objective if like is None else like
    if isinstance(returned, torch.nn.Module):
        returned = {**dict(returned.named_parameters()), **dict(returned.named_buffers())}
    theta = flat(like, returned)
    given = returned if isinstance(returned, dict) else {}
    left = [name for name in like.moving if name not in given]
    if by_user and left:
        message = (
            f"retrain returned parameters without '{left[0]}', which training changes too ({len(left)} such buffers): "
            "with the old ones the new parameters are another model. Return the trained module itself, or its "
            "state_dict()."
        )
        raise InvalidInput(message)
    others = [name for name, old in like.settled.items() if name in given and not _same(given[name], old)]
    if others:
        message = (
            f"retrain returned another '{others[0]}' ({len(others)} such tensors before the head), and the head that "
            "is explained sees features of the old one. Keep what is before the head frozen, or explain the whole "
            "module: leave parameters= out."
        )
        raise InvalidInput(message)
    beside = {}
    for name, old in like.fixed.items():
        if name not in given:
            continue
        new = torch.as_tensor(given[name]).detach()
        if new.shape != old.shape or not bool(torch.isfinite(new).all()):
            message = (
                f"retrain returned '{name}' of shape {tuple(new.shape)}, and the model that is explained has "
                f"{tuple(old.shape)}; its values must be finite. Return a model of the same architecture."
            )
            raise InvalidInput(message)
        if not _same(new, old):
            beside[name] = new.to(old, copy=True)
    return objective.at(theta).beside(beside)


def _same(given: Any, old: Tensor) -> bool:
    """Whether a returned tensor is what it was."""
    new = torch.as_tensor(given).detach()
    return new.shape == old.shape and torch.equal(new.to(old), old)


def flat(objective: Objective, params: Any) -> Float[Tensor, " p"]:
    """Whatever a retrainer returned, as a flat vector.

    Raises:
        InvalidInput: if it does not fit θ̂.
    """
    if isinstance(params, dict):
        missing = [name for name in objective.blocks if name not in params]
        if missing:
            message = (
                f"retrain returned parameters without '{missing[0]}'. Return the trained module, its state_dict(), a "
                f"dict with the names {list(objective.blocks)}, or one flat vector."
            )
            raise InvalidInput(message)
        parts = [params[name] for name in objective.blocks]
    else:
        parts = [params]
    try:
        tensors = [
            part.detach() if isinstance(part, Tensor) else torch.as_tensor(part, dtype=torch.float64) for part in parts
        ]
        vector = torch.cat([part.reshape(-1).double() for part in tensors])
    except (TypeError, ValueError, RuntimeError) as error:
        message = (
            f"retrain returned a {type(params).__name__} ({first_line(error)}). Return the trained module, its "
            f"state_dict(), a dict with the names {list(objective.blocks)}, or one flat vector."
        )
        raise InvalidInput(message) from error
    if len(vector) != objective.size:
        message = (
            f"retrain returned {len(vector)} numbers, and the objective has {objective.size} parameters. Return all of "
            f"them, in this order: {', '.join(objective.blocks)}."
        )
        raise InvalidInput(message)
    if not torch.isfinite(vector).all():
        message = "retrain returned NaN or infinite parameters: training diverged. Use a smaller step."
        raise InvalidInput(message)
    return vector


def in_words(retrain: Any, train: Any) -> str:
    """A retrainer's settings, or a function's name and a digest of what it does; never an address, which no other
    process shares.

    What was bound adds its `origin`, if it has one.
    """
    retrain = train if retrain is None else retrain
    spec = getattr(retrain, "spec", retrain)
    text = f"{spec!r}{getattr(train, 'origin', '')}"
    if " at 0x" not in text:
        return text
    return f"{getattr(spec, '__qualname__', type(spec).__qualname__)} #{identity.digest(spec)}"
