"""The exact Hessian of a linear predictor, and every way to solve with it, against autograd and dense algebra."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import scipy.sparse
import torch
from jaxtyping import config
from sklearn.linear_model import LinearRegression, LogisticRegression, Ridge, RidgeClassifier, TweedieRegressor

import upweight as uw
from upweight.errors import NotPositiveDefinite, UnsupportedModel
from upweight.model import linear
from upweight.operators import DenseOperator
from upweight.operators.leading import leading_inverse
from upweight.operators.linear import LinearHessian
from upweight.solvers import CG, Approximate, Cholesky, Dual, Plain, TwoLevel

TIGHT = {"tol": 1e-12, "max_iter": 50_000}


def numbers(draw, X, outputs=1):
    y = X @ draw.normal(size=(X.shape[1], outputs)) / X.shape[1] ** 0.5 + draw.normal(size=(len(X), outputs))
    return y[:, 0] if outputs == 1 else y


def classes(draw, X, K):
    return (X @ draw.normal(size=(X.shape[1], K)) / X.shape[1] ** 0.5 + draw.normal(size=(len(X), K))).argmax(1)


MODELS = {
    "logistic": (lambda: LogisticRegression(C=0.4, **TIGHT), lambda draw, X: classes(draw, X, 2)),
    "logistic through 0": (
        lambda: LogisticRegression(C=0.4, fit_intercept=False, **TIGHT),
        lambda draw, X: classes(draw, X, 2),
    ),
    "softmax": (lambda: LogisticRegression(C=0.4, **TIGHT), lambda draw, X: classes(draw, X, 4)),
    "softmax through 0": (
        lambda: LogisticRegression(C=0.4, fit_intercept=False, **TIGHT),
        lambda draw, X: classes(draw, X, 3),
    ),
    "ridge": (lambda: Ridge(alpha=2.0), numbers),
    "ridge of two": (lambda: Ridge(alpha=np.array([0.5, 3.0])), lambda draw, X: numbers(draw, X, 2)),
    "ridge classifier": (lambda: RidgeClassifier(alpha=1.0), lambda draw, X: classes(draw, X, 3)),
}
SHAPES = {"tall": (90, 6), "wide": (25, 40)}
SOLVERS = {
    "Cholesky": Cholesky(),
    "Dual": Dual(),
    "CG": CG(rtol=1e-10, max_sweeps=5000, preconditioner=Plain()),
    "CG, Approximate": CG(rtol=1e-10, preconditioner=Approximate()),
    "CG, TwoLevel": CG(rtol=1e-10, preconditioner=TwoLevel(rows=20)),
}


@pytest.fixture(
    scope="module", params=[(m, s, k) for m in MODELS for s in SHAPES for k in ("dense", "sparse")], ids=str
)
def influence(request):
    name, shape, kind = request.param
    n, d = SHAPES[shape]
    draw = np.random.default_rng(3)
    X = draw.normal(size=(n, d)) * (draw.random((n, d)) < 0.5)
    build, targets = MODELS[name]
    y, weights = targets(draw, X), draw.uniform(0.5, 2, size=n)
    data = X if kind == "dense" else scipy.sparse.csr_matrix(X)
    return uw.explain(build().fit(X, y, sample_weight=weights), data, y, sample_weight=weights)


@pytest.fixture(scope="module")
def by_autograd(influence):
    """∇²R by torch's own second derivatives of the loss of one example."""
    objective, examples = influence.objective, influence.examples
    X = examples.x.toarray() if scipy.sparse.issparse(examples.x) else np.asarray(examples.x)
    X, y = torch.from_numpy(X), torch.as_tensor(np.asarray(examples.y))
    weights = torch.from_numpy(examples.weights)

    def risk(theta):
        params = objective.unravel(theta)
        losses = torch.stack([objective.loss(params, (X[i], y[i])) for i in range(len(X))])
        return (weights * losses).mean() + (0.0 if objective.penalty is None else objective.penalty(params))

    return torch.autograd.functional.hessian(risk, objective.theta)


