"""An Influence that is no longer used gives its memory back at once, without waiting for the garbage collector."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.linear_model import LinearRegression, LogisticRegression

import upweight as uw
from upweight.operators import EKFAC, GaussNewton
from upweight.solvers import CG, Cholesky, TwoLevel

RNG = np.random.default_rng(0)
X = RNG.normal(size=(300, 5))
Y = (X[:, 0] + RNG.normal(size=300) > 0).astype(int)


def classifier(**settings: Any) -> uw.Influence:
    return uw.explain(LogisticRegression(C=0.1, tol=1e-10).fit(X, Y), X, Y, **settings)


def network(**settings: Any) -> uw.Influence:
    torch.manual_seed(0)
    module = torch.nn.Sequential(torch.nn.Linear(5, 3), torch.nn.Tanh(), torch.nn.Linear(3, 2))
    data = (torch.tensor(X), torch.tensor(Y))
    return uw.explain(module.double(), *data, loss=torch.nn.CrossEntropyLoss(), damping=1.0, **settings)


def scored(influence: uw.Influence) -> None:
    influence.on_loss(influence.examples.x[:2], influence.examples.y[:2]).helpful(3)


QUESTIONS: dict[str, tuple[Callable[[], uw.Influence], Callable[[uw.Influence], Any]]] = {
    "scores": (classifier, scored),
    "scores by refined CG": (lambda: classifier(solver=CG(preconditioner=TwoLevel(rows=100))), scored),
    "scores by Cholesky": (lambda: classifier(solver=Cholesky()), scored),
    "self-influence": (classifier, lambda influence: influence.of_self()),
    "removal": (classifier, lambda influence: influence.of_removing([[0, 1]], on=(X[:1], Y[:1]))),
    "check": (classifier, lambda influence: str(influence.check())),
    "statistics": (
        lambda: uw.explain(LinearRegression().fit(X, X @ np.arange(5.0)), X, X @ np.arange(5.0) + 1),
        lambda influence: influence.summary_frame(),
    ),
    "a network's scores": (lambda: network(curvature=GaussNewton()), scored),
    "a network's factors": (lambda: network(curvature=EKFAC()), scored),
    "a network's check": (lambda: network(curvature=GaussNewton()), lambda influence: str(influence.check())),
}


@pytest.fixture
def no_collector() -> Iterator[None]:
    gc.collect()
    gc.disable()
    yield
    gc.enable()


@pytest.mark.filterwarnings("ignore::upweight.errors.TheoryWarning")
@pytest.mark.parametrize("case", QUESTIONS)
@pytest.mark.usefixtures("no_collector")
def test_memory_comes_back_with_the_last_reference(case: str) -> None:
    build, ask = QUESTIONS[case]
    influence = build()
    ask(influence)
    known = weakref.ref(influence), weakref.ref(influence.operator)
    del influence
    assert [reference() for reference in known] == [None, None]
