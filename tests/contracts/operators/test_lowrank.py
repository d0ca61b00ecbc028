"""Curvature of low rank: exact at full rank by theorem, honest about its error below it, explicit about the rest."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import torch

import cases
import oracles
import upweight as uw
from tolerances import EXACT
from upweight.errors import InvalidInput, NotPositiveDefinite
from upweight.operators import Arnoldi, EmpiricalFisher, GaussNewton, Hessian, Identity, Nystroem, Spectral
from upweight.operators.krylov import lanczos
from upweight.solvers import Factored

NETWORKS = ("mlp", "cnn", "softmax", "sklearn_softmax")
BUILDERS = {
    "Arnoldi": lambda rank, **rest: Arnoldi(rank, of=GaussNewton(), **rest),
    "Nystroem": lambda rank, **rest: Nystroem(rank, **rest),
}


@cache
def dense(name):
    case = cases.make(name, weighted=True)
    model = case.model
    return oracles.dense_gauss_newton(
        case.problem, lambda t, x: model.output(model.split(t), x), model.output_loss, case.theta
    )


def operator(name, spec, **settings):
    return cases.make(name, weighted=True).influence(curvature=spec, **settings).operator


def near(a, b, rtol):
    assert float((a - b).abs().max()) <= rtol * float(b.abs().max())


@pytest.mark.parametrize("build", BUILDERS.values(), ids=BUILDERS)
@pytest.mark.parametrize("name", cases.NAMES)
def test_full_rank_is_exact_and_more_is_no_harm(name, build):
    truth = dense(name)
    p = len(truth)
    for rank in (p, 3 * p):
        bound = operator(name, build(rank))
        near(bound.matrix(), truth, EXACT)
        near(bound.eigenvalues, torch.linalg.eigvalsh(truth), EXACT)
        assert bound.error.bound <= 1e-9 * float(truth.abs().max())


@pytest.mark.parametrize("build", BUILDERS.values(), ids=BUILDERS)
@pytest.mark.parametrize("rank", [1, 5, 11])
@pytest.mark.parametrize("name", NETWORKS)
def test_spectral_laws_hold_below_full_rank(name, rank, build):
    bound = operator(name, build(rank))
    assert isinstance(bound, Spectral)
    p = bound.size
    V = torch.randn(3, p, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    matrix = bound.matrix()
    near(matrix, matrix.T, EXACT)
    near(bound.apply(V), V @ matrix, EXACT)
    near(bound.map(lambda x: x, V), V @ matrix, EXACT)
    near(bound.eigenvalues, torch.linalg.eigvalsh(matrix), EXACT)
    inverse = torch.linalg.inv(matrix + 0.3 * torch.eye(p, dtype=torch.float64))
    near(bound.map(lambda x: 1 / (x + 0.3), V), V @ inverse, 1e-9)


@pytest.mark.parametrize("build", BUILDERS.values(), ids=BUILDERS)
def test_a_uniform_penalty_is_exact_and_acts_on_the_complement(build):
    truth = dense("mlp")  # strength 0.1 on everything
    bound = operator("mlp", build(4))
    assert bound.complement == pytest.approx(0.1)
    outside = torch.eye(bound.size, dtype=torch.float64) - bound.basis.T @ bound.basis
    near(bound.matrix() @ outside, 0.1 * outside, EXACT)
    assert float(bound.eigenvalues[0]) == pytest.approx(0.1, rel=1e-9)
    assert float(torch.linalg.eigvalsh(truth)[0]) >= 0.1 - 1e-9


def test_nystroem_lies_between_the_penalty_and_the_curvature():
    truth = dense("cnn")
    for rank in (1, 2, 4):
        bound = operator("cnn", Nystroem(rank, seed=rank))
        gap = torch.linalg.eigvalsh(truth - bound.matrix())
        assert float(gap[0]) > -1e-10 * float(truth.abs().max())
        assert float(gap[-1]) > 1e-6


def test_nystroem_of_single_precision_products_is_positive_and_near():
    """Products in float32 are off by 1e-7 of the largest eigenvalue: flat directions come out negative."""
    torch.manual_seed(0)
    module = torch.nn.Sequential(torch.nn.Linear(20, 10), torch.nn.Tanh(), torch.nn.Linear(10, 3))
    X, y = torch.randn(40, 20) * torch.logspace(0, -5, 20), torch.randint(0, 3, (40,))
    loss = torch.nn.CrossEntropyLoss()

    def explained(module, X, curvature):
        return uw.explain(module, X, y, loss=loss, damping=0.1, curvature=curvature)

    truth = explained(module.double(), X.double(), GaussNewton()).operator.matrix()
    found = explained(module.float(), X, Nystroem(150, of=GaussNewton(keep=0))).operator
    assert torch.linalg.eigvalsh(truth)[0] < 1e-9 * truth.norm()  # flat directions that rounding can turn
    assert float(torch.linalg.eigvalsh(found.matrix())[0]) >= -1e-12
    near(found.matrix(), truth, 1e-5)


def test_arnoldi_keeps_the_largest_eigenvalues_and_says_how_near():
    truth = dense("cnn")
    bound = operator("cnn", Arnoldi(6, of=GaussNewton()))
    near(bound.values + bound.complement, torch.linalg.eigvalsh(truth).flip(0)[:6], 1e-8)
    missed = bound.basis @ truth - (bound.values + bound.complement)[:, None] * bound.basis
    assert torch.allclose(missed.norm(dim=1), bound.ritz_residuals, atol=1e-9)
    early = operator("cnn", Arnoldi(4, of=GaussNewton(), steps=5))
    missed = early.basis @ truth - (early.values + early.complement)[:, None] * early.basis
    assert torch.allclose(missed.norm(dim=1), early.ritz_residuals, rtol=1e-6, atol=1e-9)
    assert float(early.ritz_residuals.max()) > 1e-4


def test_arnoldi_keeps_negative_curvature_and_factored_refuses_it():
    case = cases.make("mlp")
    theta = case.theta + 0.7 * torch.randn(len(case.theta), generator=torch.Generator().manual_seed(5))
    problem = case.problem
    truth = oracles.dense_hessian(problem, theta)
    lowest = float(torch.linalg.eigvalsh(truth)[0])
    assert lowest < -1e-3
    objective = case.objective(theta=theta)
    settings = {"examples": uw.Examples(case.X, case.y), "damping": 0.0}
    influence = uw.Influence(objective, curvature=Arnoldi(len(theta), of=Hessian()), **settings)
    assert float(influence.operator.eigenvalues[0]) == pytest.approx(lowest, rel=1e-6)
    with pytest.raises(NotPositiveDefinite, match=r"negative eigenvalue, -.*damping=") as refused:
        _ = influence.prepared
    assert refused.value.suggested_damping > -lowest
    with pytest.raises(NotPositiveDefinite, match=r"Nystroem.*met curvature -.*Arnoldi"):
        _ = uw.Influence(objective, curvature=Nystroem(len(theta), of=Hessian()), **settings).operator


@pytest.mark.parametrize("build", BUILDERS.values(), ids=BUILDERS)
def test_the_error_is_an_upper_bound_and_its_mean_is_unbiased(build):
    """One approximation, many draws of the probes: the estimates of ‖E‖²_F and tr E are right on average."""
    truth = dense("cnn")
    bound = operator("cnn", build(4))
    E = truth - bound.matrix()
    squares, traces, bounds = [], [], []
    for seed in range(300):
        again = type(bound)(bound.exact, bound.basis, bound.values, bound.complement, seed, 4)
        squares.append(again.error.frobenius**2)
        traces.append(again.error.trace)
        bounds.append(again.error.bound)
    spectral = float(torch.linalg.matrix_norm(E, 2))
    for numbers, exact in ((squares, float(E.square().sum())), (traces, float(E.trace()))):
        z = (np.mean(numbers) - exact) / (np.std(numbers, ddof=1) / np.sqrt(len(numbers)))
        assert abs(z) < 4
        assert np.std(numbers) > 1e-3 * abs(exact)  # or the z could not fail
    assert np.mean(np.array(bounds) < spectral) <= 1 - again.error.confidence + 0.01
    assert again.error.confidence == 1 - 4.0**-4
    assert f"≤ {bound.error.bound:.2g}" in repr(bound)


def test_the_certificate_says_how_good_the_low_rank_is():
    case = cases.make("cnn")
    influence = case.influence(curvature=Nystroem(5), damping=0.05)
    assert influence.solver == Factored()
    assert "‖C − Ĉ‖₂ ≤" in influence.on_loss(*case.queries).certificate.curvature


def test_directions_that_nothing_bends_must_be_damped():
    case = cases.make("mlp")
    free = replace(case.objective(), penalty=None)
    settings = {"examples": uw.Examples(case.X, case.y), "curvature": Nystroem(3)}
    with pytest.raises(NotPositiveDefinite, match=r"an eigenvalue of 0 .*low rank leaves out.*Try damping="):
        uw.Influence(free, damping=0.0, **settings).on_loss(*case.queries)
    chosen = uw.Influence(free, **settings)
    assert chosen.damping > 0
    assert chosen.on_loss(*case.queries).certificate.converged


def test_a_seed_decides_everything():
    one, same, other = (operator("cnn", Nystroem(3, seed=seed)).matrix() for seed in (0, 0, 1))
    assert torch.equal(one, same)
    assert not torch.allclose(one, other)


def test_lanczos_finds_equal_eigenvalues_and_ends_where_nothing_is_left():
    identity = cases.make("mlp").influence(curvature=Identity()).operator
    Q, T, beta = lanczos(identity, identity.size)
    assert len(Q) == identity.size
    assert beta == 0
    assert torch.allclose(Q @ Q.T, torch.eye(identity.size, dtype=torch.float64), atol=1e-12)
    assert torch.allclose(T, torch.eye(identity.size, dtype=torch.float64), atol=1e-12)
    gauged = cases.make("sklearn_softmax").influence().operator
    Q, T, _ = lanczos(gauged, gauged.size)
    assert len(Q) == gauged.size - 1
    assert torch.allclose(Q.T @ T @ Q, gauged.matrix(), atol=1e-12)


@pytest.mark.parametrize(
    "build",
    [
        lambda: Nystroem(0),
        lambda: Arnoldi(-1),
        lambda: Arnoldi(5, steps=3),
        lambda: Nystroem(3, probes=0),
        lambda: Nystroem(3, of=GaussNewton),
    ],
)
def test_settings_that_make_no_sense_are_refused(build):
    from jaxtyping import config

    config.update("jaxtyping_disable", True)
    try:
        with pytest.raises(InvalidInput):
            build()
    finally:
        config.update("jaxtyping_disable", False)


def test_the_empirical_fisher_can_be_sketched_too():
    case = cases.make("cnn", weighted=True)
    truth = oracles.dense_fisher(case.problem, case.theta)
    near(operator("cnn", Nystroem(len(truth), of=EmpiricalFisher())).matrix(), truth, EXACT)
