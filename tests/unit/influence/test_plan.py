"""What `plan` says beforehand, against counting for real: reads of rows, bytes of memory and of files, products."""

from __future__ import annotations

import json
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression, Ridge
from torch import nn
from torch.nn.functional import cross_entropy

import upweight as uw
from small import XQ, YQ, classifier
from upweight.operators import EKFAC, GaussNewton, Hessian, Nystroem
from upweight.operators.layered import LayeredGaussNewton
from upweight.solvers import CG, Cholesky, Dual, LiSSA

N, Q, D = 320, 6, 5
DRAW = np.random.default_rng(0)
X = DRAW.normal(size=(N + Q, D))
Y = (X @ [1.0, -1.0, 0.5, 0.0, 0.0] + DRAW.normal(size=N + Q) > 0).astype(np.int64)
linux = pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="only Linux tells the peak of memory")


class Rows(torch.utils.data.Dataset):
    """Rows that count how often they are read."""

    def __init__(self):
        self.reads = 0

    def __len__(self):
        return N

    def __getitem__(self, row):
        self.reads += 1
        return torch.from_numpy(X[row]), torch.tensor(Y[row])


def network(**settings):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(D, 6), nn.Tanh(), nn.Linear(6, 2)).double()
    rows = Rows()
    asked = {"loss": cross_entropy, "damping": 0.1, "progress": False} | settings
    return uw.explain(model, rows, **asked), rows


SETTINGS = {
    "EKFAC": {"curvature": EKFAC()},
    "Nystroem": {"curvature": Nystroem(5)},
    "Gauss–Newton kept, Cholesky": {"curvature": GaussNewton(), "solver": Cholesky()},
    "Gauss–Newton, Cholesky": {"curvature": GaussNewton(keep=0), "solver": Cholesky()},
    "Hessian, a named damping": {"curvature": Hessian(), "solver": Cholesky(), "damping": 5.0},
    "the damping of defaults": {"curvature": GaussNewton(keep=0), "solver": Cholesky(), "damping": None},
    "LiSSA": {"curvature": GaussNewton(keep=0), "solver": LiSSA(depth=60, repeats=4, batch_size=4, scale=30.0)},
}


@pytest.mark.filterwarnings("ignore:.*at a minimum", "ignore:.*has not settled")
@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_rows_are_read_as_often_as_planned(settings):
    plan = network(**settings)[0].plan(X[N:], Y[N:])
    influence, rows = network(**settings)
    before = rows.reads
    influence.on_loss(X[N:], Y[N:])
    assert plan.passes * N == pytest.approx(rows.reads - before, abs=N / 3)  # to look at the criterion takes some rows


def test_products_are_a_forecast_and_not_far_off():
    settings = {"curvature": GaussNewton(keep=0), "solver": CG(), "damping": 0.01}
    plan = network(**settings)[0].plan(X[N:], Y[N:])
    influence, rows = network(**settings)
    before = rows.reads
    sweeps = influence.on_loss(X[N:], Y[N:]).certificate.sweeps
    assert plan.forecast
    assert sweeps / 2 < plan.products < 2 * sweeps
    assert plan.passes * N == pytest.approx(rows.reads - before, rel=0.5)
    low, high = plan.seconds_between
    assert low < plan.seconds < high
    assert f"about {plan.products:.0f}; a forecast" in str(plan)


def test_an_iteration_that_all_rows_ended_is_no_forecast():
    influence = classifier(curvature=GaussNewton(), solver=CG(), damping=0.5)
    plan = influence.plan(XQ, YQ)
    assert not plan.forecast
    assert plan.products == influence.on_loss(XQ, YQ).certificate.sweeps
    assert plan.seconds_between == (plan.seconds, plan.seconds)


def arrays(deed):
    """Bytes of NumPy's arrays at most while something is done."""
    tracemalloc.start()
    deed()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak


@linux
def test_memory_of_many_scores():
    rows = DRAW.normal(size=(20_000, 4))
    model = Ridge().fit(rows, rows.sum(1))
    on = rows[:200], rows[:200].sum(1)
    plan = uw.explain(model, rows, rows.sum(1)).plan(*on)
    taken = arrays(lambda: uw.explain(model, rows, rows.sum(1)).on_loss(*on))
    assert 8 * 200 * 20_000 < plan.memory < 1.8 * taken  # few rows take more than their part of the process


@linux
def test_memory_of_all_pairs_of_rows():
    rows = DRAW.normal(size=(1800, 2000))
    y = (rows[:, 0] > 0).astype(int)
    fitted = LogisticRegression(C=0.01, tol=1e-10, max_iter=500).fit(rows, y)
    influence = uw.explain(fitted, rows, y, solver=Dual())
    plan = influence.plan(rows[:3], y[:3])
    preparing = next(step for step in plan.steps if step.name == "preparing the solver")
    assert 0.4 < preparing.memory / arrays(lambda: influence.prepared) < 2.5  # a process's memory is a rough measure
    assert 8 * 1800**2 < plan.memory < 8 * 8 * 1800**2


