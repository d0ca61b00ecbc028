"""Question: does `check()` cost at most as much as the scores of three queries, whatever the model?

Both start from `uw.explain(...)` and take turns in one process after a first call of each; the ratio is the median over
the turns. Models: dense and sparse logistic regression, ridge, an MLP, a CNN, a small Transformer and a GRU.

    python benchmarks/check_costs_three_queries.py [TURNS]        # five minutes
"""

from __future__ import annotations

import resource
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from common import report, seconds
from sklearn.linear_model import LogisticRegression, Ridge
from sparse_categories import table

import upweight as uw

Problem = tuple[Any, Any, Any, dict[str, Any]]  # model, X, y, settings of explain


class Texts(torch.nn.Module):
    """Words to classes through one layer of attention."""

    def __init__(self, words: int = 1000, width: int = 64) -> None:
        super().__init__()
        self.embed = torch.nn.Embedding(words, width)
        self.layer = torch.nn.TransformerEncoderLayer(width, 4, 128, dropout=0.0, batch_first=True)
        self.head = torch.nn.Linear(width, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.layer(self.embed(x)).mean(1))


class Steps(torch.nn.Module):
    """Sequences to classes through a GRU."""

    def __init__(self) -> None:
        super().__init__()
        self.cell = torch.nn.GRU(4, 8, batch_first=True)
        self.head = torch.nn.Linear(8, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.cell(x)[0][:, -1])


def trained(model: torch.nn.Module, X: torch.Tensor, y: torch.Tensor, steps: int = 60) -> torch.nn.Module:
    """A few steps of Adam: far enough that its gradients look like those of a model in use."""
    step = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(steps):
        step.zero_grad()
        torch.nn.functional.cross_entropy(model(X), y).backward()
        step.step()
    return model.eval()


def separated(n: int, shape: tuple[int, ...], classes: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows around the centres of their classes."""
    y = torch.randint(0, classes, (n,))
    return torch.randn(n, *shape) + torch.randn(classes, *shape)[y], y


def dense() -> Problem:
    draw = np.random.default_rng(0)
    X = draw.normal(size=(20_000, 100))
    y = (draw.random(20_000) < 1 / (1 + np.exp(-X @ draw.normal(size=100) / 5))).astype(int)
    return LogisticRegression(C=0.1, tol=1e-10, max_iter=1000).fit(X, y), X, y, {}


def wide() -> Problem:
    draw = np.random.default_rng(0)
    X = draw.normal(size=(8000, 600))
    y = np.argmax(X @ draw.normal(size=(600, 10)) + 10 * draw.gumbel(size=(8000, 10)), 1)
    return LogisticRegression(C=0.01, tol=1e-8, max_iter=1000).fit(X, y), X, y, {}


def sparse() -> Problem:
    X, y, model = table()
    return model, X, y, {}


def ridge() -> Problem:
    draw = np.random.default_rng(0)
    X = draw.normal(size=(20_000, 300))
    y = X @ draw.normal(size=300) + draw.normal(size=20_000)
    return Ridge(alpha=1.0).fit(X, y), X, y, {}


def mlp() -> Problem:
    X, y = separated(2000, (64,), 10)
    model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.Tanh(), torch.nn.Linear(64, 10))
    return trained(model, X, y), X, y, {"damping": 0.01}


def cnn() -> Problem:
    X, y = separated(1000, (1, 16, 16), 10)
    model = torch.nn.Sequential(
        torch.nn.Conv2d(1, 8, 3, stride=2),
        torch.nn.ReLU(),
        torch.nn.Conv2d(8, 16, 3, stride=2),
        torch.nn.ReLU(),
        torch.nn.Flatten(),
        torch.nn.Linear(144, 10),
    )
    return trained(model, X, y), X, y, {"damping": 0.01}


def transformer() -> Problem:
    X, y = torch.randint(0, 1000, (200, 24)), torch.randint(0, 4, (200,))
    return trained(Texts(), X, y, 20), X, y, {"damping": 0.01}


def gru() -> Problem:
    X, y = separated(60, (12, 4), 2)
    return trained(Steps(), X, y), X, y, {"damping": 0.01}


MODELS: dict[str, Callable[[], Problem]] = {
    one.__name__: one for one in (dense, wide, sparse, ridge, mlp, cnn, transformer, gru)
}


def measured(problem: Problem, turns: int) -> dict[str, float]:
    """Seconds of both, after a first call of each, and their ratio."""
    model, X, y, settings = problem
    settings = settings | ({"loss": torch.nn.functional.cross_entropy} if isinstance(model, torch.nn.Module) else {})

    def explain() -> uw.Influence:
        return uw.explain(model, X, y, progress=False, **settings)

    def three() -> object:
        return explain().on_loss(X[:3], y[:3]).values

    def check() -> object:
        return explain().check()

    three(), check()
    both = [(seconds(check)[0], seconds(three)[0]) for _ in range(turns)]
    checks, scores = np.array(both).T
    return {
        "check_seconds": float(np.median(checks)),
        "three_queries_seconds": float(np.median(scores)),
        "ratio": float(np.median(checks / scores)),
        "peak_gigabytes_so_far": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6,
    }


def main(turns: int, names: list[str]) -> None:
    torch.manual_seed(0)
    found = {}
    for name in names or MODELS:
        found[name] = measured(MODELS[name](), turns)
        print(name, found[name], flush=True)
    if not names:
        report(__file__, {"turns": turns}, found)


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 5, sys.argv[2:])
