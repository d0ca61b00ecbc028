"""Models that several apps are tried on."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression

import upweight as uw
from victims import TIGHT


@pytest.fixture(scope="module")
def stopped_early():
    """A model far from its minimum, the one that training on gives, and test rows that the two disagree on."""
    X, y = load_digits(return_X_y=True)
    X = X / 16
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = LogisticRegression(max_iter=8).fit(X[:600], y[:600])
        influence = uw.explain(model, X[:600], y[:600])
    whole = LogisticRegression(**TIGHT).fit(X[:600], y[:600])
    given, trained = model.predict(X), whole.predict(X)
    return influence, whole, X, y, np.flatnonzero((given == y) & (trained != y) & (np.arange(len(y)) >= 600))