@linux
def test_memory_of_a_matrix_that_is_not_factorised_beforehand():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(40, 16), nn.Tanh(), nn.Linear(16, 3)).double()
    x, y = torch.randn(200, 40, dtype=torch.float64), torch.randint(0, 3, (200,))
    influence = uw.explain(model, x, y, loss=cross_entropy, damping=1.0, solver=Cholesky())
    p = influence.objective.size
    assert 500 < p < 1000
    plan = influence.plan(x[:2], y[:2])
    assert [step.name for step in plan.steps][1:4] == ["matrix", "preparing the solver", "gradients of queries"]
    assert 3 * 8 * p**2 < plan.memory < 30 * 8 * p**2
    assert plan.flops > p**3 / 3


def test_the_folder_is_as_large_as_planned(tmp_path):
    rows = DRAW.normal(size=(3000, 20))
    influence = uw.explain(Ridge().fit(rows, rows[:, 0]), rows, rows[:, 0])
    plan = influence.plan(rows[:30], rows[:30, 0])
    influence.on_loss(rows[:30], rows[:30, 0], store=tmp_path / "run")
    size = sum(file.stat().st_size for file in (tmp_path / "run").iterdir())
    assert plan.disk == pytest.approx(size, rel=0.02)


def test_what_is_prepared_costs_nothing_and_planning_prepares_no_solver():
    influence = network(curvature=GaussNewton(), solver=Cholesky())[0]
    plan = influence.plan(X[N:], Y[N:])
    assert "prepared" not in influence.system.__dict__
    values = influence.on_loss(X[N:], Y[N:]).values
    assert np.array_equal(values, network(curvature=GaussNewton(), solver=Cholesky())[0].on_loss(X[N:], Y[N:]).values)
    assert isinstance(influence.operator, LayeredGaussNewton)
    again = [step.name for step in influence.plan(X[N:], Y[N:]).steps]
    assert again == ["gradients of queries", "systems", "scores"]
    assert len(plan.steps) == len(again) + 2


def test_twice_the_queries_in_blocks(monkeypatch):
    influence = network(curvature=EKFAC())[0]
    monkeypatch.setattr("upweight.influence.removal._BLOCK_BYTES", 8 * 3 * influence.objective.size)
    plan = influence.plan(X[N:], Y[N:])
    assert (plan.queries, plan.blocks) == (Q, 2)
    assert "6, in 2 blocks" in str(plan)
    passes = {step.name: step.passes for step in plan.steps}
    assert passes["scores"] == pytest.approx(2, abs=0.05)
    assert passes["curvature"] == pytest.approx(2, abs=0.3)  # to look at the criterion takes some rows


def test_operations_are_those_of_the_layers():
    """A network of linear layers: two operations for each weight, forwards; twice that backwards; p for every dot."""
    plan = network(curvature=uw.operators.Identity())[0].plan(X[N:], Y[N:])
    weights = D * 6 + 6 * 2
    scores = next(step for step in plan.steps if step.name == "scores")
    assert scores.flops == pytest.approx(N * weights * (2 + 2 + 2 * Q), rel=0.5)


def test_a_plan_is_a_table_and_json():
    plan = classifier().plan(XQ, YQ)
    assert isinstance(plan, uw.Plan)
    told = json.loads(json.dumps(plan.to_dict()))
    assert told["passes"] == plan.passes
    assert [step["name"] for step in told["steps"]] == [step.name for step in plan.steps]
    lines = str(plan).splitlines()
    head = next(place for place, text in enumerate(lines) if text.startswith("step"))
    table = lines[head : head + len(plan.steps) + 2]
    assert len({len(text) for text in table}) == 1
    assert table[-1].startswith("all")
    assert all(f'<th scope="row">{step.name}</th>' in plan._repr_html_() for step in plan.steps)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"curvature": GaussNewton(keep=0), "solver": CG()}, "CG(settled=0.01)"),
        ({"curvature": GaussNewton(keep=0), "solver": Cholesky()}, "on_loss_in_blocks(…, size="),
    ],
)
def test_what_is_much_comes_with_advice(settings, says, monkeypatch):
    influence = network(**settings)[0]
    assert not influence.plan(X[N:], Y[N:]).advice
    monkeypatch.setattr("upweight.influence.plan.LONG", 0.0)
    monkeypatch.setattr("upweight.runs.machine.available_bytes", lambda: 1000.0)
    monkeypatch.setattr("upweight.influence.plan._Extrapolation._memory", lambda *_: 8.0 * N * Q)
    plan = influence.plan(X[N:], Y[N:])
    assert any(says in line for line in plan.advice)
    assert says in str(plan)
