"""Claim: sparse text costs seconds and less than a gigabyte, and gives the same numbers as a dense matrix would.

Enron1, bag of words with every word kept, L2-penalised logistic regression on 4,137 messages: the self-influence of
every row, and the effect of every row on all 1,035 test messages; in a process of its own for the memory. Then the same
on a dense matrix, for the comparison.

    UPWEIGHT_DATA=… python benchmarks/sparse_text_stays_sparse.py        # about a minute
"""

from __future__ import annotations

import multiprocessing
import resource
from typing import Any

import numpy as np
from common import report, seconds
from sklearn.feature_extraction.text import CountVectorizer
from sklearn.linear_model import LogisticRegression

import upweight as uw

L2, TEST = 1e-4, 1035


def messages() -> tuple[list[str], np.ndarray, list[str], np.ndarray]:
    """The shuffled messages, split as the paper splits them: the last 1,035 are the test set."""
    mail = uw.datasets.enron1()
    order = np.random.default_rng(0).permutation(len(mail.texts))
    texts, spam = [mail.texts[i] for i in order], mail.labels[order]
    return texts[:-TEST], spam[:-TEST], texts[-TEST:], spam[-TEST:]


def measure(dense: bool) -> dict[str, Any]:
    texts, y, test, yq = messages()
    words = CountVectorizer()
    X, Xq = words.fit_transform(texts).astype(np.float64), words.transform(test).astype(np.float64)
    model = LogisticRegression(C=1 / (L2 * len(y)), tol=1e-8, max_iter=5000).fit(X, y)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    if dense:
        X, Xq = X.toarray(), Xq.toarray()
    influence = uw.explain(model, X, y)
    self_seconds, own = seconds(influence.of_self)
    query_seconds, scores = seconds(lambda: influence.on_loss(Xq, yq))
    return {
        "n": len(y),
        "p": X.shape[1] + 1,
        "entries": int((X != 0).sum()),
        "solver": repr(influence.solver),
        "self_seconds": self_seconds,
        "query_seconds": query_seconds,
        "residual": float(max(own.certificate.residual.max(), scores.certificate.residual.max())),
        "before": before,
        "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6,
        "self": own.values,
        "values": scores.values,
    }


def alone(dense: bool) -> dict[str, Any]:
    """In a fresh process, so that its peak memory is its own."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(measure, (dense,))


def main() -> None:
    sparse, dense = alone(False), alone(True)
    numbers = {
        "self_influence_seconds": sparse["self_seconds"],
        "queries_seconds": sparse["query_seconds"],
        "peak_memory_gigabytes": sparse["peak"],
        "memory_before_gigabytes": sparse["before"],
        "largest_residual": sparse["residual"],
        "dense_self_influence_over_sparse": dense["self_seconds"] / sparse["self_seconds"],
        "dense_queries_over_sparse": dense["query_seconds"] / sparse["query_seconds"],
        "dense_peak_memory_gigabytes": dense["peak"],
        "largest_self_difference": _gap(sparse["self"], dense["self"]),
        "largest_query_difference": _gap(sparse["values"], dense["values"]),
    }
    settings = {key: sparse[key] for key in ("n", "p", "entries", "solver")} | {"queries": TEST, "l2": L2}
    report(__file__, settings, numbers)


def _gap(ours: np.ndarray, theirs: np.ndarray) -> float:
    """The largest difference, relative to the largest value."""
    return float(np.abs(ours - theirs).max() / np.abs(theirs).max())


if __name__ == "__main__":
    main()
