"""The certified solve: the exact damped system through a cheap curvature, and what its certificate says."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from jaxtyping import config

import cases
import oracles
import upweight as uw
from upweight.errors import InvalidInput, NotConverged, NotPositiveDefinite, UnsupportedModel
from upweight.operators import EKFAC, KFAC, Arnoldi, Dense, DenseOperator, GaussNewton, Hessian, Identity, Nystroem
from upweight.solvers import CG, Factored, Plain, Preconditioned
from upweight.solvers.block import descend_together, orthonormal
from upweight.solvers.recurrence import descend

CHEAP = {
    "Nystroem": Nystroem(6),
    "Arnoldi": Arnoldi(4, of=GaussNewton()),
    "Identity": Identity(),
    "Dense": Dense(GaussNewton()),
}
NETWORKS = ("mlp", "cnn", "softmax")


def dense(case):
    model = case.model
    return oracles.dense_gauss_newton(
        case.problem, lambda t, x: model.output(model.split(t), x), model.output_loss, case.theta
    )


def sides(p, k, seed=0):
    return torch.randn(k, p, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def system(p, k, condition, seed=0):
    draw = torch.Generator().manual_seed(seed)
    Q, _ = torch.linalg.qr(torch.randn(p, p, generator=draw, dtype=torch.float64))
    A = Q @ torch.diag(torch.logspace(-np.log10(condition), 0, p, dtype=torch.float64)) @ Q.T
    return (A + A.T) / 2, torch.randn(k, p, generator=draw, dtype=torch.float64)


# ---- the answer and its certificate ----------------------------------------------------------------------------------


@pytest.mark.parametrize("cheap", CHEAP.values(), ids=CHEAP)
@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize(("k", "damping"), [(1, 0.02), (4, 0.0), (4, 0.02)])  # one side without damping is slow
def test_every_preconditioner_gives_the_dense_answer_and_its_own_error(name, cheap, damping, k):
    case = cases.make(name, weighted=True)
    truth = dense(case)
    A = truth + damping * torch.eye(len(truth), dtype=torch.float64)
    operator = case.influence(curvature=GaussNewton()).operator
    V = sides(operator.size, k)
    solution = CG(rtol=1e-9, preconditioner=Preconditioned(cheap)).prepare(operator, damping).solve(V)
    assert float(((V - solution.x @ A).norm(dim=1) / V.norm(dim=1)).max()) <= 1.01e-9
    x = torch.linalg.solve(A, V.T).T
    assert float((solution.x - x).norm() / x.norm()) < 1e-6
    alone = case.influence(curvature=cheap).operator
    start = torch.linalg.solve(alone.matrix() + damping * torch.eye(len(A), dtype=torch.float64), V.T).T
    gap = (((start - x) @ A * (start - x)).sum(1) / (x @ A * x).sum(1)).sqrt()
    assert solution.preconditioner_gap.shape == (k,)
    assert torch.allclose(solution.preconditioner_gap, gap, rtol=1e-5, atol=1e-7)
    if isinstance(cheap, Dense):
        assert float(gap.max()) < 1e-7
        assert solution.sweeps <= 9  # float32 products between two residuals in float64
    else:
        assert float(gap.min()) > 1e-3


@pytest.mark.parametrize("cheap", [KFAC(), EKFAC()], ids=repr)
def test_kronecker_factors_of_a_module_change_no_answer_and_say_how_far_they_were(cheap):
    draw = torch.Generator().manual_seed(0)
    X = torch.randn(80, 6, generator=draw, dtype=torch.float64) * torch.logspace(0.7, -0.7, 6, dtype=torch.float64)
    y = torch.randint(0, 3, (80,), generator=draw)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        module = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.Tanh(), torch.nn.Linear(8, 3)).double()
    settings = {"loss": torch.nn.functional.cross_entropy, "curvature": GaussNewton(), "damping": 1e-3}
    exact = uw.explain(module, X, y, solver=uw.solvers.Cholesky(), **settings).on_loss(X[:5], y[:5])
    solver = CG(rtol=1e-8, preconditioner=Preconditioned(cheap))
    scores = uw.explain(module, X, y, solver=solver, **settings).on_loss(X[:5], y[:5])
    np.testing.assert_allclose(scores.values, exact.values, rtol=1e-4, atol=1e-6 * np.abs(exact.values).max())
    assert scores.certificate.residual.max() <= 1e-8
    alone = uw.explain(module, X, y, **(settings | {"curvature": cheap}))
    assert alone.solver == Factored()
    operator = uw.explain(module, X, y, **settings).operator
    x0, x = (
        influence.system.solve(sides(operator.size, 2)).x for influence in (alone, uw.explain(module, X, y, **settings))
    )
    off = x0 - x
    A = operator.matrix() + 1e-3 * torch.eye(operator.size, dtype=torch.float64)
    expected = (((off @ A) * off).sum(1) / ((x @ A) * x).sum(1)).sqrt()
    ours = solver.prepare(operator, 1e-3).solve(sides(operator.size, 2)).preconditioner_gap
    assert torch.allclose(ours, expected, rtol=1e-4)


@pytest.mark.parametrize("cheap", [KFAC(), EKFAC()], ids=repr)
def test_kronecker_factors_shorten_the_way_where_they_are_near(cheap):
    """One layer and many rows; a network with fewer outputs than parameters may well be solved sooner without."""
    draw = torch.Generator().manual_seed(0)
    X = torch.randn(300, 12, generator=draw, dtype=torch.float64) * torch.logspace(1, -1, 12, dtype=torch.float64)
    y = torch.randint(0, 3, (300,), generator=draw)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        module = torch.nn.Linear(12, 3).double()
    settings = {"loss": torch.nn.functional.cross_entropy, "curvature": GaussNewton(), "damping": 1e-4}
    operator = uw.explain(module, X, y, **settings).operator
    V = sides(operator.size, 1)
    plain = CG(rtol=1e-6).prepare(operator, 1e-4).solve(V)
    ours = CG(rtol=1e-6, preconditioner=Preconditioned(cheap)).prepare(operator, 1e-4).solve(V)
    assert ours.sweeps < plain.sweeps / 2


def test_the_gap_reaches_the_scores_and_survives_saving_and_joining(tmp_path):
    case = cases.make("cnn")
    solver = CG(rtol=1e-8, preconditioner=Preconditioned(Nystroem(4)))
    scores = case.influence(curvature=GaussNewton(), solver=solver).on_loss(*case.queries)
    gap = scores.certificate.preconditioner_gap
    assert gap.shape == (4,)
    assert f"its preconditioner alone was off by up to {gap.max():.2g}" in repr(scores)
    assert "its preconditioner alone was off" in scores._repr_html_()
    scores.save(tmp_path / "scores.safetensors")
    np.testing.assert_array_equal(uw.Scores.load(tmp_path / "scores.safetensors").certificate.preconditioner_gap, gap)
    joined = uw.Scores.joined([scores, scores]).certificate
    np.testing.assert_array_equal(joined.preconditioner_gap, np.concatenate([gap, gap]))
    without = replace(scores, certificate=replace(scores.certificate, preconditioner_gap=None))
    assert uw.Scores.joined([scores, without]).certificate.preconditioner_gap is None
    assert "preconditioner alone" not in repr(without)
    plain = case.influence(curvature=GaussNewton(), solver=CG(rtol=1e-8)).on_loss(*case.queries)
    assert plain.certificate.preconditioner_gap is None


def test_self_influence_takes_the_certified_solve():
    case = cases.make("mlp")
    solver = CG(rtol=1e-9, preconditioner=Preconditioned(Nystroem(5)))
    ours = case.influence(curvature=GaussNewton(), solver=solver).of_self()
    exact = case.influence(curvature=GaussNewton()).of_self()
    np.testing.assert_allclose(ours.values, exact.values, rtol=1e-6)
    assert ours.certificate.preconditioner_gap.shape == (case.n,)


def test_a_hessian_that_is_not_positive_is_refused_with_its_smallest_eigenvalue():
    case = cases.make("mlp")
    theta = case.theta + 0.7 * torch.randn(len(case.theta), generator=torch.Generator().manual_seed(5))
    lowest = float(torch.linalg.eigvalsh(oracles.dense_hessian(case.problem, theta))[0])
    solver = CG(rtol=1e-9, preconditioner=Preconditioned(Nystroem(8)))
    settings = {"examples": uw.Examples(case.X, case.y), "curvature": Hessian(), "solver": solver}
    operator = uw.Influence(case.objective(theta=theta), **settings).operator
    V = sides(operator.size, 4)
    with pytest.raises(NotPositiveDefinite, match=r"smallest eigenvalue of C is about -") as refused:
        solver.prepare(operator, 1e-4).solve(V)
    assert refused.value.suggested_damping > -lowest
    enough = solver.prepare(operator, refused.value.suggested_damping).solve(V)
    assert enough.converged
    assert enough.min_curvature >= lowest - 1e-9


def test_where_it_cannot_be_bound_it_says_so():
    with pytest.raises(UnsupportedModel, match=r"DenseOperator.*GaussNewton"):
        CG(preconditioner=Preconditioned(Nystroem(2))).prepare(DenseOperator(torch.eye(3, dtype=torch.float64)))
    operator = cases.make("mlp").influence(curvature=GaussNewton()).operator
    with pytest.raises(UnsupportedModel, match="does not know its eigenvalues"):
        CG(preconditioner=Preconditioned(GaussNewton())).prepare(operator)
    with pytest.raises(UnsupportedModel, match=r"Factored\(\) divides by the eigenvalues"):
        Factored().prepare(operator)
    config.update("jaxtyping_disable", True)
    try:
        for wrong in (Nystroem, "EKFAC"):
            with pytest.raises(InvalidInput, match="Preconditioned"):
                Preconditioned(wrong)
    finally:
        config.update("jaxtyping_disable", False)


# ---- Factored --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("damping", [0.0, 0.3])
@pytest.mark.parametrize("name", cases.NAMES)
def test_factored_solves_and_weighs_like_the_dense_matrix(name, damping):
    operator = cases.make(name, weighted=True).influence(curvature=Dense()).operator
    V = operator.project(sides(operator.size, 3))
    solution = Factored().prepare(operator, damping).solve(V)
    A = operator.matrix() + damping * torch.eye(operator.size, dtype=torch.float64)
    expected = operator.project(torch.linalg.lstsq(A, V.T, driver="gelsd").solution.T)
    assert solution.converged
    assert float((solution.x - expected).norm() / expected.norm()) < 1e-9
    prepared = Factored().prepare(operator, damping)
    assert torch.allclose(prepared.forms(V), (expected * V).sum(1), rtol=1e-8)
    moved = prepared.at(damping + 0.1).solve(V).x
    assert torch.allclose(moved @ (A + 0.1 * torch.eye(len(A), dtype=torch.float64)), V, atol=1e-9)


def test_factored_refuses_what_it_cannot_divide_by():
    for values, kind in (([1.0, 0.0, 2.0], "an eigenvalue of 0"), ([1.0, -0.5, 2.0], "a negative eigenvalue, -0.5")):
        operator = DenseOperator(torch.diag(torch.tensor(values, dtype=torch.float64)))
        with pytest.raises(NotPositiveDefinite, match=kind) as refused:
            Factored().prepare(operator)
        assert Factored().prepare(operator, refused.value.suggested_damping).solve(sides(3, 1)).converged


@pytest.mark.parametrize("spec", [Nystroem(5), Arnoldi(5), Identity()], ids=repr)
def test_factored_is_the_default_for_what_knows_its_eigenvalues(spec):
    case = cases.make("mlp")
    influence = case.influence(curvature=spec)
    assert influence.solver == Factored()
    assert "Factored" in influence.check().costs
    matrix = influence.operator.matrix() + influence.damping * torch.eye(len(case.theta), dtype=torch.float64)
    V = sides(len(case.theta), 2)
    assert torch.allclose(influence.system.solve(V).x @ matrix, V, atol=1e-9)
    forms = influence.of_self().values
    assert forms.shape == (case.n,)


# ---- block conjugate gradients ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("p", "k", "condition"), [(60, 2, 1e2), (200, 20, 1e5), (200, 60, 1e4)])
def test_the_block_needs_fewer_products_for_the_same_answer(p, k, condition):
    A, V = system(p, k, condition)
    goal = 1e-8 * V.norm(dim=1)
    alone = descend(lambda W: W @ A, None, torch.zeros_like(V), V, goal, 5000)
    together = descend_together(lambda W: W @ A, None, torch.zeros_like(V), V, goal, 5000)
    assert together.steps < 0.7 * alone.steps
    assert bool(((V - together.x @ A).norm(dim=1) <= 2 * goal).all())
    lowest = float(torch.linalg.eigvalsh(A)[0])
    assert lowest * (1 - 1e-9) <= float(together.smallest.min()) < 10 * lowest


def test_the_block_survives_equal_zero_dependent_and_exact_right_sides():
    A, V = system(40, 3, 1e3)
    eigenvector = torch.linalg.eigh(A)[1][:, 5]
    V = torch.stack(
        [V[0], V[0], -2 * V[0], V[1], torch.zeros(40, dtype=torch.float64), eigenvector, V[0] + 1e-9 * V[1]]
    )
    solution = CG(rtol=1e-10).prepare(DenseOperator(A)).solve(V)
    assert float(solution.residual.max()) <= 1e-10
    assert not solution.x[4].any()
    assert torch.allclose(solution.x[2], -2 * solution.x[0], rtol=1e-5, atol=1e-6)


def test_more_right_sides_than_parameters():
    A, V = system(12, 30, 1e3)
    solution = CG(rtol=1e-10).prepare(DenseOperator(A)).solve(V)
    assert float(solution.residual.max()) <= 1e-10
    assert solution.sweeps <= 4


def test_a_preconditioner_that_varies_changes_no_answer():
    A, V = system(50, 5, 1e4)
    calls = []

    def varying(R):
        calls.append(1)
        return R / (A.diagonal() * (1 + 0.3 * len(calls) % 2))

    run = descend_together(lambda W: W @ A, varying, torch.zeros_like(V), V, 1e-9 * V.norm(dim=1), 500)
    assert float(((V - run.x @ A).norm(dim=1) / V.norm(dim=1)).max()) < 2e-9


def test_the_block_goes_on_from_where_it_was_stopped():
    A, V = system(200, 4, 1e4)
    operator = DenseOperator(A)
    whole = CG(rtol=1e-8).prepare(operator).solve(V)
    with pytest.raises(NotConverged) as refused:
        CG(rtol=1e-8, max_sweeps=whole.sweeps // 2).prepare(operator).solve(V)
    resumed = CG(rtol=1e-8).prepare(operator).solve(V, state=refused.value.solution.state)
    assert resumed.sweeps <= 0.7 * whole.sweeps
    assert torch.allclose(resumed.x, whole.x, rtol=1e-4, atol=1e-5)
    near = CG(rtol=1e-8).prepare(operator).solve(V, state={"x": whole.x * (1 + 1e-5)})
    assert near.sweeps < whole.sweeps


def test_orthonormal_rows_span_what_they_were_made_of():
    Y = sides(30, 4)
    Y = torch.cat([Y, Y[:1] * 1e-9, torch.zeros(1, 30, dtype=torch.float64), Y[1:2] + Y[2:3]])
    P = orthonormal(Y)
    assert P.shape == (4, 30)
    assert torch.allclose(P @ P.T, torch.eye(4, dtype=torch.float64), atol=1e-12)
    assert torch.allclose(Y @ P.T @ P, Y, atol=1e-12)


def test_plain_means_no_preconditioner_and_no_gap():
    operator = cases.make("mlp").influence(curvature=GaussNewton()).operator
    assert CG(preconditioner=Plain()).prepare(operator, 0.1).solve(sides(operator.size, 2)).preconditioner_gap is None
