"""The datamodeling score where the truth is known: ridge in closed form, and a network that is trained again."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.stats
import torch
from sklearn.linear_model import Ridge
from torch import nn

import cases
import upweight as uw
from upweight.training.minibatch import SGD, Placed, Shuffled

N, D, ALPHA = 300, 4, 3.0
DRAW = np.random.default_rng(0)
X = DRAW.normal(size=(N, D))
Y = X @ DRAW.normal(size=D) + DRAW.normal(size=N)
XQ = DRAW.normal(size=(6, D))
YQ = XQ @ DRAW.normal(size=D)


def closed_form(rows: np.ndarray) -> np.ndarray:
    """Squared errors of the queries after ridge regression with a free intercept on these rows."""
    A, b = X[rows], Y[rows]
    centre, mean = A.mean(0), b.mean()
    w = np.linalg.solve((A - centre).T @ (A - centre) + ALPHA * np.eye(D), (A - centre).T @ (b - mean))
    return ((XQ - centre) @ w + mean - YQ) ** 2


@pytest.fixture(scope="module")
def influence():
    return uw.explain(Ridge(alpha=ALPHA, tol=1e-12).fit(X, Y), X, Y)


def test_outcomes_are_the_closed_form(influence):
    masks = uw.random_subsets(N, 5)
    found = uw.subset_retraining(influence, (XQ, YQ), masks)
    for s, mask in enumerate(masks):
        np.testing.assert_allclose(found.values[:, s, 0], closed_form(np.flatnonzero(mask)), rtol=1e-8)


def test_a_few_rows_are_predicted_in_the_right_order(influence):
    masks = uw.random_subsets(N, 150, fraction=0.98)
    found = uw.subset_retraining(influence, (XQ, YQ), masks)
    result = uw.lds(influence.on_loss(XQ, YQ), found)
    assert result.value > 0.98
    assert result.low > 0.97
    assert result.per_query.min() > 0.95


def test_half_the_rows_are_predicted_too(influence):
    found = uw.subset_retraining(influence, (XQ, YQ), uw.random_subsets(N, 150))
    scores = influence.on_loss(XQ, YQ)
    result = uw.lds(scores, found)
    assert result.value > 0.85
    predicted = scores.values @ (~found.subsets).T
    for q in range(len(XQ)):
        assert result.per_query[q] == pytest.approx(scipy.stats.spearmanr(predicted[q], found.values[q, :, 0])[0])


def test_the_sign_by_deed(influence):
    """Subsets without the helpful rows raise the loss, those without the harmful ones lower it: LDS is positive."""
    scores = influence.on_loss(XQ[:1], YQ[:1])
    order = np.argsort(scores.values[0])
    without = [np.setdiff1d(np.arange(N), order[-30:]), np.arange(N)[:-1], np.setdiff1d(np.arange(N), order[:30])]
    found = uw.subset_retraining(influence, (XQ[:1], YQ[:1]), without)
    assert found.values[0, 0] > found.values[0, 1] > found.values[0, 2]
    assert uw.lds(scores, found).value == pytest.approx(1)


def test_it_ranks_influence_above_noise(influence):
    found = uw.subset_retraining(influence, (XQ, YQ), uw.random_subsets(N, 100))
    scores = influence.on_loss(XQ, YQ)
    noise = uw.Scores(
        DRAW.normal(size=scores.values.shape), "row removed", scores.rows, N, scores.certificate, measure="loss"
    )
    nothing = uw.lds(noise, found)
    assert nothing.low < 0 < nothing.high
    assert uw.lds(scores, found).low > nothing.high


def test_a_network_at_its_minimum():
    """L-BFGS to the minimum from the fit: the Hessian predicts subsets of a tanh network."""
    case = cases.make("mlp")
    explained = case.influence()
    found = uw.subset_retraining(explained, case.queries, uw.random_subsets(case.n, 40, fraction=0.9), uw.LBFGS())
    assert uw.lds(explained.on_loss(*case.queries), found).value > 0.9


def test_a_network_that_is_trained_by_steps_with_seeds_of_its_own():
    draw = torch.Generator().manual_seed(0)
    inputs = torch.randn(120, 5, generator=draw)
    labels = (inputs[:, 0] + 0.5 * inputs[:, 1] ** 2 + 0.3 * torch.randn(120, generator=draw) > 0.3).long()

    def factory():
        return nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Dropout(0.1), nn.Linear(8, 2))

    cross_entropy = nn.functional.cross_entropy
    training = uw.StackedTraining(SGD(0.1, 0.9), Shuffled(16), 40, factory, together=20)
    plain = uw.explain(factory().eval(), inputs[:100], labels[:100], loss=cross_entropy, penalty=0.01)
    model = factory().eval()
    nn.utils.vector_to_parameters(training.bind(plain)(np.ones(100), 0), model.parameters())
    explained = uw.explain(model, inputs[:100], labels[:100], loss=cross_entropy, penalty=0.01)
    on = (inputs[100:], labels[100:])
    found = uw.subset_retraining(explained, on, uw.random_subsets(100, 60), training, seeds=4)
    result = uw.lds(explained.on_loss(*on), found)
    assert 0.4 < result.value < result.ceiling
    assert result.one_seed < result.value
    assert result.one_seed_ceiling < result.ceiling < 1

    left = uw.leave_one_out(
        explained, on, [3, 40, 77], uw.StackedTraining(SGD(0.1, 0.9), Placed(16), 40, factory), seeds=4
    )
    assert left.standard_error.shape == (20, 3)
    assert np.abs(left.control).max() > 0  # four trainings of other seeds end elsewhere
