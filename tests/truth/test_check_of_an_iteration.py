"""check() of a model whose systems cost sweeps: three of them tell what a factorisation tells of all."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from torch import nn
from torch.nn import functional as F

import upweight as uw
from upweight.operators.layered import LayeredGaussNewton
from upweight.operators.linear import LinearHessian

X, Y = load_digits(return_X_y=True)
X, Y = X[:400] / 16, Y[:400]


def digits(steps, **settings):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fit = LogisticRegression(max_iter=steps, tol=1e-12).fit(X, Y)
        return uw.explain(fit, X, Y, progress=False, **settings)


def network(**settings):
    torch.manual_seed(0)
    inputs = torch.randn(300, 8)
    targets = (inputs[:, 0] > 0).long() + (inputs[:, 1] > 0).long()
    net = nn.Sequential(nn.Linear(8, 12), nn.Tanh(), nn.Linear(12, 3))
    step = torch.optim.Adam(net.parameters(), 1e-2)
    for _ in range(100):
        step.zero_grad()
        F.cross_entropy(net(inputs), targets).backward()
        step.step()
    return uw.explain(net.eval(), inputs, targets, loss=F.cross_entropy, damping=0.02, progress=False, **settings)


EARLY = {f"{steps} steps": (digits, steps) for steps in (12, 25, 60)} | {"network": (network,)}


@pytest.mark.parametrize("name", EARLY)
def test_it_says_what_a_factorisation_says(name):
    make, *steps = EARLY[name]
    ours, exact = (make(*steps, solver=solver).check() for solver in (uw.solvers.CG(), uw.solvers.Cholesky()))
    assert ours.drift == pytest.approx(exact.drift, rel=1e-3)
    assert ours.rows_from_minimum == pytest.approx(exact.rows_from_minimum, rel=0.35)
    assert ours.value_drift == pytest.approx(exact.value_drift, rel=0.45)
    assert ours.ok == exact.ok
    assert 0 <= ours.sum_of_influences <= 8 * exact.sum_of_influences  # of the sum of 8 queries, with random signs
    assert ours.held_back <= exact.held_back * (1 + 1e-3)
    assert ours.min_curvature >= exact.min_curvature - 1e-9
    assert (ours.bound_only, exact.bound_only) == (True, False)


def test_a_query_alone_has_the_same_drift_by_its_own_system_and_by_that_of_the_gradient():
    report = digits(12, solver=uw.solvers.CG()).check((X[5:6], (Y[5:6] + 1) % 10))
    assert report.drift > 0
    assert report.sum_of_influences == pytest.approx(report.drift, rel=1e-4)


@pytest.mark.parametrize(("make", "kind"), [(lambda: digits(60, solver=uw.solvers.CG()), LinearHessian),
                                            (lambda: network(solver=uw.solvers.CG()), LayeredGaussNewton)],
                         ids=["linear", "network"])  # fmt: skip
def test_it_multiplies_the_curvature_by_no_more_vectors_than_three_queries_do(make, kind, monkeypatch):
    vectors, plain = [], kind.apply

    def counted(self, V):
        vectors.append(len(V) * self.sweep.n)
        return plain(self, V)

    monkeypatch.setattr(kind, "apply", counted)
    make().check()
    check = sum(vectors)
    vectors.clear()
    influence = make()
    asked = influence.examples.batch(np.arange(3))
    _ = influence.on_loss(*asked).values
    assert check <= 1.5 * sum(vectors)  # beside them three queries pay for one more sweep over the rows
