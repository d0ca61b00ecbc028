"""Real MNIST, the paper's objective, n = 10,000, p = 7,840: CG against Cholesky, and LiSSA against CG."""

from __future__ import annotations

import os

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression

import upweight as uw

pytestmark = [
    pytest.mark.data,
    pytest.mark.skipif(uw.datasets.local("mnist") is None, reason="UPWEIGHT_DATA has no mnist folder"),
]
N, QUERIES = 10_000, 10


@pytest.fixture(scope="module")
def study():
    data = uw.datasets.mnist(os.path.join(os.environ["UPWEIGHT_DATA"], "mnist"))
    X, y = data.images[:N] / 255, data.labels[:N]
    model = LogisticRegression(C=1 / (0.01 * N), fit_intercept=False, tol=1e-6, max_iter=1000).fit(X, y)
    wrong = np.flatnonzero(model.predict(data.test_images / 255) != data.test_labels)[:QUERIES]
    return model, X, y, (data.test_images[wrong] / 255, data.test_labels[wrong])


def test_cg_to_a_residual_of_1e_6_agrees_with_cholesky(study):
    model, X, y, on = study
    exact = uw.explain(model, X, y, solver=uw.solvers.Cholesky()).on_loss(*on)
    assert exact.certificate.residual.max() < 1e-12
    assert exact.certificate.min_curvature == pytest.approx(0.01, rel=1e-3)  # the penalty bounds it from below
    scores = uw.explain(model, X, y, solver=uw.solvers.CG(rtol=1e-6)).on_loss(*on)
    assert scores.certificate.residual.max() <= 1e-6
    for ours, theirs in zip(scores.values, exact.values, strict=True):
        assert np.corrcoef(ours, theirs)[0, 1] >= 0.999999
        assert np.polyfit(theirs, ours, 1)[0] == pytest.approx(1, abs=1e-5)


@pytest.mark.slow
def test_lissa_is_within_four_of_its_own_standard_errors_for_99_percent_of_rows(study):
    model, X, y, on = study
    exact = uw.explain(model, X, y, solver=uw.solvers.CG(rtol=1e-10)).on_loss(*on)
    spec = uw.solvers.LiSSA(depth=4000, repeats=20, batch_size=20, seed=0)
    scores = uw.explain(model, X, y, solver=spec).on_loss(*on)
    assert scores.certificate.truncation < 0.01  # (1 − λmin/scale)^depth
    bias = scores.certificate.truncation * np.abs(exact.values).max(1, keepdims=True)
    z = (np.abs(scores.values - exact.values) - bias) / scores.standard_error
    assert np.mean(z <= 4) >= 0.99
    # error bars that are too wide would pass anything: they must also describe the scatter that is there
    plain = (scores.values - exact.values) / scores.standard_error
    assert 0.5 < np.sqrt(np.mean(plain**2)) < 2
    assert np.median(scores.standard_error / np.abs(exact.values).max(1, keepdims=True)) < 0.01
    for ours, theirs in zip(scores.values, exact.values, strict=True):
        assert np.corrcoef(ours, theirs)[0, 1] > 0.99
        assert np.polyfit(theirs, ours, 1)[0] == pytest.approx(1, abs=0.05)
