"""Claim: the default is never slower than the best explicit choice by more than a third, nor than a plain solver.

Linear models of the tests' grid (`tests/grid.py`), dense and sparse, well and badly conditioned: seconds of a
processor, on one thread, of the whole question, from the model to the values, for the default, every explicit solver
and ten lines of NumPy or SciPy. Each is the least of its turns; what has no answer, or takes four times as long as the
default, is left out. A tenth of a second is no difference: a factor serves the next question too.

    python benchmarks/defaults_cannot_lose.py        # → results/defaults_cannot_lose.json
"""

from __future__ import annotations

import signal
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from common import report

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

from grid import CHOICES, Problem, Shape, plain, problem
from upweight.errors import SolverError
from upweight.solvers import CG

TURNS, RATIO, NO_DIFFERENCE, PATIENCE = 2, 1.3, 0.1, 4.0
SHAPES = (
    Shape(100, 100),
    Shape(100, 10_000),
    Shape(100, 100_000, bad=True),
    Shape(1000, 100, 20, bad=True),
    Shape(5000, 1000, 3, sparse=True),
    Shape(20_000, 3000, sparse=True),
    Shape(20_000, 3000, sparse=True, bad=True),
    Shape(2000, 5000, sparse=True, bad=True, queries=5),
    Shape(20_000, 400),
    Shape(20_000, 400, bad=True),
    Shape(100_000, 100),
    Shape(10_000, 400, queries=20),
    Shape(10_000, 400, 5),
    Shape(2000, 10_000, sparse=True, bad=True),
    Shape(4000, 1000, bad=True),
    Shape(1000, 10_000),
    Shape(20_000, 800, 5),
    Shape(100_000, 100, bad=True),
    Shape(20_000, 100, 20, bad=True),
    Shape(100_000, 100_000, sparse=True),
)


class TooLong(Exception):
    """It was stopped."""


@contextmanager
def at_most(seconds: float) -> Iterator[None]:
    """Stops what takes longer on the processor."""

    def stop(*_: Any) -> None:
        raise TooLong

    before = signal.signal(signal.SIGVTALRM, stop)
    signal.setitimer(signal.ITIMER_VIRTUAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)


def busy(function: Callable[[], Any], most: float) -> float | None:
    """Seconds of the processor; None where it has no answer, or takes too long."""
    start = time.process_time()
    try:
        with at_most(most):
            function()
    except (SolverError, TooLong):
        return None
    return max(time.process_time() - start, 1e-6)


def measured(found: Problem) -> dict[str, Any]:
    """Least seconds of each, and how the default stands."""
    first = busy(found.values, 60.0)
    assert first is not None, found.shape
    most = PATIENCE * first + 1
    ways: dict[str, Callable[[], Any]] = {"default": found.values, "plain": lambda: plain(found, 2000)}
    for name, choice in CHOICES.items():
        rows = found.shape.n * found.shape.K
        large = {"Cholesky": found.shape.p, "Dual": rows}.get(name, 0)
        if large > 8000 or large**3 / 3 / 30e9 > most:
            continue
        one = replace(choice, max_sweeps=5000) if isinstance(choice, CG) else choice
        ways[name] = lambda one=one: found.values(one)
    least: dict[str, float] = {}
    for turn in range(TURNS):
        for name in list(ways):
            taken = busy(ways[name], most)
            if taken is None:
                del ways[name]
            else:
                least[name] = min(taken, least.get(name, taken))
        if turn == 0 and sum(least.values()) > 5:  # seconds tell enough
            break
    ours, rest = least.pop("default"), {name: taken for name, taken in least.items() if name in ways}
    own = {name: taken for name, taken in rest.items() if name != "plain"}
    best = min(own, key=own.__getitem__) if own else None
    holds = best is None or ours <= max(RATIO * own[best], own[best] + NO_DIFFERENCE)
    return {
        "default_chose": found.values().certificate.solver.split("(")[0],
        "seconds": {"default": ours, **rest},
        "best_explicit_choice": best,
        "default_over_best": None if best is None else ours / own[best],
        "default_over_plain": ours / rest["plain"] if "plain" in rest else None,
        "law_holds": holds and ("plain" not in rest or ours <= rest["plain"] + NO_DIFFERENCE),
    }


def main() -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    problem(Shape(100, 10)).values()  # what is imported when it is first needed
    settings = {"turns": TURNS, "ratio": RATIO, "no_difference_seconds": NO_DIFFERENCE, "threads": 1}
    cells: dict[str, Any] = {}
    for shape in SHAPES:  # what is known is written down each time
        cells[str(shape)] = measured(problem(shape))
        kept = [cell["law_holds"] for cell in cells.values()]
        report(__file__, settings, {"cells": cells, "law_holds": sum(kept), "of": len(kept)})


if __name__ == "__main__":
    main()
