"""Whether a derivative through a training predicts what small changes of the weights really do."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from upweight.model import per_row
from upweight.model.objective import Objective
from upweight.training.backwards import Backwards

SIZES = (1e-3, 1e-2, 1e-1)  # by how much weights are moved
PAIRS = 12  # of predicted and actual changes at least, for a correlation that says something
_AGREES, _SLOPE = 0.9, 2.0  # what each of them must show


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
        """Whether the derivative predicts what changes of all these sizes really do."""
        return self.agrees(_AGREES, _SLOPE)

    def agrees(self, correlation: float, slope: float) -> bool:
        """Whether all sizes show at least this correlation, and a slope within 1/slope and slope."""
        near = (self.slope >= 1 / slope) & (self.slope <= slope)
        return bool((self.correlation >= correlation).all() and near.all())

    def __str__(self) -> str:
        told = "; ".join(
            f"±{size:g}: r = {r:.2f}, slope = {slope:.2f}"
            for size, r, slope in zip(self.sizes, self.correlation, self.slope, strict=True)
        )
        return f"weights moved at random, really trained: {told}; the adjoint grew {self.growth:.3g}-fold"


@dataclass(frozen=True)
class Moved:
    """Trainings with all weights moved at random from a step on, each run once and kept for whoever asks.

    Args:
        way: the training.
        since: from which step on the weights are other ones.
        seed: of the signs.
        ends: what is known: θ by the number of the draw and the move.
    """

    way: Backwards
    since: int
    seed: int = 0
    ends: dict[tuple[int, float], Tensor] = field(default_factory=dict, repr=False)

    def signs(self, draws: int) -> NDArray[np.float64]:
        """(draws, n) of ±1; more draws begin with those of fewer."""
        draw = np.random.default_rng(self.seed)
        return draw.choice([-1.0, 1.0], size=(draws, self.way.influence.n))

    def compared(
        self,
        measured: Objective,
        queries: Any,
        values: NDArray[np.float64],
        growth: float,
        draws: int,
        sizes: tuple[float, ...] = SIZES,
    ) -> Locality:
        """What the trainings did to queries, beside what values predict."""
        signs = self.signs(draws)
        predicted = -values @ signs.T  # (q, draws) for ε = 1
        correlation, slope = [], []
        for size in sizes:
            actual = np.stack([self._change(measured, queries, signs, d, size) for d in range(draws)], 1) / size
            correlation.append(correlation_of(predicted, actual))
            slope.append(float((predicted * actual).sum() / max((predicted**2).sum(), 1e-300)))
        return Locality(np.array(sizes), np.array(correlation), np.array(slope), growth)

    def _change(
        self, measured: Objective, queries: Any, signs: NDArray[np.float64], draw: int, size: float
    ) -> NDArray[np.float64]:
        """(f(1 + ε s) − f(1 − ε s))/2 of one draw s."""
        sides = []
        for move in (size, -size):
            if (draw, move) not in self.ends:
                weights = torch.from_numpy(1.0 + move * signs[draw])
                self.ends[draw, move] = self.way.ended(weights, self.since)
            end = self.ends[draw, move]
            sides.append(per_row.measures(self.way.influence.sweep.over(measured.at(end), queries)))
        return (sides[0] - sides[1]) / 2


def draws_for(queries: int) -> int:
    """How many draws make enough pairs of so many queries."""
    return -(-PAIRS // queries)


def correlation_of(a: NDArray[np.float64], b: NDArray[np.float64]) -> float:
    """Pearson's, of all numbers; NaN where one does not move or is not finite."""
    if a.size < 2 or not a.std() or not b.std() or not (np.isfinite(a).all() and np.isfinite(b).all()):
        return float("nan")
    return float(np.corrcoef(a.ravel(), b.ravel())[0, 1])
