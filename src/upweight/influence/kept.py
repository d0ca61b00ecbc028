"""Scores in a folder: what they depend on, and whether the chunks that are there were computed from the same."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from upweight import __version__
from upweight.data.examples import PROBE_ROWS, Examples
from upweight.influence.system import System
from upweight.model import calculus, per_row
from upweight.runs import ranks
from upweight.runs.store import SOLUTIONS, Store
from upweight.solvers import Solution


def folder(system: System, queries: Examples, measure: str, path: Any, damping: float | None = None) -> Store:
    """The store of the removal scores of these queries; λ is the system's, unless it is known from elsewhere.

    Raises:
        StoreMismatch: if the folder holds other work.
    """
    fingerprint = _fingerprint(system, queries, measure, system.damping if damping is None else damping)
    return ranks.after_first("opening the store", lambda: Store(path, fingerprint))


def compared(system: System, folder: Store, solution: Solution) -> Solution:
    """The solution that the folder's chunks were computed with, if this is the same work.

    What a hash cannot compare (losses, gradients, solutions that differ by rounding) is compared by value.
    """
    compare_losses(system, folder)
    scale = per_row.typical_row(system.sweep)  # keeps a gradient that is 0 up to rounding comparable
    gradient = np.append(system.risk_gradient.numpy(), scale)
    _agreed(folder, "risk_gradient", gradient, 1e-3)
    rtol = rounding(solution.residual.numpy()) if solution.replicas is None else 1e-6
    kept = _agreed(folder, SOLUTIONS, solution.x.numpy(), rtol)
    if ranks.first():
        folder.end_state(None if solution.settled is None else solution.settled.numpy())
    return replace(solution, x=torch.from_numpy(kept))


def compare_losses(system: System, folder: Store) -> None:
    """Raises if the folder's chunks were computed with another loss or penalty of the same name.

    Raises:
        StoreMismatch: if the losses of a few rows, or what a row carries of the penalty, are others.
    """
    probe = system.examples.batch(system.examples.spread(PROBE_ROWS))
    _agreed(folder, "losses", calculus.losses(system.objective, probe).double().cpu().numpy(), 1e-6)
    _agreed(folder, "penalty_gradient", system.penalty_share.numpy(), 1e-6)


def rounding(residual: NDArray[np.float64]) -> float:
    """How far, relative to their size, two solutions of the same systems may be apart that leave such residuals."""
    return min(1e-3, max(1e-6, 100 * float(residual.max())))


def _agreed(folder: Store, name: str, array: NDArray[np.float64], rtol: float) -> NDArray[np.float64]:
    """What rank 0 agrees on with the folder."""
    found = ranks.by_first(f"comparing {name}", lambda: {name: folder.agree(name, array, rtol)})
    assert found is not None  # the function gave it
    return found[name]


def theta(system: System) -> str:
    """A hash of θ̂."""
    return hashlib.sha256(system.objective.theta.numpy().tobytes()).hexdigest()[:16]


def work(system: System, damping: float) -> dict[str, Any]:
    """What all answers depend on: θ̂, a probe of the data, n, curvature, damping, versions."""
    return {
        "theta": theta(system),
        "data": system.examples.fingerprint(),
        "n": system.n,
        "objective": system.objective.name,
        "penalty_per_example": system.objective.folded,
        "curvature": repr(system.curvature),
        "damping": damping,
        "versions": f"upweight {__version__}, torch {torch.__version__}",
    }


def _fingerprint(system: System, queries: Examples, measure: str, damping: float) -> dict[str, Any]:
    """What scores on these queries depend on."""
    asked = {"queries": queries.fingerprint(), "measure": measure, "solver": repr(system.solver)}
    return work(system, damping) | asked
