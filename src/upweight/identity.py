"""The identity of cached work: what scores depend on, and whether a folder's chunks were computed from the same."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from upweight import calculus, scoring
from upweight.examples import PROBE_ROWS, Examples
from upweight.solvers import Solution
from upweight.store import Store

if TYPE_CHECKING:
    from upweight.influence import Influence


def fingerprint(influence: Influence, queries: Examples, measure: str) -> dict[str, Any]:
    """What scores on these queries depend on: θ̂, a probe of the data, n, curvature, solver, damping, versions."""
    import upweight

    return {
        "theta": hashlib.sha256(influence.objective.theta.numpy().tobytes()).hexdigest()[:16],
        "data": influence.examples.fingerprint(),
        "queries": queries.fingerprint(),
        "n": influence.n,
        "objective": influence.objective.name,
        "measure": measure,
        "penalty_per_example": influence.objective.folded,
        "curvature": repr(influence.curvature),
        "solver": repr(influence.solver),
        "damping": influence.damping,
        "versions": f"upweight {upweight.__version__}, torch {torch.__version__}",
    }


def compared(influence: Influence, folder: Store, solution: Solution) -> Solution:
    """The solution that the folder's chunks were computed with, if this is the same work.

    What a hash cannot compare (losses, gradients, solutions that differ by rounding) is compared by value.
    """
    probe = influence.examples.batch(influence.examples.spread(PROBE_ROWS))
    folder.agree("losses", calculus.losses(influence.objective, probe).double().cpu().numpy(), 1e-6)
    folder.agree("penalty_gradient", influence.penalty_share.numpy(), 1e-6)
    scale = scoring.typical_row(influence.sweep)  # keeps a gradient that is 0 up to rounding comparable
    gradient = np.append(influence.risk_gradient.numpy(), scale)
    folder.agree("risk_gradient", gradient, 1e-3)
    rtol = min(1e-3, max(1e-6, 100 * float(solution.residual.max()))) if solution.replicas is None else 1e-6
    kept = folder.agree("solutions", solution.x.numpy(), rtol)
    return replace(solution, x=torch.from_numpy(kept))
