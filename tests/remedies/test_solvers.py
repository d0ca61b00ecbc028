"""What is said to type by upweight/solvers, typed."""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest
import scipy.sparse
import torch
from jaxtyping import config
from numpy.testing import assert_allclose
from scipy.optimize import least_squares
from sklearn.linear_model import LinearRegression, LogisticRegression, Ridge, TweedieRegressor
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

import upweight as uw
from refusals import refused
from small import NAMESQ, XQ, YQ, ZQ, D, N, X, Y, Z, classifier, logistic, ridge
from upweight import operators, solvers
from upweight.errors import TheoryWarning
from upweight.operators import EKFAC, KFAC, Arnoldi, Dense, EmpiricalFisher, GaussNewton, Hessian, Nystroem
from upweight.solvers import (
    CG,
    Approximate,
    Cholesky,
    Dual,
    Factored,
    LiSSA,
    Preconditioned,
    SparseCholesky,
    TwoLevel,
)

ON = (XQ, ZQ)
EXACT = {"rtol": 1e-4, "atol": 1e-7}  # of CG, whose residual is 1e-6


@cache
def scored(solver=None, **settings):
    """Of a small tanh network."""
    return classifier(solver=solver, **settings).on_loss(XQ, YQ)


LABELS = np.tanh(X @ [1.0, -1.0, 0.5]) + 0.3 * np.random.default_rng(1).normal(size=N)
AGAINST = np.array([-2.0, 2.0, -1.0])  # as wrong as a model can be, where the loss bends down
BENT_ON = (X[:2], LABELS[:2])


def alike(values, exact):
    """Their correlation."""
    return np.corrcoef(values.ravel(), exact.ravel())[0, 1]


def bent(theta=AGAINST, **settings):
    """Least squares of tanh(θ·x), in two steps so that there is a Gauss–Newton matrix."""

    def outputs(theta, example):
        return torch.tanh(theta @ example[0])

    def output_loss(f, example):
        return (f - example[1]) ** 2

    objective = uw.Objective(
        lambda theta, example: output_loss(outputs(theta, example), example),
        torch.as_tensor(theta),
        outputs=outputs,
        output_loss=output_loss,
    )
    return uw.Influence(objective, (X, LABELS), **settings)


@cache
def trained():
    return least_squares(lambda theta: np.tanh(X @ theta) - LABELS, AGAINST, xtol=1e-15, gtol=1e-12).x


def damped(damping, solver=None):
    """Values of `bent` at a damping that makes its Hessian positive."""
    with pytest.warns(TheoryWarning, match="not at a minimum"):
        return bent(curvature=Hessian(), damping=damping, solver=solver).on_loss(*BENT_ON).values


def by_hand(damping):
    """The same from the dense Hessian that autograd writes out."""
    theta, rows = torch.as_tensor(AGAINST), torch.as_tensor(X)
    one = lambda theta, x, y: (torch.tanh(theta @ x) - y) ** 2  # noqa: E731
    G = torch.stack([torch.func.grad(one)(theta, x, y) for x, y in zip(rows, LABELS, strict=True)])
    H = torch.autograd.functional.hessian(
        lambda t: ((torch.tanh(rows @ t) - torch.as_tensor(LABELS)) ** 2).mean(), theta
    )
    return (G[:2] @ torch.linalg.solve(H + damping * torch.eye(D, dtype=torch.float64), G.T) / N).numpy()


# ---- base ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def _annotations_unchecked():
    """Outside the tests nothing checks them before the library does."""
    config.update("jaxtyping_disable", True)
    yield
    config.update("jaxtyping_disable", False)


@pytest.mark.usefixtures("_annotations_unchecked")
def test_a_damping_below_zero():
    with refused("It is the λ of (C + λI) x = v and must be a finite number ≥ 0", "damping=0 solves with C itself"):
        ridge(damping=-1.0)
    assert_allclose(ridge(damping=0).on_loss(*ON).values, ridge().on_loss(*ON).values, rtol=1e-10)


