"""What single rows and queries give: their gradients, their measures, and how much a typical row moves ∇R."""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from upweight.model import calculus, layers
from upweight.model.sweep import Sweep

_SAMPLED_ROWS = 256


def gradients(sweep: Sweep, rows: NDArray[np.int64] | None = None) -> Float[Tensor, "k p"]:
    """∇L of examples, or ∇f of queries; without penalty."""
    one = sweep.objective
    values = sweep.emit(
        lambda batch, _: layers.gradients(one, batch), vectors=width(sweep), rows=rows, label="gradients"
    )
    return torch.from_numpy(values)


def measures(sweep: Sweep) -> Float[NDArray[np.float64], " q"]:
    """The measure of every query now; of a smooth stand-in the loss that it stands for."""
    reported = sweep.objective.reporting()
    return sweep.emit(lambda batch, _: calculus.losses(reported, batch), label="query measures")


def typical_row(sweep: Sweep) -> float:
    """rms(wᵢ‖∇Lᵢ‖/n): how much one row moves ∇R, over rows spread through the data; never 0."""
    rows = sweep.examples.spread(_SAMPLED_ROWS)
    squares = sweep.emit(
        lambda batch, _: layers.squares(sweep.objective, batch), vectors=width(sweep), rows=rows, label="typical row"
    )
    return max(float(np.sqrt(np.mean(squares * sweep.examples.weights[rows] ** 2))) / sweep.n, 1e-300)


def rows_from_minimum(sweep: Sweep, gradient: Float[Tensor, " p"]) -> float:
    """‖∇R‖ in units of one row's effect on it, over rows spread through the data."""
    return float(gradient.norm()) / typical_row(sweep)


def width(sweep: Sweep) -> int:
    """How many vectors' memory a row of p gradients is worth."""
    pieces = layers.vectors(sweep.objective, sweep.example_bytes)
    return 1 + pieces + 16 * sweep.objective.size // sweep.example_bytes
