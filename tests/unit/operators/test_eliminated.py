"""A sparse system without the columns that are solved for exactly has the solutions of the whole."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.sparse
import torch
from sklearn.linear_model import LogisticRegression, Ridge

import upweight as uw
from grid import Shape, problem
from upweight.operators import eliminated as module
from upweight.operators.eliminated import Eliminated, eliminated
from upweight.operators.entries import Entries
from upweight.solvers import CG, Approximate, Cholesky, Plain, cg, reduced

N, D = 80, 40


def table(seed=1):
    """Columns that many rows have, columns of one entry (two of them in one row), and columns of none."""
    draw = np.random.default_rng(seed)
    often = scipy.sparse.random(N, 14, density=0.4, random_state=seed, format="csr")
    alone = scipy.sparse.csr_matrix((draw.normal(size=20), (np.arange(20) // 2 * 5, np.arange(20))), shape=(N, 20))
    X = scipy.sparse.hstack([alone, often, scipy.sparse.csr_matrix((N, D - 34))], format="csr")
    return X[:, draw.permutation(D)].tocsr()


def influence(classes=2, intercept=True, **settings):
    X, draw = table(), np.random.default_rng(0)
    y, weights = draw.integers(0, classes, N), draw.uniform(0.5, 2, N)
    model = LogisticRegression(C=0.3, fit_intercept=intercept, tol=1e-12, max_iter=10_000)
    return uw.explain(model.fit(X, y, sample_weight=weights), X, y, sample_weight=weights, **settings)


def outputs(**settings):
    X, draw = table(), np.random.default_rng(0)
    Y = draw.normal(size=(N, 3))
    return uw.explain(Ridge(alpha=0.5, solver="lsqr", tol=1e-12).fit(X, Y), X, Y, **settings)


def one_of_each():
    return [influence(), influence(intercept=False), influence(3), influence(3, intercept=False), outputs()]


def dense(operator, damping):
    return operator.matrix() + damping * torch.eye(operator.size, dtype=torch.float64)


def sides(operator, count=3):
    V = torch.randn(count, operator.size, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return operator.project(V)


@pytest.mark.parametrize("damping", [0.0, 0.02])
@pytest.mark.parametrize("kind", range(5))
def test_what_is_left_and_the_rest_make_the_whole_solution(kind, damping):
    operator = one_of_each()[kind].operator
    left = eliminated(operator, damping)
    assert left is not None
    assert len(left.few) == 26
    assert len(left.columns) == 14
    V = sides(operator)
    side = left.side(V)
    A = left.product(torch.eye(side.middle.shape[1], dtype=torch.float64))
    torch.testing.assert_close(A, A.T, rtol=1e-10, atol=1e-12)
    x = operator.project(left.whole(side, torch.linalg.solve(A, side.middle.T).T))
    expected = operator.project(torch.linalg.lstsq(dense(operator, damping), V.T, driver="gelsd").solution.T)
    torch.testing.assert_close(x, expected, rtol=1e-8, atol=1e-8 * float(expected.abs().max()))


def test_places_come_back():
    left = eliminated(influence(3).operator, 0.0)
    Y = torch.randn(2, len(left.diagonal), dtype=torch.float64)
    assert torch.equal(left.taken_from(left.spread_out(Y)), Y)
    assert int((left.spread_out(Y) != 0).sum()) == Y.numel()


@pytest.mark.parametrize("kind", [2, 4])
def test_the_inverse_of_the_diagonal_is_positive_and_leaves_shifts_apart(kind):
    operator = one_of_each()[kind].operator
    left = eliminated(operator, 0.01)
    eye = torch.eye(len(left.diagonal), dtype=torch.float64)
    M, A = left.precondition(eye), left.product(eye)
    torch.testing.assert_close(M, M.T, rtol=1e-12, atol=1e-12)
    assert float(torch.linalg.eigvalsh(M)[0]) > 0
    if kind == 2:
        shift = torch.randn(1, 14, dtype=torch.float64).repeat(1, 3)
        torch.testing.assert_close(left.precondition(shift @ A), shift, rtol=1e-9, atol=1e-12)
    else:
        torch.testing.assert_close((M @ A).diagonal(), torch.ones(42, dtype=torch.float64), rtol=0.5, atol=0)


@pytest.mark.parametrize("kind", range(5))
def test_the_approximate_inverse_is_symmetric_positive_and_near(kind):
    operator = one_of_each()[kind].operator
    left = eliminated(operator, 0.02)
    M = left.inverse(torch.eye(operator.size, dtype=torch.float64))
    torch.testing.assert_close(M, M.T, rtol=1e-9, atol=1e-9 * float(M.abs().max()))
    spectrum = torch.linalg.eigvals(M @ dense(operator, 0.02)).real
    assert float(spectrum.min()) > 0
    assert float(spectrum.max()) < 100 * float(spectrum.min())
    alone = torch.zeros(2, operator.size, dtype=torch.float64)
    alone[:, left.few[:2]] = torch.eye(2, dtype=torch.float64)  # columns of one entry, in the product with C too
    torch.testing.assert_close((alone @ dense(operator, 0.02)) @ M, alone, rtol=1e-9, atol=1e-9)


def test_scores_are_the_same_with_an_entry_in_two_parts():
    X = table()
    parts = (np.repeat(X.data / 2, 2), np.repeat(X.indices, 2), 2 * X.indptr)
    twice = scipy.sparse.csr_matrix(parts, shape=X.shape)
    y = np.arange(N) % 2
    model = LogisticRegression(C=0.3, tol=1e-12, max_iter=10_000).fit(X, y)
    solver = CG(1e-10, preconditioner=Approximate())
    ours, theirs = (uw.explain(model, X, y, solver=s) for X, s in ((twice, solver), (X, Cholesky())))
    assert ours.prepared.reduced is not None
    np.testing.assert_allclose(
        ours.on_loss(X[:3], y[:3]).values, theirs.on_loss(X[:3], y[:3]).values, rtol=1e-7, atol=1e-12
    )


@pytest.mark.parametrize("classes", [2, 3])
@pytest.mark.parametrize("intercept", [True, False])
def test_scores_are_those_of_a_factorisation_and_the_promise_holds_in_both_norms(classes, intercept):
    exact = influence(classes, intercept, solver=Cholesky())
    near = influence(classes, intercept, solver=CG(1e-7, preconditioner=Approximate()))
    on = (exact.examples.x[:6] * 1.5, np.arange(6) % classes)
    expected, found = exact.on_loss(*on), near.on_loss(*on)
    np.testing.assert_allclose(found.values, expected.values, rtol=1e-5, atol=1e-6 * np.abs(expected.values).max())
    V = sides(near.operator, 4)
    missing = V - near.system.solve(V).x @ dense(near.operator, 0.0)
    unit = dense(near.operator, 0.0).diagonal().rsqrt()
    assert float((missing.norm(dim=1) / V.norm(dim=1)).max()) <= 1e-7
    assert float(((missing * unit).norm(dim=1) / (V * unit).norm(dim=1)).max()) <= 1e-7


def test_the_smallest_curvature_is_never_below_the_true_one():
    near = influence(solver=CG(1e-8, preconditioner=Approximate()))
    known = float(torch.linalg.eigvalsh(dense(near.operator, 0.0))[0])
    met = near.system.solve(sides(near.operator)).min_curvature
    assert known * (1 - 1e-9) <= met <= float(dense(near.operator, 0.0).diagonal().min()) * (1 + 1e-9)


def test_a_softmax_takes_no_more_products_than_without_a_preconditioner():
    plain, near = (influence(3, solver=CG(preconditioner=one)) for one in (Plain(), Approximate()))
    on = (plain.examples.x[:1], np.zeros(1, dtype=int))
    assert near.on_loss(*on).certificate.sweeps <= plain.on_loss(*on).certificate.sweeps


def test_many_right_hand_sides_share_a_space_where_their_own_ways_are_long(monkeypatch):
    solver = CG(1e-10, preconditioner=Approximate())
    alone = influence(3, solver=solver).system.solve(V := sides(influence(3).operator, 8))
    monkeypatch.setattr(reduced, "MANY", 4)
    monkeypatch.setattr(reduced, "ALONE", 3)
    together = influence(3, solver=solver).system.solve(V)
    assert together.sweeps < alone.sweeps
    torch.testing.assert_close(together.x, alone.x, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize(
    ("shape", "helps"), [(Shape(300, 1500, 3, sparse=True), True), (Shape(300, 1500, sparse=True, bad=True), False)]
)
def test_the_scale_is_left_out_where_that_is_quicker(shape, helps, monkeypatch):
    monkeypatch.setattr(reduced, "TRIED", 12)
    monkeypatch.setattr(reduced, "LONG", 20)
    found, solver = problem(shape), CG(1e-8, preconditioner=Approximate())
    one = found.influence(solver)
    assert one.prepared.reduced.wide
    ours, exact = one.on_loss(found.Xq, found.yq), found.values(Cholesky())
    np.testing.assert_allclose(ours.values, exact.values, rtol=1e-4, atol=1e-6 * np.abs(exact.values).max())
    monkeypatch.setattr(Eliminated, "wide", False)
    scaled = found.values(solver).certificate.sweeps
    taken = ours.certificate.sweeps
    assert taken < scaled - 12 if helps else taken == scaled + 12  # the trial's products count


def test_steps_are_expected_by_the_pace_of_the_later_half():
    way = reduced.Way(
        eliminated(influence().operator, 0.0), torch.ones(1), shared=False, past=[1e6, 1e5, 1e4, 1e3, 1e2]
    )
    assert way.expected == pytest.approx(4 + 2)
    way.past = [1e6, 1e3, 1e3]
    assert way.expected == np.inf
    way.past = [10.0, 0.5]
    assert way.expected == 1


def test_an_iteration_goes_on_where_it_was_looked_at(monkeypatch):
    solver = CG(1e-10, preconditioner=Approximate())
    V = sides(influence(3).operator)
    through = influence(3, solver=solver).system.solve(V)
    monkeypatch.setattr(cg, "_RARELY", 4)
    looked_at = influence(3, solver=solver).system.solve(V)
    torch.testing.assert_close(looked_at.x, through.x, rtol=1e-7, atol=1e-9)
    assert looked_at.sweeps <= 1.5 * through.sweeps + 2  # a look at the residual is a product, too


def test_an_earlier_solution_is_a_place_to_start():
    solver = CG(1e-10, preconditioner=Approximate())
    V = sides(influence(3).operator)
    through = influence(3, solver=solver).system.solve(V)
    prepared = influence(3, solver=CG(1e-4, preconditioner=Approximate())).prepared
    begun = prepared.solve(V)
    again = influence(3, solver=solver).prepared.solve(V, state=begun.state)
    assert again.sweeps < through.sweeps
    torch.testing.assert_close(again.x, through.x, rtol=1e-7, atol=1e-9)


def test_nothing_is_eliminated_where_a_coefficient_is_not_held_or_rows_come_in_batches(monkeypatch):
    assert eliminated(influence(batch_size=7).operator, 0.0) is None
    X, y = table(), np.arange(N) % 2
    few = X[:, np.argsort(-np.diff(X.tocsc().indptr))[:3]]
    free = uw.explain(LogisticRegression(C=np.inf, tol=1e-10).fit(few, y), few, y, damping=0.1)
    assert eliminated(free.operator, 0.0) is None
    assert eliminated(free.operator, 0.1) is not None
    whole = uw.explain(LogisticRegression(C=0.3, tol=1e-12).fit(X.toarray(), y), X.toarray(), y)
    assert eliminated(whole.operator, 0.0) is None
    monkeypatch.setattr(module, "_COPIES", 12 * X.nnz - 1)
    assert eliminated(influence().operator, 0.0) is None


@pytest.mark.parametrize("vectors", [1, 2, 5])
def test_all_kernels_agree(vectors):
    X = scipy.sparse.random(30, 11, density=0.3, random_state=0, format="csr")
    long = X.copy()
    long.indices, long.indptr = long.indices.astype(np.int64), long.indptr.astype(np.int64)
    V = torch.randn(11, vectors, dtype=torch.float64)
    R = torch.randn(30, vectors, dtype=torch.float64)
    dense = torch.from_numpy(X.toarray())
    for entries in (Entries(X, transposed=True), Entries(X, transposed=False), Entries(long, transposed=True)):
        torch.testing.assert_close(entries.across(V), dense @ V)
        torch.testing.assert_close(entries.back(R), dense.T @ R)


@pytest.mark.parametrize("classes", [2, 3])
def test_a_group_is_removed_as_by_a_factorisation(classes):
    on, groups = (table()[:3], np.arange(3) % classes), [[0, 1, 5], [7]]
    near, exact = (influence(classes, solver=one) for one in (CG(1e-9, preconditioner=Approximate()), Cholesky()))
    found, expected = near.of_removing(groups, on=on), exact.of_removing(groups, on=on)
    np.testing.assert_allclose(found.values, expected.values, rtol=1e-5, atol=1e-8 * np.abs(expected.values).max())


def test_whoever_sorts_the_users_rows_in_place_changes_nothing():
    draw = np.random.default_rng(0)
    X = scipy.sparse.csr_matrix(draw.normal(size=(60, 5)))
    order = np.concatenate([5 * row + draw.permutation(5) for row in range(60)])
    X.indices, X.data, X.has_sorted_indices = X.indices[order], X.data[order], False
    y = (X @ np.ones(5) > 0).astype(int)
    influence = uw.explain(LogisticRegression().fit(X, y), X, y, solver=CG())
    assert influence.system.prepared.reduced is not None
    X.sort_indices()  # as another estimator's fit does
    V = sides(influence.operator)
    found = influence.system.prepared.solve(V).x
    torch.testing.assert_close(found, torch.linalg.solve(dense(influence.operator, 0.0), V.T).T, rtol=1e-5, atol=1e-7)


def test_a_table_without_entries():
    X, y = scipy.sparse.csr_matrix((12, 4)), np.arange(12) % 2
    model = LogisticRegression().fit(X, y)
    found = uw.explain(model, X, y, solver=CG()).on_loss(X[:2], y[:2]).values
    np.testing.assert_allclose(
        found, uw.explain(model, X, y, solver=Cholesky()).on_loss(X[:2], y[:2]).values, atol=1e-9
    )


@pytest.mark.parametrize("rtol", [1e-6, 1e-8, 1e-10])
@pytest.mark.parametrize("seed", range(4))
def test_values_that_settle_leave_the_smallest_curvature_known(seed, rtol):
    draw = np.random.default_rng(seed)
    X = scipy.sparse.random(400, 300, density=0.02, random_state=seed + 1, format="csr")
    y = draw.integers(0, 4, 400)
    model = LogisticRegression(C=2, tol=1e-10, max_iter=5000).fit(X, y)
    found = uw.explain(model, X, y, damping=0.01, solver=CG(rtol=rtol, settled=1e-3)).on_loss(X[:3], y[:3])
    assert np.isfinite(found.certificate.min_curvature)
