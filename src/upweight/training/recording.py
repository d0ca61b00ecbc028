"""The recorder of a training loop, told by the loop and by its optimiser: it makes a `Trajectory`."""

from __future__ import annotations

from collections.abc import Callable, MutableMapping
from contextlib import AbstractContextManager, ExitStack
from copy import deepcopy
from dataclasses import dataclass, field
from functools import partial
from types import TracebackType
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from upweight.adapters import explain
from upweight.errors import InvalidInput, UnsupportedModel
from upweight.influence.face import Influence
from upweight.model.modules import refuse_training_mode
from upweight.runs.store import Store
from upweight.training import kept_states
from upweight.training.moves import rule_named, rule_of, settings_of
from upweight.training.trainers import arguments_of, watched
from upweight.training.trajectory import Part, Spread, State, Step, Trajectory


@dataclass
class Recording:
    """What a training loop did, told by the loop and by its optimiser.

    Inside `with recording:` every `optimizer.step()` is recorded; before it the loop says which rows the gradient is
    of. Kept are the rows and the optimiser's numbers of every step, and up to 64 states of parameters and moments,
    evenly spread, from which the rest is computed again. Memory: 64 times the model and the optimiser's state; with
    `store` one of them, and the disk holds the others.

        recording = uw.Recording(model, optimizer, X, y, loss=cross_entropy)
        with recording:
            for rows in batches:
                optimizer.zero_grad()
                cross_entropy(model(X[rows]), y[rows]).backward()
                recording.batch(rows)
                optimizer.step()

    Args:
        model: the module, without dropout and batch statistics while it trains.
        optimizer: SGD, Adam or AdamW of torch.optim, over parameters of the model.
        X: the training inputs, as for `explain`; or rows of named parts.
        y: the training targets.
        loss: the criterion of a batch, a mean over its rows; None asks the model for its own.
        penalty: what else was added to a batch's loss, as for `explain`; the optimiser's weight decay is read off it.
        clip: max_norm of `torch.nn.utils.clip_grad_norm_` over all parameters before each step; None clips nothing.
        settings: more arguments of `explain`, such as collate_fn.
        store: a folder in which states and steps are kept, so that `Recording.open` goes on with them after whatever
            ended this process; None keeps them in memory.
        watching: from this recording to a context in which somebody calls `batch`; see `of_trainer`.

    Raises:
        UnsupportedModel: if the optimiser is another one, or it trains what is no parameter of the model.
    """

    model: torch.nn.Module
    optimizer: torch.optim.Optimizer
    X: Any
    y: Any = None
    loss: Any = None
    penalty: Any = None
    clip: float | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    watching: Callable[[Recording], AbstractContextManager[None]] | None = None
    store: Any = None
    steps: list[Step] = field(default_factory=list, init=False)
    states: MutableMapping[int, State] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        self._idle: set[str] | None = None  # parameters that the steps' gradients do not reach
        self.optimiser_name, self.rule = rule_of(self.optimizer)
        named = {id(parameter): name for name, parameter in self.model.named_parameters()}
        groups = self.optimizer.param_groups
        strangers = sum(id(one) not in named for group in groups for one in group["params"])
        if strangers:
            message = (
                f"The optimizer trains {strangers} tensors that are no parameters of {type(self.model).__name__}. Pass "
                "the module whose parameters() were given to it."
            )
            raise InvalidInput(message)
        moving = [(number, one) for number, group in enumerate(groups) for one in group["params"] if one.requires_grad]
        self.group_of = {named[id(one)]: number for number, one in moving}  # a frozen one is in no step
        self._trained = {named[id(one)]: one for _, one in moving}
        self._parts: list[Part] = []
        self._kept: Store | None = None
        self._open = ExitStack()

    @classmethod
    def of_trainer(cls, trainer: Any, *, store: Any = None) -> Self:
        """The recording of what a Trainer of transformers is about to do, adapters of peft included.

            recording = uw.Recording.of_trainer(trainer)
            with recording:
                trainer.train()

        Batches, accumulation, clipping and schedule are the Trainer's own, and nothing of it changes. Rows are numbered
        as in its train_dataset.

        Raises:
            InvalidInput: if it is no Trainer, or its rows are no mappings that are known by number.
            UnsupportedModel: if its steps could not be made again, as with dropout or mixed precision.
        """
        return cls(**arguments_of(trainer), watching=partial(watched, trainer), store=store)

    @staticmethod
    def open(folder: Any, model: torch.nn.Module, X: Any, y: Any = None, **settings: Any) -> Trajectory:
        """A training that was recorded with `store=folder`, in another process or before it was killed.

        The folder holds rows, numbers and parameters, and no code: the module and the data are given again, and steps
        that are made again must end where they did.

        Args:
            folder: of the recording.
            model: of the same architecture, with what was not trained as it was; it is copied.
            X: the training inputs, as they were.
            y: the training targets.
            settings: loss, penalty and other arguments of `explain`, as they were.

        Raises:
            InvalidInput: if the folder holds no training that has ended, or the model has other parameters.
        """
        told = kept_states.told(folder)
        copied = deepcopy(model).eval()
        _put(told.states[len(told.steps)].parameters, copied)
        loss = settings.get("loss")
        return Trajectory(
            optimiser=told.optimiser,
            rule=rule_named(told.optimiser),
            steps=told.steps,
            states=told.states,
            group_of=told.group_of,
            clip=told.clip,
            reading=partial(explain, copied, X, y, **{**settings, "parameters": told.moving}),
            rounding=told.rounding,
            summed=_sums(loss),
        )

    def __enter__(self) -> Self:
        self._parts = []
        if self.steps:
            message = (
                f"This recording holds a training of {len(self.steps)} steps. Make another uw.Recording for another "
                "training."
            )
            raise InvalidInput(message)
        self._refuse_begun()
        with ExitStack() as stack:
            if self.store is not None:
                self._kept = stack.enter_context(self._folder())
                self.states = kept_states.KeptStates(self._kept.path, self._kept.work, store=self._kept)
            self._spread = Spread(self.states)
            if self.watching is not None:
                stack.enter_context(self.watching(self))
            stack.callback(self.optimizer.register_step_pre_hook(self._before_step).remove)
            self._open = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self.states[len(self.steps)] = self._state()
            if self._kept is not None and kind is None and self.steps:
                card = {"group_of": self.group_of, "moving": self.moving, "rounding": self.rounding}
                kept_states.ended(self._kept, self.steps, list(self.states), card)
        finally:
            self._open.__exit__(kind, error, trace)

    def batch(self, rows: Any, scale: float = 1.0) -> None:
        """Tell that the mean loss of these rows, times `scale`, is in the gradient of the next step.

        Args:
            rows: numbers of training rows.
            scale: such as 1/4 where four batches are accumulated and each loss was divided by 4.

        Raises:
            InvalidInput: if they are no whole numbers, or none.
        """
        array = np.asarray(rows.cpu() if isinstance(rows, Tensor) else rows)
        if array.ndim != 1 or not len(array) or array.dtype.kind not in "iu" or (array < 0).any():
            message = (
                f"rows is {array.dtype} of shape {array.shape}. Pass the numbers of the training rows of this batch, "
                "0 for the first, such as [3, 17, 4]."
            )
            raise InvalidInput(message)
        self._parts.append(Part(array.astype(np.int64), float(scale)))

    def _before_step(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:  # noqa: ARG002
        if not self._parts:
            message = (
                f"optimizer.step() number {len(self.steps) + 1} was made without the rows of its gradient. Call "
                "recording.batch(rows) before every step, once for each batch whose backward() it uses."
            )
            raise InvalidInput(message)
        refuse_training_mode(self.model)
        if not self.steps:
            self._refuse_begun()  # a Trainer loads what its optimizer remembers when it goes on at a checkpoint
        self._refuse_sometimes()
        self._spread.passed(len(self.steps), self._state)
        told = tuple(settings_of(group, self.rule) for group in optimizer.param_groups)
        self.steps.append(Step(tuple(self._parts), told))
        self._parts = []

    def _refuse_begun(self) -> None:
        """Raises where the optimizer is not at its beginning.

        Raises:
            InvalidInput: then.
        """
        if any(self.optimizer.state.values()):
            message = (
                "The optimizer has made steps already, which nobody recorded. Make a new optimizer, and record from "
                "its first step on, not from a checkpoint."
            )
            raise InvalidInput(message)

    def _refuse_sometimes(self) -> None:
        """Raises where a parameter has a gradient in some steps only: torch leaves it out of the others.

        Raises:
            InvalidInput: then.
        """
        idle = {name for name, one in self._trained.items() if one.grad is None}
        known = idle if self._idle is None else self._idle
        if idle != known:
            name = min(idle ^ known)
            message = (
                f"'{name}' has {'no' if name in idle else 'a'} gradient in step {len(self.steps) + 1}, and was "
                f"otherwise before, so the optimizer {'leaves it out' if name in idle else 'begins with it'} now. Let "
                "every step's loss use the same parameters, optimizer.zero_grad(set_to_none=False) included, or freeze "
                "it: requires_grad_(False)."
            )
            raise InvalidInput(message)
        self._idle = known

    @property
    def moving(self) -> list[str]:
        """The parameters that the steps move: in the optimizer, not frozen, and reached by the gradients."""
        return [name for name in self.group_of if name not in (self._idle or ())]

    @property
    def rounding(self) -> float:
        """How coarse the numbers of the training were, as a share of them."""
        return max(torch.finfo(one.dtype).eps for one in self._trained.values())

    def copied(self) -> torch.nn.Module:
        """The model that was trained, apart from whoever trained it and in evaluation mode.

        A Trainer may have put another `forward` into the instance, which is bound to it: the copy has its class's own.
        """
        model = deepcopy(self.model).eval()
        if self.watching is not None:
            for module in model.modules():
                vars(module).pop("forward", None)
        return model

    @property
    def trajectory(self) -> Trajectory:
        """The training that was recorded, as data."""
        return Trajectory(
            optimiser=self.optimiser_name,
            rule=self.rule,
            steps=self.steps,
            states=self.states,
            group_of=self.group_of,
            clip=self.clip,
            reading=self._read,
            rounding=self.rounding,
            summed=_sums(self.loss),
        )

    def _read(self, **settings: Any) -> Influence:
        """The trained model on its rows."""
        known = {"loss": self.loss, "penalty": self.penalty, "parameters": self.moving, **self.settings}
        return explain(self.copied(), self.X, self.y, **{**known, **settings})

    def _folder(self) -> Store:
        """The folder of this recording.

        Raises:
            InvalidInput: if it holds a whole training.
            UnsupportedModel: if a parameter cannot be kept there.
        """
        half = sorted({str(one.dtype) for one in self._trained.values() if one.dtype == torch.bfloat16})
        if half:
            message = (
                f"Parameters in {half[0]} are not kept in a folder: NumPy has no such numbers. Train in float32, or "
                "leave store= out."
            )
            raise UnsupportedModel(message)
        blocks = {name: list(one.shape) for name, one in self._trained.items()}
        return kept_states.opened_for(
            self.store, {"optimiser": self.optimiser_name, "clip": self.clip, "blocks": blocks}
        )

    def _state(self) -> State:
        return State(
            {name: one.detach().cpu().clone() for name, one in self._trained.items()},
            {name: self._remembered(one) for name, one in self._trained.items()},
        )

    def _remembered(self, parameter: Tensor) -> tuple[Tensor, ...]:
        known = self.optimizer.state.get(parameter, {})
        found = [known.get(name) for name in self.rule.state]
        return tuple(
            torch.zeros_like(parameter, device="cpu") if one is None else one.detach().cpu().clone() for one in found
        )


def _sums(loss: Any) -> bool:
    """Whether a criterion is a sum over its batch."""
    return getattr(loss, "reduction", "mean") == "sum"


def _put(parameters: dict[str, Tensor], model: torch.nn.Module) -> None:
    """Parameters that training found, into a model.

    Raises:
        InvalidInput: if it has others.
    """
    own = dict(model.named_parameters())
    wrong = [name for name, one in parameters.items() if name not in own or own[name].shape != one.shape]
    if wrong:
        here = tuple(own[wrong[0]].shape) if wrong[0] in own else "nothing"
        message = (
            f"The recorded training found '{wrong[0]}' of shape {tuple(parameters[wrong[0]].shape)}, and "
            f"{type(model).__name__} has {here} there. Pass a model of the architecture that was trained."
        )
        raise InvalidInput(message)
    with torch.no_grad():
        for name, one in parameters.items():
            own[name].copy_(one)
