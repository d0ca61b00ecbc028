"""A sparse matrix solved for level by level has the inverse of the whole."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.sparse

from upweight.operators import core


def table(n=300, columns=400, entries=5, seed=0):
    """Rows of few entries in columns that are as frequent as words are; the last column is in every row."""
    draw = np.random.default_rng(seed)
    share = 1 / np.arange(1, columns) ** 1.1
    X = scipy.sparse.lil_matrix((n, columns))
    for row in range(n):
        places = draw.choice(columns - 1, size=entries, replace=False, p=share / share.sum())
        X[row, places] = draw.normal(size=entries)
    X[:, columns - 1] = draw.normal(size=(n, 1))
    return X.tocsr()


def scaled(X, intercept, held=0.3, seed=1):
    draw = np.random.default_rng(seed)
    A = core.gram(X, draw.uniform(0, 1, X.shape[0]), np.full(X.shape[1] + int(intercept), held), intercept)
    scale = A.diagonal() ** -0.5
    return (scipy.sparse.diags(scale) @ A @ scipy.sparse.diags(scale)).tocsr()


def whole(found):
    inner = found.kept @ np.linalg.inv(found.rest.toarray()) @ found.kept.T.toarray()
    return (found.solved @ found.solved.T).toarray() + inner


@pytest.mark.parametrize("intercept", [False, True])
def test_the_levels_and_the_core_make_the_inverse(intercept):
    A = scaled(table(), intercept)
    found = core.around(A)
    assert 0 < found.rest.shape[0] < 0.7 * A.shape[0]  # some are left, and many are solved for
    assert np.allclose(whole(found), np.linalg.inv(A.toarray()), rtol=1e-10, atol=1e-12)


def test_no_two_columns_of_a_level_are_neighbours():
    A = scaled(table(), True)
    for level, _, _ in core._levels(A):
        own = A[level.columns][:, level.columns]
        assert own.nnz == len(level.columns)
        break


def test_columns_of_no_entries_and_of_one_are_solved_for():
    X = scipy.sparse.hstack([scipy.sparse.csr_matrix((300, 20)), scipy.sparse.identity(300), table()], format="csr")
    A = scaled(X, False)
    found = core.around(A)
    assert found.rest.shape[0] < 400
    assert np.allclose(whole(found), np.linalg.inv(A.toarray()), atol=1e-12)


def test_a_diagonal_matrix_has_no_core_and_a_full_one_no_levels():
    apart = core.around(scipy.sparse.identity(3000, format="csr"))
    assert apart.rest.shape == (0, 0)
    assert abs(apart.solved @ apart.solved.T - scipy.sparse.identity(3000)).max() == 0
    full = np.eye(200) + 0.01
    joined = core.around(scipy.sparse.csr_matrix(full))
    assert joined.rest.shape == full.shape
    assert np.allclose(whole(joined), np.linalg.inv(full))


def test_what_is_not_positive_has_no_core():
    pair = np.array([[1, 1.5], [1.5, 1]])
    assert core.around(scipy.sparse.kron(scipy.sparse.identity(1500), pair, format="csr")) is None


@pytest.mark.parametrize("count", [1, 5])
def test_columns_that_come_twice_without_a_penalty_have_no_core(monkeypatch, count):
    monkeypatch.setattr(core, "SECONDS", core.SECONDS / 1e6)  # what is left of a pair is an empty row
    assert core.around(scipy.sparse.csr_matrix(np.kron(np.eye(count), np.ones((2, 2))))) is None


@pytest.mark.parametrize("most", [2**8, 2**21])
def test_forms_of_narrow_and_of_wide_rows(monkeypatch, most):
    monkeypatch.setattr(core, "_AT_ONCE", most)
    draw = np.random.default_rng(0)
    Y = scipy.sparse.random(50, 90, density=0.05, random_state=0, format="csr").tolil()
    Y[3], Y[7] = draw.normal(size=90), 0
    Y = Y.tocsr()
    Z = draw.normal(size=(90, 90))
    Z = np.ascontiguousarray(Z @ Z.T)
    assert np.diff(Y.indptr).min() == 0
    assert np.allclose(core.forms(Y, Z), ((Y @ Z) * Y.toarray()).sum(1), rtol=1e-12)


def test_the_count_by_pattern_is_that_of_the_numbers():
    X = table()
    counted = core.counted(X, True)
    assert counted.size == core.around(scaled(X, True)).rest.shape[0]
    assert counted.memory >= 8 * counted.size**2
    assert counted.flops == counted.size**3


def test_levels_that_fill_what_they_leave_are_not_followed(monkeypatch):
    monkeypatch.setattr(core, "SECONDS", core.SECONDS / 100)
    draw = np.random.default_rng(0)
    rows, entries = 4000, 5
    hashed = (np.ones(rows * entries), draw.integers(0, 2000, rows * entries), np.arange(rows + 1) * entries)
    X = scipy.sparse.csr_matrix(hashed, shape=(rows, 2000))
    whole, begun = core.counted(X, False), core.counted(X, False, most=300)
    assert whole.size > 2 * 300  # the answer is the same
    assert begun.size > 2 * 300
    assert begun.entries < whole.entries / 2
    assert core.counted(table(), True, most=300) == core.counted(table(), True)


def test_entries_of_the_caller_stay_where_they_are():
    X = table()
    X.indices[: X.indptr[1]] = X.indices[: X.indptr[1]][::-1].copy()  # not sorted
    X.data[: X.indptr[1]] = X.data[: X.indptr[1]][::-1].copy()
    X.has_sorted_indices = False
    before = X.data.copy(), X.indices.copy()
    core.around(scaled(X, False))
    core.counted(X, False)
    assert np.array_equal(before[0], X.data)
    assert np.array_equal(before[1], X.indices)
