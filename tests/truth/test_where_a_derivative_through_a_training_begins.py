"""The first step that is differentiated is chosen by trainings with other weights; two known failures are refused."""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

import upweight as uw
from upweight.errors import NotLocal
from upweight.training.backwards import Backwards

N, WORDS, BATCH, STEPS = 48, 30, 8, 36
DRAW = torch.Generator().manual_seed(0)
X = (torch.rand(N, 5, generator=DRAW).pow(2) * WORDS).long()
Y = (X.double().mean(1) > WORDS / 3).long() ^ (torch.rand(N, generator=DRAW) < 0.15).long()
XQ, YQ = X[::6].flip(1), Y[::6]


class Reader(nn.Module):
    """Words are looked up, and some are in few rows: their second moments are almost empty for long."""

    def __init__(self):
        super().__init__()
        self.table, self.mix, self.out = nn.Embedding(WORDS, 6), nn.Linear(6, 6), nn.Linear(6, 2)

    def forward(self, x):
        return self.out(3 * torch.tanh(self.mix(self.table(x)).mean(-2)))


def trained(kind, rate, weights=None):
    """A model, its optimiser and, while the loop runs, its recording."""
    weights = torch.ones(N, dtype=torch.float64) if weights is None else weights
    torch.manual_seed(1)
    model = Reader().double()
    optimizer = kind(model.parameters(), lr=rate)
    with uw.Recording(model, optimizer, X, Y, loss=cross_entropy) as recording:
        for step in range(STEPS):
            rows = torch.arange(BATCH * step, BATCH * step + BATCH) % N
            optimizer.zero_grad()
            (weights[rows] * cross_entropy(model(X[rows]), Y[rows], reduction="none")).mean().backward()
            recording.batch(rows)
            optimizer.step()
    return recording


def adam(parameters, lr):
    return torch.optim.AdamW(parameters, lr=lr, weight_decay=0.0)


@cache
def removals(rate):
    """(q, n) what training without a row really does to the queries."""

    def losses(weights=None):
        model = trained(adam, rate, weights).model
        return cross_entropy(model(XQ), YQ, reduction="none").detach().numpy()

    whole = losses()
    without = torch.ones(N, N, dtype=torch.float64) - torch.eye(N, dtype=torch.float64)
    return np.stack([losses(line) - whole for line in without], 1)


def test_all_steps_where_all_steps_hold():
    through = uw.through(trained(torch.optim.SGD, 0.1), progress=False)
    assert through.since == 0
    told = str(through.on_loss(XQ, YQ).certificate)
    assert f"steps 0 to {STEPS} of SGD; steps from 0 on, as 8 training rows say (±" in told


def test_the_first_steps_of_adam_are_left_out():
    recording = trained(adam, 0.05)
    through = uw.through(recording, progress=False)
    assert STEPS // 12 <= through.since <= STEPS // 2
    scores = through.on_loss(XQ, YQ)
    assert "from 0 on the adjoint grew " in str(scores.certificate)
    whole = uw.through(recording, since=0, progress=False)
    with pytest.raises(NotLocal, match="r = -0"):
        whole.on_loss(XQ, YQ)
    noise = whole.on_loss(XQ, YQ, check=False)
    actual = removals(0.05)
    found, lost = (np.corrcoef(values.ravel(), actual.ravel())[0, 1] for values in (scores.values, noise.values))
    assert found > 0.6
    assert lost < 0.3


def test_a_derivative_through_the_second_moment_can_be_exact_and_no_prediction():
    """Of changes by 1/1000 it is right, and 1/10 of every row are beyond it: so is a row that goes."""
    through = uw.through(trained(adam, 0.15), since=0, second_moment="through", progress=False)
    found = through.locality(XQ, YQ)
    assert found.correlation[0] > 0.999
    assert found.slope[0] == pytest.approx(1, abs=0.02)
    assert not found.holds
    with pytest.raises(NotLocal, match=r"±0.1: r = -?0\.[0-7]"):
        through.on_loss(XQ, YQ)


def test_steps_that_are_too_large_have_no_beginning():
    """A network from scratch whose steps are far too large: no step to begin with, and all that was tried is told."""
    torch.manual_seed(0)
    Z = torch.randn(N, 3, dtype=torch.float64)
    model = nn.Sequential(nn.Linear(3, 16), nn.Tanh(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 2)).double()
    optimizer = torch.optim.SGD(model.parameters(), lr=8.0)
    with uw.Recording(model, optimizer, Z, Y, loss=cross_entropy) as recording:
        for step in range(4 * STEPS):
            rows = torch.arange(BATCH * step, BATCH * step + BATCH) % N
            optimizer.zero_grad()
            cross_entropy(model(Z[rows]), Y[rows]).backward()
            recording.batch(rows)
            optimizer.step()
    with pytest.raises(NotLocal) as refused:
        uw.through(recording, progress=False)
    for step in (0, 12, 24, 48, 72, 96):
        assert f"from {step} on " in str(refused.value)


def test_the_trainings_that_chose_judge_the_queries_too(monkeypatch):
    ended, runs = Backwards.ended, []
    monkeypatch.setattr(Backwards, "ended", lambda *told: runs.append(told[2]) or ended(*told))
    through = uw.through(trained(torch.optim.SGD, 0.1), progress=False)
    assert runs == [0] * 12
    scores = through.on_loss(XQ, YQ)
    assert runs == [0] * 12
    named = uw.through(through.trajectory, since=0, progress=False).on_loss(XQ, YQ)
    assert runs == [0] * 24
    np.testing.assert_array_equal(scores.values, named.values)
    assert str(scores.certificate).endswith(str(named.certificate).split("of SGD; ")[1])
    through.on_loss(XQ[:1], YQ[:1])
    assert runs == [0] * (24 + 60), "twelve draws for one query, two of which are known"
