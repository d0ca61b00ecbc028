"""Every automatic choice, and that it shows."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from sklearn.linear_model import Ridge
from torch import nn

import cases
import upweight as uw
from small import XQ, YQ, D, X, Y, Z, classifier, logistic, regressor, ridge, seeded
from upweight import defaults
from upweight.influence import deletion
from upweight.influence.rehearsal import CURVATURE, DAMPING
from upweight.operators import EKFAC, Dense, EmpiricalFisher, GaussNewton, Hessian, Identity, Nystroem
from upweight.solvers import CG, Approximate, Cholesky, TwoLevel, cg


def one_function():
    return uw.Objective(lambda params, z: (params @ z[0] - z[1]) ** 2, torch.ones(D, dtype=torch.float64))


def test_curvature_is_exact_for_linear_predictors_and_single_functions_and_positive_for_modules():
    assert logistic().curvature == Hessian()
    assert uw.Influence(one_function(), (X, Z)).curvature == Hessian()
    assert classifier().curvature == GaussNewton()


@pytest.mark.parametrize(("p", "expected"), [(4000, Cholesky()), (4001, CG(rtol=1e-6))])
def test_solver_is_direct_up_to_4000_parameters(p, expected):
    objective = uw.Objective(lambda params, z: params.sum(), torch.ones(p))
    assert defaults.solver(objective, uw.Examples(X, Z), Hessian()) == expected


@pytest.mark.parametrize(("n", "curvature", "expected"), [(100, GaussNewton(), Cholesky()),
                                                          (3000, GaussNewton(), CG(rtol=1e-6)),
                                                          (3000, EmpiricalFisher(), CG(rtol=1e-6)),
                                                          (3000, Hessian(), Cholesky())])  # fmt: skip
def test_a_network_is_factorised_where_that_is_no_wait_and_where_curvature_may_be_negative(n, curvature, expected):
    objective = uw.Objective(lambda params, z: params.sum(), torch.ones(2000))
    assert defaults.solver(objective, uw.Examples(np.zeros((n, 2))), curvature) == expected
    assert defaults.solver(objective, uw.Examples(np.zeros((n, 2))), curvature, systems=n) == Cholesky()


ASKED = {
    "on_loss": lambda influence, _: influence.on_loss(XQ, YQ),
    "on_loss in a folder": lambda influence, folder: influence.on_loss(XQ, YQ, store=folder / "run"),
    "leading in a folder": lambda influence, folder: influence.leading(XQ, YQ, k=2, store=folder / "run"),
    "of_self": lambda influence, _: influence.of_self([1, 0]),
    "damping_path": lambda influence, _: influence.damping_path(XQ, YQ, dampings=[0.3, 0.01]).scores(0.01),
    "of_relabeling": lambda influence, _: influence.of_relabeling([0, 1], 1 - Y[:2], on=(XQ, YQ)),
    "relative influence": lambda influence, _: uw.baselines.relative_influence(influence, XQ, YQ),
}


def given_up(*, left):
    """A classifier whose CG does not converge, and whether its choice was left."""
    named = classifier(solver=CG(max_sweeps=2))
    chosen = uw.Influence.__new__(uw.Influence)
    chosen.__dict__.update(named.__dict__ | {"system": replace(named.system, solver_is_named=not left)})
    return chosen


def numbers(answer):
    return answer.total if isinstance(answer, uw.Leading) else answer.values


@pytest.mark.parametrize("asked", ASKED)
def test_an_iteration_that_was_chosen_and_does_not_converge_gives_way_to_a_factorisation(asked, tmp_path, monkeypatch):
    ask = ASKED[asked]
    with pytest.raises(uw.errors.NotConverged):
        ask(given_up(left=False), tmp_path / "named")
    chosen = given_up(left=True)
    monkeypatch.setattr(defaults, "solver", lambda *_, **__: CG(max_sweeps=2))
    found = ask(chosen, tmp_path / "chosen")
    assert found.certificate.solver in {"Cholesky()", "Factored()"}
    exact = ask(classifier(solver=Cholesky()), tmp_path / "exact")
    np.testing.assert_allclose(numbers(found), numbers(exact), rtol=1e-8)
    assert chosen.of_self([0]).certificate.solver == "Cholesky()"


def test_an_iteration_goes_on_to_its_end_where_a_factorisation_must_refuse(monkeypatch):
    draw = np.random.default_rng(0)
    few = draw.normal(size=(200, 8))
    x, z = few @ draw.normal(size=(8, 20)), few[:, 0]
    fitted = Ridge(alpha=1e-11, solver="svd").fit(x, z)
    chosen, named = CG(preconditioner=TwoLevel()), uw.explain(fitted, x, z, solver=CG(preconditioner=TwoLevel()))
    monkeypatch.setattr(cg, "FURTHER", 0.0)
    monkeypatch.setattr(defaults, "patience", lambda *_: lambda _: 1)
    monkeypatch.setattr(defaults, "solver", lambda *_, **__: chosen)
    with pytest.raises(uw.errors.NotPositiveDefinite):
        uw.explain(fitted, x, z, solver=Cholesky()).on_loss(x[:2], z[:2] + 1)
    influence = uw.explain(fitted, x, z)
    found = influence.on_loss(x[:2], z[:2] + 1)
    np.testing.assert_allclose(found.values, named.on_loss(x[:2], z[:2] + 1).values, rtol=1e-6)
    assert found.certificate.solver == repr(influence.solver) == repr(chosen)


def test_a_solver_that_is_taken_by_hand_goes_on_to_its_end(monkeypatch):
    monkeypatch.setattr(cg, "FURTHER", 0.0)
    monkeypatch.setattr(defaults, "patience", lambda *_: lambda _: 1)
    monkeypatch.setattr(defaults, "solver", lambda *_, **__: CG(preconditioner=Approximate()))
    influence = ridge()
    V = influence.risk_gradient[None] + 1
    assert influence.prepared.solve(V).converged
    assert isinstance(influence.solver, CG)
    influence.on_loss(X[:1], Z[:1])
    assert influence.solver == Cholesky()


NUMBERS = {
    "leverage": uw.diagnostics.leverage,
    "standard errors": uw.diagnostics.ij_standard_errors,
    "summary": lambda influence: uw.diagnostics.summary_frame(influence).to_numpy(),
    "diagonal of the inverse": lambda influence: deletion.inverse_diagonal(influence.system),
}


@pytest.mark.parametrize("folded", [False, True], ids=["the penalty stays", "it goes with the rows"])
@pytest.mark.parametrize("asked", NUMBERS)
def test_diagnostics_are_factorised_where_the_iteration_that_was_chosen_does_not_converge(asked, folded, monkeypatch):
    exact = NUMBERS[asked](ridge(solver=Cholesky(), penalty_per_example=folded))
    with pytest.raises(uw.errors.NotConverged):
        NUMBERS[asked](ridge(solver=CG(max_sweeps=1, preconditioner=TwoLevel()), penalty_per_example=folded))
    monkeypatch.setattr(defaults, "solver", lambda *_, **__: CG(max_sweeps=1, preconditioner=TwoLevel()))
    np.testing.assert_allclose(NUMBERS[asked](ridge(penalty_per_example=folded)), exact, rtol=1e-8)


@pytest.mark.parametrize("asked", ["on_loss in a folder", "leading in a folder"])
def test_the_same_question_is_the_same_work_before_and_after_its_iteration_gave_way(asked, tmp_path, monkeypatch):
    monkeypatch.setattr(defaults, "solver", lambda *_, **__: CG(max_sweeps=2))
    ask = ASKED[asked]
    chosen, another_process = given_up(left=True), given_up(left=True)
    first = ask(chosen, tmp_path / "asked before")
    np.testing.assert_array_equal(numbers(ask(chosen, tmp_path / "asked before")), numbers(first))
    ask(chosen, tmp_path / "asked after")
    np.testing.assert_allclose(numbers(ask(another_process, tmp_path / "asked after")), numbers(first), rtol=1e-6)


def test_many_systems_take_their_own_factorisation_after_an_iteration_gave_way(monkeypatch):
    monkeypatch.setattr(defaults, "solver", lambda *_, systems=1, **__: Cholesky() if systems > 5 else CG(max_sweeps=2))
    chosen = given_up(left=True)
    before = repr(chosen.system.planned_for(9).begun_with)
    chosen.on_loss(XQ, YQ)
    many = chosen.system.for_many(9)
    assert before == repr(many.begun_with) == "Cholesky()"
    assert many.prepared is chosen.system.prepared


def test_what_is_prepared_already_is_not_planned_again(monkeypatch):
    monkeypatch.setattr(defaults, "solver", lambda *_, systems=1, **__: Cholesky() if systems > 2 else CG())
    influence = logistic()
    influence.on_loss(XQ[:1], ["no"])
    assert isinstance(influence.solver, CG)
    first = influence.plan(XQ[:4], ["no"] * 4)
    assert first.solver == "Cholesky()"
    assert not {CURVATURE, DAMPING} & {step.name for step in first.steps}
    influence.on_loss(XQ[:4], ["no"] * 4)
    assert len(influence.plan(XQ[:4], ["no"] * 4).steps) < len(first.steps)


def test_what_takes_the_place_of_an_iteration_keeps_to_the_budget():
    influence = classifier()
    known = (influence.objective, influence.examples, GaussNewton())
    matrix = defaults.cost(Cholesky(), *known).memory
    assert defaults.in_its_place(CG(), *known, int(matrix)).solver == Cholesky()
    assert defaults.in_its_place(CG(), *known, int(matrix) - 1) is None


def test_check_factorises_what_a_query_would_be_factorised_for(monkeypatch):
    monkeypatch.setattr(defaults, "solver", lambda *_, **__: CG(max_sweeps=2))
    assert given_up(left=False).check().problem
    report = given_up(left=True).check()
    assert (report.problem, report.solver) == ("", "Cholesky()")


@pytest.mark.parametrize("curvature", [Hessian(), GaussNewton(), EmpiricalFisher(), Identity()], ids=repr)
def test_estimators_are_never_damped(curvature):
    assert ridge(curvature=curvature).damping == 0
    assert logistic(curvature=curvature).damping == 0


@pytest.mark.parametrize("curvature", [Hessian(), Identity()], ids=repr)
def test_exact_hessians_are_never_damped(curvature):
    assert classifier(curvature=curvature, penalty=None).damping == 0


@pytest.mark.parametrize("curvature", [GaussNewton(), EmpiricalFisher(), Dense(GaussNewton()), EKFAC()], ids=repr)
@pytest.mark.parametrize("penalty", [None, 0.1, uw.L2({"2.bias": 0.1}), lambda p: p["2.bias"].square().sum()])
def test_networks_away_from_a_minimum_are_damped_by_the_mean_eigenvalue(curvature, penalty):
    if isinstance(curvature, EKFAC) and callable(penalty) and not isinstance(penalty, uw.L2):
        pytest.skip("Kronecker factors ask for a separable penalty")
    influence = classifier(curvature=curvature, penalty=penalty)
    mean = float(influence.operator.matrix().trace()) / influence.objective.size
    assert influence.damping == pytest.approx(mean, rel=0.5)
    assert influence.damping == classifier(curvature=curvature, penalty=penalty).damping


@pytest.mark.parametrize("curvature", [GaussNewton(), EmpiricalFisher(), Nystroem(3)], ids=repr)
@pytest.mark.parametrize("name", ["mlp", "cnn"])
def test_at_a_minimum_a_penalty_on_everything_is_damping_enough(curvature, name):
    case = cases.make(name)
    assert case.influence(curvature=curvature).damping == 0
    moved = uw.Influence(case.objective(theta=case.theta + 0.1), uw.Examples(case.X, case.y), curvature=curvature)
    assert moved.damping > 0


def test_damping_given_is_the_damping_that_acts():
    influence = classifier(damping=0.25)
    assert influence.damping == 0.25
    assert influence.on_loss(XQ, YQ).certificate.damping == 0.25
    assert influence.check().damping == 0.25


def test_choices_show_before_and_after_the_first_question():
    influence = classifier(penalty=None)
    assert "damping=chosen when first needed" in repr(influence)
    influence.on_loss(XQ, YQ)
    for part in ("n=40, p=26", "curvature=GaussNewton()", "solver=Cholesky()", f"damping={influence.damping:.4g}"):
        assert part in repr(influence)
    assert "penalty=None" in repr(influence)


def test_the_share_of_the_penalty_that_a_removed_row_takes_by_default():
    assert not logistic().objective.folded  # scikit-learn's sum + penalty
    assert classifier().objective.folded  # a mean + penalty
    assert not classifier(loss=nn.CrossEntropyLoss(reduction="sum")).objective.folded
    assert not classifier(penalty_per_example=False).objective.folded
    assert not classifier(penalty=None, penalty_per_example=True).objective.folded


def test_large_networks_start_with_kronecker_factors_unless_an_iteration_is_named():
    def of(model, **settings):
        return classifier(model.eval(), **settings).curvature

    wide = nn.Sequential(nn.Linear(D, 300), nn.Tanh(), nn.Linear(300, 400), nn.Tanh(), nn.Linear(400, 2))
    assert of(wide) == EKFAC()
    assert of(wide, solver=CG(rtol=1e-3)) == GaussNewton()
    assert of(wide, curvature=Hessian(), damping=1.0) == Hessian()
    assert of(nn.Linear(D, 2)) == GaussNewton()


def test_outputs_too_many_for_an_expectation_are_sampled():
    def words(count):
        model = nn.Sequential(nn.Linear(D, 2), nn.Tanh(), nn.Linear(2, count), nn.Unflatten(1, (2, count // 2)))
        return seeded(lambda: model).double().eval()

    y = torch.from_numpy(np.stack([Y, Y], 1))
    model = words(2002)
    influence = uw.explain(nn.Sequential(model, Turned()), X, y, loss=nn.functional.cross_entropy, damping=0.1)
    assert influence.curvature == EKFAC(samples=1)
    assert np.isfinite(influence.on_loss(XQ, torch.from_numpy(np.stack([YQ, YQ], 1))).values).all()


class Turned(nn.Module):
    """(b, places, classes) as (b, classes, places)."""

    def forward(self, x):
        return x.transpose(1, 2)


def test_a_loss_without_known_cotangents_keeps_the_gauss_newton_matrix():
    model = seeded(lambda: nn.Linear(D, 1200)).double().eval()
    targets = torch.zeros(len(X), 1200).double()

    def coupled(output, y):
        return ((output - y).square().sum(1) + 1).sqrt().mean()

    assert uw.explain(model, X, targets, loss=coupled, damping=0.1).curvature == GaussNewton()


def test_memory_per_example_grows_with_the_activations():
    def deep(width):
        model = nn.Sequential(nn.Linear(D, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh(), nn.Linear(width, 2))
        return classifier(model.double().eval()).sweep.example_bytes

    assert deep(400) > 3 * deep(40)
    assert logistic().sweep.example_bytes < 1000


def test_frozen_weights_are_no_memory_of_an_example():
    model = nn.Sequential(nn.Linear(D, 4), nn.Tanh(), nn.Linear(4, 2000), nn.Tanh(), nn.Linear(2000, 2)).double().eval()
    whole = classifier(model).sweep.example_bytes
    first = classifier(model, parameters=["0.weight", "0.bias"]).sweep.example_bytes
    assert first <= whole  # the layers behind it are gone through, and their weights are one for all examples


def test_memory_of_an_example_does_not_depend_on_how_many_there_are():
    assert (
        regressor().sweep.example_bytes
        == regressor(X=np.tile(X, (5, 1)), y=np.tile(Z[:, None], (5, 1))).sweep.example_bytes
    )
    assert classifier().sweep.example_bytes == classifier(X=X[:8], y=Y[:8]).sweep.example_bytes


def test_a_loss_may_differentiate_inside():
    """With torch.func, which refuses to run where saved tensors are looked at."""
    draw = np.random.default_rng(0)
    X, y = torch.from_numpy(draw.normal(size=(20, 3))), torch.from_numpy(draw.normal(size=20))
    theta = torch.from_numpy(draw.normal(size=3))

    def loss(theta, example):
        def predicted(x):
            return torch.tanh(x @ theta)

        x, target = example
        return (predicted(x) - target) ** 2 + (torch.func.grad(predicted)(x) ** 2).sum()

    def mean(theta):
        return torch.stack([loss(theta, one) for one in zip(X, y, strict=True)]).mean()

    H = torch.autograd.functional.hessian(mean, theta) + 5 * torch.eye(3, dtype=torch.float64)
    G = torch.stack([torch.func.grad(loss)(theta, one) for one in zip(X, y, strict=True)])
    with pytest.warns(uw.errors.TheoryWarning):
        found = uw.Influence(uw.Objective(loss, theta), uw.Examples(X, y), damping=5.0).on_loss(uw.Examples(X, y))
    assert np.allclose(found.values, (G @ torch.linalg.solve(H, G.T) / 20).numpy(), rtol=1e-8)
