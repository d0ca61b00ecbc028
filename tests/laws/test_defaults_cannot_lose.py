"""The default costs at most 1.3 times the best explicit choice, and no more than the plain solver of ten lines.

Counted in operations and bytes as they happen (`counted`), of the whole question, from the model to the values, on
linear models of many shapes (`grid`). Differences of a tenth of a second on the machine that counts are none: a
factor serves the next question too. In seconds: benchmarks/defaults_cannot_lose.py.
"""

from __future__ import annotations

import warnings
from dataclasses import replace

import numpy as np
import pytest
import scipy.sparse

from counted import BYTES, FLOPS, counting
from grid import CHOICES, Shape, plain, problem
from upweight import defaults
from upweight.errors import SolverError
from upweight.solvers import CG, Cholesky, Dual, Plain

RATIO, NO_DIFFERENCE = 1.3, 0.1
SHAPES = [
    Shape(1000, 100),
    Shape(100, 5000),
    Shape(100, 5000, bad=True),
    Shape(5000, 60, 5, bad=True),
    Shape(10_000, 300),
    Shape(1000, 100, 10, bad=True),
    Shape(10_000, 3000, sparse=True),
    Shape(10_000, 3000, sparse=True, bad=True),
    Shape(2000, 5000, sparse=True, bad=True, queries=5),
    Shape(5000, 1000, 3, sparse=True),
]
LARGE = [
    Shape(100, 100_000),
    Shape(1000, 10_000, bad=True),
    Shape(4000, 1000, bad=True),
    Shape(10_000, 400, 5),
    Shape(10_000, 1000, queries=20),
    Shape(20_000, 400, bad=True),
    Shape(20_000, 400, queries=20),
    Shape(20_000, 800, 5),
    Shape(20_000, 100, 20, bad=True),
    Shape(100_000, 100),
    Shape(100_000, 100, bad=True),
    Shape(2000, 10_000, sparse=True),
    Shape(20_000, 20_000, sparse=True, bad=True),
    Shape(100_000, 100_000, sparse=True),
    Shape(10_000, 100_000, 5, sparse=True),
]


def counted(found, solver=None):
    """Seconds on the machine that counts, and the scores; infinite and None where the solver gives none."""
    with counting() as cost, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            scores = found.values(solver)
        except SolverError:
            return np.inf, None
    return cost.seconds, scores


def least(shape, solver):
    """A bound from below, so that what cannot be the best is not run."""
    rows = shape.n * shape.K
    cube = {Cholesky: shape.p, Dual: rows}.get(type(solver), 0)
    return cube**3 / 3 / FLOPS if cube <= 8000 else np.inf


def of_a_product(found):
    """The plain solver's: it reads X forth and back."""
    K = found.shape.K
    if scipy.sparse.issparse(found.X):
        return 2 * (12 + 8 * K) * found.X.nnz / BYTES
    return max(4 * K * found.X.size / FLOPS, 16 * found.X.size / BYTES)


def check(shape):
    found = problem(shape)
    ours, scores = counted(found)
    assert scores is not None
    allowed = ours / RATIO - NO_DIFFERENCE
    product = of_a_product(found)
    for name, choice in CHOICES.items():
        if least(shape, choice) > ours or (shape.sparse and "two-level" in name):  # whose inner products cost as much
            continue
        tried = replace(choice, max_sweeps=3 + int(4 * ours / product)) if isinstance(choice, CG) else choice
        theirs, other = counted(found, tried)
        assert theirs >= allowed, f"{name}: {theirs:.3g} s, default {scores.certificate.solver}: {ours:.3g} s"
        if other is not None:
            np.testing.assert_allclose(other.values, scores.values, atol=1e-3 * np.abs(scores.values).max())
    most = 3 + int(ours / product)
    values, products = plain(found, most)
    assert (products + shape.queries) * product >= ours - NO_DIFFERENCE
    if products < most:
        np.testing.assert_allclose(values, scores.values, atol=1e-3 * np.abs(values).max())


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_default_costs_at_most_a_third_more_than_the_best_choice(shape):
    check(shape)


@pytest.mark.slow
@pytest.mark.parametrize("shape", LARGE, ids=str)
def test_so_it_does_where_there_is_much_to_do(shape):
    check(shape)


def test_an_iteration_that_would_take_longer_than_a_factorisation_gives_way_to_it(monkeypatch):
    found = problem(Shape(1000, 100, 3, bad=True))
    for where in ("defaults", "costs"):
        monkeypatch.setattr(f"upweight.influence.{where}.preconditioner", lambda *_: Plain())
    monkeypatch.setattr(defaults, "_NO_WAIT", 0.0)
    monkeypatch.setattr(defaults, "_CLOSE", 0.0)  # the iteration is chosen, and has to prove itself
    monkeypatch.setattr(defaults, "product_seconds", lambda *_: 1e-3)
    assert isinstance(found.influence().solver, CG)
    cost, scores = counted(found)
    assert scores.certificate.solver == "Cholesky()"
    direct, exact = counted(found, Cholesky())
    assert cost < 4 * direct
    np.testing.assert_allclose(scores.values, exact.values, rtol=1e-8, atol=1e-8 * np.abs(exact.values).max())
    monkeypatch.setattr(defaults, "product_seconds", lambda *_: 1e-7)  # with all the time in the world it arrives
    assert counted(found)[1].certificate.solver.startswith("CG(")
