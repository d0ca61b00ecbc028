"""Whether two ways gave the same numbers: compared part by part, so that it takes no memory where they are many."""

from __future__ import annotations

import torch
from torch import Tensor

_PART = 2**22  # numbers that are compared at once, in float64


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
