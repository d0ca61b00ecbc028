"""Values of rows in a file are those of the same numbers in memory, and those of the formula in plain NumPy."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest
import scipy.sparse
import scipy.sparse.linalg
from sklearn.linear_model import LinearRegression, LogisticRegression, Ridge

import upweight as uw
from stored import KINDS, columns, mapped, opened, small_blocks, values  # noqa: F401 a fixture
from tolerances import EXACT

N, D, QUERIES = 300, 5, 3
DRAW = np.random.default_rng(3)
X = DRAW.normal(size=(N, D)).astype(np.float32)
LATENT = X @ DRAW.normal(size=D) + DRAW.logistic(size=N)
XQ, YQ = DRAW.normal(size=(QUERIES, D)), np.array([0, 1, 1])
MODELS = {
    "logistic": LogisticRegression(C=0.7, tol=1e-12, max_iter=5000),
    "ridge": Ridge(alpha=3.0),
    "least squares": LinearRegression(),
}

pytestmark = pytest.mark.usefixtures("small_blocks")


def closed_form(kind, model, y):
    """(1/n) ∇L(z_q)ᵀ (∇²R)⁻¹ ∇L(zᵢ) with R = (1/n) Σ L + (strength/2n) ‖coef‖²."""
    A, Aq = (np.hstack([part.astype(np.float64), np.ones((len(part), 1))]) for part in (X, XQ))
    theta = np.r_[np.ravel(model.coef_), np.ravel(model.intercept_)]
    if kind == "logistic":
        slope, strength = (lambda eta, y: 1 / (1 + np.exp(-eta)) - y), 1 / model.C
        chance = slope(A @ theta, 0.0)
        curved = chance * (1 - chance)
    else:  # (η − y)²
        slope, curved = (lambda eta, y: 2 * (eta - y)), np.full(N, 2.0)
        strength = 2 * model.alpha if kind == "ridge" else 0.0
    H = (A * curved[:, None]).T @ A / N + np.diag(np.r_[np.full(D, strength), 0.0]) / N
    G, Gq = A * slope(A @ theta, y)[:, None], Aq * slope(Aq @ theta, YQ)[:, None]
    return Gq @ np.linalg.solve(H, G.T) / N


@pytest.mark.parametrize("kind", MODELS)
def test_in_a_file_in_memory_and_by_the_formula(kind, tmp_path):
    y = (LATENT > 0).astype(int) if kind == "logistic" else LATENT
    model = MODELS[kind].fit(X.astype(np.float64), y)
    in_memory = values(model, X, y, (XQ, YQ))
    expected = closed_form(kind, model, y)
    assert np.abs(in_memory - expected).max() < 1e4 * EXACT * np.abs(expected).max()
    there = mapped(tmp_path / "X.npy", X)
    table = columns(X, target=y)
    found = {"memmap": values(model, there, y, (XQ, YQ))}
    found |= {name: values(model, opened(name, table, tmp_path), "target", (XQ, YQ)) for name in KINDS}
    for name, one in found.items():
        assert np.array_equal(one, in_memory), name


def test_a_sparse_file_is_never_dense(tmp_path):
    """Twenty million numbers, of which all but four thousand are 0."""
    n, d = 1000, 20_000
    matrix = scipy.sparse.random(n, d, density=2e-4, format="csr", dtype=np.float32, random_state=0)
    scipy.sparse.save_npz(tmp_path / "X.npz", matrix)
    y = DRAW.normal(size=n)
    there = scipy.sparse.load_npz(tmp_path / "X.npz")
    model = Ridge(alpha=1.0, fit_intercept=False, solver="sparse_cg", tol=1e-12).fit(there, y)
    values(Ridge().fit(X, LATENT), X, LATENT, (XQ, YQ))  # what is imported then is no data
    tracemalloc.start()
    try:
        influence = uw.explain(model, there, y)
        scores = influence.on_loss(there[:2], y[:2])
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert np.shares_memory(influence.examples.x.data, there.data)
    assert peak < 3 * n * d, peak  # all of the numbers are 4 n d in float32
    K = scipy.sparse.identity(n) + (there @ there.T).astype(float)  # (XᵀX + I)⁻¹ Xᵀ = Xᵀ (XXᵀ + I)⁻¹
    missed = there @ model.coef_ - y
    expected = scipy.sparse.linalg.spsolve(K.tocsc(), (there @ there[:2].T).toarray()).T * missed[:2, None] * 2 * missed
    assert np.allclose(scores.values, expected, rtol=1e-4, atol=1e-6 * np.abs(expected).max())
