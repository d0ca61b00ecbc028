"""One step of torch.optim's SGD, Adam and AdamW as a differentiable function: (θ, memory, g) → (θ′, memory′).

All is flat, in the order of the objective's blocks; settings are numbers, or vectors where parameter groups differ.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from upweight.errors import UnsupportedModel, first_line
from upweight.model import calculus

Number = float | Tensor
Settings = Mapping[str, Number]
Memory = tuple[Tensor, ...]
_CLIP_EPS = 1e-6  # torch.nn.utils.clip_grad_norm_ adds it to the norm


@dataclass(frozen=True)
class Rule:
    """An optimiser of torch.

    Args:
        state: names of what it remembers of each parameter, in the order of a Memory.
        settings: names of the numbers of a parameter group that it reads.
        refused: settings that must be off.
        move: (θ, memory, g, settings, step, fixed) → (θ′, memory′), with step from 1, and `fixed` for a second moment
            that is taken as it is.
    """

    state: tuple[str, ...]
    settings: tuple[str, ...]
    refused: tuple[str, ...]
    move: Callable[[Tensor, Memory, Tensor, Settings, int, bool], tuple[Tensor, Memory]]


def _sgd(theta: Tensor, memory: Memory, g: Tensor, s: Settings, step: int, fixed: bool) -> tuple[Tensor, Memory]:  # noqa: ARG001
    g = g + s["weight_decay"] * theta
    damped = s["dampening"] * (s["momentum"] != 0)  # without momentum torch dampens nothing
    buffer = g if step == 1 else s["momentum"] * memory[0] + (1 - damped) * g
    ahead = s["nesterov"] * (g + s["momentum"] * buffer) + (1 - s["nesterov"]) * buffer  # 0 or 1, of every group
    return theta - s["lr"] * ahead, (buffer,)


def _adam_step(theta: Tensor, memory: Memory, g: Tensor, s: Settings, step: int, fixed: bool) -> tuple[Tensor, Memory]:
    one, two = s["beta1"], s["beta2"]
    mean = one * memory[0] + (1 - one) * g
    square = two * memory[1] + (1 - two) * g * g
    seen = square.detach() if fixed else square
    moved = seen > 0  # √ has no derivative at 0, where the mean is 0 too and nothing hangs on it
    root = torch.where(moved, torch.where(moved, seen / (1 - two**step), 1.0).sqrt(), 0.0) + s["eps"]
    return theta - s["lr"] / (1 - one**step) * mean / root, (mean, seen)


def _adam(theta: Tensor, memory: Memory, g: Tensor, s: Settings, step: int, fixed: bool) -> tuple[Tensor, Memory]:
    return _adam_step(theta, memory, g + s["weight_decay"] * theta, s, step, fixed)


def _adamw(theta: Tensor, memory: Memory, g: Tensor, s: Settings, step: int, fixed: bool) -> tuple[Tensor, Memory]:
    return _adam_step(theta * (1 - s["lr"] * s["weight_decay"]), memory, g, s, step, fixed)


_MOMENTS = ("exp_avg", "exp_avg_sq")
_OF_ADAM = ("lr", "beta1", "beta2", "eps", "weight_decay")
RULES: dict[type[torch.optim.Optimizer], Rule] = {
    torch.optim.SGD: Rule(
        ("momentum_buffer",), ("lr", "momentum", "dampening", "weight_decay", "nesterov"), ("maximize",), _sgd
    ),
    torch.optim.Adam: Rule(_MOMENTS, _OF_ADAM, ("amsgrad", "maximize", "decoupled_weight_decay"), _adam),
    torch.optim.AdamW: Rule(_MOMENTS, _OF_ADAM, ("amsgrad", "maximize"), _adamw),
}


def rule_of(optimizer: torch.optim.Optimizer) -> tuple[str, Rule]:
    """The rule of an optimiser, and its name.

    Raises:
        UnsupportedModel: if it is another one, or has a setting that is not written here.
    """
    kind, rule = type(optimizer), RULES.get(type(optimizer))
    name = kind.__name__
    if rule is None:
        message = (
            f"{name} is not among the optimisers whose step is known here: SGD, Adam and AdamW of torch.optim. Train "
            "with one of these to differentiate through it; scores at the end of any training are uw.explain(model, …)."
        )
        raise UnsupportedModel(message)
    on = sorted({one for group in optimizer.param_groups for one in rule.refused if group.get(one)})
    if on:
        shown = ", ".join(f"{one}=True" for one in on)
        message = (
            f"{name} with {shown} is not a step that is known here. Leave it off; AdamW decouples its weight decay."
        )
        raise UnsupportedModel(message)
    return name, rule


def rule_named(name: str) -> Rule:
    """The rule of an optimiser by its name."""
    return next(rule for kind, rule in RULES.items() if kind.__name__ == name)


def settings_of(group: Mapping[str, Any], rule: Rule) -> dict[str, float]:
    """The numbers of a parameter group that a rule reads.

    Raises:
        UnsupportedModel: if one of them is no number.
    """
    told = {**group, **dict(zip(("beta1", "beta2"), group.get("betas", ()), strict=False))}
    try:
        return {name: float(told[name]) for name in rule.settings}
    except (TypeError, ValueError, KeyError) as error:
        message = f"A parameter group has settings that are no numbers ({first_line(error)}). Use plain numbers."
        raise UnsupportedModel(message) from error


def joined(groups: Sequence[Mapping[str, float]], of_block: Sequence[int], sizes: Sequence[int]) -> dict[str, Number]:
    """The settings of all parameters: a number where groups agree, a vector where they do not.

    Args:
        groups: the settings of every parameter group.
        of_block: the group of every block.
        sizes: of the blocks.
    """
    found: dict[str, Number] = {}
    for name in groups[0]:
        values = [groups[group][name] for group in of_block]
        found[name] = (
            values[0]
            if len(set(values)) == 1
            else torch.cat(
                [torch.full((size,), value, dtype=torch.float64) for value, size in zip(values, sizes, strict=True)]
            )
        )
    return found


def shrunk(g: Tensor, most: float | None) -> Tensor:
    """By how much torch.nn.utils.clip_grad_norm_ shortens a gradient: a number up to 1."""
    return g.new_ones(()) if most is None else (most / (g.norm() + _CLIP_EPS)).clamp(max=1.0)


def slopes(outputs: Sequence[Tensor], inputs: Sequence[Tensor]) -> list[list[Tensor | None] | None]:
    """∂output/∂input of a step that treats every coordinate alone, a vector each.

    None stands for an input that an output does not depend on, and for an output that is held.
    """
    pulled = (calculus.pulled([one], inputs, [torch.ones_like(one)]) if one.requires_grad else None for one in outputs)
    return [None if found is None else [one if bool(one.any()) else None for one in found] for found in pulled]


def back_through(slopes: Sequence[Sequence[Tensor | None] | None], adjoints: Sequence[Tensor]) -> list[Tensor]:
    """The adjoints of the inputs of a step, p numbers each, from those of its outputs."""
    known = [(slope, adjoint) for slope, adjoint in zip(slopes, adjoints, strict=True) if slope is not None]
    found = []
    for k in range(len(known[0][0])):
        total: Tensor | None = None
        for slope, adjoint in known:
            factor = slope[k]
            if factor is not None:
                total = factor * adjoint if total is None else total.addcmul_(factor, adjoint)
        found.append(torch.zeros_like(adjoints[0]) if total is None else total)
    return found