def test_a_side_without_a_number():
    theta = torch.ones(D, dtype=torch.float64)
    inputs = torch.as_tensor(XQ).abs()
    inputs[1] = 0
    prepared = ridge().prepared

    def sides(loss):
        slopes = [torch.func.grad(loss)(theta, x) for x in inputs]
        return torch.cat([torch.stack(slopes), torch.zeros(len(XQ), 1, dtype=torch.float64)], 1)

    V = sides(lambda theta, x: -(theta @ x).log() * (theta @ x).detach().sign())
    with refused("is NaN or infinite, so its system has no solution", "leave it out, or clamp inside the loss"):
        prepared.solve(V)
    clamped = prepared.solve(sides(lambda theta, x: -(theta @ x).clamp(min=1e-12).log())).x
    assert not clamped[1].any()
    assert_allclose(prepared.solve(V[[0, 2, 3]]).x, clamped[[0, 2, 3]], rtol=1e-10)


# ---- cg --------------------------------------------------------------------------------------------------------------


def test_a_residual_that_is_no_share():
    with refused("It is a relative residual and must lie between 0 and 1", "such as 1e-6"):
        CG(rtol=2.0)
    assert_allclose(ridge(solver=CG(rtol=1e-6)).on_loss(*ON).values, ridge().on_loss(*ON).values, **EXACT)


def test_a_preconditioner_without_its_brackets():
    with refused("preconditioner=", "Pass an object, such as solvers.TwoLevel(), or None"):
        CG(preconditioner=TwoLevel)
    expected = ridge().on_loss(*ON).values
    assert_allclose(ridge(solver=CG(preconditioner=solvers.TwoLevel())).on_loss(*ON).values, expected, **EXACT)
    assert_allclose(ridge(solver=CG(preconditioner=None)).on_loss(*ON).values, expected, **EXACT)


def test_a_state_of_other_sides():
    prepared = ridge(solver=CG()).prepared
    V = torch.eye(D + 1, dtype=torch.float64)
    solution = prepared.solve(V)
    with refused("state is not that of an earlier Solution for ", "Pass solution.state"):
        prepared.solve(V[:2], state=solution.state)
    assert_allclose(prepared.solve(V, state=solution.state).x, solution.x, rtol=1e-5)


def test_too_few_sweeps():
    settings = {"penalty": 1e-3, "damping": 1e-3}
    exact = scored(Cholesky(), **settings)
    stopped = classifier(solver=CG(max_sweeps=2), **settings)
    with refused("The system is badly ", "Continue from error.solution.state, raise max_sweeps, ") as error:
        stopped.on_loss(XQ, YQ)
    assert_allclose(scored(CG(max_sweeps=100), **settings).values, exact.values, **EXACT)
    assert scored(CG(max_sweeps=2), **settings | {"damping": 1e4}).certificate.converged
    assert ", or accept less: CG(rtol=0.02)." in str(error.value)
    less = scored(CG(rtol=0.02, max_sweeps=2), **settings)
    assert less.certificate.residual.max() <= 0.02
    V = torch.eye(stopped.objective.size, dtype=torch.float64)[:3]
    with refused("The system is badly ", "Continue from error.solution.state, raise max_sweeps, ") as error:
        stopped.prepared.solve(V)
    continued = classifier(solver=CG(), **settings).prepared.solve(V, state=error.value.solution.state)
    exactly = classifier(solver=Cholesky(), **settings).prepared.solve(V).x
    assert continued.residual.max() <= 1e-6
    assert_allclose(continued.x, exactly, rtol=1e-4, atol=1e-6 * float(exactly.abs().max()))


def test_a_residual_so_large_that_no_share_would_accept_it():
    values = torch.logspace(-6, 0, 30, dtype=torch.float64)
    with refused("The system is badly ", "Continue from error.solution.state, raise max_sweeps, ") as error:
        CG(max_sweeps=1).prepare(operators.DenseOperator(torch.diag(values))).solve(values.rsqrt()[None])
    assert "accept less" not in str(error.value)
    more = CG(max_sweeps=1000).prepare(operators.DenseOperator(torch.diag(values))).solve(values.rsqrt()[None])
    assert_allclose(more.x, values.pow(-1.5)[None], rtol=1e-3)


def test_negative_curvature_on_the_way():
    with (
        refused("θ̂ is probably not a minimum. ", "Try damping=") as error,
        pytest.warns(TheoryWarning, match="minimum"),
    ):
        bent(curvature=Hessian(), solver=CG()).on_loss(*BENT_ON)
    assert "CG met curvature -" in str(error.value)
    assert "Try damping=0.6, curvature=GaussNewton(), or train further" in str(error.value)
    assert_allclose(damped(0.6, CG()), by_hand(0.6), **EXACT)
    assert bent(curvature=GaussNewton(), solver=CG()).on_loss(*BENT_ON).certificate.min_curvature > 0
    assert bent(trained(), curvature=Hessian(), solver=CG()).on_loss(*BENT_ON).certificate.min_curvature > 0


