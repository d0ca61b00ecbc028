"""Whether a derivative through a training predicts what small changes of the weights really do."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float
from numpy.typing import NDArray

_AGREES, _SLOPES = 0.9, (0.5, 2.0)  # what the smallest of them must show


@dataclass(frozen=True)
class Locality:
    """What really happened when the weights of all rows were moved at random by ±ε, beside what was predicted.

    Args:
        sizes: (s,) the ε.
        correlation: (s,) of predicted and actual changes, over all queries and draws.
        slope: (s,) of actual on predicted.
        growth: by which factor the norm of the adjoint grew on its way back, largest over smallest.

    >>> import torch, upweight as uw
    >>> X, y = torch.linspace(-1, 1, 20)[:, None], torch.linspace(-1, 1, 20)[:, None] ** 3
    >>> model, criterion = torch.nn.Linear(1, 1), torch.nn.functional.mse_loss
    >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    >>> with uw.Recording(model, optimizer, X, y, loss=criterion) as recording:
    ...     for rows in torch.arange(20).split(5):
    ...         optimizer.zero_grad()
    ...         criterion(model(X[rows]), y[rows]).backward()
    ...         recording.batch(rows)
    ...         optimizer.step()
    >>> found = uw.through(recording).locality(X[:2], y[:2])
    >>> found.holds, round(float(found.slope[0]), 2)
    (True, 1.0)
    """

    sizes: Float[NDArray[np.float64], " s"]
    correlation: Float[NDArray[np.float64], " s"]
    slope: Float[NDArray[np.float64], " s"]
    growth: float

    @property
    def holds(self) -> bool:
        """Whether the derivative predicts what small changes really do."""
        low, high = _SLOPES
        return bool(self.correlation[0] >= _AGREES and low <= self.slope[0] <= high)

    def __str__(self) -> str:
        told = "; ".join(
            f"±{size:g}: r = {r:.2f}, slope = {slope:.2f}"
            for size, r, slope in zip(self.sizes, self.correlation, self.slope, strict=True)
        )
        return f"weights moved at random, really trained: {told}; the adjoint grew {self.growth:.3g}-fold"


def correlation_of(a: NDArray[np.float64], b: NDArray[np.float64]) -> float:
    """Pearson's, of all numbers; NaN where one does not move or is not finite."""
    if a.size < 2 or not a.std() or not b.std() or not np.isfinite(b).all():
        return float("nan")
    return float(np.corrcoef(a.ravel(), b.ravel())[0, 1])
