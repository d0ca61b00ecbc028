"""The peers' table: its page is what its result says, and its oracle is right where the answer is known."""

from __future__ import annotations

import json
import sys

import numpy as np
import pytest
import torch
from generated import ROOT

import upweight as uw

PEERS = ROOT / "benchmarks" / "peers"


@pytest.fixture(scope="module")
def peers():
    """The modules of the comparison, which stand beside each other and not in a package."""
    names = ("networks", "workloads", "truth", "table", "environments", "page", "run", "run_protocols")
    sys.path.insert(0, str(PEERS))
    try:
        yield {name: __import__(name) for name in names}
    finally:
        sys.path.remove(str(PEERS))
        for name in names:
            sys.modules.pop(name, None)


@pytest.fixture(scope="module")
def report():
    return json.loads((ROOT / "benchmarks/results/peers.json").read_text())


@pytest.fixture(scope="module")
def protocols():
    return json.loads((ROOT / "benchmarks/results/peers_protocols.json").read_text())


def test_the_page_is_that_of_the_results(peers, report, protocols):
    assert (ROOT / "docs/peers.md").read_text() == peers["page"].page(report, protocols), "run scripts/docs pages"


def test_a_protocol_compares_both_libraries_and_says_what_is_smaller(peers, protocols):
    runner = peers["run_protocols"]
    assert set(protocols["protocols"]) == set(runner.NAMES)
    for name, one in protocols["protocols"].items():
        module = runner.protocol(name)
        assert (one["title"], one["documented"], one["smaller"]) == (module.TITLE, module.DOCUMENTED, module.SMALLER)
        named = {str(row[0]).partition(",")[0] for row in one["rows"]}
        assert {"upweight", one["library"]} <= named
        assert all(len(row) == len(one["columns"]) for row in one["rows"])
        assert all(library in {"", "upweight", one["library"]} for library, _ in module.STEPS)


def test_every_cell_is_measured_or_says_why_not(peers, report):
    assert len(report["libraries"]) >= 12
    assert len(report["workloads"]) >= 5
    for library, one in report["libraries"].items():
        for method in one["methods"]:
            for workload in report["workloads"]:
                cell = report["cells"][f"{library}/{method}/{workload}"]
                assert ("seconds" in cell) + bool(cell.get("error")) + bool(cell.get("not")) == 1
    asked = [key for key, cell in report["cells"].items() if cell.get("not") == "not measured in this run"]
    assert not asked


def test_the_table_in_the_source_is_the_one_that_was_measured(peers, report):
    for library in peers["table"].LIBRARIES:
        assert report["libraries"][library.name]["methods"] == {one.name: one.settings for one in library.methods}
        assert (PEERS / "libraries" / f"{library.name}.py").exists()
        assert (PEERS / "requirements" / f"{library.name}.txt").exists()


def test_everything_that_is_installed_is_pinned():
    for file in (PEERS / "requirements").glob("*.txt"):
        for line in file.read_text().split("\n"):
            assert not line or "==" in line or "@ git+" in line, (file.name, line)


@pytest.mark.filterwarnings("ignore::upweight.errors.TheoryWarning")  # the network is not trained
@pytest.mark.parametrize("name", ["hessian", "gauss_newton"])
def test_the_dense_answer_is_that_of_upweight(peers, name):
    """Two ways that share no line, on a network with a squared loss; with the sign turned they would differ by 2."""
    truth = peers["truth"]
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 2)).double()
    X, y = torch.randn(20, 3, dtype=torch.float64), torch.randint(0, 2, (20,))
    Xq, yq = X[:5] + 0.1, y[:5]
    criterion, λ = torch.nn.functional.cross_entropy, 1.5
    flat = truth.Flat(model, criterion)
    C = getattr(truth, name)(flat, X, y)
    values, lowest = truth.solved(C, λ, flat.gradients(Xq, yq), flat.gradients(X, y))
    spec = {"hessian": uw.operators.Hessian(), "gauss_newton": uw.operators.GaussNewton()}[name]
    ours = uw.explain(model, X, y, loss=criterion, curvature=spec, damping=λ, penalty_per_example=False)
    assert lowest > 0
    np.testing.assert_allclose(values, ours.on_loss(Xq, yq).values, rtol=1e-6, atol=1e-10)


def test_the_closed_form_of_softmax_regression_is_that_of_autograd(peers):
    truth = peers["truth"]
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(4, 3, bias=False)).double()
    X, y = torch.randn(15, 4, dtype=torch.float64), torch.randint(0, 3, (15,))
    flat = truth.Flat(model, torch.nn.functional.cross_entropy)
    closed = truth.softmax_hessian(X, model[0].weight.detach())
    torch.testing.assert_close(closed, truth.hessian(flat, X, y))


def test_agreement_says_slope_error_and_what_is_not_finite(peers):
    agreement = peers["run"].agreement
    dense = np.random.default_rng(0).normal(size=(3, 20))
    same = agreement(20 * dense, dense, 1 / 20)
    assert same["pearson"] == pytest.approx(1)
    assert same["slope"] == pytest.approx(1)
    assert same["largest_error"] < 1e-12
    turned = agreement(-2 * dense, dense, 1.0)
    assert turned["slope"] == pytest.approx(-2)
    assert turned["largest_error"] == pytest.approx(3)
    assert turned["largest_error_rescaled"] < 1e-12
    assert "2 of 60" in agreement(np.where(np.arange(60).reshape(3, 20) < 2, np.nan, dense), dense, 1.0)["error"]
    assert "(3, 19)" in agreement(dense[:, 1:], dense, 1.0)["error"]


def test_models_side_by_side_are_those_of_sgd_one_by_one(peers, monkeypatch):
    concrete = peers["run_protocols"].protocol("kronfluence_concrete")
    monkeypatch.setattr(concrete, "EPOCHS", 2)
    X = torch.randn(100, 8, generator=torch.Generator().manual_seed(0))
    y = X[:, :1].sin()
    sets, seeds = [np.arange(100), np.arange(4, 100)], [3, 4]
    together = concrete.trained(X, y, sets, seeds)
    for k, (rows, seed) in enumerate(zip(sets, seeds, strict=True)):
        torch.manual_seed(seed)
        model = concrete.network()
        optimizer = torch.optim.SGD(model.parameters(), lr=concrete.STEP, weight_decay=concrete.DECAY)
        for _ in range(2):
            for batch in torch.from_numpy(rows)[torch.randperm(len(rows))[:96]].split(32):
                optimizer.zero_grad()
                torch.nn.functional.mse_loss(model(X[batch]), y[batch]).backward()
                optimizer.step()
        for one, other in zip(model.parameters(), together, strict=True):
            torch.testing.assert_close(one.detach(), other[k], rtol=1e-5, atol=1e-6)
