"""Leave-one-out of a network that is not at a minimum: refused at once, or with the minimum as the reference."""

from __future__ import annotations

import weakref

import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from torch import nn

import upweight as uw
from upweight.errors import InvalidInput, NotConverged

DRAW = torch.Generator().manual_seed(0)
X = torch.randn(60, 3, generator=DRAW, dtype=torch.float64)
Y = (X[:, 0] + X[:, 1] ** 2 > 0.5).long()
PENALTY = 0.1


def network():
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()


def test_what_is_far_from_a_minimum_is_refused_before_it_trains(monkeypatch):
    influence = uw.explain(network(), X, Y, loss=nn.functional.cross_entropy, penalty=PENALTY)
    monkeypatch.setattr("scipy.optimize.minimize", lambda *_, **__: pytest.fail("it trained"))
    with pytest.raises(InvalidInput, match=r"not at a minimum of its objective, as much as .* rows \(going on"):
        uw.leave_one_out(influence, (X[:2], Y[:2]), [0, 1])


def test_what_the_refusal_says_to_type():
    influence = uw.explain(network(), X, Y, loss=nn.functional.cross_entropy, penalty=PENALTY)
    at_its_end = uw.retrained(influence)
    first = uw.leave_one_out(at_its_end, (X[:2], Y[:2]), [0, 1, 2])
    second = uw.leave_one_out(influence, (X[:2], Y[:2]), [0, 1, 2], retrain=uw.LBFGS())
    np.testing.assert_allclose(first.actual, second.actual, rtol=1e-3, atol=1e-7)
    assert np.abs(first.control).max() < 1e-6
    assert np.abs(second.control).max() > 1e-2
    optimizer, batches = uw.minibatch.Adam(lr=0.01), uw.minibatch.Shuffled(20)
    training = uw.StackedTraining(optimizer, batches, epochs=2, factory=network)
    assert np.isfinite(uw.leave_one_out(influence, (X[:2], Y[:2]), [0, 1], retrain=training).actual).all()


def test_the_reference_is_the_minimum_that_training_on_all_rows_reaches():
    influence = uw.explain(network(), X, Y, loss=nn.functional.cross_entropy, penalty=PENALTY)
    names = list(dict(network().named_parameters()))
    shapes = [parameter.shape for parameter in network().parameters()]

    def objective(vector, weights):
        theta = torch.tensor(vector, requires_grad=True)
        parts = dict(zip(names, theta.split([shape.numel() for shape in shapes]), strict=True))
        parts = {name: part.reshape(shape) for (name, part), shape in zip(parts.items(), shapes, strict=True)}
        outputs = torch.func.functional_call(network(), parts, X)
        losses = nn.functional.cross_entropy(outputs, Y, reduction="none")
        share = float(weights.sum()) / len(X)
        value = (torch.from_numpy(weights) * losses).sum() / len(X) + share * PENALTY / 2 * (theta**2).sum()
        value.backward()
        return value.item(), theta.grad.numpy(), losses.detach().numpy()

    def trained(start, weights):
        solved = minimize(lambda v: objective(v, weights)[:2], start, jac=True, options={"gtol": 1e-9})
        return solved.x

    start = torch.cat([parameter.detach().reshape(-1) for parameter in network().parameters()]).numpy()
    ones = np.ones(len(X))
    whole = trained(start, ones)
    for row in (3, 11):
        without = trained(whole, np.where(np.arange(len(X)) == row, 0.0, 1.0))
        expected = objective(without, ones)[2][:4] - objective(whole, ones)[2][:4]
        actual = uw.leave_one_out(influence, (X[:4], Y[:4]), [row], retrain=uw.LBFGS(rtol=1e-6)).actual[:, 0]
        np.testing.assert_allclose(actual, expected, rtol=1e-3, atol=1e-7)


def test_parameters_of_trainings_are_not_kept():
    influence = uw.explain(network(), X, Y, loss=nn.functional.cross_entropy, penalty=PENALTY)
    alive, most = [], 0

    def retrain(weights, seed):
        nonlocal most
        theta = torch.cat([parameter.detach().reshape(-1) for parameter in network().parameters()]) * (1 + seed / 100)
        most = max(most, sum(one() is not None for one in alive))
        alive.append(weakref.ref(theta))
        return theta

    uw.leave_one_out(influence, (X[:2], Y[:2]), range(20), retrain=retrain)
    assert len(alive) == 21
    assert most <= 2


def test_a_control_that_fails_ends_the_run_at_once():
    influence = uw.explain(network(), X, Y, loss=nn.functional.cross_entropy, penalty=PENALTY)
    calls = []

    def retrain(weights, seed):
        calls.append(seed)
        raise NotConverged("it went nowhere")

    with pytest.raises(NotConverged, match="it went nowhere"):
        uw.leave_one_out(influence, (X[:2], Y[:2]), range(20), retrain=retrain)
    assert len(calls) == 1
