"""The law-book of solvers: every solver on every positive system, and what each does when the system is not."""

from __future__ import annotations

from inspect import signature

import numpy as np
import pytest
import torch
from hypothesis import given, strategies as st
from sklearn.linear_model import LinearRegression, LogisticRegression

import cases
import upweight as uw
from strategies import vectors
from tolerances import SOLVERS_AGREE, STANDARD_ERRORS
from upweight.errors import Diverged, InvalidInput, NotConverged, NotPositiveDefinite, UnsupportedModel, UpweightError
from upweight.operators import Dense, DenseOperator, EmpiricalFisher, GaussNewton, Hessian, Identity
from upweight.solvers import CG, Approximate, Cholesky, LiSSA, Plain

EXACT_SOLVERS = {"Cholesky": (Cholesky(), 1e-10), "CG": (CG(rtol=1e-10, max_sweeps=2000), 1e-10)}
CURVATURES = [Hessian(), GaussNewton(), Dense(), EmpiricalFisher(), Identity()]


def truth(operator, damping, V):
    """Independent of every solver: the pseudo-inverse on the complement of the gauge."""
    V = operator.project(V)
    A = operator.matrix() + damping * torch.eye(operator.size, dtype=torch.float64)
    x = torch.linalg.lstsq(A, V.T, driver="gelsd").solution.T
    return operator.project(x)


@pytest.fixture(scope="module", params=cases.NAMES)
def case(request):
    return cases.make(request.param, weighted=True)


@pytest.fixture(params=EXACT_SOLVERS)
def solver(request):
    return EXACT_SOLVERS[request.param]


