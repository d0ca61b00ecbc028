"""What is kept of a network's rows serves for every question about their curvature, and for ∇R."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import upweight as uw
from upweight.model import per_row
from upweight.operators import GaussNewton, layered
from upweight.operators.layered import LayeredGaussNewton
from upweight.solvers import CG
from upweight.solvers.precondition import Plain

N = 1100  # more than one chunk


def influence(**settings):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    X, y = torch.randn(N, 3, dtype=torch.float64), torch.randint(0, 3, (N,))
    weights = np.random.default_rng(0).uniform(0.5, 2.0, N)
    settings = {"curvature": GaussNewton(), "batch_size": 300, "damping": 0.02, "progress": False} | settings
    return uw.explain(net, X, y, loss=F.cross_entropy, penalty=0.1, sample_weight=weights, **settings)


def test_the_gradient_of_the_risk_takes_no_pass(monkeypatch):
    ours, swept = influence(), influence().system
    _ = ours.operator.apply(torch.ones(1, ours.objective.size, dtype=torch.float64))
    monkeypatch.setattr(type(ours.system.sweep), "fold", None)
    G = per_row.gradients(swept.sweep).numpy()
    mean = swept.examples.weights @ G / N + 0.1 * swept.objective.theta.numpy()
    assert np.abs(ours.system.risk_gradient.numpy() - mean).max() < 1e-12 * np.abs(mean).max() + 1e-14


def test_of_some_rows_with_other_weights_nothing_is_computed_again(monkeypatch):
    operator = influence().operator
    V = torch.randn(3, operator.size, dtype=torch.float64)
    rows = np.array([2, 299, 300, 1023, 1024, 1099])  # on both sides of every batch and chunk
    weights = np.array([1.0, 0.5, 2.0, 3.0, 0.25, 1.0])
    fresh = operator.of(rows, weights)
    assert not fresh.ready
    truth = fresh.apply(V)
    _ = operator.kept
    monkeypatch.setattr(layered, "kept", None)
    ours = operator.of(rows, weights)
    torch.testing.assert_close(ours.apply(V), truth, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(ours.forms(V), (V * truth).sum(1), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("preconditioner", [None, Plain()], ids=repr)
def test_products_run_in_single_precision_unless_plain_was_asked_for(preconditioner, monkeypatch):
    made, product = [], LayeredGaussNewton._product
    monkeypatch.setattr(
        LayeredGaussNewton, "_product", lambda self, *given: made.append(self.precision) or product(self, *given)
    )
    ours = influence(solver=CG(rtol=1e-9, preconditioner=preconditioner))
    V = per_row.gradients(ours.system.sweep, np.arange(3))
    found = ours.system.prepared.solve(V)
    matrix = ours.operator.matrix() + 0.02 * torch.eye(ours.operator.size, dtype=torch.float64)
    torch.testing.assert_close(found.x, torch.linalg.solve(matrix, V.T).T, rtol=1e-6, atol=1e-9)
    assert float(found.residual.max()) <= 1e-9  # of products in double precision
    assert (torch.float32 in made) == (preconditioner is None)


def test_a_rough_solution_makes_no_product_to_be_certain(monkeypatch):
    ours = influence(solver=CG())
    V = per_row.gradients(ours.system.sweep, np.arange(2))
    matrix = ours.operator.matrix() + 0.02 * torch.eye(ours.operator.size, dtype=torch.float64)
    made, apply = [], LayeredGaussNewton.apply
    monkeypatch.setattr(LayeredGaussNewton, "apply", lambda self, V: made.append(len(V)) or apply(self, V))
    x, left = ours.system.prepared.roughly(V, 0.05)
    rough = len(made)
    made.clear()
    _ = ours.system.prepared.solve(V)
    assert rough < len(made)
    torch.testing.assert_close(V - x @ matrix, left, rtol=1e-3, atol=1e-5 * float(V.norm()))
    assert bool((left.norm(dim=1) <= 0.05 * V.norm(dim=1)).all())
