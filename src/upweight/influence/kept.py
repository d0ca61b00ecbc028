"""Scores in a folder: what they depend on, and whether the chunks that are there were computed from the same."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from upweight import __version__
from upweight.data.examples import PROBE_ROWS, Examples
from upweight.influence.scores import Scores
from upweight.influence.system import System
from upweight.model import calculus, per_row
from upweight.model.chunks import CHUNK
from upweight.runs import ranks, threads
from upweight.runs.files import check_room
from upweight.runs.store import SCORES, SOLUTIONS, Store, fingerprint
from upweight.solvers import CG, Solution, Solver

_CHUNK_BYTES = 2**24
_ROWS = "rows_of_a_chunk"  # in the manifest


def folder(system: System, queries: Examples, measure: str, path: Any, part: str = "", values: bool = True) -> Store:
    """The store of the removal scores of these queries, or of a part of them; of several ranks the first one leads.

    Args:
        system: whose scores they are.
        queries: on which.
        measure: what is measured of them.
        path: of the folder.
        part: of the work.
        values: whether the values of all rows will be written there.

    Raises:
        StoreMismatch: if the folder holds other work.
        StorageFailed: if the disk has no room for them.
    """
    chunks = span(system, len(queries))
    told = _fingerprint(system, queries, measure) | {_ROWS: chunks * CHUNK}
    follows = not ranks.first()

    def made() -> Store:
        store = Store(path, told, part=part, follows=follows, span=chunks)
        finished = len(list(store.path.glob("chunk-*")))
        rows = max(0, system.n - finished * chunks * CHUNK) if values else 0
        estimates = getattr(system.solver, "repeats", 0)
        solving = 0 if store.has(SOLUTIONS) else (3 + estimates) * system.objective.size
        check_room(store.path, 8 * len(queries) * (rows + solving))
        return store

    return ranks.after_first("opening the store", made)


def span(system: System, queries: int) -> int:
    """How many times 1,024 rows a chunk in a folder has.

    Once, where a model has to be evaluated for each row. A linear predictor's values are computed as fast as a disk
    takes them, and flushed every 16 MB; but at least four chunks are left, for processes that share them.
    """
    if system.objective.linear is None:
        return 1
    return max(1, min(_CHUNK_BYTES // (8 * CHUNK * queries), -(-system.n // CHUNK) // 4))


def span_in(path: Path) -> int:
    """The same of a folder that is there."""
    return int(fingerprint(path)[_ROWS]) // CHUNK


@contextmanager
def taken(store: Store) -> Iterator[None]:
    """Inside, a store belongs to this process, or to all ranks of its job."""
    with ExitStack() as stack:
        ranks.after_first("taking the store", lambda: stack.enter_context(store))
        stack.enter_context(threads.fixed())
        yield
        ranks.after_first("leaving the store", lambda: None)  # nobody reads what rank 0 has not written yet


@contextmanager
def opened(
    system: System, queries: Examples, measure: str, path: Any, *, values: bool = True
) -> Iterator[Store | None]:
    """The same store, taken for this process or job; None where no path is named."""
    if path is None:
        yield None
        return
    store = folder(system, queries, measure, path, values=values)
    with taken(store):
        yield store


def refuse_other_queries(queries: Examples, measure: str) -> None:
    """Raises if another process of the same job asks something else.

    Raises:
        InvalidInput: on every rank, naming the first that differs from rank 0.
    """
    facts = {"queries": queries.fingerprint, "measure": lambda: measure}
    ranks.refuse_others("comparing the queries of all ranks", lambda: {name: of() for name, of in facts.items()})


def compared(system: System, folder: Store, solution: Solution) -> Solution:
    """The solution that the folder's chunks were computed with, if this is the same work.

    What a hash cannot compare (λ, gradients, solutions that differ by rounding) is compared by value; losses were, by
    `compare_losses`, before anything was taken from the folder.
    """
    _agreed(folder, "damping", np.array([system.damping]), 1e-6)
    scale = per_row.typical_row(system.sweep)  # keeps a gradient that is 0 up to rounding comparable
    gradient = np.append(system.risk_gradient.numpy(), scale)
    _agreed(folder, "risk_gradient", gradient, 1e-3)
    rtol = rounding(solution.residual.numpy()) if solution.replicas is None else 1e-6
    kept = _agreed(folder, SOLUTIONS, solution.x.numpy(), rtol)
    if ranks.first():
        folder.end_state({name: x.numpy() for name, x in solution.looked.items()})
    return replace(solution, x=torch.from_numpy(kept))


def compare_losses(system: System, folder: Store) -> None:
    """Raises if the folder's chunks were computed with another damping, or another loss or penalty of the same name.

    A damping that is not known yet is not made for this.

    Raises:
        StoreMismatch: if λ, the losses of a few rows, or what a row carries of the penalty, are others.
    """
    if system.known_damping is not None:
        _agreed(folder, "damping", np.array([system.known_damping]), 1e-6)
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


def finish(folder: Store, scores: Scores, name: str = SCORES, **told: Any) -> None:
    """Keep what belongs to the scores beside their values, which are the chunks times −scale."""
    arrays, card = scores.parts()
    del arrays["values"]
    if ranks.first():
        folder.once(name, lambda: arrays, card | told)


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
    asked = {"queries": queries.fingerprint(), "measure": measure, "solver": _in_words(system.begun_with)}
    return work(system) | asked


def _in_words(solver: Solver) -> str:
    """A solver without the number of products that end it: with more of them the same work goes on."""
    return repr(replace(solver, max_sweeps=CG.max_sweeps) if isinstance(solver, CG) else solver)
