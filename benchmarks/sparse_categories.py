"""Claim: a sparse linear model costs no more than the simple thing: SciPy's CG, one query after the other.

Logistic regression on 20,000 rows of 13 one-hot columns, 45,994 parameters, five queries to 1e-6; then 200,000 rows of
100 hashed words in 2²⁰ columns, one query, for its memory. `upweight` is `uw.explain(...)` to `.values`; SciPy is the
ten lines of `plain`. They take turns in one process, after a first call that imports; the ratio is the median of seven.
Self-influence is that of all rows, over one query, both from model to values; 64 rows are compared with CG to 1e-11.
An older build, where its source folder is given, runs in a process of its own between two measurements of this one.

    git worktree add --detach ../before COMMIT
    python benchmarks/sparse_categories.py [../before/src]        # two minutes
"""

from __future__ import annotations

import json
import multiprocessing
import os
import resource
import subprocess
import sys
from typing import Any

import numpy as np
import scipy.sparse
import scipy.sparse.linalg
from common import report, seconds
from sklearn.linear_model import LogisticRegression

import upweight as uw

N, LEVELS, FACTORS, QUERIES, TURNS, ROWS = 20_000, 3538, 13, 5, 7, 64


def table() -> tuple[Any, np.ndarray, LogisticRegression]:
    """Rows of one-hot columns whose levels are as frequent as words are, and the model that fits them."""
    draw = np.random.default_rng(0)
    share = 1 / np.arange(1, LEVELS + 1) ** 1.1
    levels = draw.choice(LEVELS, size=(N, FACTORS), p=share / share.sum()) + LEVELS * np.arange(FACTORS)
    X = scipy.sparse.csr_matrix((np.ones(levels.size), levels.ravel(), np.arange(0, levels.size + 1, FACTORS)))
    X.resize(N, LEVELS * FACTORS)
    slopes = 0.5 * draw.normal(size=X.shape[1])
    y = (draw.random(N) < 1 / (1 + np.exp(-(X @ slopes)))).astype(int)
    return X, y, LogisticRegression(tol=1e-10, max_iter=3000).fit(X, y)


def ours(X: Any, y: np.ndarray, model: LogisticRegression) -> np.ndarray:
    return uw.explain(model, X, y).on_loss(X[:QUERIES], 1 - y[:QUERIES]).values


def plain(X: Any, y: np.ndarray, model: LogisticRegression) -> tuple[np.ndarray, int]:
    """The same by SciPy's conjugate gradients, a query at a time, and the products that they took."""
    n, (coef,), (shift,) = len(y), model.coef_, model.intercept_
    share = 1 / (1 + np.exp(-(X @ coef + shift)))
    curved, products = share * (1 - share), 0

    def product(v: np.ndarray) -> np.ndarray:
        nonlocal products
        products += 1
        along = curved * (X @ v[:-1] + v[-1])
        return np.append(X.T @ along / n + v[:-1] / n, along.sum() / n)

    H = scipy.sparse.linalg.LinearOperator((X.shape[1] + 1,) * 2, matvec=product)
    values = []
    for query in range(QUERIES):
        slope = share[query] - (1 - y[query])
        v = slope * np.append(X[query].toarray()[0], 1.0)
        s, _ = scipy.sparse.linalg.cg(H, v, rtol=1e-6, maxiter=5000)
        values.append((share - y) * (X @ s[:-1] + s[-1]) / n)
    return np.array(values), products


def hashed() -> dict[str, float]:
    """Seconds and peak memory of one query where there are a million columns; in a process of its own."""
    draw = np.random.default_rng(0)
    n, d, words = 200_000, 2**20, 100
    columns = (d * draw.random((n, words)) ** 3).astype(np.int32)
    X = scipy.sparse.csr_matrix((np.ones(n * words), columns.ravel(), np.arange(0, n * words + 1, words)), shape=(n, d))
    X.sum_duplicates()
    y = (draw.random(n) < 1 / (1 + np.exp(-(X @ (0.1 * draw.normal(size=d)))))).astype(int)
    model = LogisticRegression(C=1e-2, tol=1e-4, max_iter=200).fit(X, y)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    took, _ = seconds(lambda: uw.explain(model, X, y).on_loss(X[:1], y[:1]).values)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    return {"seconds": took, "gigabytes_before": before, "peak_gigabytes": peak, "entries": float(X.nnz)}


def other(source: str) -> float:
    """The seconds of the same call by the build in another source folder, after a first one that imports."""
    environment = os.environ | {"PYTHONPATH": source}
    told = subprocess.run(
        [sys.executable, __file__, "--once"], env=environment, capture_output=True, text=True, check=True
    )
    return float(json.loads(told.stdout.splitlines()[-1]))


def own(X: Any, y: np.ndarray, model: LogisticRegression) -> dict[str, float]:
    """Self-influence of all rows over one query, what it takes beside the data, and how far it is from CG's."""
    one = min(seconds(lambda: uw.explain(model, X, y).on_loss(X[:1], 1 - y[:1]).values)[0] for _ in range(TURNS))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    took, values = seconds(lambda: uw.explain(model, X, y).of_self().values)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    some = np.linspace(0, N - 1, ROWS).astype(int)
    solver = uw.solvers.CG(rtol=1e-11, preconditioner=uw.solvers.Approximate())
    exact = uw.explain(model, X, y, solver=solver).of_self(some).values
    return {
        "one_query_seconds": one,
        "self_influence_seconds": took,
        "self_influence_over_one_query": took / one,
        "self_influence_gigabytes": peak - before,
        "self_influence_difference": float(np.abs(values[some] / exact - 1).max()),
    }


def main(source: str | None) -> None:
    data = table()
    values, (expected, products) = ours(*data), plain(*data)
    mine, theirs = zip(
        *((seconds(lambda: ours(*data))[0], seconds(lambda: plain(*data))[0]) for _ in range(TURNS)), strict=True
    )
    numbers: dict[str, Any] = {
        "seconds": float(np.median(mine)),
        "scipy_seconds": float(np.median(theirs)),
        "scipy_over_ours": float(np.median(np.divide(theirs, mine))),
        "scipy_products": products,
        "our_products": int(
            uw.explain(data[2], *data[:2]).on_loss(data[0][:QUERIES], 1 - data[1][:QUERIES]).certificate.sweeps
        ),
        "largest_difference": float(np.abs(values - expected).max() / np.abs(expected).max()),
    }
    numbers |= own(*data)
    if source is not None:
        before = other(source)
        numbers |= {"other_build_seconds": before, "other_build_over_ours": before / other(str(uw.__path__[0]) + "/..")}
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        numbers["hashed"] = pool.apply(hashed)
    shape = {"n": N, "p": LEVELS * FACTORS + 1, "entries": N * FACTORS, "queries": QUERIES, "turns": TURNS}
    report(__file__, shape, numbers)


if __name__ == "__main__":
    if "--once" in sys.argv:
        once = table()
        ours(*once)
        print(json.dumps(seconds(lambda: ours(*once))[0]))
    else:
        main(sys.argv[1] if len(sys.argv) > 1 else None)
