"""Rows of weight 0 in fit(): the same as leaving them out, for support vector machines that number the others anew."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
from sklearn.svm import SVC, SVR

import upweight as uw


def drawn(seed):
    draw = np.random.default_rng(seed)
    X = draw.normal(size=(24, 2))
    y = (X[:, 0] + draw.normal(size=24) > 0).astype(int)
    return X, y, draw.choice([0, 0.5, 1, 2.0], 24)


@pytest.mark.filterwarnings("ignore::upweight.errors.TheoryWarning")
@pytest.mark.parametrize("seed", [3, 34])  # 34: bounds of other rows held an intercept that is free, 14 times too much
def test_a_linear_machine_is_that_of_the_rows_that_weigh(seed):
    X, y, weights = drawn(seed)
    kept = weights > 0
    whole = SVC(kernel="linear", C=0.3).fit(X, y, sample_weight=weights)
    part = SVC(kernel="linear", C=0.3).fit(X[kept], y[kept], sample_weight=weights[kept])
    found = uw.explain(whole, X, y, sample_weight=weights).on_loss(X[:3], y[:3]).values
    expected = uw.explain(part, X[kept], y[kept], sample_weight=weights[kept]).on_loss(X[:3], y[:3]).values
    np.testing.assert_allclose(found[:, kept], expected, rtol=1e-3, atol=1e-6 * np.abs(expected).max())
    assert not found[:, ~kept].any()


def gram(A, B):
    return np.exp(-((A[:, None] - B[None]) ** 2).sum(2))


@pytest.mark.filterwarnings("ignore::upweight.errors.TheoryWarning")
@pytest.mark.parametrize("kind", [SVC, SVR])
def test_a_kernel_that_is_no_name_is_warned_of_and_the_way_out_works(kind):
    X, y, weights = drawn(3)
    kept = weights > 0
    machine = kind(kernel=gram, C=0.5).fit(X, y, sample_weight=weights)
    with pytest.warns(uw.errors.TheoryWarning, match=r"rows of weight 0.*own predictions are wrong.*X\[w > 0\]"):
        uw.explain(machine, X, y, sample_weight=weights)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        uw.explain(kind(kernel="rbf", C=0.5).fit(X, y, sample_weight=weights), X, y, sample_weight=weights)
    assert not [one for one in said if "rows of weight 0" in str(one.message)]
    again = kind(kernel=gram, C=0.5).fit(X[kept], y[kept], sample_weight=weights[kept])
    influence = uw.explain(again, X[kept], y[kept], sample_weight=weights[kept])
    assert np.isfinite(influence.on_loss(X[:3], y[:3]).values).all()
