"""How stored numbers are read: in which precision, and whether whole numbers are classes or floats, found by trying."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from upweight.adapters.criteria import Criterion
from upweight.data.arrays import as_tensor
from upweight.data.stored import Stored
from upweight.data.trees import leaves, tree_map
from upweight.errors import InvalidInput, UnsupportedModel, UpweightError
from upweight.model import routes
from upweight.model.objective import Objective


@dataclass(frozen=True)
class Reading:
    """How stored numbers are read: whole numbers in floats and in integers mean the same, but modules are particular.

    Args:
        dtype: precision of weights and inputs; None keeps the module's own.
        x_floats: integer inputs are turned into floats.
        y_kind: "kept", "class" (int64 class numbers) or "float".
    """

    dtype: torch.dtype | None
    x_floats: bool
    y_kind: str

    def criterion(self, loss: Criterion, name: str = "criterion") -> Criterion:
        """`loss` on targets of this reading; also reads those that a Dataset returns."""

        def read(output: Tensor, target: Tensor) -> Tensor:
            target = self._target(target)
            return loss(output, target.to(output.dtype) if target.is_floating_point() else target)

        read.__name__ = name
        return read

    def batch(self, batch: Any) -> tuple[Any, Tensor]:
        """(x, y) as this reading has them."""
        return tree_map(self._input, batch[0]), self._target(batch[1])

    def inputs(self, X: Any) -> Any:
        """Stored inputs as this reading has them."""
        if not self.x_floats:
            return X
        if isinstance(X, Stored):  # whose blocks are cast when they are read
            return X if X.dtype.kind == "f" else X.mapped(lambda block: block.astype(np.float64))
        return self._input(as_tensor(X))

    def labels(self, y: Any) -> Any:
        """Stored targets as this reading has them.

        Raises:
            InvalidInput: if class numbers are wanted and a target is not a whole number.
        """
        if y is None or self.y_kind == "kept":
            return y
        target = as_tensor(y)
        if self.y_kind == "class" and target.is_floating_point() and not bool((target == target.round()).all()):
            wrong = float(target[target != target.round()].flatten()[0])
            message = (
                f"y holds {wrong:g}, which is no class number, and the criterion wants whole class numbers 0 … K−1. "
                "Encode the labels, or use a regression loss."
            )
            raise InvalidInput(message)
        return self._target(target)

    def _input(self, x: Any) -> Any:
        floats = not self.x_floats or not isinstance(x, Tensor) or x.is_floating_point()
        return x if floats else x.to(torch.float64)

    def _target(self, y: Tensor) -> Tensor:
        if self.y_kind == "class":
            return y.long()
        return y.to(torch.float64) if self.y_kind == "float" and not y.is_floating_point() else y


def working(
    build: Callable[[Reading], Objective], readings: Iterable[Reading], probe: Any
) -> tuple[Reading, Objective]:
    """The first reading under which the loss of an example can be computed and differentiated.

    Raises:
        InvalidInput: if there is none; the text is that of the plainest reading.
    """
    failures: list[UpweightError] = []
    few = tree_map(lambda leaf: leaf[:2], probe)
    for reading in readings:
        objective = build(reading)
        try:
            with torch.random.fork_rng(devices=[]):
                routes.tried(objective, reading.batch(few))
        except UpweightError as error:
            if not isinstance(error.__cause__, RuntimeError | TypeError | ValueError | IndexError):
                raise
            failures.append(error)
            continue
        return reading, objective
    raise next((error for error in failures if isinstance(error, UnsupportedModel)), failures[0])


def readings(probe: Any, precision: torch.dtype) -> Iterable[Reading]:
    """The readings to try, the likeliest first."""
    y = probe[1]
    if y.is_floating_point():
        kinds = ["kept", "class"] if bool((y == y.round()).all()) else ["kept"]
    else:
        kinds = ["float", "class"]  # a criterion that takes them as floats is a regression; class numbers it refuses
    integers = all(isinstance(leaf, Tensor) and not leaf.is_floating_point() for leaf in leaves(probe[0]))
    for dtype in (precision, None):
        for x_floats in (False, True) if integers else (False,):
            for kind in kinds:
                yield Reading(dtype, x_floats, kind)
