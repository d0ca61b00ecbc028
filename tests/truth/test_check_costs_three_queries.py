"""check() of a network computes about what the scores of three queries do: counted, not timed.

Both start from `explain`. What three queries pay for beside their systems, a sweep over the rows, check() has for the
products that its own questions take: the distance from the minimum, and C beside the Hessian.
"""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import upweight as uw
from counted import counting
from upweight.model import calculus
from upweight.operators import layered


class Words(nn.Module):
    """Words to classes through one layer of attention."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(40, 16)
        self.layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
        self.head = nn.Linear(16, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.layer(self.embed(x)).mean(1))


class Steps(nn.Module):
    """Sequences to classes through a GRU."""

    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.GRU(4, 8, batch_first=True)
        self.head = nn.Linear(8, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.cell(x)[0][:, -1])


def mlp():
    return nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 10)), torch.randn(1600, 64), 10


def cnn():
    stages = (nn.Conv2d(1, 8, 3, stride=2), nn.Tanh(), nn.Conv2d(8, 16, 3, stride=2), nn.Tanh(), nn.Flatten())
    return nn.Sequential(*stages, nn.Linear(144, 10)), torch.randn(1000, 1, 16, 16), 10


def transformer():
    return Words(), torch.randint(0, 40, (300, 12)), 3


def gru():
    return Steps(), torch.randn(60, 6, 4), 2


MOST = {mlp: 1.05, cnn: 1.1, transformer: 1.4, gru: 1.42}


def explained(make):
    torch.manual_seed(0)
    model, X, classes = make()
    y = torch.randint(0, classes, (len(X),))
    step = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(20):
        step.zero_grad()
        F.cross_entropy(model(X), y).backward()
        step.step()
    settings = {"loss": F.cross_entropy, "damping": 0.01, "progress": False}
    return lambda: uw.explain(model.eval(), X, y, **settings), (X[:3], y[:3])


@pytest.mark.parametrize("make", MOST, ids=lambda make: make.__name__)
def test_check_computes_what_three_queries_do(make):
    explain, queries = explained(make)
    explain().check()
    with counting() as check:
        report = explain().check()
    with counting() as three:
        explain().on_loss(*queries)
    assert report.beside_hessian is not None
    assert report.value_drift == report.value_drift

    assert check.flops <= MOST[make] * three.flops


def test_the_rows_are_visited_once_for_everything_that_is_asked_of_their_activations(monkeypatch):
    explain, _ = explained(mlp)
    rows, plain = [], layered.kept
    monkeypatch.setattr(layered, "kept", lambda objective, batch, w: rows.append(len(w)) or plain(objective, batch, w))
    pulled, pull = [], calculus.pull
    monkeypatch.setattr(calculus, "pull", lambda *given: pulled.append(given) or pull(*given))
    influence = explain()
    pulled.clear()  # those of the probe
    influence.check()
    assert sum(rows) == influence.examples.length  # also of the 512 rows that stand for all
    assert not pulled  # ∇R comes from what is kept
