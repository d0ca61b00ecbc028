"""The network of figure 2 right: its derivatives against the library's, and the figure's own code on few rows."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy

import upweight as uw
from upweight import datasets

ROOT = Path(__file__).parents[2]


def some(n=12, dtype=torch.float64):
    from paper import cnn

    draw = torch.Generator().manual_seed(1)
    return cnn.Rows(torch.rand(n, 1, 28, 28, generator=draw, dtype=dtype), torch.arange(n) % 10)


def theta():
    from paper import cnn

    return cnn.flat(cnn.untrained()) * 0.7


def library(rows, **settings):
    from paper import cnn

    named = cnn.Network().named_parameters()
    strengths = {name: 0.001 for name, _ in named if name.endswith("weight")}
    model = cnn.at(theta(), torch.float64)
    return uw.explain(model, rows.X, rows.y, loss=cross_entropy, penalty=uw.L2(strengths), **settings)


def test_the_network_has_the_papers_parameters():
    from paper import cnn

    network = cnn.untrained()
    assert sum(parameter.numel() for parameter in network.parameters()) == 2_616
    assert [tuple(c.weight.shape) for c in network.convolutions] == [(8, 1, 3, 3), *[(8, 8, 3, 3)] * 4, (10, 8, 1, 1)]
    x, shapes = torch.zeros(1, 1, 28, 28), []
    for convolution in network.convolutions:
        x = convolution(x)
        shapes.append(x.shape[2])
    assert shapes == [26, 12, 10, 4, 2, 2]
    assert network(torch.zeros(3, 1, 28, 28)).shape == (3, 10)
    weights = network.convolutions[1].weight.detach()
    assert float(weights.abs().max()) <= 2 * 2 / 72**0.5
    assert all(float(p.detach().abs().max()) == 0 for name, p in network.named_parameters() if name.endswith("bias"))
    assert float((cnn.strengths() > 0).sum()) == 2_616 - 5 * 8 - 10 - 10


def test_the_gradient_is_the_librarys_with_and_without_a_row():
    from paper import cnn

    rows = some()
    influence = library(rows, penalty_per_example=True)
    _, gradient = cnn.risk(theta(), rows)
    torch.testing.assert_close(gradient, influence.risk_gradient, atol=1e-12, rtol=0)
    value, without = cnn.risk(theta(), rows, 3)
    kept = torch.tensor([row for row in range(rows.n) if row != 3])
    less, _ = cnn.risk(theta(), cnn.Rows(rows.X[kept], rows.y[kept]))
    assert value == pytest.approx(less * (1 - 1 / rows.n), abs=1e-12)
    _, row = cnn.risk(theta(), cnn.Rows(rows.X[[3]], rows.y[[3]]))
    torch.testing.assert_close(without, gradient - row / rows.n, atol=1e-12, rtol=0)


def test_gauss_newton_and_hessian_are_the_librarys():
    from paper import cnn

    rows = some(3)
    influence = library(rows, curvature=uw.operators.GaussNewton())
    V = torch.randn(4, 2_616, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    G = cnn.gauss_newton(theta(), rows)
    torch.testing.assert_close(V @ G, influence.operator.apply(V), atol=1e-8, rtol=1e-6)
    exact = library(rows, curvature=uw.operators.Hessian()).operator.apply(V)
    start, late = 2_616 - 110 - 90 - 584, slice(2_616 - 110 - 90 - 584, None)
    network = cnn.at(theta(), torch.float64)
    lines = cnn._lines(network, 4, 40, rows) / rows.n
    lines[:, :40] += torch.diag(cnn.strengths()[late][:40])
    V[:, :start] = 0
    exact = library(rows, curvature=uw.operators.Hessian()).operator.apply(V)
    torch.testing.assert_close(V[:, late] @ lines.T, exact[:, late][:, :40], atol=1e-9, rtol=1e-7)


def test_the_newton_step_of_a_removal_is_that_of_the_curvature_without_the_row():
    from paper import cnn, fig2_right

    rows, query = some(4), some(1)
    curvature = torch.rand(2_616, generator=torch.Generator().manual_seed(5), dtype=torch.float64) + 0.5
    H = uw.operators.DenseOperator(torch.diag(curvature))
    values, leverages = fig2_right.newton_steps(theta(), rows, query, H, np.array([2]))
    one = cnn.Rows(rows.X[[2]], rows.y[[2]])
    own = (cnn.gauss_newton(theta(), one) - torch.diag(cnn.strengths())) / rows.n
    whole = torch.diag(curvature + 0.01)
    step = torch.linalg.solve(whole - own, cnn.risk(theta(), one)[1] / rows.n)
    slope = cnn.risk(theta(), query)[1] - cnn.strengths() * theta()
    assert values[0] == pytest.approx(float(slope @ step), rel=1e-4)
    scale = (curvature + 0.01).rsqrt()
    assert leverages[0] == pytest.approx(float(torch.linalg.eigvalsh(scale[:, None] * own * scale)[-1]), rel=1e-4)
    assert leverages[0] > 0.01


def test_training_on_is_gradient_descent_for_a_time():
    from paper import cnn, fig2_right

    rows, query = some(6), some(1)
    flat = uw.operators.DenseOperator(torch.zeros(2_616, 2_616, dtype=torch.float64))
    flat._spectrum = (torch.zeros(2_616, dtype=torch.float64), torch.eye(2_616, dtype=torch.float64))
    losses = fig2_right.further(theta(), flat, rows, query, 4)
    at = theta()
    for loss in losses:
        at = at - fig2_right.LENGTH * cnn.risk(at, rows, 4)[1]
        assert loss == pytest.approx(fig2_right.loss_of(at, query), rel=1e-9)
    time = fig2_right.AGAIN * fig2_right.LENGTH
    assert time == pytest.approx(1 / fig2_right.DAMPING)


def test_a_hessian_is_put_together_from_its_layers(monkeypatch):
    from paper import cnn

    whole = torch.randn(2_616, 2_616, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    whole = whole + whole.T
    sizes = [80, 584, 584, 584, 584, 90, 110]
    starts = np.cumsum([0, *sizes])

    def lines(network, layer, size, rows):
        assert size == sizes[layer]
        return whole[starts[layer] : starts[layer] + size, starts[layer] :] * rows.n

    monkeypatch.setattr(cnn, "_lines", lines)
    monkeypatch.setattr(cnn, "CHUNK", 5)
    expected = whole + torch.diag(cnn.strengths())
    torch.testing.assert_close(cnn.hessian(theta(), some(12)), expected, atol=1e-10, rtol=0)


def test_descent_finds_the_minimum_of_a_quadratic_in_few_steps():
    from paper import cnn

    generator = torch.Generator().manual_seed(4)
    root = torch.randn(30, 30, generator=generator, dtype=torch.float64)
    A = root @ root.T + 0.1 * torch.eye(30, dtype=torch.float64)
    b = torch.randn(30, generator=generator, dtype=torch.float64)

    def function(x):
        return float(x @ A @ x / 2 - b @ x), A @ x - b

    start = torch.ones(30, dtype=torch.float64)
    found = cnn.descend(function, start, cnn.Metric(uw.operators.DenseOperator(A)), 1e-9, 40)
    torch.testing.assert_close(found.theta, torch.linalg.solve(A, b), atol=1e-7, rtol=0)
    assert found.norm <= 1e-9
    assert found.calls <= 6
    indefinite = A - 2 * torch.eye(30, dtype=torch.float64)
    metric = cnn.Metric(uw.operators.DenseOperator(indefinite))
    eigenvalues, Q = torch.linalg.eigh(indefinite)
    sizes = eigenvalues.abs().clamp(min=cnn.FLOOR)
    torch.testing.assert_close(metric.scaled(b, -1.0), Q @ ((Q.T @ b) / sizes), atol=1e-9, rtol=1e-9)
    assert float((eigenvalues < 0).sum()) > 0


def test_adam_goes_on_where_it_was_interrupted(tmp_path, monkeypatch):
    from paper import cnn

    monkeypatch.setattr(cnn, "BATCH", 10)
    monkeypatch.setattr(cnn, "KEEP_EVERY", 3)
    rows = some(30, torch.float32)
    plan = cnn.Adam(10, 1e-3, (6, 8))
    whole, _ = plan.train(theta(), rows, tmp_path / "a.pt")
    replace(plan, steps=5).train(theta(), rows, tmp_path / "b.pt")  # keeps step 3, where an epoch ends
    again, state = plan.train(theta(), rows, tmp_path / "b.pt")
    torch.testing.assert_close(again, whole, atol=0, rtol=0)
    assert state["param_groups"][0]["lr"] == pytest.approx(1e-5)
    further, _ = cnn.Adam(1, 1e-6, ()).train(whole, rows, tmp_path / "c.pt", state=state)
    assert 0 < float((further - whole).abs().max()) < 2e-6  # moments that are kept make no first step of full size


@pytest.mark.data
@pytest.mark.skipif(datasets.local("mnist") is None, reason="UPWEIGHT_DATA has no mnist folder")
def test_the_figure_is_computed_on_few_rows(tmp_path, monkeypatch):
    from paper import cnn, fig2_right, report

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(cnn, "BATCH", 50)
    monkeypatch.setattr(fig2_right, "TRAIN", cnn.Adam(60, 3e-3, (40, 50)))
    monkeypatch.setattr(fig2_right, "LOWEST", 2)
    monkeypatch.setattr(fig2_right, "TRIES", 2)
    monkeypatch.setattr(fig2_right, "DAMPING", 3.0)  # positive with it, so that few products do
    monkeypatch.setattr(fig2_right, "DAMPINGS", (3.0,))
    monkeypatch.setattr(fig2_right, "MORE", 5.0)
    monkeypatch.setattr(fig2_right, "AGAIN", 3)
    monkeypatch.setattr(cnn, "STEPS", 10)
    half = torch.eye(cnn.PARAMETERS, dtype=torch.float64) / 2
    monkeypatch.setattr(cnn, "near_hessian", lambda theta, rows, hard: half)
    small = report.timed(fig2_right.compute, rows=200, removed=3, rounds=1)
    assert small["numbers"]["n_removed"] == 3
    assert len(small["arrays"]["actual"]) == 3
    assert np.isfinite(list(small["numbers"].values())).all()
    kept = json.loads(next((tmp_path / "upweight" / "paper").glob("fig2_right-*.json")).read_text())
    assert set(kept) == {*map(str, small["arrays"]["rows"]), "None"}
    assert np.shape(small["arrays"]["losses"]) == (4, 3)
