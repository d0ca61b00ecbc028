"""Whether two ways gave the same numbers: compared part by part, so that it takes no memory where they are many."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from upweight.data.trees import take
from upweight.model import calculus
from upweight.model.objective import Objective

_PART = 2**22  # numbers that are compared at once, in float64
_DOUBLE, _SINGLE_INSIDE, _LOWER = 1e-8, 1e-5, 1e-3  # what is rounding, of the largest number


def agree(ours: Tensor, truth: Tensor, rtol: float) -> bool:
    """|ours − truth| ≤ rtol (|truth| + max |truth| + 10⁻¹²) for all numbers; NaN agrees with nothing.

    >>> agree(torch.tensor([1.0, 1e-9]), torch.tensor([1.0, 0.0]), 1e-8)
    True
    >>> agree(torch.tensor([1.0, 1e-7]), torch.tensor([1.0, 0.0]), 1e-8)
    False
    """
    if ours.shape != truth.shape:
        return False
    if not truth.numel():
        return True
    lowest, highest = truth.aminmax()
    floor = rtol * (max(abs(float(lowest)), abs(float(highest))) + 1e-12)
    parts = zip(ours.reshape(-1).split(_PART), truth.reshape(-1).split(_PART), strict=True)
    return all(torch.allclose(a.double(), b.double(), rtol=rtol, atol=floor) for a, b in parts)


def tolerance(objective: Objective, batch: Any) -> float:
    """How far two ways to the derivatives of an objective lie apart by rounding alone, relative to the largest number.

    A model may compute in less than its precision, as norms of language models do in float32 whatever they are given:
    then a last bit of float64 decides now and then over one of float32.  Cost: one forward pass of one example.
    """
    if objective.reference.dtype != torch.float64:
        return _LOWER
    with torch.enable_grad():
        loss = objective.loss(calculus.leaves_of(objective), take(calculus.ready(objective, batch), 0))
    lowest = min((dtype.itemsize for dtype in _precisions(loss)), default=8)
    return _DOUBLE if lowest == 8 else _SINGLE_INSIDE if lowest == 4 else _LOWER


def _precisions(loss: Tensor) -> set[torch.dtype]:
    """Those of all that the loss was computed from and that depends on a parameter.

    >>> x = torch.ones(2, dtype=torch.float64, requires_grad=True)
    >>> sorted(map(str, _precisions(x.float().square().double().sum())))
    ['torch.float32', 'torch.float64']
    """
    waiting, seen, found = [loss.grad_fn], set(), set()
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        found |= {made.dtype for made in getattr(node, "_input_metadata", ())}
        waiting.extend(parent for parent, _ in node.next_functions)
    return found