def right_sides(p, k=3, seed=0):
    return torch.randn(k, p, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# without damping the empirical Fisher may have fewer rows than it has parameters
SYSTEMS = [(c, damping) for c in CURVATURES for damping in (0.0, 0.3) if damping or c != EmpiricalFisher()]


@pytest.mark.parametrize(("curvature", "damping"), SYSTEMS, ids=repr)
def test_keeps_its_promise_and_means_the_same_lambda(case, solver, curvature, damping):
    spec, promise = solver
    operator = case.influence(curvature=curvature).operator
    V = right_sides(operator.size)
    solution = spec.prepare(operator, damping).solve(V)
    assert solution.converged
    W = operator.project(V)
    missing = (W - operator.project(operator.apply(solution.x)) - damping * solution.x).norm(dim=1) / W.norm(dim=1)
    assert float(missing.max()) <= 1.01 * promise
    assert torch.allclose(solution.residual, missing, atol=1e-12)
    expected = truth(operator, damping, V)
    assert float((solution.x - expected).norm() / expected.norm()) < SOLVERS_AGREE


@given(vectors(3, 40), st.floats(-3, 3))
def test_is_linear_and_treats_rows_alone(case, V, factor):
    for spec, _ in EXACT_SOLVERS.values():
        prepared = spec.prepare(case.influence().operator, 0.1)
        W = torch.from_numpy(V[:, : len(case.theta)])
        together = prepared.solve(W).x
        alone = torch.cat([prepared.solve(w[None]).x for w in W])
        assert torch.allclose(together, alone, rtol=1e-7, atol=1e-8)
        combined = prepared.solve(W[:1] + factor * W[1:2]).x
        assert torch.allclose(combined, together[:1] + factor * together[1:2], rtol=1e-7, atol=1e-7)


def test_a_zero_right_side_has_a_zero_solution(case, solver):
    solution = solver[0].prepare(case.influence().operator).solve(torch.zeros(2, len(case.theta), dtype=torch.float64))
    assert not solution.x.any()
    assert not solution.residual.any()


def test_the_smallest_curvature_is_exact_for_cholesky_and_an_upper_bound_for_cg(case):
    operator = case.influence().operator
    gauge = torch.eye(operator.size, dtype=torch.float64) - operator.project(
        torch.eye(operator.size, dtype=torch.float64)
    )
    smallest = float(torch.linalg.eigvalsh(operator.matrix() + 100 * gauge)[0])
    V = right_sides(operator.size)
    assert Cholesky().prepare(operator, 0.2).solve(V).min_curvature == pytest.approx(smallest, rel=1e-7)
    assert CG().prepare(operator, 0.2).solve(V).min_curvature >= smallest - 1e-9


@pytest.mark.parametrize("units", [1e-6, 1e6])
def test_features_in_other_units_cost_no_digits(units):
    D = torch.diag(torch.tensor([1.0, units, 1.0], dtype=torch.float64))
    A = torch.tensor([[2.0, 0.3, 0.1], [0.3, 1.0, 0.2], [0.1, 0.2, 3.0]], dtype=torch.float64)
    V = right_sides(3)
    x = Cholesky().prepare(DenseOperator(D @ A @ D)).solve(V).x
    expected = torch.linalg.solve(A, (V / D.diagonal()).T).T / D.diagonal()
    assert torch.allclose(x, expected, rtol=1e-9)


def least_squares(X, y, units=1.0):
    model = LinearRegression(fit_intercept=False)
    model.coef_, model.intercept_ = np.linalg.solve(X.T @ X, X.T @ y) / units, 0.0
    return uw.explain(model, X * units, y, solver=CG(rtol=1e-8, max_sweeps=200))


@pytest.mark.parametrize("unit", [1e-18, 1e18])
def test_cg_hides_no_feature_behind_anothers_units(unit):
    draw = np.random.default_rng(0)
    X, y, units = draw.normal(size=(60, 6)), draw.normal(size=60), np.where(np.arange(6) < 3, unit, 1.0)
    G = -2 * (y - X @ np.linalg.solve(X.T @ X, X.T @ y))[:, None] * X
    expected = G[:3] @ np.linalg.solve(2 * X.T @ X, G.T)  # units cancel in it
    values = least_squares(X, y, units).on_loss((X * units)[:3], y[:3]).values
    np.testing.assert_allclose(values, expected, rtol=0, atol=1e-6 * np.abs(expected).max())


def test_many_features_in_other_units_cost_few_products():
    draw = np.random.default_rng(0)
    X, y = draw.normal(size=(2600, 1030)), draw.normal(size=2600)  # too many features for eigenvectors of XᵀX
    units = 10.0 ** draw.uniform(-4, 4, 1030)
    plain, other = (least_squares(X, y, one).on_loss((X * one)[:2], y[:2]) for one in (np.ones(1030), units))
    np.testing.assert_allclose(other.values, plain.values, rtol=0, atol=1e-6 * np.abs(plain.values).max())
    assert other.certificate.sweeps <= 1.5 * plain.certificate.sweeps


@pytest.mark.parametrize("rows", [500, 9000], ids=["Kronecker", "leading"])
@pytest.mark.parametrize("spread", [0, 1, 3])
def test_features_in_other_units_cost_few_products_of_many_outputs(spread, rows):
    draw = np.random.default_rng(0)
    X, units = draw.normal(size=(rows, 12)), 10.0 ** draw.uniform(-spread, spread, 12)
    y = np.argmax(X[:, :4] + draw.gumbel(size=(rows, 4)), 1)
    model = LogisticRegression(C=1e6, tol=1e-6, solver="newton-cholesky").fit(X, y)
    model.coef_ = model.coef_ / units  # the penalty is so small that this is a minimum, too
    found, exact = (
        uw.explain(model, X * units, y, solver=solver).on_loss((X * units)[:2], y[:2])
        for solver in (CG(rtol=1e-8, max_sweeps=200), Cholesky())
    )
    np.testing.assert_allclose(found.values, exact.values, rtol=0, atol=1e-6 * np.abs(exact.values).max())
    assert found.certificate.sweeps <= 40


def test_what_cg_says_it_reached_is_what_it_promised():
    draw = np.random.default_rng(0)
    X, y, units = draw.normal(size=(60, 6)), draw.normal(size=60), 10.0 ** np.array([-6, 0, 0, 0, 3, 6])
    system = least_squares(X, y, units).system
    V = 2 * torch.from_numpy((X * units)[:1] * y[:1, None])
    D = system.operator.diagonal().rsqrt()
    with pytest.raises(NotConverged) as refused:
        CG(rtol=1e-8, max_sweeps=2, preconditioner=Approximate()).prepare(system.operator).solve(V)
    missing = V - system.operator.apply(refused.value.solution.x)
    promised = max(missing.norm() / V.norm(), (missing * D).norm() / (V * D).norm())
    assert float(refused.value.solution.residual) == pytest.approx(float(promised))
    assert f"residual of {float(promised):.2g} for" in str(refused.value)


def test_cg_of_dependent_sides_is_judged_by_them_and_not_by_their_basis():
    draw = np.random.default_rng(0)
    X, y = draw.normal(size=(100, 20)) + 1e3, np.arange(100) % 2
    model = LogisticRegression(tol=1e-10, max_iter=1000, solver="newton-cholesky").fit(X, y)
    found, exact = (
        uw.explain(model, X, y, solver=solver).of_self()
        for solver in (CG(rtol=1e-8, max_sweeps=200, preconditioner=Plain()), Cholesky())
    )
    assert found.certificate.residual.max() < 1e-8
    np.testing.assert_allclose(found.values, exact.values, rtol=1e-3, atol=1e-6)


INDEFINITE = torch.diag(torch.tensor([5.0, 2.0, 1.0, -0.7], dtype=torch.float64))


@pytest.mark.parametrize("spec", [Cholesky(), CG(rtol=1e-8)], ids=repr)
def test_negative_curvature_is_refused_with_a_damping_that_would_do(spec):
    operator = DenseOperator(INDEFINITE)
    with pytest.raises(NotPositiveDefinite, match=r"-0\.7.*damping=\d.*GaussNewton.*train further") as refused:
        spec.prepare(operator, 0.1).solve(torch.ones(1, 4, dtype=torch.float64))
    suggestion = refused.value.suggested_damping
    assert 0.7 < suggestion < 1.0
    assert spec.prepare(operator, suggestion).solve(torch.ones(1, 4, dtype=torch.float64)).converged
    assert isinstance(refused.value, ArithmeticError)


def test_cg_suggests_by_lanczos_not_by_the_curvature_it_happened_to_meet():
    """The right side hardly sees the worst direction; the suggestion must still cover it."""
    values = torch.cat(
        [torch.linspace(0.5, 3, 38, dtype=torch.float64), torch.tensor([-0.05, -4.0], dtype=torch.float64)]
    )
    v = torch.ones(1, 40, dtype=torch.float64)
    v[0, -1] = 1e-9
    with pytest.raises(NotPositiveDefinite) as refused:
        CG(rtol=1e-12).prepare(DenseOperator(torch.diag(values))).solve(v)
    assert refused.value.suggested_damping > 4.0


def test_a_singular_matrix_is_refused_as_collinear():
    X = torch.randn(20, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    X = torch.cat([X, X[:, :1] + X[:, 1:]], 1)
    with pytest.raises(NotPositiveDefinite, match="collinear"):
        Cholesky().prepare(DenseOperator(X.T @ X / 20))


def test_cg_out_of_sweeps_raises_with_its_work_and_goes_on_from_it():
    draw = torch.Generator().manual_seed(0)
    Q, _ = torch.linalg.qr(torch.randn(60, 60, generator=draw, dtype=torch.float64))
    operator = DenseOperator(Q @ torch.diag(torch.logspace(-4, 1, 60, dtype=torch.float64)) @ Q.T)
    V = right_sides(60, 2)
    with pytest.raises(NotConverged, match=r"residual of .* after 20 sweeps; 1e-08 was promised") as refused:
        CG(rtol=1e-8, max_sweeps=20).prepare(operator).solve(V)
    partial = refused.value.solution
    assert not partial.converged
    assert partial.sweeps == 20
    recomputed = (V - operator.apply(partial.x)).norm(dim=1) / V.norm(dim=1)
    assert torch.allclose(partial.residual, recomputed)
    whole = CG(rtol=1e-8).prepare(operator).solve(V)
    resumed = CG(rtol=1e-8).prepare(operator).solve(V, state=partial.state)
    assert resumed.converged
    assert resumed.sweeps <= whole.sweeps - 10
    assert torch.allclose(resumed.x, whole.x, rtol=1e-4, atol=1e-4)


def test_cg_agrees_with_scipy():
    from scipy.sparse.linalg import cg

    operator = cases.make("mlp").influence().operator
    V = right_sides(operator.size, 1)
    name = "rtol" if "rtol" in signature(cg).parameters else "tol"  # before SciPy 1.12
    theirs, info = cg(operator.matrix().numpy(), V[0].numpy(), maxiter=2000, atol=0.0, **{name: 1e-12})
    assert info == 0
    ours = CG(rtol=1e-12, max_sweeps=5000).prepare(operator).solve(V).x[0].numpy()
    np.testing.assert_allclose(ours, theirs, rtol=1e-6)


# ---- LiSSA -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("damping", [0.0, 0.5])
@pytest.mark.parametrize("name", ["ridge", "sklearn_softmax", "sklearn_logistic"])
def test_lissa_is_within_its_own_standard_errors(name, damping):
    operator = cases.make(name, weighted=True).influence().operator
    V = right_sides(operator.size, 2)
    spec = LiSSA(depth=300, repeats=8, batch_size=8, seed=1)
    prepared = spec.prepare(operator, damping)
    solution = prepared.solve(V)
    expected = truth(operator, damping, V)
    error = solution.replicas.std(0) / np.sqrt(spec.repeats)
    assert torch.allclose(solution.replicas.mean(0), solution.x)
    eye = torch.eye(operator.size, dtype=torch.float64)
    complement = operator.matrix() + damping * eye + 100 * (eye - operator.project(eye))
    bias = (1 - float(torch.linalg.eigvalsh(complement)[0]) / prepared.scale) ** spec.depth * expected.norm(
        dim=1, keepdim=True
    )
    z = ((solution.x - expected).abs() - bias) / error.clamp(min=1e-12)
    assert float(z.max()) < STANDARD_ERRORS
    # the error bars are no larger than they have to be, or this test could not fail
    assert float(error.norm() / expected.norm()) < 0.3
    z_true = (solution.x - expected) / error.clamp(min=1e-12)
    assert 0.3 < float(z_true.pow(2).mean().sqrt()) < 3


def test_lissa_damping_is_not_multiplied_by_its_scale():
    operator = cases.make("ridge").influence().operator
    V = right_sides(operator.size, 1)
    x = {
        scale: LiSSA(depth=600, repeats=4, batch_size=30, scale=scale, seed=2).prepare(operator, 0.5).solve(V).x
        for scale in (20.0, 60.0)
    }
    expected = truth(operator, 0.5, V)
    for found in x.values():
        assert float((found - expected).norm() / expected.norm()) < 0.05


def test_lissa_scale_bounds_the_minibatches_and_not_only_their_mean():
    """One row in forty carries all the curvature: the mean's largest eigenvalue would be far too small a scale."""
    case = cases.make("ridge")
    X = case.X.clone()
    X[0] *= 40
    from sklearn.linear_model import Ridge

    import upweight as uw

    fitted = Ridge(alpha=1.0).fit(X.numpy(), case.y.numpy())
    operator = uw.explain(fitted, X.numpy(), case.y.numpy()).operator
    mean = float(torch.linalg.eigvalsh(operator.matrix())[-1])
    V = right_sides(operator.size, 1)
    prepared = LiSSA(depth=300, repeats=2, batch_size=1, seed=0).prepare(operator)
    assert prepared.scale > 10 * mean
    assert torch.isfinite(prepared.solve(V).x).all()
    with pytest.raises(Diverged, match=r"grew|diverged.*scale=") as refused:
        LiSSA(depth=2000, repeats=2, batch_size=1, scale=mean, seed=0).prepare(operator).solve(V)
    assert refused.value.solution is not None


def test_lissa_seed_decides_everything():
    operator = cases.make("ridge").influence().operator
    V = right_sides(operator.size, 1)
    spec = LiSSA(depth=50, repeats=2, seed=5)
    assert torch.equal(spec.prepare(operator).solve(V).x, spec.prepare(operator).solve(V).x)
    other = LiSSA(depth=50, repeats=2, seed=6).prepare(operator).solve(V).x
    assert not torch.equal(spec.prepare(operator).solve(V).x, other)


def test_lissa_needs_rows():
    with pytest.raises(UnsupportedModel, match="draws minibatches"):
        LiSSA().prepare(DenseOperator(INDEFINITE))


@pytest.mark.parametrize(
    "build",
    [
        lambda: CG(rtol=0.0),
        lambda: CG(rtol=2.0),
        lambda: CG(max_sweeps=0),
        lambda: LiSSA(depth=0),
        lambda: LiSSA(repeats=0),
        lambda: LiSSA(batch_size=0),
        lambda: LiSSA(scale=-1.0),
        lambda: Cholesky().prepare(DenseOperator(INDEFINITE), -0.1),
        lambda: CG().prepare(DenseOperator(INDEFINITE), float("nan")),
        lambda: LiSSA().prepare(cases.make("ridge").influence().operator, float("inf")),
    ],
)
def test_settings_that_make_no_sense_are_refused(build):
    with pytest.raises(InvalidInput) as refused:
        build()
    assert isinstance(refused.value, UpweightError)
    assert isinstance(refused.value, ValueError)
