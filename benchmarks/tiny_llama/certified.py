"""Question: does solving the damped Gauss–Newton system itself predict retraining better than EKFAC does?

The fine-tuned tiny Llama of `llama`, its 20 queries, all 260,032 parameters, and the halves of `retrained`. The
curvature is the exact Gauss–Newton matrix of every fifth sequence (200 of 1,000: a product of 20 vectors takes 25
processor seconds, five times that with all), solved by block CG with EKFAC as its preconditioner until the values have
settled to 1 % (`settled`, an estimate; the residual that is left is stated). Beside it EKFAC of the same 200 sequences
at the same damping. Scores of all 1,000 rows are those of adding each of them, with the sign turned round.

    UPWEIGHT_DATA=… python benchmarks/tiny_llama/certified.py  # results/certified.json; goes on where it was

One thread. Values that are finished are kept in $CERTIFIED (default: a folder under the system's temporary one).
"""

from __future__ import annotations

import json
import os
import resource
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from llama import rows, tuned
from methods import judged, truth
from numpy.typing import NDArray
from retrained import RESULTS, ROWS

import upweight as uw
from upweight.operators import EKFAC, GaussNewton
from upweight.solvers import CG, Preconditioned

EVERY, SETTLED = 5, 0.01
FRACTIONS = (100.0, 30.0, 10.0, 3.0)  # of the mean eigenvalue: dampings, the quickest to solve first
FOLDER = Path(os.environ.get("CERTIFIED", Path(tempfile.gettempdir()) / "upweight-certified"))


def solved(name: str, influence: uw.Influence, train: list[Any], queries: list[Any]) -> tuple[NDArray[Any], Any]:
    """Scores (q, n) of all rows and what it took; read again where they are finished."""
    file = FOLDER / f"{name}.npz"
    if not file.exists():
        start, wall = time.process_time(), time.perf_counter()
        scores = influence.of_adding(train, on=queries, store=FOLDER / f"{name}.state")
        certificate = scores.certificate
        gap = certificate.preconditioner_gap
        told = {
            "processor seconds": round(time.process_time() - start, 1),
            "seconds on the wall": round(time.perf_counter() - wall, 1),
            "products": certificate.sweeps,
            "largest residual": float(certificate.residual.max()),
            "still to come to the values (estimated)": None
            if certificate.settled is None
            else float(certificate.settled.max()),
            "still to come to the values (proven, at most)": None
            if certificate.settled_bound is None
            else float(certificate.settled_bound.max()),
            "distance of the preconditioner alone": None if gap is None else [float(gap.min()), float(gap.max())],
        }
        np.savez(file, values=-scores.values, told=json.dumps(told))
        print(name, told, flush=True)
    with np.load(file) as found:
        return found["values"], json.loads(str(found["told"]))


def likeness(A: NDArray[Any], B: NDArray[Any]) -> list[float]:
    """Pearson's r of every query's values: smallest and mean."""
    each = [float(np.corrcoef(a, b)[0, 1]) for a, b in zip(A, B, strict=True)]
    return [round(min(each), 3), round(float(np.mean(each)), 3)]


def main() -> None:
    """Solve at every damping, and judge beside EKFAC."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    FOLDER.mkdir(parents=True, exist_ok=True)
    train, queries = rows("train", ROWS), rows("query")
    model, part = tuned(np.arange(ROWS), 0), rows("train", ROWS)[::EVERY]
    numbers, actual, _ = truth()
    mean = float(uw.explain(model, part, curvature=EKFAC(samples=1), damping=1e-3).operator.eigenvalues.mean())
    lines: dict[str, Any] = {}
    for fraction in FRACTIONS:
        name, damping = f"{fraction:g} × mean eigenvalue", fraction * mean
        near = uw.explain(model, part, curvature=EKFAC(samples=1), damping=damping)
        solver = CG(settled=SETTLED, preconditioner=Preconditioned(EKFAC(samples=1)))
        exact = uw.explain(model, part, curvature=GaussNewton(), damping=damping, solver=solver)
        approximate, cheap = solved(f"EKFAC {fraction:g}", near, train, queries)
        values, told = solved(f"exact {fraction:g}", exact, train, queries)
        lines[f"EKFAC of 200, λ = {name}"] = judged(approximate, numbers, actual) | cheap
        lines[f"Gauss–Newton of 200, solved, λ = {name}"] = (
            judged(values, numbers, actual)
            | told
            | {"Pearson with EKFAC, smallest and mean": likeness(values, approximate)}
        )
        report = {
            "settings": {
                "rows": ROWS,
                "rows of the curvature": len(part),
                "settled": SETTLED,
                "mean eigenvalue": mean,
                "halves": len(numbers),
            },
            "peak memory in MB": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024),
            "methods": lines,
        }
        text = json.dumps(report, indent=1, ensure_ascii=False)
        (RESULTS / "certified.json").write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    main()
