"""A damping path is what separate Influences would say, from one factorisation."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from sklearn.linear_model import LinearRegression

import cases
import upweight as uw
from redundant import REDUNDANT, Y
from upweight import defaults
from upweight.errors import InvalidInput, NotPositiveDefinite
from upweight.influence import scoring
from upweight.operators import Dense, GaussNewton, Hessian, Nystroem
from upweight.solvers import CG, Cholesky, Dual, Factored, LiSSA, Preconditioned

DAMPINGS = (0.5, 0.003, 0.05)
TIGHT = {"rtol": 1e-12, "max_sweeps": 5000}
WAYS = {
    "Cholesky": (GaussNewton(), Cholesky()),
    "Factored, Dense": (Dense(GaussNewton()), Factored()),
    "Factored, Nystroem": (Nystroem(6), Factored()),
    "CG": (GaussNewton(), CG(**TIGHT)),
    "CG, Nystroem": (GaussNewton(), CG(**TIGHT, preconditioner=Preconditioned(Nystroem(6)))),
}


@pytest.mark.parametrize("name", ["mlp", "cnn", "sklearn_softmax"])
@pytest.mark.parametrize("way", WAYS)
def test_equals_separate_influences(name, way):
    case, (curvature, solver) = cases.make(name, weighted=True), WAYS[way]
    path = case.influence(curvature=curvature, solver=solver).damping_path(*case.queries, dampings=DAMPINGS)
    assert path.dampings.tolist() == sorted(DAMPINGS)
    assert path.values.shape == (3, len(case.Xq), case.n)
    for damping in DAMPINGS:
        ours = path.scores(damping)
        alone = case.influence(curvature=curvature, solver=solver, damping=damping).on_loss(*case.queries)
        np.testing.assert_allclose(ours.values, alone.values, rtol=0, atol=1e-8 * np.abs(alone.values).max())
        np.testing.assert_allclose(ours.certificate.drift, alone.certificate.drift, rtol=1e-6, atol=1e-12)
        np.testing.assert_allclose(ours.query_values, alone.query_values)
        np.testing.assert_allclose(ours.derivative, ours.values / alone.scale)
        assert ours.certificate.damping == damping
        assert ours.certificate.converged
        assert ours.counterfactual == alone.counterfactual
        if alone.certificate.preconditioner_gap is not None:
            np.testing.assert_allclose(
                ours.certificate.preconditioner_gap, alone.certificate.preconditioner_gap, rtol=1e-6
            )
    assert (path.preconditioner_gaps is None) == (way != "CG, Nystroem")


def test_the_penalty_of_a_folded_objective_is_in_every_row():
    case = cases.make("cnn", folded=True)
    path = case.influence(curvature=GaussNewton()).damping_path(*case.queries, dampings=[0.1, 1.0])
    alone = case.influence(curvature=GaussNewton(), damping=0.1).on_loss(*case.queries)
    np.testing.assert_allclose(path.scores(0.1).values, alone.values, rtol=1e-8, atol=1e-12)


def test_one_factorisation_and_one_sweep_for_all(monkeypatch):
    case = cases.make("cnn")
    calls = []
    for kind in (GaussNewton, Nystroem):
        bind = kind.bind
        monkeypatch.setattr(kind, "bind", lambda self, sweep, bind=bind: calls.append(type(self)) or bind(self, sweep))
    influence = case.influence(
        curvature=GaussNewton(), solver=CG(rtol=1e-8, preconditioner=Preconditioned(Nystroem(6)))
    )
    path = influence.damping_path(*case.queries, dampings=np.geomspace(0.01, 1, 5))
    assert calls.count(Nystroem) == 1
    assert len(path.every) == 5
    cold = sum(
        case.influence(curvature=GaussNewton(), solver=influence.solver, damping=damping)
        .on_loss(*case.queries)
        .certificate.sweeps
        for damping in path.dampings
    )
    assert sum(scores.certificate.sweeps for scores in path.every) <= cold + 5  # a place to start costs a product


def test_many_queries_are_solved_in_blocks_that_fit(monkeypatch):
    case = cases.make("mlp")
    settings = {"curvature": GaussNewton(), "solver": CG(**TIGHT)}
    whole = case.influence(**settings).damping_path(*case.queries, dampings=DAMPINGS)
    monkeypatch.setattr("upweight.influence.damping_path._NUMBERS", 2 * len(case.theta))
    parts = case.influence(**settings).damping_path(*case.queries, dampings=DAMPINGS)
    np.testing.assert_allclose(parts.values, whole.values, rtol=0, atol=1e-8 * np.abs(whole.values).max())
    assert parts.residuals.shape == (3, len(case.Xq))


def test_the_largest_block_of_queries_still_shares_its_sweep_among_dampings(monkeypatch):
    case = cases.make("mlp")
    influence = case.influence(curvature=Nystroem(6))
    monkeypatch.setattr("upweight.influence.damping_path._NUMBERS", len(case.Xq) * len(case.theta))
    calls, with_rows = [], scoring.with_rows
    monkeypatch.setattr(scoring, "with_rows", lambda *given: calls.append(len(given[1].x)) or with_rows(*given))
    influence.damping_path(*case.queries, dampings=DAMPINGS)
    assert calls == [len(DAMPINGS) * len(case.Xq)]


def test_the_default_dampings_stand_around_the_mean_eigenvalue():
    case = cases.make("mlp")
    influence = case.influence(curvature=Nystroem(len(case.theta)))
    path = influence.damping_path(*case.queries)
    mean = float(torch.linalg.eigvalsh(influence.operator.matrix()).mean())
    np.testing.assert_allclose(path.dampings, mean * np.geomspace(1e-3, 10, 9), rtol=1e-9)
    rough = defaults.dampings(case.influence(curvature=GaussNewton()).operator)
    assert 0.5 < rough[0] / path.dampings[0] < 2


def test_a_large_damping_gives_the_gradients_products():
    case = cases.make("mlp")
    influence = case.influence(curvature=GaussNewton())
    path = influence.damping_path(*case.queries, dampings=[1.0, 1e6])
    identity = case.influence(curvature=uw.operators.Identity()).on_loss(*case.queries)
    np.testing.assert_allclose(1e6 * path.scores(1e6).values, identity.values, rtol=1e-4, atol=1e-6)
    assert path.correlation_with_next[0] < 1


def test_negative_curvature_is_refused_where_the_damping_is_too_small():
    case = cases.make("mlp")
    theta = case.theta + 0.7 * torch.randn(len(case.theta), generator=torch.Generator().manual_seed(5))
    influence = uw.Influence(
        case.objective(theta=theta), uw.Examples(case.X, case.y), curvature=Hessian(), solver=Cholesky()
    )
    with pytest.raises(NotPositiveDefinite, match="damping=") as refused:
        influence.damping_path(*case.queries, dampings=[1e-6, 10.0])
    enough = refused.value.suggested_damping
    assert influence.damping_path(*case.queries, dampings=[enough, 10.0]).every[0].certificate.converged


def test_stochastic_and_dual_solvers_take_the_path_too():
    case = cases.make("ridge")
    for solver in (LiSSA(depth=300, repeats=8, batch_size=10), Dual()):
        sk = cases.make("sklearn_logistic") if isinstance(solver, Dual) else case
        penalised = replace(sk.influence().objective, penalty=0.1)
        examples = uw.Examples(sk.X, sk.y)
        influence = uw.Influence(penalised, examples, curvature=Hessian(), solver=solver)
        path = influence.damping_path(*sk.queries, dampings=[0.5])
        exact = uw.Influence(penalised, examples, curvature=Hessian(), damping=0.5).on_loss(*sk.queries)
        error = path.every[0].standard_error
        allowed = 1e-8 if error is None else 6 * error
        assert (np.abs(path.values[0] - exact.values) <= allowed).all()


def test_it_shows_itself_and_refuses_what_it_cannot_use():
    case = cases.make("mlp")
    path = case.influence(curvature=GaussNewton()).damping_path(*case.queries, dampings=[0.1, 0.2])
    assert repr(path).startswith("DampingPath(2 dampings × 4 queries × 30 rows)")
    assert "correlation_with_next" in repr(path)
    frame = path.to_pandas()
    assert frame.index.tolist() == [0.1, 0.2]
    assert frame["residual"].max() < 1e-6
    with pytest.raises(InvalidInput, match=r"not on this path; its dampings are 0.1, 0.2"):
        path.scores(0.15)
    for wrong in ([], [-1.0], [float("nan")]):
        with pytest.raises(InvalidInput):
            case.influence(curvature=GaussNewton()).damping_path(*case.queries, dampings=wrong)


def test_the_picture_draws_what_the_path_says():
    case = cases.make("mlp")
    solver = CG(rtol=1e-8, preconditioner=Preconditioned(Nystroem(3)))
    path = case.influence(curvature=GaussNewton(), solver=solver).damping_path(*case.queries, dampings=[0.1, 0.2, 0.4])
    ax = uw.plots.damping_path(path)
    drawn = {line.get_label(): line.get_xydata() for line in ax.get_lines()}
    assert len(drawn) == 2
    np.testing.assert_allclose(drawn["preconditioner's error, alone"][:, 1], path.preconditioner_gaps.max(1))
    assert ax.get_xscale() == "log"


@pytest.mark.parametrize("solver", [None, uw.solvers.CG(1e-8)], ids=["Cholesky", "CG"])
def test_no_damping_and_columns_that_repeat(solver):
    """At λ = 0 the answers are those of on_loss, and NaN where it has none; at others every query has some."""
    X, _ = REDUNDANT["a column twice"]
    influence = uw.explain(LinearRegression().fit(X, Y), X, Y, solver=solver)
    apart = X[:3].copy()
    apart[1, 3] += 1
    with pytest.warns(uw.errors.TheoryWarning, match=r"1 of 3 systems \(first: number 1\).* columns x0, x3 repeat"):
        path = influence.damping_path(apart, Y[:3], dampings=[0.0, 1e-4, 0.1])
    with pytest.warns(uw.errors.TheoryWarning, match="1 of 3 systems"):
        exact = influence.on_loss(apart, Y[:3]).values
    np.testing.assert_allclose(path.values[0], exact, rtol=1e-6, atol=1e-9)
    np.testing.assert_allclose(path.values[1, [0, 2]], exact[[0, 2]], rtol=1e-3, atol=1e-5)
    damped = uw.explain(LinearRegression().fit(X, Y), X, Y, solver=solver, damping=0.1).on_loss(apart, Y[:3]).values
    np.testing.assert_allclose(path.values[2], damped, rtol=1e-6, atol=1e-9)
    table = path.to_pandas()
    assert np.isfinite(table.rms_value).all()
    assert table.correlation_with_next.iloc[0] == pytest.approx(1)
