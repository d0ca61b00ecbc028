"""The statistician's set: names, laws, what is NaN, what is refused, and the picture."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import scipy.sparse
import torch
from sklearn.datasets import load_iris
from sklearn.kernel_ridge import KernelRidge
from sklearn.linear_model import Lasso, LinearRegression, LogisticRegression, Ridge
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import OneHotEncoder, StandardScaler

import upweight as uw
from tolerances import EXACT
from upweight import diagnostics

RNG = np.random.default_rng(3)
X = RNG.normal(size=(40, 3))
Y = X @ [1.0, -2.0, 0.5] + RNG.normal(size=40)
W = RNG.uniform(0.5, 2, 40)


def frame_of(model, X=X, y=Y, fit_weights=None, **settings):
    return uw.explain(
        model.fit(X, y, sample_weight=fit_weights), X, y, sample_weight=fit_weights, **settings
    ).summary_frame()


def same(left, right, tolerance=EXACT):
    left, right = np.asarray(left), np.asarray(right)
    assert np.array_equal(np.isnan(left), np.isnan(right))
    assert np.nanmax(np.abs(left - right)) <= tolerance * np.nanmax(np.abs(right))


# ---- names -----------------------------------------------------------------------------------------


def test_columns_and_index():
    frame = frame_of(Ridge())
    assert list(frame.columns) == [
        "leverage",
        "cooks_distance",
        "dffits",
        "studentized_residual",
        "dfbetas_x0",
        "dfbetas_x1",
        "dfbetas_x2",
        "dfbetas_intercept",
        "loo_residual",
    ]
    assert list(frame.index) == list(range(40))
    assert frame.dtypes.unique().tolist() == [np.dtype("float64")]


def test_names_come_from_the_estimator_or_through_the_pipeline():
    data = pd.DataFrame(X, columns=["a", "b", "c"])
    assert list(frame_of(LinearRegression(fit_intercept=False), data).columns[4:-1]) == [f"dfbetas_{c}" for c in "abc"]
    piped = make_pipeline(StandardScaler(), Ridge()).fit(data, Y)
    assert diagnostics.parameter_names(uw.explain(piped, data, Y)) == ["a", "b", "c", "intercept"]
    colours = pd.DataFrame({"colour": np.array(["red", "blue"])[np.arange(40) % 2]})
    encoded = make_pipeline(OneHotEncoder(), Ridge()).fit(colours, Y)
    assert diagnostics.parameter_names(uw.explain(encoded, colours, Y))[:2] == ["colour_blue", "colour_red"]


def test_names_that_are_not_unique_fall_back_to_numbers():
    data = pd.DataFrame(X, columns=["a", "b", "intercept"])
    assert diagnostics.parameter_names(uw.explain(Ridge().fit(data, Y), data, Y)) == ["x0", "x1", "x2", "intercept"]


def test_an_active_set_keeps_the_names_of_its_columns_and_kernels_have_none():
    data = pd.DataFrame(X, columns=["a", "b", "c"])
    lasso = Lasso(alpha=0.6, tol=1e-12).fit(data, Y)
    assert (lasso.coef_ != 0).tolist() == [True, True, False]
    assert diagnostics.parameter_names(uw.explain(lasso, data, Y)) == ["a", "b", "intercept"]
    second = Lasso(alpha=2.2, tol=1e-12).fit(X, Y)
    assert second.coef_.nonzero()[0].tolist() == [1]
    frame = uw.explain(second, X, Y).summary_frame()
    assert list(frame.columns[4:-1]) == ["dfbetas_x1", "dfbetas_intercept"]
    refit = Lasso(alpha=2.2, tol=1e-12).fit(X[1:], Y[1:])
    assert frame.loc[0, "loo_residual"] == pytest.approx(Y[0] - refit.predict(X[:1])[0], rel=1e-8)
    kernel = uw.explain(KernelRidge(alpha=1.0, kernel="rbf").fit(X, Y), X, Y)
    assert {name.rstrip("0123456789") for name in diagnostics.parameter_names(kernel)} == {"kernel"}


# ---- laws ------------------------------------------------------------------------------------------

MODELS = [
    (LinearRegression(), Y),
    (Ridge(alpha=3.0), Y),
    (LogisticRegression(tol=1e-12, solver="newton-cholesky"), Y > 0),
]


@pytest.mark.parametrize(("model", "y"), MODELS, ids=["ols", "ridge", "logistic"])
def test_the_way_it_is_computed_changes_nothing(model, y):
    frame = frame_of(model, y=y, fit_weights=W)
    same(frame_of(model, y=y, fit_weights=W, batch_size=7), frame)
    same(frame_of(model, y=y, fit_weights=W, solver=uw.solvers.CG(rtol=1e-12)), frame, 1e-8)
    same(frame_of(model, y=y, fit_weights=W, curvature=uw.operators.GaussNewton()), frame)
    order = np.random.default_rng(0).permutation(40)
    same(frame_of(model, X[order], y[order], W[order]), frame.iloc[order], 1e-8)


@pytest.mark.parametrize("penalty_per_example", [False, True])
def test_sparse_is_dense(penalty_per_example):
    some = np.where(np.abs(X) > 0.7, X, 0)
    model = Ridge(alpha=2.0, solver="sparse_cg", tol=1e-14).fit(some, Y)
    dense = uw.explain(model, some, Y, penalty_per_example=penalty_per_example)
    sparse = uw.explain(model, scipy.sparse.csr_matrix(some), Y, penalty_per_example=penalty_per_example)
    same(sparse.summary_frame(), dense.summary_frame())
    same(diagnostics.ij_standard_errors(sparse), diagnostics.ij_standard_errors(dense))


def test_units_of_the_features_do_not_matter_without_a_penalty():
    same(frame_of(LinearRegression(), X * [100.0, 1.0, 0.1]), frame_of(LinearRegression()), 1e-8)


def test_the_scale_of_the_weights_does_not_matter_to_a_variance_that_is_estimated():
    same(frame_of(LinearRegression(), fit_weights=7 * W), frame_of(LinearRegression(), fit_weights=W))


def test_a_row_of_weight_zero_is_a_row_that_is_not_there():
    w = np.where(np.arange(40) == 5, 0.0, W)
    with_it, keep = frame_of(Ridge(), fit_weights=w), np.arange(40) != 5
    same(with_it[keep], frame_of(Ridge(), X[keep], Y[keep], w[keep]))
    assert with_it.loc[5].drop("loo_residual").eq(0).all()
    model = Ridge().fit(X[keep], Y[keep], sample_weight=w[keep])
    assert with_it.loc[5, "loo_residual"] == pytest.approx(Y[5] - model.predict(X[5:6])[0])


def test_leverages_are_shares_of_the_effective_parameters():
    inside = [diagnostics.leverage(uw.explain(Ridge(alpha=a).fit(X, Y), X, Y)) for a in (1e-9, 1.0, 1e9)]
    assert [round(h.sum(), 3) for h in (inside[0], inside[2])] == [4.0, 1.0]
    assert 1 < inside[1].sum() < 4
    assert all((h > 0).all() and (h < 1).all() for h in inside)


@pytest.mark.parametrize("folded", [False, True])
def test_standard_errors_are_those_of_on_params_for_any_model(folded):
    module = torch.nn.Linear(3, 2).double()
    with torch.no_grad():
        module.weight.zero_()
    target = np.column_stack([Y, -Y])
    influence = uw.explain(
        module, X, target, loss=torch.nn.functional.mse_loss, penalty=0.1, sample_weight=W, penalty_per_example=folded
    )
    psi = influence.on_params()
    same(diagnostics.ij_standard_errors(influence), np.sqrt(((W[:, None] * psi / 40) ** 2).sum(0)))


def test_nothing_of_size_n_by_n_and_no_loop_over_rows():
    rows = np.random.default_rng(0).normal(size=(20_000, 20))
    target = rows.sum(1) + np.random.default_rng(1).normal(size=20_000)
    assert frame_of(LinearRegression(), rows, target).shape == (20_000, 26)


# ---- what does not exist ---------------------------------------------------------------------------


def test_a_row_that_determines_a_parameter_alone_is_nan_and_named():
    alone = np.column_stack([X, np.arange(40) == 11])
    model = LinearRegression().fit(alone, Y)
    with pytest.warns(uw.errors.TheoryWarning, match=r"1 rows \(first: \[11\]\) have leverage 1"):
        frame = uw.explain(model, alone, Y).summary_frame()
    assert frame.loc[11, "leverage"] == pytest.approx(1)
    assert frame.loc[11].drop("leverage").isna().all()
    others = np.arange(40) != 11
    same(
        frame.loc[others, "studentized_residual"],
        frame_of(LinearRegression(), X[others], Y[others])["studentized_residual"],
    )
    assert np.isfinite(frame[others]).all(axis=None)


def test_no_degree_of_freedom_left_is_nan_and_never_infinite():
    frame = frame_of(LinearRegression(), X[:5], Y[:5])  # n − p = 1: s² exists, s(i)² does not
    assert frame["cooks_distance"].notna().all()
    assert frame[["studentized_residual", "dffits"]].isna().all(axis=None)
    assert frame["loo_residual"].notna().all()
    exact = frame_of(LinearRegression(), X, np.round(X @ [1.0, 2.0, 3.0], 12))
    assert not np.isinf(exact).any(axis=None)


def test_a_probability_that_has_underflowed_is_no_infinity():
    far = np.array([[-2000.0], [-1.0], [0.0], [0.5], [1.0], [2.0], [3.0], [1e4]])
    y = np.array([0.0, 0, 1, 0, 1, 0, 1, 1])
    objective = uw.Objective(
        lambda params, example: uw.losses.logistic(params["coef"] @ example[0], example[1]),
        {"coef": torch.ones(1, 1, dtype=torch.float64)},
        linear=uw.Linear(uw.losses.logistic, 1, 1, False),
    )
    right = uw.Influence(objective, (far, y)).summary_frame()
    assert right.loc[[0, 7], ["leverage", "dffits", "studentized_residual"]].eq(0).all(axis=None)
    wrong = uw.Influence(objective, (far, 1 - y)).summary_frame()
    assert not np.isinf(wrong).any(axis=None)
    assert wrong.loc[[0, 7], "studentized_residual"].isna().all()


@pytest.mark.parametrize(
    ("model", "settings", "text"),
    [
        (LinearRegression(), {"damping": 0.1}, r"damping=0.1 is no part of the fit.*Leave damping=None"),
        (LinearRegression(), {"curvature": uw.operators.EmpiricalFisher()}, "not its Hessian. Leave curvature=None"),
        (LinearRegression(), {"solver": uw.solvers.LiSSA()}, "need exact solutions"),
    ],
)
@pytest.mark.parametrize("question", [diagnostics.summary_frame, diagnostics.leverage])
def test_what_is_not_exact_is_refused(model, settings, text, question):
    influence = uw.explain(model.fit(X, Y), X, Y, **settings)
    with pytest.raises(uw.errors.UnsupportedModel, match=text):
        question(influence)


def test_more_than_one_output_is_refused():
    data = load_iris()
    model = LogisticRegression(tol=1e-10, max_iter=5000).fit(data.data, data.target)
    with pytest.raises(uw.errors.UnsupportedModel, match=r"3 outputs .* one model per output"):
        uw.explain(model, data.data, data.target).summary_frame()
    with pytest.raises(uw.errors.UnsupportedModel, match="2 outputs"):
        frame_of(LinearRegression(), X, np.column_stack([Y, Y]))


def test_a_module_is_refused_with_what_to_do_instead():
    module = torch.nn.Linear(3, 1).double()
    influence = uw.explain(module, X, Y[:, None], loss=torch.nn.functional.mse_loss)
    with pytest.raises(uw.errors.UnsupportedModel, match=r"Use of_self\(\) for its self-influence, leave"):
        influence.summary_frame()


def test_a_loss_without_a_likelihood_has_a_leverage_and_no_frame():
    loss = uw.losses.huber(1.0)
    theta = torch.tensor(np.linalg.lstsq(X, Y, rcond=None)[0])
    objective = uw.Objective(
        lambda params, example: loss(params["coef"] @ example[0], example[1]),
        {"coef": theta[None]},
        linear=uw.Linear(loss, 1, 3, False),
    )
    influence = uw.Influence(objective, (X, Y))
    assert diagnostics.leverage(influence).sum() == pytest.approx(3)
    with pytest.raises(uw.errors.UnsupportedModel, match=r"huber\(1\) .* no likelihood"):
        influence.summary_frame()


# ---- the picture -----------------------------------------------------------------------------------


def test_the_contours_are_where_cooks_distance_says():
    """A dot whose Cook's distance is D lies on the contour of D, with external and with internal residuals."""
    for model, y in (MODELS[0], MODELS[2]):
        frame = frame_of(model, y=y)
        row = int(frame["cooks_distance"].argmax())
        distance = float(frame["cooks_distance"][row])
        axes = uw.plots.leverage_residual(frame, cooks=(distance,), labels=1)
        upper, lower, _ = axes.lines
        at = np.interp(frame["leverage"][row], upper.get_xdata(), upper.get_ydata())
        assert at == pytest.approx(abs(frame["studentized_residual"][row]), rel=1e-2)
        assert np.array_equal(lower.get_ydata(), -upper.get_ydata())
        assert [text.get_text() for text in axes.texts] == [str(row)]
        assert len(axes.collections[0].get_offsets()) == 40


def test_the_picture_leaves_out_rows_without_a_residual_and_says_what_is_missing():
    frame = frame_of(LinearRegression())
    frame.loc[4, "studentized_residual"] = np.nan
    assert len(uw.plots.leverage_residual(frame, labels=99).collections[0].get_offsets()) == 39
    with pytest.raises(uw.errors.InvalidInput, match="no column cooks_distance"):
        uw.plots.leverage_residual(frame.drop(columns="cooks_distance"))