# ---- direct ----------------------------------------------------------------------------------------------------------


def test_negative_curvature():
    with refused("eigenvalues negative). ", "Try damping=") as error:
        bent(curvature=Hessian(), solver=Cholesky()).on_loss(*BENT_ON)
    assert "Try damping=0.6, curvature=GaussNewton(), or train further" in str(error.value)
    assert_allclose(damped(0.6, Cholesky()), by_hand(0.6), rtol=1e-8)
    assert bent(curvature=GaussNewton(), solver=Cholesky()).on_loss(*BENT_ON).certificate.min_curvature > 0
    assert bent(trained(), curvature=Hessian(), solver=Cholesky()).on_loss(*BENT_ON).certificate.min_curvature > 0


def test_a_feature_that_nearly_repeats():
    near = np.c_[X, X[:, 0] + 1e-8 * np.random.default_rng(3).normal(size=N)]
    model, plain = LinearRegression().fit(near, Z), LinearRegression().fit(X, Z)
    model.coef_, model.intercept_ = np.r_[plain.coef_, 0.0], plain.intercept_  # fit() may part the two by 1e7
    with refused("eigenvalues negative). ", "Try damping=") as error:
        uw.explain(model, near, Z).on_loss(near[:2], Z[:2])
    assert "Try damping=5.2e-06, or drop or standardise features" in str(error.value)
    dropped = uw.explain(LinearRegression().fit(X, Z), X, Z).on_loss(X[:2], Z[:2]).values
    values = uw.explain(model, near, Z, damping=5.2e-06).on_loss(near[:2], Z[:2]).values
    assert_allclose(values, dropped, rtol=1e-3, atol=1e-6)


def test_features_far_from_zero():
    far = X + 1e7
    with refused("eigenvalues negative). ", "Try damping=") as error:
        uw.explain(LinearRegression().fit(far, Z), far, Z).on_loss(far[:2], Z[:2])
    assert "centring and scaling (StandardScaler) cures the former" in str(error.value)
    model = make_pipeline(StandardScaler(), LinearRegression()).fit(far, Z)
    expected = uw.explain(LinearRegression().fit(X, Z), X, Z).on_loss(X[:2], Z[:2]).values
    assert_allclose(uw.explain(model, far, Z).on_loss(far[:2], Z[:2]).values, expected, rtol=1e-6)


# ---- dual ------------------------------------------------------------------------------------------------------------


def test_the_rows_of_a_network():
    with refused("Dual() works on the exact Hessian of a linear predictor", "Use CG() or Cholesky()"):
        scored(Dual())
    assert_allclose(scored(CG()).values, scored(Cholesky()).values, **EXACT)


def test_a_support_vector_machine_without_a_row_on_the_margin():
    def explained(loss, **settings):
        objective = uw.Objective(
            lambda params, example: loss(params["coef"] @ example[0] + params["intercept"], example[1]),
            {"coef": torch.zeros(1, D, dtype=torch.float64), "intercept": torch.zeros(1, dtype=torch.float64)},
            penalty=uw.L2({"coef": 1.0}),
            linear=uw.Linear(loss, 1, D, True),
        )
        return uw.Influence(objective, (X, Y), **settings).on_loss(XQ, YQ).values

    hinge, smoother = uw.losses.smooth_hinge(0.001), uw.losses.smooth_hinge(0.5)
    with refused("The data do not determine the intercept", "Try damping=1e-6, or a smoother loss"):
        explained(hinge, solver=Dual())
    expected = explained(hinge, solver=Cholesky(), damping=1e-6)
    assert_allclose(explained(hinge, solver=Dual(), damping=1e-6), expected, rtol=1e-6)
    assert_allclose(explained(smoother, solver=Dual()), explained(smoother, solver=Cholesky()), rtol=1e-6)


