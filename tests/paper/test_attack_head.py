"""The fast top layer of paper.attack gives what an Influence, `apps.attack` and scikit-learn give."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import upweight as uw

ROOT = Path(__file__).parents[2]

PENALTY, N = 0.01, 120


@pytest.fixture
def data():
    draw = np.random.default_rng(0)
    H = draw.normal(size=(N + 10, 8))
    y = (H[:, 0] + draw.normal(size=N + 10) > 0).astype(float)
    return H[:N], y[:N], H[N:], y[N:]


def fitted(H, y):
    from sklearn.linear_model import LogisticRegression

    return LogisticRegression(C=1 / (N * PENALTY), fit_intercept=False, tol=1e-12, max_iter=5000).fit(H, y)


def test_its_answers_are_those_of_an_influence(data):
    from paper.head import Head

    H, y, Hq, yq = data
    head = Head(H, y, PENALTY)
    head.fit()
    model = fitted(H, y)
    np.testing.assert_allclose(head.theta, model.coef_[0], atol=1e-6)
    influence = uw.explain(model, H, y)
    expected = influence.of_perturbing(np.arange(N), on=(Hq, yq)).mean(0)
    np.testing.assert_allclose(head.of_perturbing(head.s_test(Hq, yq)), expected, atol=1e-6)
    assert head.loss(Hq, yq) == pytest.approx(influence.on_loss(Hq, yq).query_values.mean(), rel=1e-5)
    head.H[[3, 9]] += 0.5
    head.fit()
    np.testing.assert_allclose(head.theta, fitted(head.H, y).coef_[0], atol=1e-6)


def test_its_iteration_is_that_of_the_app(data):
    from paper.head import Head

    H, y, Hq, yq = data
    rows, step, half = np.array([5, 60]), 0.02, 0.5 * 0.999
    head = Head(H, y, PENALTY)
    head.fit()
    losses = [head.loss(Hq, yq)]
    x = H[rows].copy()
    for _ in range(6):
        gradient = head.of_perturbing(head.s_test(Hq, yq))[rows]
        x = np.clip(np.clip(x + step * np.sign(gradient), H[rows] - half, H[rows] + half), H.min(), H.max())
        head.H[rows] = x
        head.fit()
        losses.append(head.loss(Hq, yq))
    made = uw.apps.attack(uw.explain(fitted(H, y), H, y), (Hq, yq), rows=rows, level=1.0, step=step, iterations=6)
    np.testing.assert_allclose(made.losses, losses, rtol=1e-5)
    np.testing.assert_allclose(made.after, x, atol=1e-9)
