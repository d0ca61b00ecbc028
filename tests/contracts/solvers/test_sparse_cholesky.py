"""The sparse factorisation against dense inverses, and where defaults take it."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.sparse
import torch
from sklearn.linear_model import LogisticRegression, PoissonRegressor, Ridge

import upweight as uw
from upweight.influence import costs, defaults
from upweight.operators import Hessian, core
from upweight.solvers import Cholesky, Pairwise, Quadratic, SparseCholesky

N, D = 260, 330


def table(seed=0, entries=4):
    """Few entries a row: columns of all frequencies, one in every row, some empty, two alike."""
    draw = np.random.default_rng(seed)
    share = 1 / np.arange(1, D - 9) ** 1.1
    X = scipy.sparse.lil_matrix((N, D))
    for row in range(N):
        X[row, draw.choice(D - 10, size=entries, replace=False, p=share / share.sum())] = draw.normal(size=entries)
    X[:, D - 1] = draw.normal(size=(N, 1))
    X[:, D - 2] = X[:, 3]
    return X.tocsr()


def binary(intercept=True, weighted=False, **settings):
    X, draw = table(), np.random.default_rng(1)
    y, weights = draw.integers(0, 2, N), draw.uniform(0.2, 2, N) if weighted else None
    model = LogisticRegression(C=0.5, fit_intercept=intercept, tol=1e-12, max_iter=10_000)
    return uw.explain(model.fit(X, y, sample_weight=weights), X, y, sample_weight=weights, **settings)


def counts(**settings):
    X, draw = table(), np.random.default_rng(1)
    y = draw.poisson(1.0, N)
    return uw.explain(PoissonRegressor(alpha=0.1, tol=1e-10, max_iter=3000).fit(X, y), X, y, **settings)


def squares(**settings):
    X, draw = table(), np.random.default_rng(1)
    y = draw.normal(size=N)
    return uw.explain(Ridge(alpha=0.5, solver="lsqr", tol=1e-13).fit(X, y), X, y, **settings)


def plain(**settings):
    return binary(intercept=False, **settings)


def weighted(**settings):
    return binary(weighted=True, **settings)


EACH = pytest.mark.parametrize("kind", [binary, plain, weighted, counts, squares])


@pytest.fixture(autouse=True)
def levels_pay(monkeypatch):
    """As they would where columns are thousands."""
    monkeypatch.setattr(core, "SECONDS", core.SECONDS / 1000)


@EACH
@pytest.mark.parametrize("damping", [0.0, 0.03])
def test_self_influence_is_that_of_the_dense_inverse(kind, damping):
    sparse = kind(solver=SparseCholesky(), damping=damping)
    matrix = sparse.operator.matrix() + damping * torch.eye(sparse.operator.size, dtype=torch.float64)
    assert isinstance(sparse.prepared, Quadratic)
    assert 0 < len(sparse.prepared.inverse) < 0.8 * D
    found = sparse.of_self()
    G = uw.calculus.gradients(sparse.objective, sparse.examples.batch(slice(None))).double()
    along = (G @ torch.linalg.inv(matrix) * (G + sparse.system.penalty_share)).sum(1).numpy()
    expected = along * sparse.examples.weights / N
    assert np.allclose(found.values, expected, rtol=1e-9, atol=1e-14)
    assert found.certificate.solver == "SparseCholesky()"
    some = np.array([5, 3, 200])
    assert np.allclose(sparse.of_self(some).values, expected[some], rtol=1e-9)


@EACH
def test_solutions_forms_and_scores_are_those_of_a_dense_factor(kind):
    sparse, dense = kind(solver=SparseCholesky()), kind(solver=Cholesky())
    V = torch.randn(3, sparse.operator.size, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    ours, theirs = sparse.prepared.solve(V), dense.prepared.solve(V)
    assert ours.converged
    assert float(ours.residual.max()) < 1e-11
    assert torch.allclose(ours.x, theirs.x, rtol=1e-8, atol=1e-10)
    assert torch.allclose(sparse.prepared.forms(V), dense.prepared.forms(V), rtol=1e-9)
    assert ours.min_curvature >= theirs.min_curvature * (1 - 1e-5)
    X, y = table(seed=7), np.random.default_rng(2).integers(0, 2, N)
    found, expected = sparse.on_loss(X[:20], y[:20]), dense.on_loss(X[:20], y[:20])
    assert np.allclose(found.values, expected.values, rtol=1e-7, atol=1e-12)
    assert float(found.certificate.residual.max()) < 1e-10


def test_it_compares_examples():
    influence = binary(solver=SparseCholesky())
    X, R = table(seed=3)[:8], torch.linspace(-1, 1, 8, dtype=torch.float64)[:, None]
    V = torch.cat([torch.from_numpy(X.toarray()) * R, R], 1)
    assert isinstance(influence.prepared, Pairwise)
    assert torch.allclose(influence.prepared.own(X, R), influence.prepared.forms(V), rtol=1e-10)
    across = influence.prepared.against(X, R)(X, R)
    assert torch.allclose(across.diagonal(), influence.prepared.own(X, R), rtol=1e-9)
    assert torch.allclose(across, V @ influence.prepared.solve(V).x.T, rtol=1e-9, atol=1e-12)


def test_rows_that_repeat_an_entry_have_the_sum_of_both():
    X = table()
    twice = scipy.sparse.csr_matrix((np.repeat(X.data / 2, 2), np.repeat(X.indices, 2), 2 * X.indptr), shape=X.shape)
    known = binary(solver=SparseCholesky())
    prepared = known.prepared
    R = torch.ones(N, 1, dtype=torch.float64)
    assert torch.allclose(prepared.own(twice, R), prepared.own(X, R), rtol=1e-12)


def worth(monkeypatch):
    """What lets counted costs choose it for a table of a few hundred columns."""
    monkeypatch.setattr(costs, "_SURE", 1e-9)
    monkeypatch.setattr(costs, "DIRECT_UP_TO", 100)
    monkeypatch.setattr(costs, "FACTOR_UP_TO", D - 1)
    monkeypatch.setattr(costs, "DUAL_UP_TO", 1)
    monkeypatch.setattr(defaults, "DIRECT_UP_TO", 100)


def test_defaults_take_it_for_many_rows_and_the_certificate_says_so(monkeypatch):
    worth(monkeypatch)
    influence = binary()
    found = influence.of_self()
    assert found.certificate.solver == "SparseCholesky()"
    assert np.allclose(found.values, binary(solver=Cholesky()).of_self().values, rtol=1e-8)


def test_it_is_not_taken_where_its_core_is_too_large_for_memory_or_a_default(monkeypatch):
    worth(monkeypatch)
    known = binary()
    about = known.objective, known.examples, Hessian()
    [one] = [one for one in costs.costs(*about, systems=N) if isinstance(one.solver, SparseCholesky)]
    assert one.possible
    assert one.order == len(binary(solver=SparseCholesky()).prepared.inverse)
    assert one.memory >= 8 * one.order**2
    assert isinstance(defaults.solver(*about, systems=N, budget=int(one.memory) + 1), SparseCholesky)
    assert not isinstance(defaults.solver(*about, systems=N, budget=int(one.memory) - 1), SparseCholesky)
    monkeypatch.setattr(costs, "FACTOR_UP_TO", one.order - 1)
    assert not isinstance(defaults.solver(*about, systems=N), SparseCholesky)


def test_a_core_is_not_counted_for_few_systems_or_full_rows(monkeypatch):
    known = binary()
    about = known.objective, known.examples, Hessian()
    monkeypatch.setattr(core, "counted", lambda *_: pytest.fail("counted"))
    monkeypatch.setattr(core, "SECONDS", 1e-7)
    costs.costs(*about, systems=5)
    monkeypatch.setattr(core, "SECONDS", 0.0)
    monkeypatch.setattr(core, "PAIRS", 10)
    costs.costs(*about, systems=10**6)


def test_a_plan_of_many_queries_knows_the_core():
    influence = binary(solver=SparseCholesky())
    X, y = table(seed=7), np.random.default_rng(2).integers(0, 2, N)
    assert "SparseCholesky()" in str(influence.plan(X, y))


def test_a_core_is_counted_within_the_memory_there_is(monkeypatch):
    worth(monkeypatch)
    influence = squares()
    known = (influence.objective, influence.examples, Hessian())
    needed = int(core.counting(influence.examples.x))
    assert needed >= 12 * (influence.examples.x.T @ influence.examples.x).nnz

    def listed(budget):
        return [type(one.solver) for one in costs.costs(*known, systems=10**6, budget=budget)]

    assert SparseCholesky in listed(needed + 1)
    monkeypatch.setattr(core, "counted", lambda *_: pytest.fail("counted"))
    assert SparseCholesky not in listed(needed - 1)


def test_levels_that_fill_more_than_there_is_are_not_followed():
    X = table()
    whole = core.counted(X, False)
    begun = core.counted(X, False, room=1000)
    assert begun.size > whole.size
    assert begun.memory > 1000  # and so it is not chosen