def test_rows_that_bend_down():
    y = np.random.default_rng(0).gamma(0.3, 1, N) + 0.01
    model = TweedieRegressor(power=3, link="log", alpha=1.0, tol=1e-10, max_iter=10_000).fit(X, y)
    with refused("so C has no factor UᵀU", "Use Cholesky() or CG()"):
        uw.explain(model, X, y, solver=Dual()).on_loss(X[:2], y[:2])
    direct = uw.explain(model, X, y, solver=Cholesky()).on_loss(X[:2], y[:2]).values
    assert_allclose(uw.explain(model, X, y, solver=CG()).on_loss(X[:2], y[:2]).values, direct, **EXACT)


def test_coefficients_without_a_penalty():
    model = LinearRegression().fit(X, Z)
    with refused("an unpenalised fit is not unique", "Use a penalty, or damping=1e-6"):
        uw.explain(model, X, Z, solver=Dual()).on_loss(*ON)
    assert_allclose(ridge(solver=Dual()).on_loss(*ON).values, ridge().on_loss(*ON).values, rtol=1e-8)
    damped = uw.explain(model, X, Z, solver=Dual(), damping=1e-6).on_loss(*ON).values
    assert_allclose(damped, uw.explain(model, X, Z).on_loss(*ON).values, atol=1e-6)


def test_coefficients_that_are_free_only_together():
    labels = np.digitize(Z, [-1, 1])
    model = LogisticRegression(C=np.inf, tol=1e-10, max_iter=5000).fit(X, labels)
    settings, on = {"damping": 1e-6}, (XQ, labels[:4])
    with refused("Dual() needs every coefficient to be free to move", "Use Cholesky() or CG()"):
        uw.explain(model, X, labels, solver=Dual(), **settings).on_loss(*on)
    direct = uw.explain(model, X, labels, solver=Cholesky(), **settings).on_loss(*on).values
    assert_allclose(uw.explain(model, X, labels, solver=CG(), **settings).on_loss(*on).values, direct, **EXACT)


def test_features_in_small_units():
    far, q = np.c_[X[:, :2], 1e9 * (X[:, 0] + X[:, 2])], np.c_[XQ[:, :2], 1e9 * (XQ[:, 0] + XQ[:, 2])]
    model = Ridge(1.0, solver="svd").fit(far, Z)
    with refused("Dual() cannot factorise", "Use Cholesky(), a larger penalty, or standardised features"):
        uw.explain(model, far, Z, solver=Dual()).on_loss(q, ZQ)
    values = uw.explain(model, far, Z, solver=Cholesky()).on_loss(q, ZQ).values
    assert np.isfinite(values).all()
    scaled = make_pipeline(StandardScaler(), Ridge(1.0)).fit(far, Z)
    direct = uw.explain(scaled, far, Z, solver=Cholesky()).on_loss(q, ZQ).values
    assert_allclose(uw.explain(scaled, far, Z, solver=Dual()).on_loss(q, ZQ).values, direct, rtol=1e-7)


# ---- sparse ----------------------------------------------------------------------------------------------------------


def test_rows_that_are_not_sparse():
    with refused("SparseCholesky() works on the exact Hessian of a linear predictor", "Use CG() or Cholesky()"):
        ridge(solver=SparseCholesky()).on_loss(*ON)
    with refused("SparseCholesky() works on the exact Hessian of a linear predictor", "Use CG() or Cholesky()"):
        scored(SparseCholesky())
    for solver in (CG(rtol=1e-10), Cholesky()):
        assert_allclose(ridge(solver=solver).on_loss(*ON).values, ridge().on_loss(*ON).values, **EXACT)


def test_a_penalty_on_sparse_rows_that_is_a_function():
    V, rows = torch.ones(1, D).double(), scipy.sparse.csr_matrix(X)

    def solution(solver, penalty):
        linear = uw.Linear(uw.losses.squared, 1, D, False)
        objective = uw.Objective(linear.loss, {"coef": torch.zeros(1, D).double()}, penalty=penalty, linear=linear)
        return uw.Influence(objective, (rows, Z), solver=solver).prepared.solve(V).x

    def ridge_of(params):
        return params["coef"].square().sum() / 2

    with refused("SparseCholesky() needs coefficients that are free to move", "Use CG() or Cholesky(), or write the"):
        solution(SparseCholesky(), ridge_of)
    H = 2 * torch.from_numpy(X.T @ X) / len(X) + torch.eye(D).double()
    for solver, penalty in ((CG(), ridge_of), (Cholesky(), ridge_of), (SparseCholesky(), 1.0)):
        torch.testing.assert_close(solution(solver, penalty), torch.linalg.solve(H, V.T).T, rtol=1e-5, atol=0)


