"""Scores in a folder: what they depend on, and whether the chunks that are there were computed from the same."""

from __future__ import annotations

import hashlib
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from upweight import __version__
from upweight.data.examples import PROBE_ROWS, Examples
from upweight.influence.scores import Scores
from upweight.influence.system import System
from upweight.model import calculus, per_row
from upweight.model.sweep import CHUNK
from upweight.runs.files import check_room
from upweight.runs.store import SCORES, SOLUTIONS, Store
from upweight.solvers import Solution


def folder(system: System, queries: Examples, measure: str, path: Any) -> Store:
    """The store of the removal scores of these queries.

    Raises:
        StoreMismatch: if the folder holds other work.
        StorageFailed: if the disk has no room for them.
    """
    store = Store(path, _fingerprint(system, queries, measure))
    finished = len(list(store.path.glob("chunk-*")))
    rows = max(0, system.n - finished * CHUNK)
    check_room(store.path, 8 * len(queries) * (rows + 3 * system.objective.size))
    return store


def opened(system: System, queries: Examples, measure: str, path: Any) -> AbstractContextManager[Store | None]:
    """The same store, taken for this process; None where no path is named."""
    return nullcontext() if path is None else folder(system, queries, measure, path)


def compared(system: System, folder: Store, solution: Solution) -> Solution:
    """The solution that the folder's chunks were computed with, if this is the same work.

    What a hash cannot compare (losses, gradients, solutions that differ by rounding) is compared by value.
    """
    folder.agree("damping", np.array([system.damping]), 1e-6)
    probe = system.examples.batch(system.examples.spread(PROBE_ROWS))
    folder.agree("losses", calculus.losses(system.objective, probe).double().cpu().numpy(), 1e-6)
    folder.agree("penalty_gradient", system.penalty_share.numpy(), 1e-6)
    scale = per_row.typical_row(system.sweep)  # keeps a gradient that is 0 up to rounding comparable
    gradient = np.append(system.risk_gradient.numpy(), scale)
    folder.agree("risk_gradient", gradient, 1e-3)
    rtol = min(1e-3, max(1e-6, 100 * float(solution.residual.max()))) if solution.replicas is None else 1e-6
    kept = folder.agree(SOLUTIONS, solution.x.numpy(), rtol)
    folder.end_state(None if solution.settled is None else solution.settled.numpy())
    return replace(solution, x=torch.from_numpy(kept))


def finish(folder: Store, scores: Scores) -> None:
    """Keep what belongs to the scores beside their values, which are the chunks times −scale."""
    arrays, card = scores.parts()
    del arrays["values"]
    folder.once(SCORES, lambda: arrays, card)


def theta(system: System) -> str:
    """A hash of θ̂."""
    return hashlib.sha256(system.objective.theta.numpy().tobytes()).hexdigest()[:16]


def work(system: System) -> dict[str, Any]:
    """What all answers depend on: θ̂, a probe of the data, n, curvature, damping, versions."""
    return {
        "theta": theta(system),
        "data": system.examples.fingerprint(),
        "n": system.n,
        "objective": system.objective.name,
        "penalty_per_example": system.objective.folded,
        "curvature": repr(system.curvature),
        "damping": "by default" if system.named_damping is None else system.named_damping,
        "versions": f"upweight {__version__}, torch {torch.__version__}",
    }


def _fingerprint(system: System, queries: Examples, measure: str) -> dict[str, Any]:
    """What scores on these queries depend on."""
    asked = {"queries": queries.fingerprint(), "measure": measure, "solver": repr(system.solver)}
    return work(system) | asked
