"""The derivative through a StackedTraining's own steps is what the same StackedTraining does with other weights."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

import upweight as uw
from upweight.training.minibatch import SGD, Adam, Placed, Shuffled

N, D = 22, 3
DRAW = torch.Generator().manual_seed(0)
X = torch.randn(N, D, generator=DRAW, dtype=torch.float64)
Y = torch.randint(0, 2, (N,), generator=DRAW)
XQ, YQ = torch.randn(3, D, generator=DRAW, dtype=torch.float64), torch.tensor([0, 1, 1])
ROWS = [0, 5, 11, 21]
ONES = np.ones(N)
SOME = (np.arange(N) % 4 != 1).astype(float)


def mlp():
    return nn.Sequential(nn.Linear(D, 4), nn.Tanh(), nn.Linear(4, 2)).double()


def influence(**settings):
    torch.manual_seed(3)
    return uw.explain(mlp(), X, Y, loss=cross_entropy, **settings)


def by_reruns(training, at, seed, line, size=1e-6):
    """−df/du of these rows: the training itself, with the weight of one row moved up and down."""
    train = training.bind(at)

    def losses(row, move):
        weights = line.copy()
        weights[row] *= 1 + move
        objective = at.objective.at(train(weights, seed))
        return uw.calculus.losses(objective, (XQ, YQ)).numpy()

    return np.stack([(losses(row, -size) - losses(row, size)) / (2 * size) for row in ROWS], 1)


CASES = {
    "momentum, penalty per row": (SGD(0.2, 0.7), Shuffled(5), mlp, {"penalty": 0.3}, ONES),
    "penalty that stays": (SGD(0.2), Shuffled(5), mlp, {"penalty": 0.3, "penalty_per_example": False}, ONES),
    "Adam with decay, from the explained model": (Adam(0.05, eps=1e-4, weight_decay=0.1), Placed(6), None, {}, ONES),
    "rows that are left out close up": (SGD(0.2, 0.5), Shuffled(5), mlp, {"penalty": 0.3}, SOME),
    "rows that are left out leave their places": (Adam(0.05, eps=1e-4), Placed(2), mlp, {"penalty": 0.3}, SOME),
    "sample weights": (SGD(0.2), Shuffled(5), mlp, {"penalty": 0.3, "sample_weight": 0.5 + np.arange(N) / N}, ONES),
}


@pytest.mark.parametrize("name", CASES)
def test_it_is_the_derivative_of_the_same_training(name):
    optimizer, batches, factory, settings, line = CASES[name]
    training = uw.StackedTraining(optimizer, batches, 3, factory, together=2)
    at = influence(**settings)
    seeds = [0, 4, 1]
    runs = uw.recorded(training, at, seeds, weights=line)
    for run, seed in zip(runs, seeds, strict=True):
        theta, _ = run.begun(len(run), list(at.objective.blocks))
        torch.testing.assert_close(theta, training.bind(at)(line, seed), rtol=1e-12, atol=1e-14)
    for run, seed in zip(runs[1:], seeds[1:], strict=True):
        values = uw.through(run, since=0, second_moment="through").on_loss(XQ, YQ, check=False).values
        expected = by_reruns(training, at, seed, line)
        np.testing.assert_allclose(values[:, ROWS], expected, rtol=1e-5, atol=1e-6 * np.abs(expected).max())
        assert not values[:, line == 0].any()


def test_an_objective_that_is_a_function():
    """Without a module: a loss of one example, and parameters under one name."""

    def loss(theta, example):
        return (theta @ example[0] - example[1]) ** 2

    y = X @ torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    at = uw.Influence(uw.Objective(loss, torch.zeros(D, dtype=torch.float64)), (X, y))
    training = uw.StackedTraining(SGD(0.05, 0.5), Shuffled(4), 2)
    (run,) = uw.recorded(training, at)
    values = uw.through(run, since=0).on_loss(XQ, y[:3]).values
    train = training.bind(at)
    sides = []
    for size in (-1e-6, 1e-6):
        weights = ONES.copy()
        weights[7] += size
        sides.append(uw.calculus.losses(at.objective.at(train(weights, 0)), (XQ, y[:3])).numpy())
    np.testing.assert_allclose(values[:, 7], (sides[0] - sides[1]) / 2e-6, rtol=1e-6)


def test_removal_is_predicted_and_their_mean_is_a_mean():
    at, training = influence(), uw.StackedTraining(SGD(0.1), Placed(11), 4, mlp)
    runs = uw.recorded(training, at, [0, 1])
    values = np.mean([uw.through(run).on_loss(XQ, YQ).values for run in runs], 0)
    left = uw.leave_one_out(at, (XQ, YQ), range(N), training, seeds=2)
    assert np.corrcoef(values.ravel(), left.actual.ravel())[0, 1] > 0.98
    slope = float((values * left.actual).sum() / (values**2).sum())
    assert slope == pytest.approx(1, abs=0.1)