def test_sparse_columns_that_repeat_without_a_penalty():
    twice = scipy.sparse.csr_matrix(np.c_[X, X[:, :1]])
    model = LinearRegression().fit(X, Z)
    model.coef_ = np.r_[model.coef_, 0.0]
    model.n_features_in_ = twice.shape[1]

    def values(solver, **settings):
        return uw.explain(model, twice, Z, solver=solver, **settings).on_loss(twice[:4], Z[:4]).values

    with refused("SparseCholesky() cannot divide by C + λI", "Use a penalty, or damping=1e-6"):
        values(SparseCholesky())
    assert_allclose(values(SparseCholesky(), damping=1e-6), values(Cholesky()), atol=1e-6)
    assert_allclose(values(CG(rtol=1e-10)), values(Cholesky()), **EXACT)


# ---- factored --------------------------------------------------------------------------------------------------------


def test_a_curvature_without_eigenvalues():
    with refused(
        "Factored() divides by the eigenvalues of the curvature", "Pass curvature=operators.EKFAC(), Nystroem"
    ):
        scored(Factored())
    exact = scored(CG()).values
    assert_allclose(scored(Factored(), curvature=Dense(GaussNewton())).values, exact, rtol=1e-3, atol=1e-5)
    for near in (operators.EKFAC(), operators.Nystroem(20)):
        assert alike(scored(Factored(), curvature=near).values, exact) > 0.8


def test_an_eigenvalue_below_zero():
    with refused(" are too small to divide by). ", "Try damping=") as error:
        bent(curvature=Arnoldi(3), damping=0.0).on_loss(*BENT_ON)
    assert "Try damping=0.6, or curvature over GaussNewton(), which has none" in str(error.value)
    assert_allclose(bent(curvature=Arnoldi(3), damping=0.6).on_loss(*BENT_ON).values, by_hand(0.6), rtol=1e-6)
    over = bent(curvature=Arnoldi(3, of=GaussNewton()), damping=0.0).on_loss(*BENT_ON).values
    assert_allclose(over, bent(curvature=GaussNewton(), damping=0.0).on_loss(*BENT_ON).values, rtol=1e-6)


def test_an_eigenvalue_of_zero():
    with refused(" are too small to divide by). ", "Try damping=") as error:
        scored(curvature=Nystroem(3), damping=0.0, penalty=0)
    assert "Try damping=0.00075, or a penalty on it all" in str(error.value)
    assert scored(curvature=Nystroem(3), damping=0.00075, penalty=0).certificate.residual.max() < 1e-6
    assert scored(curvature=Nystroem(3), damping=0.0, penalty=0.1).certificate.residual.max() < 1e-6


# ---- lissa -----------------------------------------------------------------------------------------------------------


def test_a_scale_below_zero():
    with refused("It must exceed the largest curvature of a minibatch", "None chooses it"):
        LiSSA(scale=-1.0)
    exact = ridge(damping=10.0).on_loss(*ON).values
    for scale in (40.0, None):
        values = ridge(damping=10.0, solver=LiSSA(depth=30, repeats=2, scale=scale)).on_loss(*ON).values
        assert alike(values, exact) > 0.99


def test_a_curvature_without_minibatches():
    with refused(
        "LiSSA draws minibatches of curvature, and ", "Use Hessian(), GaussNewton() or EmpiricalFisher(); or "
    ):
        scored(LiSSA(), curvature=EKFAC())
    solver = LiSSA(depth=30, repeats=2, scale=40.0)
    for curvature in (Hessian(), GaussNewton(), EmpiricalFisher()):
        values = ridge(solver=solver, curvature=curvature, damping=10.0).on_loss(*ON).values
        exact = ridge(curvature=curvature, damping=10.0).on_loss(*ON).values
        assert alike(values, exact) > 0.99
    values = scored(Cholesky(), curvature=EKFAC()).values
    assert_allclose(values, scored(Factored(), curvature=EKFAC()).values, rtol=1e-6)


