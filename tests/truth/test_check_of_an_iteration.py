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
from upweight.influence import minimum
from upweight.operators.layered import LayeredGaussNewton
from upweight.operators.linear import LinearHessian

X, Y = load_digits(return_X_y=True)
X, Y = X[:400] / 16, Y[:400]


def digits(steps, **settings):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fit = LogisticRegression(max_iter=steps, tol=1e-12).fit(X, Y)
        return uw.explain(fit, X, Y, progress=False, **settings)


torch.manual_seed(0)
INPUTS = torch.randn(300, 8)
TARGETS = (INPUTS[:, 0] > 0).long() + (INPUTS[:, 1] > 0).long()


def network(**settings):
    torch.manual_seed(0)
    inputs, targets = INPUTS, TARGETS
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
    assert (ours.summed, exact.summed) == (True, False)


def test_an_iteration_does_not_call_what_holds_back_the_sum_of_queries_the_most():
    ours, exact = (network(solver=solver).check() for solver in (uw.solvers.CG(), uw.solvers.Cholesky()))
    alone = network(solver=uw.solvers.CG()).check((INPUTS[:1], TARGETS[:1]))
    assert f"holds back about {ours.held_back:.0%}" in str(ours)
    assert f"holds back up to {exact.held_back:.0%}" in str(exact)
    assert f"holds back up to {alone.held_back:.0%}" in str(alone)


ROWS = np.random.default_rng(0).normal(size=(2045, 6))
SIGNS = (2 * ROWS[:, 0] + np.random.default_rng(1).normal(size=2045) > 0) * 1
WEIGHTS = {
    "every second row": np.arange(2045) % 2.0,  # none of every fourth row has any
    "a hundredth of the rows": np.where(np.arange(2045) % 100 == 7, 100.0, 0.01),
}


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("solver", [uw.solvers.CG(), uw.solvers.Cholesky()], ids=repr)
def test_the_few_rows_that_stand_for_all_stand_for_their_weights(weights, solver, monkeypatch):
    settings = {"sample_weight": WEIGHTS[weights], "solver": solver, "progress": False}

    def drift():
        return uw.explain(fit, ROWS, SIGNS, **settings).check().value_drift

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fit = LogisticRegression(max_iter=3, C=10).fit(ROWS, SIGNS, sample_weight=WEIGHTS[weights])
        few = drift()
        monkeypatch.setattr(minimum, "FEW", 2045)
        assert few == pytest.approx(drift(), rel=0.1)


def test_beside_the_hessian_rows_without_weight_count_for_nothing(monkeypatch):
    torch.manual_seed(0)
    net, inputs = nn.Sequential(nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 2)), torch.from_numpy(ROWS).float()
    settings = {"loss": F.cross_entropy, "damping": 0.01, "progress": False, "curvature": uw.operators.EKFAC()}
    influence = uw.explain(net, inputs, SIGNS, sample_weight=WEIGHTS["every second row"], **settings)
    few = influence.check().beside_hessian
    monkeypatch.setattr(minimum, "FEW", 2045)
    assert few == pytest.approx(influence.check().beside_hessian, rel=0.2)


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
