"""Equation 5: how a query's loss follows a small change of a training row's input."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from upweight.errors import TheoryWarning
from upweight.influence import scoring
from upweight.influence.system import System
from upweight.model import calculus


def of_perturbing(system: System, rows: Any, on: Any) -> Float[NDArray[np.float64], "q r ..."]:
    """−(wᵢ/n) ∇L(z_q)ᵀ (C + λI)⁻¹ ∇ₓ∇L(zᵢ) for every query and row: `Influence.of_perturbing`."""
    rows = system.examples.rows(rows)
    movable = system.encoder.movable(rows)
    S = scoring.solutions(system, system.queries(on)).x
    leaning = S.isnan().any(1)  # queries whose system has no solution
    S = torch.where(leaning[:, None], 0.0, S)

    def fields(batch: Any, w: Tensor) -> Tensor:
        gradient = calculus.input_gradients(system.objective, batch, S).double().cpu().movedim(0, 1)  # (b, q, *x)
        return gradient * w.reshape(-1, *[1] * (gradient.ndim - 1))

    moved = system.sweep.emit(fields, vectors=len(S), rows=rows, label="perturb")
    moved[:, leaning.numpy()] = np.nan
    left_open = system.undetermined
    if len(left_open.features):
        message = (
            f"Moving {', '.join(left_open.columns)} apart from each other settles coefficients that no row held "
            f"before ({left_open.why}), which is no small change: these columns are NaN. Drop one and fit again."
        )
        warnings.warn(message, TheoryWarning, stacklevel=3)
        moved[..., left_open.features] = np.nan
    return movable.widened(np.moveaxis(-moved / system.n, 0, 1))