@pytest.mark.filterwarnings("ignore:.*has not settled:upweight.errors.TheoryWarning")  # a short LiSSA
def test_one_row_has_more_curvature_than_the_scale():
    rows = X.copy()
    rows[0] *= 8
    model = Ridge(1.0).fit(rows, Z)

    def values(solver):
        return uw.explain(model, rows, Z, solver=solver).on_loss(*ON).values

    exact, settings = values(Cholesky()), {"depth": 50, "repeats": 2}
    with refused("has more curvature than the scale, or negative curvature", "Try scale=") as error:
        values(LiSSA(**settings, batch_size=1, scale=4.0))
    assert "Try scale=59, a larger batch_size, or solver=CG()" in str(error.value)
    assert alike(values(LiSSA(**settings, batch_size=1, scale=59)), exact) > 0.6
    assert alike(values(LiSSA(**settings, batch_size=400, scale=4.0)), exact) > 0.99
    assert_allclose(values(CG()), exact, **EXACT)


def test_minibatches_of_negative_curvature():
    with (
        refused("has more curvature than the scale, or negative curvature", "Try scale="),
        pytest.warns(TheoryWarning, match="not at a minimum"),
    ):
        bent(curvature=Hessian(), solver=LiSSA(depth=50, repeats=1)).on_loss(*BENT_ON)
    solver = LiSSA(depth=20, repeats=2, scale=4.0)
    exact = bent(curvature=GaussNewton(), solver=Cholesky(), damping=1.0).on_loss(*BENT_ON).values
    assert alike(bent(curvature=GaussNewton(), solver=solver, damping=1.0).on_loss(*BENT_ON).values, exact) > 0.99
    assert alike(damped(3.0, solver), by_hand(3.0)) > 0.99


# ---- precondition ----------------------------------------------------------------------------------------------------


def test_the_approximate_inverse_of_a_network():
    with refused("Approximate() asks the curvature for an approximate inverse", "leave preconditioner=None"):
        scored(CG(preconditioner=Approximate()))
    assert_allclose(scored(CG(preconditioner=None)).values, scored(Cholesky()).values, **EXACT)


def test_an_inner_residual_that_is_no_share():
    with refused("It is a relative residual between 0 and 1", "such as 0.1"):
        TwoLevel(rtol=2.0)
    solver = CG(preconditioner=TwoLevel(rtol=0.1, rows=10))
    values = logistic(solver=solver).on_loss(XQ, NAMESQ).values
    assert_allclose(values, logistic(solver=Cholesky()).on_loss(XQ, NAMESQ).values, **EXACT)


def test_a_few_rows_of_a_network():
    with refused("TwoLevel() needs the curvature of a few rows", "leave preconditioner=None"):
        scored(CG(preconditioner=TwoLevel()))
    assert_allclose(scored(CG(preconditioner=None)).values, scored(Cholesky()).values, **EXACT)


def test_a_preconditioning_curvature_without_its_brackets():
    with refused(" is no curvature. ", "Pass an object, such as Preconditioned("):
        Preconditioned(EKFAC)
    assert_allclose(
        scored(CG(preconditioner=Preconditioned(operators.EKFAC()))).values, scored(Cholesky()).values, **EXACT
    )


def test_a_matrix_has_no_rows_to_precondition_by():
    with refused(
        "to the operator's rows, and ", "Use CG with curvature=GaussNewton() or Hessian(), or Cholesky() for a"
    ):
        scored(CG(preconditioner=Preconditioned(EKFAC())), curvature=Dense(GaussNewton()))
    settings = {"damping": 1.0}
    solver = CG(preconditioner=Preconditioned(EKFAC()))
    values = scored(solver, curvature=GaussNewton(), **settings).values
    assert_allclose(values, scored(Cholesky(), curvature=Dense(GaussNewton()), **settings).values, **EXACT)


def test_a_preconditioning_curvature_without_eigenvalues():
    with refused(
        "does not know its eigenvalues", "Use operators.EKFAC(), KFAC(), Nystroem(rank), Arnoldi(rank) or Dense"
    ):
        scored(CG(preconditioner=Preconditioned(GaussNewton())))
    exact = scored(Cholesky()).values
    for near in (operators.EKFAC(), KFAC(), Nystroem(5), Arnoldi(5), Dense(GaussNewton())):
        assert_allclose(scored(CG(preconditioner=Preconditioned(near))).values, exact, **EXACT)


