"""Small runs for the tests of the explorer's reviews."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import numpy as np

import upweight as uw
from upweight.explore.labels import Labels, labels_of
from upweight.explore.reviews import Reviews

N, CLASSES = 120, ("cat", "dog", "=owl")


@cache
def _fitted():
    from sklearn.linear_model import LogisticRegression

    draw = np.random.default_rng(0)
    X = draw.normal(size=(N + 30, 2))
    truth = np.digitize(X[:, 0], [-0.4, 0.4])
    y = truth.copy()
    y[:12] = (y[:12] + 1) % 3
    names = np.array(CLASSES)
    model = LogisticRegression(tol=1e-8).fit(X[:N], names[y[:N]])
    return X, names[y], names[truth], model


def study() -> uw.Study:
    """A study whose first 12 of 120 labels are wrong."""
    X, y, truth, model = _fitted()
    influence = uw.explain(model, X[:N], y[:N], ids=[f"row {row}" for row in range(N)])
    return uw.Study(influence, (X[N:], truth[N:]))


def truth():
    return _fitted()[2][:N]


def made(folder: Path) -> uw.Run:
    """A run of it."""
    one = study()
    return uw.write_run(one.influence, folder, *one.queries, card=lambda row: f"text <b>{row}</b>")


def labels(n: int = 20, work: str = "0123456789abcdef") -> Labels:
    """Labels of no run: rows are called 3, or 7, in turn; the model says 7 of all."""
    codes = (np.arange(n) % 2).astype(np.int32)
    return Labels(work, (3, 7), codes, np.ones(n, np.int32), {"loss": np.arange(n) / n})


def log(folder: Path, n: int = 20) -> Reviews:
    return Reviews(folder, labels(n))


__all__ = ["CLASSES", "N", "labels", "labels_of", "log", "made", "study", "truth"]
