"""torch modules: criterion(model(x[None]), y[None]) as the loss of one example, and the checks that make that true."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from upweight import calculus
from upweight.errors import InvalidInput, UpweightError
from upweight.examples import Examples
from upweight.influence import Influence, PlainEncoder
from upweight.objective import Objective
from upweight.trees import batch_length, leaves, take, tree_map

_PROBE = 8


def explain(
    model: torch.nn.Module,
    X: Any,
    y: Any = None,
    *,
    loss: Callable[[Tensor, Tensor], Tensor],
    penalty: float | Callable[[Any], Tensor] | None = None,
    parameters: Iterable[str] | Callable[[str], bool] | None = None,
    sample_weight: Any = None,
    penalty_per_example: bool | None = None,
    curvature: Any = None,
    solver: Any = None,
    damping: float | None = None,
    batch_size: int | None = None,
    progress: bool | None = None,
) -> Influence:
    """The Influence of a torch module on its training data.

    Weights of lower precision are evaluated in float64, where the module allows it, so that residuals mean something;
    the module itself is not touched. `Objective.from_module(..., dtype=…)` decides otherwise.

    Raises:
        InvalidInput: if the criterion is no mean (or sum) of single-example losses, or refuses the data.
        UnsupportedModel: if nothing can be differentiated, or the loss is random.
    """
    examples = X if isinstance(X, Examples) else Examples(X, y, sample_weight=sample_weight)
    probe = examples.batch(np.arange(min(_PROBE, len(examples))))
    if not isinstance(probe, tuple | list) or len(probe) != 2:
        message = (
            "A module is explained on (x, y) examples. Pass X and y, or a Dataset of (x, y); for other shapes "
            "write Objective(loss, params)."
        )
        raise InvalidInput(message)

    def build(criterion: Callable[[Tensor, Tensor], Tensor], dtype: torch.dtype | None) -> Objective:
        return Objective.from_module(
            model,
            criterion,
            penalty=penalty,
            penalty_per_example=penalty_per_example,
            parameters=parameters,
            dtype=dtype,
        )

    objective, criterion, dtype = _working(build, loss, probe)
    _refuse_other_reductions(model, criterion, objective, probe)
    encoder = PlainEncoder()
    influence = Influence(
        objective,
        examples,
        curvature=curvature,
        solver=solver,
        damping=damping,
        batch_size=batch_size,
        progress=progress,
        encoder=encoder,
    )
    if dtype is None and objective.reference.dtype != torch.float64:
        route = replace(
            influence.objective.route, reason=f"in {objective.reference.dtype}, for the module refuses float64"
        )
        influence.objective = replace(influence.objective, route=route)
    return influence


def _working(
    build: Callable[[Callable[[Tensor, Tensor], Tensor], torch.dtype | None], Objective],
    loss: Callable[[Tensor, Tensor], Tensor],
    probe: Any,
) -> tuple[Objective, Callable[[Tensor, Tensor], Tensor], torch.dtype | None]:
    """The first of a few equivalent readings of dtype and labels under which the loss of an example can be computed.

    Whole numbers stored as floats and as integers mean the same; which of them a criterion accepts is its own affair.
    """
    y = probe[1]
    casts: list[Callable[[Tensor], Tensor]] = [lambda target: target]
    if isinstance(y, Tensor) and y.is_floating_point() and bool((y == y.round()).all()):
        casts.append(lambda target: target.long())
    if isinstance(y, Tensor) and not y.is_floating_point():
        casts.append(lambda target: target.to(torch.get_default_dtype()))
    failures: list[Exception] = []
    for dtype in (torch.float64, None):
        for cast in casts:

            def criterion(output: Tensor, target: Tensor, cast: Callable[[Tensor], Tensor] = cast) -> Tensor:
                moved = cast(target)
                return loss(output, moved.to(output.dtype) if moved.is_floating_point() else moved)

            criterion.__name__ = getattr(loss, "__name__", type(loss).__name__)
            objective = build(criterion, dtype)
            try:
                with torch.random.fork_rng(devices=[]):
                    calculus.probe(objective, tree_map(lambda leaf: leaf[:2], probe))
            except UpweightError as error:
                failures.append(error)
                if isinstance(
                    error.__cause__, RuntimeError | TypeError | ValueError
                ) and "failed on one example" in str(error):
                    continue
                raise
            return objective, criterion, dtype
    raise failures[0]


def _refuse_other_reductions(
    model: torch.nn.Module, criterion: Callable[[Tensor, Tensor], Tensor], objective: Objective, probe: Any
) -> None:
    """The criterion on a batch must be the mean, or the sum, of its single-example values.

    Raises:
        InvalidInput: if it is neither, as with class weights, ignored labels or token means.
    """
    reference = objective.reference
    cast = tree_map(lambda leaf: leaf.to(reference.dtype) if leaf.is_floating_point() else leaf, probe)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter(
            "ignore"
        )  # a broadcasting criterion warns; its value then differs, which is what we look for
        singles = torch.stack([objective.loss(objective.params, take(cast, b)) for b in range(batch_length(cast))])
        try:
            rows = [objective.outputs(objective.params, take(cast, b)) for b in range(batch_length(cast))]  # type: ignore[misc]
            batch = criterion(torch.cat(rows), cast[1])
        except (RuntimeError, ValueError, TypeError) as error:
            message = (
                f"The criterion accepts one example but not a batch of {len(singles)} ({error}). Pass loss(output, "
                "target) that takes a batch."
            )
            raise InvalidInput(message) from error
    if batch.shape != ():
        message = (
            f"The criterion returns a tensor of shape {tuple(batch.shape)} for a batch; it must return one number. "
            "Use reduction='mean'."
        )
        raise InvalidInput(message)
    mean, total, value = float(singles.mean()), float(singles.sum()), float(batch)
    size = float(singles.abs().max()) + 1e-12
    if abs(value - mean) > 1e-5 * size and abs(value - total) > 1e-5 * size * len(singles):
        shapes = [tuple(leaf.shape) for leaf in leaves(cast[1])]
        message = (
            f"The criterion gives {value:.6g} for {len(singles)} examples whose single values have the mean "
            f"{mean:.6g} and the sum {total:.6g}. "
            "It weighs examples unequally (class weights, ignore_index, token means) or broadcasts outputs "
            f"{tuple(torch.cat(rows).shape)} against targets {shapes}. "
            f"Pass an unweighted criterion to {type(model).__name__} and put the weights into sample_weight; make "
            "output and target shapes equal."
        )
        raise InvalidInput(message)