def test_a_penalty_that_is_a_function_has_no_dual_form():
    def scored(solver, penalty):
        linear = uw.Linear(uw.losses.squared, 1, D, False)
        objective = uw.Objective(linear.loss, {"coef": torch.zeros(1, D).double()}, penalty=penalty, linear=linear)
        return uw.Influence(objective, (X, Z), solver=solver)

    def ridge_of(params):
        return params["coef"].square().sum() / 2

    with refused("and this one is a function", "Use Cholesky() or CG(), or write the penalty as a float"):
        scored(solvers.Dual(), ridge_of).prepared.solve(torch.ones(1, D).double())
    V = torch.ones(1, D).double()
    for solver, penalty in ((solvers.Cholesky(), ridge_of), (solvers.CG(), ridge_of), (solvers.Dual(), 1.0)):
        H = 2 * torch.from_numpy(X.T @ X) / len(X) + torch.eye(D).double()
        torch.testing.assert_close(
            scored(solver, penalty).prepared.solve(V).x, torch.linalg.solve(H, V.T).T, rtol=1e-5, atol=0
        )


def linear(X, solver=None):
    return uw.explain(LinearRegression().fit(X, Z), X, Z, solver=solver)


def test_columns_that_nearly_repeat_under_cg():
    nearly = np.c_[X, X[:, 0] + 1e-8 * np.random.default_rng(0).normal(size=N)]
    with refused(
        "where every column alone has 1, which is singular to rounding", "Drop or standardise features, or fit"
    ):
        linear(nearly, CG()).on_loss(nearly[:4], Z[:4])
    exact = linear(X, Cholesky()).on_loss(XQ, ZQ).values
    assert_allclose(linear(nearly[:, :3], CG()).on_loss(*ON).values, exact, **EXACT)  # dropped
    model = Ridge(alpha=0.1).fit(nearly, Z)
    penalised, direct = (uw.explain(model, nearly, Z, solver=solver) for solver in (CG(), Cholesky()))
    assert_allclose(penalised.on_loss(nearly[:4], Z[:4]).values, direct.on_loss(nearly[:4], Z[:4]).values, **EXACT)
    far = X + np.array([1e8, 0, 0])  # a constant column but for its digits
    with refused("where every column alone has 1, which is singular to rounding", "standardise features"):
        linear(far, CG()).on_loss(far[:4], Z[:4])
    standardised = make_pipeline(StandardScaler(), LinearRegression()).fit(far, Z)
    values = uw.explain(standardised, far, Z, solver=CG()).on_loss(far[:4], Z[:4]).values
    assert_allclose(values, linear(X).on_loss(X[:4], Z[:4]).values, rtol=1e-3, atol=1e-6)


def test_more_columns_that_repeat_than_cg_looks_for(monkeypatch):
    monkeypatch.setattr("upweight.solvers.cg._MATRIX_UP_TO", 10)  # parameters, in place of 4,000
    many = np.c_[X, np.zeros((N, 40))]
    with refused(
        "or more directions of the ", "Use solver=Cholesky(), which finds them all, drop such columns and fit"
    ):
        linear(many, CG()).on_loss(many[:4], Z[:4])
    values = linear(many, Cholesky()).on_loss(many[:4], Z[:4]).values
    assert_allclose(linear(X, CG()).on_loss(X[:4], Z[:4]).values, values, **EXACT)
    model = Ridge(alpha=0.1).fit(many, Z)
    penalised = uw.explain(model, many, Z, solver=CG()).on_loss(many[:4], Z[:4]).values
    assert_allclose(penalised, uw.explain(model, many, Z, solver=Cholesky()).on_loss(many[:4], Z[:4]).values, **EXACT)


# ---- pacing.py -------------------------------------------------------------------------------------------------------


def test_values_settle_on_rows():
    side = torch.ones(1, 3, dtype=torch.float64)
    matrix = operators.DenseOperator(torch.eye(3, dtype=torch.float64))
    with refused("settled=", "Pass the share of the values that may still come, such as 0.01, or None"):
        CG(settled=2.0)
    with refused("settled follows the values of a few rows", "Leave settled out, and name the residual to reach"):
        CG(settled=0.01).prepare(matrix).solve(side)
    assert torch.allclose(CG(rtol=1e-6).prepare(matrix).solve(side).x, side)