def sides(influence, k=3):
    return torch.randn(k, influence.objective.size, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def test_the_matrix_and_the_products_are_the_hessian_by_autograd(influence, by_autograd):
    operator, expected = influence.operator, by_autograd
    assert isinstance(operator, LinearHessian)
    V = sides(influence)
    torch.testing.assert_close(operator.matrix(), expected, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(operator.apply(V), V @ expected, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(operator.diagonal(), expected.diagonal(), rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(operator.coarse.apply(V), V @ expected, rtol=1e-4, atol=1e-5)
    rows = np.array([3, 8, 8, 20])
    few = sum(operator.apply_rows(V, np.array([row])) for row in rows) / len(rows)
    torch.testing.assert_close(operator.apply_rows(V, rows), few, rtol=1e-10, atol=1e-12)
    every = operator.of_rows(np.arange(influence.n))
    torch.testing.assert_close(every.apply(V), V @ expected, rtol=1e-10, atol=1e-12)


def dots(operator, V, rows=None):
    sweep, function = operator.dots(V)
    return torch.from_numpy(sweep.emit(function, rows=rows))


def test_dots_of_rows_are_those_by_autograd_whether_or_not_their_product_was_just_made(influence):
    operator, objective, V = influence.operator, influence.objective, sides(influence)
    dense = influence.examples.x.toarray() if scipy.sparse.issparse(influence.examples.x) else influence.examples.x
    rows = zip(torch.from_numpy(np.array(dense)), torch.as_tensor(np.array(influence.examples.y)), strict=True)
    G = torch.stack(
        [torch.func.grad(lambda t, r=r: objective.loss(objective.unravel(t), r))(objective.theta) for r in rows]
    )
    torch.testing.assert_close(dots(operator, V), G @ V.T, rtol=1e-10, atol=1e-12)
    operator.apply(V)
    some = np.array([7, 3, 3])
    torch.testing.assert_close(dots(operator, V), G @ V.T, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(dots(operator, V, some), G[some] @ V.T, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(dots(operator, 2 * V), 2 * G @ V.T, rtol=1e-10, atol=1e-12)
    operator.apply(V[:1])
    torch.testing.assert_close(dots(operator, V), G @ V.T, rtol=1e-10, atol=1e-12)


def test_dots_are_right_when_a_batch_of_the_product_did_not_fit(influence, monkeypatch):
    operator, V, curved = influence.operator, sides(influence), linear.curved
    monkeypatch.setattr("upweight.operators.linear._CHUNK_ROWS", (8, 8))
    expected = dots(operator, V)
    failures = iter([True])

    def tight(h, Z):
        if next(failures, False):
            raise MemoryError
        return curved(h, Z)

    monkeypatch.setattr(linear, "curved", tight)
    operator.apply(V)
    torch.testing.assert_close(dots(operator, V), expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("columns", [1, 2, 10, 64, 65])
def test_products_with_few_columns_are_products(columns):
    draw = torch.Generator().manual_seed(0)
    X, A = (torch.randn(*shape, generator=draw, dtype=torch.float64) for shape in ((7, 300), (300, columns)))
    torch.testing.assert_close(linear.times(X, A), torch.einsum("bd,dk->bk", X, A), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("damping", [0.0, 0.2])
@pytest.mark.parametrize("name", SOLVERS)
def test_every_solver_gives_the_dense_answer(influence, by_autograd, name, damping):
    operator = influence.operator
    P = operator.project(torch.eye(operator.size, dtype=torch.float64))
    A = P @ by_autograd @ P + damping * P
    V = sides(influence)
    solution = SOLVERS[name].prepare(operator, damping).solve(V)
    expected = operator.project(torch.linalg.lstsq(A, operator.project(V).T, driver="gelsd").solution.T)
    assert solution.converged
    assert float((solution.x - expected).norm() / expected.norm()) < 1e-7


@pytest.mark.parametrize("name", ["Cholesky", "Dual"])
def test_forms_are_those_of_the_solutions(influence, name):
    prepared = SOLVERS[name].prepare(influence.operator, 0.1)
    V = influence.operator.project(sides(influence, 5))
    torch.testing.assert_close(prepared.forms(V), (prepared.solve(V).x * V).sum(1), rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("name", ["Dual", "Cholesky"])
def test_the_smallest_curvature_is_that_of_the_matrix(influence, name):
    operator = influence.operator
    eye = torch.eye(operator.size, dtype=torch.float64)
    smallest = float(torch.linalg.eigvalsh(operator.matrix() + 1e3 * (eye - operator.project(eye)))[0])
    assert SOLVERS[name].prepare(operator, 0.3).solve(sides(influence)).min_curvature == pytest.approx(
        smallest, rel=1e-2
    )


def test_a_preconditioner_shortens_the_way_and_changes_no_answer():
    draw = np.random.default_rng(0)
    X = draw.normal(size=(3000, 30)) * np.geomspace(0.03, 3, 30)
    y = classes(draw, X / X.std(0), 5)
    model = LogisticRegression(C=100 / 3000, **TIGHT).fit(X, y)
    on = (X[:4] + 0.1, y[:4])
    plain, approximate, two = (
        uw.explain(model, X, y, solver=CG(rtol=1e-8, preconditioner=p)).on_loss(*on)
        for p in (Plain(), Approximate(), TwoLevel(rows=500))
    )
    exact = uw.explain(model, X, y, solver=Cholesky()).on_loss(*on)
    assert two.certificate.sweeps < approximate.certificate.sweeps < plain.certificate.sweeps
    for scores in (plain, approximate, two):
        assert scores.certificate.residual.max() <= 1e-8
        np.testing.assert_allclose(scores.values, exact.values, rtol=1e-5, atol=1e-7 * np.abs(exact.values).max())


def test_float32_products_are_refined_below_their_own_precision():
    """The promise is far below float32; only true residuals in float64 can keep it."""
    draw = np.random.default_rng(0)
    X = draw.normal(size=(2000, 20))
    y = classes(draw, X, 2)
    model = LogisticRegression(C=0.01, **TIGHT).fit(X, y)
    influence = uw.explain(model, X, y, solver=CG(rtol=1e-13, preconditioner=Approximate()))
    solution = influence.prepared.solve(sides(influence))
    A = influence.operator.matrix()
    V = sides(influence)
    assert float(((V - solution.x @ A).norm(dim=1) / V.norm(dim=1)).max()) <= 1.1e-13


def test_dual_refuses_what_it_cannot_divide_by():
    draw = np.random.default_rng(0)
    X = draw.normal(size=(30, 4))
    free = uw.explain(LinearRegression().fit(X, X[:, 0]), X, X[:, 0], solver=Dual())
    with pytest.raises(NotPositiveDefinite, match=r"smallest is 0 .*damping=1e-6"):
        free.on_loss(X[:1], X[:1, 0])
    with pytest.raises(UnsupportedModel, match="DenseOperator"):
        Dual().prepare(DenseOperator(torch.eye(3, dtype=torch.float64)))


def test_preconditioners_refuse_other_curvatures():
    for preconditioner in (Approximate(), TwoLevel()):
        with pytest.raises(UnsupportedModel, match="DenseOperator"):
            CG(preconditioner=preconditioner).prepare(DenseOperator(torch.eye(3, dtype=torch.float64)))
    config.update("jaxtyping_disable", True)
    try:
        with pytest.raises(uw.errors.InvalidInput, match="preconditioner='kronecker'"):
            CG(preconditioner="kronecker")
    finally:
        config.update("jaxtyping_disable", False)
    with pytest.raises(uw.errors.InvalidInput, match="between 0 and 1"):
        TwoLevel(rtol=2.0)


@pytest.mark.parametrize("folded", [False, True])
def test_scores_through_the_rows_are_those_through_the_parameters(influence, folded):
    draw = np.random.default_rng(9)
    Xq = draw.normal(size=(6, influence.objective.linear.n_features))
    classes = influence.objective.linear.loss.name in ("logistic", "cross_entropy")
    yq = torch.as_tensor(np.asarray(influence.examples.y))[:6]
    on = uw.Examples(Xq, yq if classes else yq.double())
    settings = {"objective": replace(influence.objective, penalty_per_example=folded), "examples": influence.examples}
    rows, parameters = (uw.Influence(**settings, solver=solver) for solver in (Dual(), Cholesky()))
    for ask in (lambda inf: inf.on_loss(on), lambda inf: inf.of_self(), lambda inf: inf.of_self([4, 1])):
        ours, theirs = ask(rows), ask(parameters)
        np.testing.assert_allclose(ours.values, theirs.values, rtol=1e-8, atol=1e-10 * np.abs(theirs.values).max())
        np.testing.assert_allclose(ours.certificate.drift, theirs.certificate.drift, rtol=1e-4, atol=1e-9)
        assert ours.certificate.residual.shape == theirs.certificate.residual.shape


def test_rows_of_negative_curvature_leave_a_preconditioner_that_works():
    draw = np.random.default_rng(1)
    X, y = draw.normal(size=(60, 8)), draw.gamma(0.3, 1, 60) + 0.01
    model = TweedieRegressor(power=3, link="log", alpha=1.0, tol=1e-10, max_iter=10_000).fit(X, y)
    on = (X[:3], y[:3])
    exact = uw.explain(model, X, y, solver=Cholesky())
    two = uw.explain(model, X, y, solver=CG(rtol=1e-9, preconditioner=TwoLevel(rows=20))).on_loss(*on)
    np.testing.assert_allclose(two.values, exact.on_loss(*on).values, rtol=1e-6, atol=1e-12)
    upside_down = LinearHessian(exact.operator.sweep, curvatures=-1e6 * exact.operator.curvatures.abs())
    assert leading_inverse(upside_down, 0.0, 8) is None
    TwoLevel(rows=20).prepare(upside_down, 0.0)  # falls back, and raises nothing
