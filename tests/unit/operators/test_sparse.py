"""What the exact Hessian does where rows are sparse: whole chunks, and an inverse for the frequent columns."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.sparse
import torch
from sklearn.linear_model import LogisticRegression

import upweight as uw
from upweight.model import linear
from upweight.model.calculus import gradients
from upweight.operators import sparse
from upweight.solvers import CG, Approximate, Cholesky, Plain

N, D = 90, 12


def influence(classes=2, intercept=True, **settings):
    draw = np.random.default_rng(0)
    X = scipy.sparse.random(N, D, density=0.4, random_state=1, format="csr")
    y = draw.integers(0, classes, N)
    weights = draw.uniform(0.5, 2, N)
    model = LogisticRegression(C=0.3, fit_intercept=intercept, tol=1e-10, max_iter=10_000)
    return uw.explain(model.fit(X, y, sample_weight=weights), X, y, sample_weight=weights, **settings)


@pytest.fixture
def every_column(monkeypatch):
    monkeypatch.setattr(sparse, "_TOGETHER", (D,))
    monkeypatch.setattr(sparse, "_PAIRS", {"sparse": 5, "dense": 10_000})


@pytest.mark.parametrize("intercept", [True, False])
def test_the_inverse_is_exact_where_all_columns_are_frequent(every_column, intercept):
    operator = influence(intercept=intercept).operator
    inverse = operator.approximate_inverse(0.01)
    A = operator.matrix() + 0.01 * torch.eye(operator.size, dtype=torch.float64)
    torch.testing.assert_close(inverse(A), torch.eye(operator.size, dtype=torch.float64), rtol=1e-6, atol=1e-6)


def test_outputs_that_are_coupled_are_inverted_each_for_itself(every_column):
    operator = influence(classes=3).operator
    A = operator.matrix() + 0.01 * torch.eye(operator.size, dtype=torch.float64)
    own = torch.cat([torch.arange(3).repeat_interleave(D), torch.arange(3)])  # the output of every parameter
    blocks = torch.where(own[:, None] == own, A, 0.0)
    inverse = operator.approximate_inverse(0.01)
    torch.testing.assert_close(inverse(blocks), torch.eye(len(A), dtype=torch.float64), rtol=1e-6, atol=1e-6)


def test_rare_columns_are_divided_by_their_own_curvature(monkeypatch):
    monkeypatch.setattr(sparse, "_TOGETHER", (4,))
    monkeypatch.setattr(sparse, "_PAIRS", {"sparse": 1000, "dense": 1000})
    explained = influence()
    operator, X = explained.operator, explained.examples.x
    often = np.argsort(-np.diff(X.tocsc().indptr), kind="stable")[:4]
    A = operator.matrix()
    inverse = operator.approximate_inverse(0.0)(torch.eye(len(A), dtype=torch.float64))
    together = np.append(np.sort(often), D)  # and the intercept
    torch.testing.assert_close(
        inverse[np.ix_(together, together)], torch.linalg.inv(A[np.ix_(together, together)]), rtol=1e-6, atol=1e-6
    )
    rare = np.setdiff1d(np.arange(D), often)
    torch.testing.assert_close(inverse[rare][:, rare], torch.diag(1 / A.diagonal()[rare]), rtol=1e-9, atol=1e-12)
    assert float(inverse[rare][:, together].abs().max()) == 0


def test_the_two_ways_to_a_gram_matrix_agree(monkeypatch):
    X, a = scipy.sparse.random(50, 6, density=0.5, random_state=0, format="csr"), np.linspace(0, 2, 50)
    dense = X.toarray().T @ (a[:, None] * X.toarray())
    for limits in ({"sparse": 1, "dense": 10**9}, {"sparse": 10**9, "dense": 1}):
        monkeypatch.setattr(sparse, "_PAIRS", limits)
        monkeypatch.setattr(sparse, "_BLOCK", 7)
        np.testing.assert_allclose(sparse._gram(X, a), dense, rtol=1e-12)


def test_no_columns_are_taken_together_where_all_are_rare():
    X = scipy.sparse.csr_matrix(np.eye(40))
    assert len(sparse.frequent(X)) == 0


def test_rows_are_taken_without_a_copy():
    X = scipy.sparse.random(20, 5, density=0.5, random_state=0, format="csr")
    part = sparse.rows(X, 4, 11)
    assert np.shares_memory(part.data, X.data)
    np.testing.assert_array_equal(part.toarray(), X[4:11].toarray())


@pytest.mark.parametrize("settings", [{}, {"batch_size": 7}], ids=["whole chunks", "batches"])
def test_products_do_not_depend_on_how_rows_are_taken(settings, monkeypatch):
    monkeypatch.setattr("upweight.operators.linear._CHUNK_ROWS", (16, 16))
    operator = influence(classes=3, **settings).operator
    V = torch.randn(4, operator.size, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    torch.testing.assert_close(operator.apply(V), V @ operator.matrix(), rtol=1e-12, atol=1e-14)


def test_chunks_grow_with_the_columns_that_a_sum_has():
    wide = scipy.sparse.random(100, 2**16, density=2**-13, random_state=0, format="csr")  # 8 entries in a row
    assert sparse.chunk(wide, 1024) == 2**14
    assert sparse.chunk(wide, 2**15) == 2**15


def test_lengths_of_gradients_need_no_gradients():
    for explained in (influence(3), uw.explain(*_dense())):
        objective, examples = explained.objective, explained.examples
        batch = examples.batch(slice(0, 20))
        torch.testing.assert_close(
            linear.squares(objective, batch), (gradients(objective, batch) ** 2).sum(1), rtol=1e-12, atol=0
        )


def _dense():
    X, y = np.random.default_rng(0).normal(size=(30, 3)), np.arange(30) % 2
    return LogisticRegression(tol=1e-10).fit(X, y), X, y


def test_sparse_rows_get_the_inverse_that_costs_by_entries(monkeypatch):
    monkeypatch.setattr("upweight.influence.defaults.DIRECT_UP_TO", 5)
    monkeypatch.setattr("upweight.influence.costs.DIRECT_UP_TO", 5)
    monkeypatch.setattr("upweight.influence.costs.DUAL_UP_TO", 5)
    assert influence().solver == CG(rtol=1e-6, preconditioner=Approximate())
    assert influence(solver=CG(1e-7)).solver == CG(1e-7, preconditioner=Approximate())


@pytest.mark.parametrize("classes", [2, 3])
@pytest.mark.parametrize("preconditioner", [Plain(), Approximate()], ids=repr)
def test_queries_share_a_space_and_have_the_exact_answer(classes, preconditioner):
    exact, near = influence(classes, solver=Cholesky()), influence(classes, solver=CG(1e-9, 1000, preconditioner))
    on = (exact.examples.x[:6] * 1.5, np.arange(6) % classes)
    expected = exact.on_loss(*on)
    scores = near.on_loss(*on)
    assert float(scores.certificate.residual.max()) <= 1e-9
    np.testing.assert_allclose(scores.values, expected.values, rtol=1e-6, atol=1e-9 * np.abs(expected.values).max())
    if preconditioner == Plain():
        alone = [near.on_loss(on[0][i], on[1][i : i + 1]).certificate.sweeps for i in range(6)]
        assert scores.certificate.sweeps < max(alone)


def test_an_entry_in_two_parts_is_their_sum():
    X = scipy.sparse.random(N, D, density=0.4, random_state=1, format="csr")
    parts = (np.repeat(X.data / 2, 2), np.repeat(X.indices, 2), 2 * X.indptr)
    twice, spread = scipy.sparse.csr_matrix(parts, shape=X.shape), torch.linspace(0, 1, 2 * N).reshape(N, 2).double()
    assert twice.nnz == 2 * X.nnz
    torch.testing.assert_close(sparse.squares(twice, spread), sparse.squares(X, spread), rtol=1e-12, atol=0)
    assert twice.nnz == 2 * X.nnz  # the user's matrix stays as it is
