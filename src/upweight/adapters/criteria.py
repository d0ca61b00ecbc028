"""What a torch criterion does with a batch: how it weighs examples and positions, and whether it takes the mean.

A script minimises criterion(model(X), y) + penalty(θ). torch's mean of a weighted cross-entropy divides by the weights:

    Σ_t w[y_t] ℓ_t / Σ_t w[y_t]        over the positions t of all examples whose label is not `ignore_index`

which is R(θ) = (1/n) Σᵢ wᵢ L(zᵢ, θ) + r(θ) with Lᵢ the same mean over example i alone, cᵢ = Σ_{t in i} w[y_t] what
counts in it, and

    wᵢ = n cᵢ / Σⱼ cⱼ

so that class weights, ignored labels and means over tokens are weights of rows. A sum, Σᵢ Lᵢ + penalty, is n·R(θ) with
r = penalty/n. Leaving a row out of the script keeps the penalty beside a mean, so that the row takes its share of it
along (`penalty_per_example`), and beside a sum, where it takes nothing.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from upweight.errors import InvalidInput
from upweight.model.objective import L2

Criterion = Callable[[Tensor, Tensor], Tensor]
_OF_CLASSES: dict[Any, Callable[..., Tensor]] = {
    nn.CrossEntropyLoss: functional.cross_entropy,
    nn.NLLLoss: functional.nll_loss,
    functional.cross_entropy: functional.cross_entropy,
    functional.nll_loss: functional.nll_loss,
}
_SETTINGS = ("weight", "ignore_index", "label_smoothing")


@dataclass(frozen=True)
class Reduction:
    """A criterion, and what is known of how it reduces a batch.

    Args:
        criterion: as it was given, with its class weights in the precision of the outputs.
        total: whether it says that it takes the sum.
        summed: the sum over the counted positions of a batch; None where the criterion is not one of classes.
        weight: (K,) of the classes, or None.
        ignore_index: the label that is not counted.
        name: the criterion's own.
        by_rows: whether every example that counts at all counts alike: a mean of the examples' own means.
    """

    criterion: Criterion
    total: bool = False
    summed: Criterion | None = None
    weight: Tensor | None = None
    ignore_index: int = -100
    name: str = "criterion"
    by_rows: bool = False

    @classmethod
    def of(cls, criterion: Any) -> Reduction:
        """Read off the criterion: an object of torch.nn, a function of torch.nn.functional, or a partial of one."""
        function: Any = criterion
        settings: dict[str, Any] = {}
        if isinstance(criterion, nn.Module):
            function = type(criterion)
            settings = {name: getattr(criterion, name, None) for name in (*_SETTINGS, "reduction")}
        while isinstance(function, functools.partial) and not function.args:
            function, settings = function.func, {**function.keywords, **settings}
        reduction = settings.get("reduction") or "mean"
        named = _OF_CLASSES.get(function) if reduction in {"mean", "sum"} else None
        said = getattr(criterion, "__name__", type(criterion).__name__)
        if named is None:
            return cls(criterion, reduction == "sum", name=said)
        weight = settings.get("weight")
        others = {name: settings[name] for name in _SETTINGS[1:] if settings.get(name) is not None}

        def reducing(how: str) -> Criterion:
            def reduced(output: Tensor, target: Tensor) -> Tensor:
                own = None if weight is None else weight.to(output)
                if output.ndim > 2 and target.ndim == output.ndim - 1:  # classes last, as models make them
                    output, target = output.movedim(1, -1).flatten(0, -2), target.flatten()
                return named(output, target, weight=own, reduction=how, **others)

            return reduced

        if reduction == "sum":
            return cls(reducing("sum"), total=True, name=said)
        return cls(reducing("mean"), False, reducing("sum"), weight, int(others.get("ignore_index", -100)), said)

    def __call__(self, output: Tensor, target: Tensor) -> Tensor:
        """The criterion of a batch of one; 0 where nothing of it is counted, which torch calls NaN."""
        if self.summed is None or target.is_floating_point():
            return self.criterion(output, target)
        counted = self._weights(target).sum().to(output.dtype)
        return self.summed(output, target) / torch.where(counted > 0, counted, 1.0)

    def counts_alike(self, targets: Tensor) -> bool:
        """Whether these examples are one counted label each, of one weight: then torch's mean is a plain one."""
        plain = self.weight is None and targets.ndim == 1
        return self.summed is None or (plain and not bool((targets == self.ignore_index).any()))

    def counted(self, targets: Tensor) -> NDArray[np.float64]:
        """cᵢ of every example: how much of it is counted in a mean over the batch; ones where all count alike."""
        if self.summed is None or targets.is_floating_point():
            return np.ones(len(targets))
        counted = self._weights(targets).reshape(len(targets), -1).sum(1).double().cpu().numpy()
        return (counted > 0).astype(np.float64) if self.by_rows else counted

    def scale(self, counted: NDArray[np.float64]) -> float:
        """n/Σc, which makes weights of what the training rows count.

        Raises:
            InvalidInput: if no row counts.
        """
        if not counted.sum() > 0:
            message = (
                f"No row counts: every label is {self.ignore_index}, which the criterion ignores, or of a class of "
                "weight 0. Pass the labels that the model was trained on."
            )
            raise InvalidInput(message)
        return len(counted) / float(counted.sum())

    def taken(self, given: str | None) -> Reduction:
        """The same with the mean that training took: "tokens" or None, its own; "rows", a mean of means.

        Raises:
            InvalidInput: if it is neither, or the criterion has no labels to count.
        """
        if given not in {None, "tokens", "rows"}:
            message = (
                f"reduction={given!r} is no mean that is known. Pass reduction='tokens', a mean over all counted "
                "labels, or reduction='rows', a mean of the rows' own means."
            )
            raise InvalidInput(message)
        if given is not None and self.summed is None:
            message = (
                f"reduction={given!r} was given, and {self.name} does not say how labels count in it. "
                "Pass loss=torch.nn.CrossEntropyLoss(), whose labels are counted, or omit reduction: every row then "
                "weighs what sample_weight says."
            )
            raise InvalidInput(message)
        return replace(self, by_rows=given == "rows")

    def of_a_batch(self) -> Reduction:
        """The criterion's own, whatever training took the mean of."""
        return replace(self, by_rows=False)

    def plain(self) -> Reduction:
        """The criterion as it is, for examples that count alike."""
        return replace(self, summed=None)

    def penalty(self, given: Any, n: int) -> Any:
        """r of R, from what was added to the criterion."""
        if not self.total or given is None:
            return given
        if isinstance(given, L2):
            return given.scaled(1 / n)
        if isinstance(given, int | float | np.number):
            return float(given) / n

        def share(params: Any) -> Any:
            return given(params) / n

        return share if callable(given) else given  # what is neither is refused where it is used

    def penalty_per_example(self, given: bool | None) -> bool:
        """Whether a row that is left out takes its share of r along: beside a mean it does, beside a sum not."""
        return not self.total if given is None else given

    def _weights(self, target: Tensor) -> Tensor:
        """The weight of every label, 0 where it is ignored."""
        inside = target != self.ignore_index
        if self.weight is None:
            return inside.double()
        known = self.weight.to(target.device).double()
        return known[torch.where(inside, target, 0).clamp(0, len(known) - 1)] * inside


def is_criterion(module: nn.Module) -> bool:
    """Whether a module is a loss, and not a model."""
    return type(module).__module__ == nn.CrossEntropyLoss.__module__
