"""What is said to type by upweight/influence, typed."""

from __future__ import annotations

import shutil
from functools import cache

import numpy as np
import pandas as pd
import pytest
import torch
from jaxtyping import config
from numpy.testing import assert_allclose
from safetensors.numpy import save_file
from sklearn.linear_model import LinearRegression, LogisticRegression, Ridge, TweedieRegressor
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import nn
from torch.nn.functional import mse_loss

import upweight as uw
from ranks import work
from refusals import refused, warned
from small import XQ, YQ, ZQ, D, N, X, Y, Z, classifier, net, ridge
from upweight.errors import NotPositiveDefinite
from upweight.influence import baselines, diagnostics, index as index_module, indexing, shards
from upweight.operators import EKFAC, EmpiricalFisher, GaussNewton, Hessian, Nystroem
from upweight.runs.files import read_tensors, write_tensors
from upweight.solvers import CG, Cholesky, LiSSA

ON = (XQ, ZQ)
TWICE = np.c_[X, X[:, 0]]
TWICE_Q = np.c_[XQ, XQ[:, 0]]
APART = TWICE_Q + np.eye(4)[3]
ALONE = np.c_[X[:12, 0], np.r_[np.zeros(11), 1]]  # row 11 alone has the second feature
PAIR = (ALONE[:2], Z[:2])
TINY = 1e-9 * np.random.default_rng(3).normal(size=12)
NEARLY = np.c_[X[:12, 0], X[:12, 0] + TINY + (np.arange(12) == 11)]  # row 11 alone tells the second from the first


@pytest.fixture
def _annotations_unchecked():
    """Outside the tests nothing checks them before the library does."""
    config.update("jaxtyping_disable", True)
    yield
    config.update("jaxtyping_disable", False)


@cache
def linear(kind="twice"):
    """Unpenalised least squares; shared, so never to be changed."""
    rows, targets = {"plain": (X, Z), "twice": (TWICE, Z), "alone": (ALONE, Z[:12]), "nearly": (NEARLY, Z[:12])}[kind]
    return uw.explain(LinearRegression().fit(rows, targets), rows, targets)


def after(model, rows, targets, on, *, without):
    """What really happens to squared errors when rows are left out."""
    kept = np.setdiff1d(np.arange(len(rows)), without)
    again = type(model)(**model.get_params()).fit(rows[kept], targets[kept])
    return (again.predict(on[0]) - on[1]) ** 2 - (model.predict(on[0]) - on[1]) ** 2


def layer(weight, bias):
    """A linear layer with these parameters."""
    model = nn.Linear(D, 1).double().requires_grad_(False)
    model.weight[:], model.bias[:] = torch.as_tensor(weight), torch.as_tensor(bias)
    return model.requires_grad_()


# ---- baselines -------------------------------------------------------------------------------------------------------


def nearest(model, embed):
    return baselines.nearest_neighbours(classifier(), X[:3], Y[:3], embed=embed).values


def test_an_embedding_that_wants_another_precision():
    model = net(dtype=torch.float32)
    with refused(
        "embed failed on a batch of ", "It is called with a batch of inputs as they were given; cast them inside"
    ):
        nearest(model, model[:-1])
    values = nearest(model, embed=lambda x: model[:-1](x.float()))
    hidden = torch.tanh(model[0](torch.as_tensor(X).float())).detach().double()
    near = torch.cdist(hidden[:3], hidden, compute_mode="donot_use_mm_for_euclid_dist").square().numpy()
    sign = np.where(Y[:3, None] == Y, 1, -1)
    assert_allclose(values, sign / (1 + near / near.mean(1, keepdims=True)), atol=1e-6)


def test_an_embedding_that_returns_a_number():
    model = net()
    with refused("embed returned ", "pass a function such as embed=model[:-1]"):
        nearest(model, lambda x: model(x).sum())
    values = nearest(model, embed=model[:-1])
    assert np.abs(values).argmax(1).tolist() == [0, 1, 2]  # each query is a row


# ---- damping_path ----------------------------------------------------------------------------------------------------


def test_a_damping_that_is_not_on_the_path():
    path = ridge().damping_path(*ON, dampings=[0.1, 1.0])
    with refused("is not on this path; its dampings are ", "Take one of path.dampings"):
        path.scores(0.5)
    assert_allclose(path.scores(path.dampings[0]).values, ridge(damping=0.1).on_loss(*ON).values, rtol=1e-8)


def test_a_path_of_no_dampings():
    with refused("dampings is empty", "Pass some λ > 0, such as numpy.geomspace(1e-4, 1, 9), or None"):
        ridge().damping_path(*ON, dampings=[])
    path = ridge().damping_path(*ON, dampings=np.geomspace(1e-4, 1, 9))
    assert_allclose(path.values[-1], ridge(damping=1.0).on_loss(*ON).values, rtol=1e-8)
    assert len(ridge().damping_path(*ON, dampings=None).dampings) == 9


# ---- defaults --------------------------------------------------------------------------------------------------------


def test_a_loss_that_bends_down_has_no_curvature_to_choose_a_damping_by():
    settings = {"loss": lambda f, y: -((f - y) ** 2).mean(), "curvature": GaussNewton()}
    influence = uw.explain(net(1), X, Z[:, None], **settings)
    with refused("so there is no curvature of the data to choose a damping by", "Name the damping: "):
        influence.on_loss(XQ, ZQ[:, None])
    damping = influence.check().suggested_damping
    typed = uw.explain(net(1), X, Z[:, None], damping=damping, **settings)
    assert float(torch.linalg.eigvalsh(typed.operator.matrix())[0]) + damping > 0
    assert typed.on_loss(XQ, ZQ[:, None]).certificate.converged


def test_rows_that_are_fitted_exactly_have_none_either():
    model = net(1)
    targets = model(torch.as_tensor(X)).detach()
    settings = {"loss": mse_loss, "curvature": EmpiricalFisher()}
    with refused("so there is no curvature of the data to choose a damping by", "Name the damping: "):
        uw.explain(model, X, targets, **settings).on_loss(XQ, ZQ[:, None])
    values = uw.explain(model, X, targets, damping=0.1, **settings).on_loss(XQ, ZQ[:, None]).values
    assert not values.any()  # no row has a gradient


# ---- deletion --------------------------------------------------------------------------------------------------------


def test_diagnostics_of_estimates():
    with refused("These diagnostics need exact solutions, and ", "Use solver=Cholesky() or CG(), or leave solver=None"):
        ridge(solver=LiSSA()).summary_frame()
    exact = ridge(solver=Cholesky()).summary_frame()
    pd.testing.assert_frame_equal(ridge(solver=CG()).summary_frame(), exact, rtol=1e-4)
    pd.testing.assert_frame_equal(ridge(solver=None).summary_frame(), exact, rtol=1e-8)


def test_diagnostics_of_features_that_nearly_repeat():
    near = np.c_[X, X[:, 0] + 1e-5 * np.random.default_rng(3).normal(size=N)]
    with refused("C is too badly conditioned (smallest curvature ", "Drop collinear features, standardise them "):
        uw.explain(LinearRegression().fit(near, Z), near, Z).summary_frame()
    dropped = near[:, :3]
    frame = uw.explain(LinearRegression().fit(dropped, Z), dropped, Z).summary_frame()
    assert frame.leverage.sum() == pytest.approx(D + 1)
    penalised = uw.explain(Ridge(1e-3).fit(near, Z), near, Z).summary_frame()
    assert_allclose(penalised.leverage, frame.leverage, rtol=1e-3)


def test_diagnostics_of_features_in_other_units():
    far, ridge_of = np.c_[X[:, :2], 3e10 * (X[:, 0] + X[:, 2])], Ridge(1.0, solver="svd")
    with refused("C is too badly conditioned (smallest curvature ", "Drop collinear features, standardise them "):
        uw.explain(ridge_of.fit(far, Z), far, Z).summary_frame()
    frame = uw.explain(make_pipeline(StandardScaler(), Ridge(1.0)).fit(far, Z), far, Z).summary_frame()
    same = np.c_[X[:, :2], X[:, 0] + X[:, 2]]
    expected = uw.explain(make_pipeline(StandardScaler(), Ridge(1.0)).fit(same, Z), same, Z).summary_frame()
    pd.testing.assert_frame_equal(frame, expected, rtol=1e-8)


# ---- diagnostics -----------------------------------------------------------------------------------------------------


def test_diagnostics_of_a_network():
    fit = LinearRegression().fit(X, Z)
    influence = uw.explain(layer(fit.coef_, fit.intercept_), X, Z[:, None], loss=mse_loss, damping=0.0)
    with refused("has no linear predictor", "Use of_self() for its self-influence, leave_one_out to retrain"):
        influence.summary_frame()
    assert influence.of_self().values.min() > 0
    actual = uw.leave_one_out(influence, (XQ, ZQ[:, None]), [0, 1]).actual
    expected = [after(fit, X, Z, ON, without=[row]) for row in (0, 1)]
    assert_allclose(actual, np.transpose(expected), atol=1e-5)


def test_diagnostics_of_several_outputs():
    labels = np.digitize(Z, [-1, 1])
    model = LogisticRegression(tol=1e-10, max_iter=5000).fit(X, labels)
    influence = uw.explain(model, X, labels)
    with refused(" outputs and ", "Fit one model per output (one class against the rest), or use of_self() and "):
        influence.summary_frame()
    one = LogisticRegression(tol=1e-10, max_iter=5000).fit(X, labels == 2)
    assert len(uw.explain(one, X, labels == 2).summary_frame()) == N
    assert influence.of_self().values.min() > 0
    values = influence.of_removing([0], on=(X[:1], labels[:1])).values  # leverage corrected: more than first order
    assert values[0, 0] > influence.of_self([0]).values[0]


def test_diagnostics_of_another_curvature():
    with refused(" is not its Hessian", "Leave curvature=None"):
        ridge(curvature=EmpiricalFisher()).summary_frame()
    frame = ridge(curvature=None).summary_frame()
    assert_allclose(frame.leverage, diagnostics.leverage(ridge(curvature=Hessian())), rtol=1e-10)


def test_diagnostics_of_a_damped_curvature():
    with refused(" is no part of the fit", "Leave damping=None; columns that repeat or add up to "):
        uw.explain(LinearRegression().fit(TWICE, Z), TWICE, Z, damping=0.1).summary_frame()
    leverage = diagnostics.leverage(uw.explain(LinearRegression().fit(TWICE, Z), TWICE, Z, damping=None))
    assert_allclose(leverage, linear("plain").summary_frame().leverage, rtol=1e-8)


def test_residuals_of_a_loss_that_is_no_likelihood():
    loss = uw.losses.huber(1.0)
    objective = uw.Objective(
        lambda params, example: loss(params["coef"] @ example[0], example[1]),
        {"coef": torch.as_tensor(np.linalg.lstsq(X, Z, rcond=None)[0])[None]},
        linear=uw.Linear(loss, 1, D, False),
    )
    influence = uw.Influence(objective, (X, Z))
    with refused(
        "is no likelihood of a generalised linear model", "leverage(), ij_standard_errors() and of_removing() "
    ):
        influence.summary_frame()
    assert diagnostics.leverage(influence).sum() == pytest.approx(D)
    assert (diagnostics.ij_standard_errors(influence) > 0).all()
    assert np.isfinite(influence.of_removing([0, 1], on=ON).values).all()


def test_coefficients_of_columns_that_repeat():
    with warned("so the data determine predictions ", "Drop a column, or fit with a penalty"):
        frame = linear("twice").summary_frame()
    assert frame[["dfbetas_x0", "dfbetas_x3"]].isna().all(axis=None)
    dropped = linear("plain").summary_frame()
    assert_allclose(frame["dfbetas_x1"], dropped["dfbetas_x1"], rtol=1e-8)
    assert np.isfinite(dropped).all(axis=None)
    assert np.isfinite(uw.explain(Ridge(0.1).fit(TWICE, Z), TWICE, Z).summary_frame()).all(axis=None)


def test_the_only_row_that_has_a_feature():
    with warned("their columns are NaN", "Leave them out, or "):
        frame = linear("alone").summary_frame()
    rows = ALONE[:11]
    with warned("so the data determine predictions ", "Drop a column, or fit with a penalty"):
        left = uw.explain(LinearRegression().fit(rows, Z[:11]), rows, Z[:11]).summary_frame()
    columns = ["leverage", "dffits", "studentized_residual", "dfbetas_x0", "loo_residual"]
    pd.testing.assert_frame_equal(frame.loc[:10, columns], left[columns], rtol=1e-7)
    assert np.isfinite(uw.explain(Ridge(0.1).fit(ALONE, Z[:12]), ALONE, Z[:12]).summary_frame()).all(axis=None)


def test_rows_where_a_loss_is_not_convex():
    y = np.random.default_rng(0).gamma(0.3, 1, N) + 0.01
    settings = {"power": 3, "link": "log", "alpha": 1.0, "tol": 1e-10, "max_iter": 10_000}
    influence = uw.explain(TweedieRegressor(**settings).fit(X, y), X, y)
    with warned("their columns are NaN", "Leave them out, or "):
        frame = influence.summary_frame()
    concave = np.flatnonzero(frame.cooks_distance.isna())
    assert 0 < len(concave) < N
    values = influence.of_removing(concave[:2], on=(X[:2], y[:2])).values
    actual = uw.leave_one_out(influence, (X[:2], y[:2]), concave[:2]).actual
    assert_allclose(values, actual, rtol=0.15)


# ---- edits -----------------------------------------------------------------------------------------------------------


def test_one_new_example_for_two_rows():
    with refused(" rows are to be replaced by ", "Pass one new example for each row"):
        ridge().of_replacing([0, 1], X[2:3], Z[2:3], on=ON)
    values = ridge().of_replacing([0, 1], X[[2, 2]], Z[[2, 2]], on=ON).values
    one = ridge().of_replacing([1], X[2:3], Z[2:3], on=ON).values
    assert_allclose(values[:, 1:], one, rtol=1e-10)


# ---- groups ----------------------------------------------------------------------------------------------------------


def test_the_newton_step_of_a_network():
    influence = classifier()
    on = (XQ, YQ)
    with refused(
        "of_removing updates the exact Hessian of a linear predictor", "Use on_loss or of_groups (first order)"
    ):
        influence.of_removing([[0, 1]], on=on)
    first = influence.of_groups([[0, 1]], on=on).values[:, 0]
    assert_allclose(first, influence.on_loss(*on).values[:, :2].sum(1), rtol=1e-8)


def test_the_newton_step_of_another_curvature_can_be_retrained_instead():
    influence = ridge(curvature=EmpiricalFisher(), damping=0.1)
    with refused(
        "of_removing updates the exact Hessian of a linear predictor", "Use on_loss or of_groups (first order)"
    ):
        influence.of_removing([[0, 1]], on=ON)
    actual = uw.leave_one_out(influence, ON, [0]).actual[:, 0]
    assert_allclose(actual, after(Ridge(2.0).fit(X, Z), X, Z, ON, without=[0]), rtol=1e-6)
    outcomes = uw.subset_retraining(influence, ON, [range(2, N)])
    expected = after(Ridge(2.0).fit(X, Z), X, Z, ON, without=[0, 1])
    assert_allclose(outcomes.values[:, 0, 0] - outcomes.query_values, expected, rtol=1e-6)


def test_the_newton_step_by_estimates():
    with (
        pytest.warns(uw.errors.TheoryWarning, match="has not settled"),
        refused("of_removing needs exact solutions, and ", "Use Cholesky() or CG()"),
    ):
        ridge(solver=LiSSA(depth=10, repeats=2)).of_removing([0], on=ON)
    expected = after(Ridge(2.0).fit(X, Z), X, Z, ON, without=[0])[:, None]
    assert_allclose(ridge(solver=Cholesky()).of_removing([0], on=ON).values, expected, rtol=1e-8)
    assert_allclose(ridge(solver=CG()).of_removing([0], on=ON).values, expected, rtol=1e-4)


def test_one_removal_of_several_has_no_value():
    on = (NEARLY[:2], Z[:2])
    with warned("have no value and are NaN", "Leave them out, or see to the first: "):
        values = linear("nearly").of_removing([0, 1, 11], on=on).values
    assert np.isnan(values).tolist() == [[False, False, True]] * 2
    assert_allclose(values[:, :2], linear("nearly").of_removing([0, 1], on=on).values, rtol=1e-10)
    model = Ridge(0.1).fit(NEARLY, Z[:12])
    values = uw.explain(model, NEARLY, Z[:12]).of_removing([0, 1, 11], on=on).values
    assert_allclose(values[:, 2], after(model, NEARLY, Z[:12], on, without=[11]), rtol=1e-8)


def test_removing_all_rows_of_a_level_that_a_query_has():
    with refused("fills the gap, and no query has a value", "Ask about queries that have nothing of it, leave some"):
        linear("alone").of_removing([11], on=(ALONE[11:], Z[11:12]))
    on = (ALONE[[0, 11]], Z[[0, 11]])
    with warned("fills the gap; these are NaN", "Ask about queries that have nothing of it, leave some"):
        assert np.isnan(linear("alone").of_removing([11], on=on).values).tolist() == [[False], [True]]
    model = LinearRegression().fit(ALONE, Z[:12])
    values = linear("alone").of_removing([11], on=PAIR).values[:, 0]  # they have nothing of it
    assert_allclose(values, after(model, ALONE, Z[:12], PAIR, without=[11]), atol=1e-12)  # 0: it settled its own alone
    twice, targets = ALONE[[*range(12), 11]], Z[[*range(12), 0]]
    model = LinearRegression().fit(twice, targets)
    values = uw.explain(model, twice, targets).of_removing([11], on=on).values[:, 0]  # row 12 is left in
    assert_allclose(values, after(model, twice, targets, on, without=[11]), rtol=1e-7, atol=1e-12)
    model = Ridge(0.1).fit(ALONE, Z[:12])
    values = uw.explain(model, ALONE, Z[:12]).of_removing([11], on=on).values[:, 0]
    assert_allclose(values, after(model, ALONE, Z[:12], on, without=[11]), rtol=1e-8)


# ---- newton_step -----------------------------------------------------------------------------------------------------


def test_a_share_of_a_penalty_that_is_a_function():
    objective = uw.Objective(
        lambda params, example: uw.losses.squared(params["coef"] @ example[0], example[1]),
        {"coef": torch.zeros(1, D, dtype=torch.float64)},
        penalty=lambda params: 0.1 * (params["coef"] ** 2).sum(),
        penalty_per_example=True,
        linear=uw.Linear(uw.losses.squared, 1, D, False),
    )
    influence = uw.Influence(objective, (X, Z), solver=CG(rtol=1e-10))
    with refused("with penalty_per_example=True needs an L2 penalty", "Use on_loss (first order)"):
        influence.of_removing([0], on=ON)
    same = uw.Influence(uw.Objective(objective.loss, objective.params, penalty=0.2, penalty_per_example=True), (X, Z))
    with pytest.warns(uw.errors.TheoryWarning, match="not at a minimum"):
        expected = same.on_loss(*ON).values
    assert_allclose(influence.on_loss(*ON).values, expected, rtol=1e-8)


def test_a_group_that_leaves_little_curvature():
    rows, targets = np.random.default_rng(0).normal(size=(12, 4)), Z[:12]
    model, on, group = Ridge(1e-7).fit(rows, targets), (rows[:2], targets[:2]), np.arange(10)
    influence = uw.explain(model, rows, targets, penalty_per_example=True)
    with refused("What is left is badly conditioned", "add damping, or "):
        influence.of_removing([group], on=on)
    damped = uw.explain(model, rows, targets, penalty_per_example=True, damping=1e-3).of_removing([group], on=on)
    assert np.isfinite(damped.values).all()
    outcomes = uw.subset_retraining(influence, on, [[10, 11]])
    again = Ridge(1e-7 * 2 / 12).fit(rows[10:], targets[10:])
    assert_allclose(outcomes.values[:, 0, 0], (again.predict(rows[:2]) - targets[:2]) ** 2, rtol=1e-3)


def test_a_removal_after_which_the_fit_is_not_unique():
    on = (NEARLY[:2], Z[:2])
    with refused("Without them the fit is not unique", "Add a penalty or damping, or remove other rows"):
        linear("nearly").of_removing([11], on=on)
    model = Ridge(0.1).fit(NEARLY, Z[:12])
    values = uw.explain(model, NEARLY, Z[:12]).of_removing([11], on=on).values[:, 0]
    assert_allclose(values, after(model, NEARLY, Z[:12], on, without=[11]), rtol=1e-8)
    plain = linear("nearly").objective
    damped = uw.Influence(plain, (NEARLY, Z[:12]), damping=1e-3).of_removing([11], on=on).values
    assert np.isfinite(damped).all()
    others = linear("nearly").of_removing([0], on=on).values[:, 0]
    model = LinearRegression().fit(NEARLY, Z[:12])
    assert_allclose(others, after(model, NEARLY, Z[:12], on, without=[0]), rtol=1e-8)


# ---- parameters ------------------------------------------------------------------------------------------------------


def test_one_change_for_two_rows():
    with refused(", and the inputs of ", "Pass one change of the whole input for each row"):
        ridge().on_params_of_perturbing([0, 1], np.full((1, D), 1e-3))
    moved = ridge().on_params_of_perturbing([0, 1], np.full((2, D), 1e-3))
    expected = ridge().on_params_of_replacing([0, 1], X[:2] + 1e-3, Z[:2])
    assert_allclose(moved, expected, rtol=0.02, atol=1e-5)


# ---- perturbation ----------------------------------------------------------------------------------------------------


def test_columns_that_repeat_are_not_moved_apart():
    with warned(" apart from each other settles coefficients that no row held ", "Drop one and fit again"):
        moved = linear("twice").of_perturbing([3], on=(TWICE_Q, ZQ))
    dropped = linear("plain").of_perturbing([3], on=ON)
    assert np.isfinite(dropped).all()
    assert_allclose(moved[..., [1, 2]], dropped[..., [1, 2]], rtol=1e-7, atol=1e-12)


# ---- scores ----------------------------------------------------------------------------------------------------------


def test_a_finite_change_has_no_derivative():
    scores = ridge().of_removing([0, 1], on=ON)
    with refused(
        "is a finite change, or no change of one weight", "Use .values, or influence.on_loss for the derivative"
    ):
        _ = scores.derivative
    assert_allclose(scores.values[:, 0], after(Ridge(2.0).fit(X, Z), X, Z, ON, without=[0]), rtol=1e-8)
    scores = ridge().on_loss(*ON)
    assert_allclose(scores.derivative, -N * scores.values)


def test_the_derivative_of_a_row_without_weight():
    weights = np.ones(N)
    weights[7] = 0
    model = Ridge(2.0).fit(X, Z, sample_weight=weights)
    influence = uw.explain(model, X, Z, sample_weight=weights)
    with refused("has sample weight 0", "Use of_adding for its derivative"):
        _ = influence.on_loss(*ON).derivative
    derivative = influence.of_adding(X[7:8], Z[7:8], on=ON).derivative[:, 0]
    weights[7] = 1e-6
    again = Ridge(2.0).fit(X, Z, sample_weight=weights)
    change = (again.predict(XQ) - ZQ) ** 2 - (model.predict(XQ) - ZQ) ** 2
    assert_allclose(derivative, change / (1e-6 / N), rtol=1e-4)


def test_blocks_of_other_rows():
    one, other = ridge().on_loss(*ON), ridge().of_removing([0, 1], on=ON)
    with refused("blocks of scores do not stand for the same rows", "Join those of one question"):
        uw.Scores.joined([one, other])
    first, last = ridge().on_loss(XQ[:1], ZQ[:1]), ridge().on_loss(XQ[1:], ZQ[1:])
    assert_allclose(uw.Scores.joined([first, last]).values, one.values, rtol=1e-10)


def test_a_file_of_other_tensors(tmp_path):
    path = tmp_path / "tensors"
    save_file({"values": np.ones(3)}, path)
    with refused("is a safetensors file without upweight scores in it", "Scores are written by scores.save(path)"):
        uw.Scores.load(path)
    scores = ridge().on_loss(*ON)
    scores.save(path)
    assert np.array_equal(uw.Scores.load(path).values, scores.values)


def test_a_file_without_leading_rows(tmp_path):
    path = tmp_path / "scores"
    scores = ridge().on_loss(*ON)
    scores.save(path)
    with refused("is a safetensors file without leading rows in it", "scores are read by Scores.load(path)"):
        uw.Leading.load(path)
    assert np.array_equal(uw.Scores.load(path).values, scores.values)
    leading = ridge().leading(*ON, k=2)
    leading.save(path)
    assert str(uw.Leading.load(path)) == str(leading)


def test_more_leading_rows_than_were_kept():
    leading = ridge().leading(*ON, k=2)
    with refused("rows were kept on either side", "or keep more: influence.leading(Xq, yq, k="):
        leading.helpful(5)
    assert np.array_equal(ridge().leading(*ON, k=5).helpful(5).rows, ridge().on_loss(*ON).helpful(5).rows)
    assert leading.harmful(2).rows.shape == (len(XQ), 2)


def test_leading_rows_of_estimates():
    lissa = ridge(solver=LiSSA(depth=20, repeats=5), damping=5.0)
    with refused("leading keeps no standard errors", "Use Cholesky() or CG(); or on_loss, whose standard_error says"):
        lissa.leading(*ON)
    exact = ridge(solver=Cholesky(), damping=5.0)
    assert np.array_equal(exact.leading(*ON).helpful(3).rows, exact.on_loss(*ON).helpful(3).rows)
    assert lissa.on_loss(*ON).standard_error.shape == (len(XQ), N)


def test_no_blocks_of_scores():
    influence = ridge()
    with refused("There are no blocks of scores to reduce", "Pass influence.on_loss_in_blocks(Xq, yq)"):
        uw.extremes([], k=2)
    extremes = uw.extremes(influence.on_loss_in_blocks(XQ, ZQ), k=2)
    assert np.array_equal(extremes.helpful.rows, influence.on_loss(XQ, ZQ).helpful(2).rows)


# ---- system ----------------------------------------------------------------------------------------------------------


def test_queries_that_are_like_no_row():
    influence = linear("twice")
    with refused("combinations that no row has. ", "Ask about examples whose columns go together as they do in the "):
        influence.on_loss(APART, ZQ)
    expected = linear("plain").on_loss(*ON).values  # a column dropped
    assert_allclose(influence.on_loss(TWICE_Q, ZQ).values, expected, rtol=1e-8)
    penalised = uw.explain(Ridge(0.1).fit(TWICE, Z), TWICE, Z)
    assert np.isfinite(penalised.on_loss(APART, ZQ).values).all()


def test_one_query_of_several_is_like_no_row():
    influence = linear("twice")
    mixed = np.r_[TWICE_Q[:3], APART[3:]]
    with warned("combinations that no row has; their values are NaN. ", "Ask about examples whose columns go together"):
        values = influence.on_loss(mixed, ZQ).values
    expected = linear("plain").on_loss(*ON).values
    assert_allclose(values[:3], expected[:3], rtol=1e-8)
    assert_allclose(influence.on_loss(TWICE_Q, ZQ).values, expected, rtol=1e-8)
    penalised = uw.explain(Ridge(0.1).fit(TWICE, Z), TWICE, Z)
    assert np.isfinite(penalised.on_loss(mixed, ZQ).values).all()


def test_a_new_row_that_is_like_no_other():
    influence, new = linear("twice"), APART[:1]
    with warned(
        "which is no small change: their values are NaN", "Train with it instead, or drop a column and fit again"
    ):
        values = influence.of_adding(new, ZQ[:1], on=(TWICE_Q, ZQ)).values
    assert np.isnan(values).all()
    rows, targets = np.r_[TWICE, new], np.r_[Z, ZQ[:1]]
    trained = uw.explain(LinearRegression().fit(rows, targets), rows, targets)
    assert np.isfinite(trained.on_loss(TWICE_Q, ZQ).values).all()
    dropped = linear("plain").of_adding(new[:, :D], ZQ[:1], on=ON).values
    assert np.isfinite(dropped).all()


@pytest.mark.usefixtures("_annotations_unchecked")
def test_a_question_about_inputs_alone():
    with refused("on is ", "Pass the pair on=(Xq, yq), or upweight.Examples"):
        ridge().of_groups([[0, 1]], on=XQ)
    with refused("on is ", "Pass the pair on=(Xq, yq), or upweight.Examples"):
        ridge().of_groups([[0, 1]], on=(XQ, ZQ, None))
    expected = ridge().on_loss(*ON).values[:, :2].sum(1, keepdims=True)
    assert_allclose(ridge().of_groups([[0, 1]], on=(XQ, ZQ)).values, expected, rtol=1e-8)
    assert_allclose(ridge().of_groups([[0, 1]], on=uw.Examples(XQ, ZQ)).values, expected, rtol=1e-8)


def test_queries_without_targets():
    with refused("examples have no y, and the training rows have one", "Pass y too, as in on_loss(X, y) or on=(X, y)"):
        ridge().on_loss(XQ)
    values = ridge().on_loss(XQ, ZQ).values
    assert_allclose(ridge().of_groups([[0]], on=(XQ, ZQ)).values[:, 0], values[:, 0], rtol=1e-10)


def test_a_network_that_is_not_at_a_minimum():
    settings = {"loss": mse_loss, "curvature": Hessian(), "damping": 0.0}
    targets, on = Z[:, None], (XQ, ZQ[:, None])
    with warned("is not at a minimum: ‖∇R‖ = ", "Train further, check that the penalty is the one it was trained with"):
        uw.explain(layer(0.0, 0.0), X, targets, **settings).on_loss(*on)
    fit = LinearRegression().fit(X, Z)
    further = uw.explain(layer(fit.coef_, fit.intercept_), X, targets, **settings).on_loss(*on).values
    assert_allclose(further, linear("plain").on_loss(*ON).values, rtol=1e-8)
    settings["curvature"] = GaussNewton()
    assert np.isfinite(uw.explain(layer(0.0, 0.0), X, targets, **settings).on_loss(*on).values).all()


def test_a_network_that_was_trained_with_another_penalty():
    columns = np.c_[X, np.ones(N)]
    theta = np.linalg.solve(columns.T @ columns * 2 / N + 0.5 * np.eye(D + 1), columns.T @ Z * 2 / N)
    model = layer(theta[:D], theta[D])
    settings = {"loss": mse_loss, "curvature": Hessian()}
    on = (XQ, ZQ[:, None])
    with warned("is not at a minimum: ‖∇R‖ = ", "Train further, check that the penalty is the one it was trained with"):
        uw.explain(model, X, Z[:, None], **settings).on_loss(*on)
    scores = uw.explain(model, X, Z[:, None], penalty=0.5, **settings).on_loss(*on)
    assert scores.certificate.gradient_norm < 1e-10


def test_a_damping_that_hardly_helps():
    settings = {"curvature": Nystroem(3), "penalty": 0}
    on = (XQ, YQ)
    with refused(
        "C + λI is too badly conditioned for float64", "Try a larger damping, or drop or standardise features"
    ):
        classifier(damping=1e-11, **settings).on_loss(*on)
    scores = classifier(damping=1e-3, **settings).on_loss(*on)
    assert scores.certificate.converged
    assert scores.certificate.residual.max() < 1e-10


def test_features_in_other_units():
    far, q = np.c_[X[:, :2], 1e6 * (X[:, 0] + X[:, 2])], np.c_[XQ[:, :2], 1e6 * (XQ[:, 0] + XQ[:, 2])]
    solver = uw.solvers.Dual()
    with refused(
        "C + λI is too badly conditioned for float64", "Try a larger damping, or drop or standardise features"
    ):
        uw.explain(Ridge(1.0).fit(far, Z), far, Z, solver=solver).on_loss(q, ZQ)
    larger = uw.explain(Ridge(1.0).fit(far, Z), far, Z, solver=solver, damping=10.0).on_loss(q, ZQ)
    assert larger.certificate.converged
    scaled = make_pipeline(StandardScaler(), Ridge(1.0)).fit(far, Z)
    values = uw.explain(scaled, far, Z, solver=solver).on_loss(q, ZQ).values
    assert_allclose(values, uw.explain(scaled, far, Z, solver=Cholesky()).on_loss(q, ZQ).values, rtol=1e-7)


def test_a_recursion_that_has_not_settled():
    with warned("that their standard errors do not contain", "Raise depth, or use CG() for exact answers"):
        ridge(solver=LiSSA(depth=2, repeats=2), damping=5.0).on_loss(*ON)
    exact = ridge(solver=CG(), damping=5.0).on_loss(*ON).values
    scores = ridge(solver=LiSSA(depth=20, repeats=5), damping=5.0).on_loss(*ON)
    assert np.abs(scores.values - exact).max() < 6 * scores.standard_error.max()
    assert_allclose(exact, ridge(solver=Cholesky(), damping=5.0).on_loss(*ON).values, rtol=1e-4, atol=1e-8)


def test_a_specification_without_its_brackets():
    with refused(" specification. ", "Pass an object such as "):
        ridge(curvature=uw.operators.Hessian)
    values = ridge(curvature=uw.operators.Hessian()).on_loss(*ON).values
    with refused(" specification. ", "Pass an object such as "):
        ridge(solver=uw.solvers.CG)
    assert_allclose(ridge(solver=uw.solvers.CG()).on_loss(*ON).values, values, rtol=1e-4, atol=1e-8)


# ---- top -------------------------------------------------------------------------------------------------------------


def test_more_rows_than_there_are():
    scores = ridge().on_loss(*ON)
    with refused(" columns to choose from", "Ask for 1 to "):
        scores.helpful(N + 1)
    assert np.array_equal(scores.helpful(N).rows, np.argsort(-scores.values, 1))
    assert scores.helpful(1).values.ravel().tolist() == scores.values.max(1).tolist()


def test_a_column_that_is_called_like_one_of_the_table():
    scores = ridge().on_loss(*ON)
    frame = pd.DataFrame({"value": Z, "x0": X[:, 0]})
    with refused("which is what a column of the table is called", "Rename it: data=frame.add_prefix('data_')"):
        scores.top(2, data=frame)
    table = scores.top(2, data=frame.add_prefix("data_"))
    assert np.array_equal(table["data_value"], Z[table.index])


def test_data_of_other_lines():
    scores = ridge().on_loss(*ON)
    frame = pd.DataFrame(X)
    with refused(", and there are ", "Pass what the rows were made from, one line for each row"):
        scores.top(2, data=frame[1:])
    table = scores.top(2, data=frame)
    assert np.array_equal(table[0], X[table.index, 0])
    with refused(", and there are ", "Pass what the rows were made from, one line for each row"):
        scores.top(2, data={"x0": X[:, 0]})
    table = scores.top(2, data=X)
    assert np.array_equal(table[0], X[table.index, 0])


def test_data_of_other_names():
    frame = pd.DataFrame(X, index=[f"patient {row}" for row in range(N)], columns=["a", "b", "c"])
    scores = uw.explain(Ridge(2.0).fit(frame, Z), frame, Z).on_loss(frame[:2], Z[:2])
    other = frame.set_index(pd.Index([f"other {row}" for row in range(N)]))
    with refused("data has no row named ", "Pass the frame that was explained; or, if its lines are in the same order"):
        scores.top(2, data=other)
    table = scores.top(2, data=frame)
    assert np.array_equal(table["a"], frame.loc[table.index, "a"])
    pd.testing.assert_frame_equal(scores.top(2, data=other.reset_index(drop=True)), table)


# ---- tokens.py -------------------------------------------------------------------------------------------------------


@cache
def tagged():
    """A tagger of three places, with its texts and tags."""
    texts = torch.randint(0, 5, (8, 3), generator=torch.Generator().manual_seed(0))
    model = nn.Sequential(nn.Embedding(5, 2), nn.Linear(2, 4)).double().requires_grad_(True)
    influence = uw.explain(model, texts, texts % 4, loss=tags, damping=0.1)
    return influence, texts, texts % 4


def tags(output, y):
    return nn.functional.cross_entropy(output.transpose(1, 2), y)


def test_tokens_are_told_of_one_query_and_one_row():
    influence, texts, y = tagged()
    with refused("queries, and tokens are told of one query and one row", "Pass one: by_token(row, on=[question])"):
        influence.by_token(0, on=(texts[:2], y[:2]))
    with refused("rows, and tokens are told of one row and one query", "Pass one row: by_token(0, on=…)"):
        influence.by_token([0, 1], on=(texts[:1], y[:1]))
    found = influence.by_token(0, on=(texts[:1], y[:1]))
    assert_allclose(found.total, influence.on_loss(texts[:1], y[:1]).values[0, 0])


def test_a_tokenizer_shows_tokens():
    influence, texts, y = tagged()
    with refused("tokenizer is a", "Pass a tokenizer with decode(), or a function from a token's number to its text"):
        influence.by_token(0, on=(texts[:1], y[:1]), tokenizer=["a", "b", "c", "d"])
    words = ["a", "b", "c", "d"]
    found = influence.by_token(0, on=(texts[:1], y[:1]), tokenizer=words.__getitem__)
    assert [token.text for token in found.row] == [words[k] for k in y[0]]


def test_a_loss_of_one_prediction_has_no_tokens():
    one = classifier()
    with refused("so its value has no tokens to be taken apart by", "Use on_loss; tokens are for losses with a target"):
        one.by_token(0, on=(XQ[:1], YQ[:1]))
    assert np.isfinite(one.on_loss(XQ[:1], YQ[:1]).values).all()


@pytest.mark.filterwarnings("ignore:.*does not count:upweight.errors.TheoryWarning")
def test_a_row_without_a_counted_token_cannot_be_taken_apart():
    texts, model = tagged()[1], nn.Embedding(5, 2).double()  # three classes at each of two places
    y = (texts[:, :2] % 3).index_fill(0, torch.tensor([2]), -100)
    influence = uw.explain(model, texts, y, loss=nn.CrossEntropyLoss(), damping=0.1)
    with refused("has no token that the loss depends on", "Pass another, such as one of on_loss(…).helpful(5)"):
        influence.by_token(2, on=(texts[:1], y[:1]))
    scores = influence.on_loss(texts[:1], y[:1])
    assert_allclose(influence.by_token(scores.helpful(5).rows[0, 0], on=(texts[:1], y[:1])).total, scores.values.max())


# ---- index.py --------------------------------------------------------------------------------------------------------


def indexed(model, **settings):
    return uw.explain(
        model, X, Y, loss=nn.functional.cross_entropy, **{"curvature": EKFAC(), "damping": 0.1, **settings}
    )


def test_an_index_says_what_it_needs(tmp_path):
    model = nn.Sequential(nn.Linear(D, 20), nn.Tanh(), nn.Linear(20, 3)).double()
    folder = tmp_path / "index"
    with refused("The error", "Pass an error between 0 and 1, such as 0.1, and 4 or 8 bits"):
        indexed(model).index(folder, error=2.0)
    with refused(
        "An index keeps gradients along the eigenvectors of a network",
        "Pass a network, and curvature=operators.EKFAC()",
    ):
        indexed(model, curvature=GaussNewton()).index(folder)
    with refused("holds no finished index", "Make one: influence.index"):
        uw.Index.open(folder)
    influence = indexed(model)
    index = influence.index(folder, error=0.1, bits=4)
    (folder / "chunk-000000.safetensors").unlink()
    with refused("chunks", "Make the same call again, which goes on where it was interrupted"):
        uw.Index.open(folder)
    index = influence.index(folder, error=0.1, bits=4)
    queries = index.coordinates(influence, XQ, YQ)
    other = indexed(nn.Sequential(nn.Linear(D, 20), nn.Tanh(), nn.Linear(20, 3)).double())
    with refused("was made of other parameters", "Pass the Influence of the model as it was then"):
        index.coordinates(other, XQ, YQ)
    with refused("coordinates, and the index", "Make them with this index: index.coordinates"):
        index.on_loss(uw.Coordinates(queries.values[:, :5], queries.query_values))
    with refused("and the index has", "Ask for 1 to"):
        index.extremes(queries, N + 1)
    assert index.extremes(queries, N).helpful.rows.shape == (len(XQ), N)
    exact = influence.on_loss(XQ, YQ).values
    assert np.linalg.norm(index.on_loss(queries).values - exact) < 0.2 * np.linalg.norm(exact)


def test_a_part_of_an_index_is_one_of_them(tmp_path):
    """And a file that somebody wrote with something else in it is none."""
    influence = indexed(nn.Sequential(nn.Linear(D, 20), nn.Tanh(), nn.Linear(20, 3)).double())
    with refused("Shards are numbered from 0", "pass shard=0 to shard="):
        influence.index_shard(tmp_path / "index", 2, 2)
    for number in (0, 1):
        influence.index_shard(tmp_path / "index", number, 2)
    index = influence.index(tmp_path / "index")
    queries = index.coordinates(influence, XQ, YQ)
    expected = index.on_loss(queries).values
    folder = tmp_path / "index"
    for name in ("chunk-000000", "coordinates"):
        file = folder / f"{name}.safetensors"
        write_tensors(file, {}, read_tensors(file)[1])
        with refused(" holds no part of an index (", "Delete the folder, and make the index again"):
            uw.Index.open(folder).on_loss(queries)
        shutil.rmtree(folder)
        index = influence.index(folder)
    assert index.on_loss(queries).values.tobytes() == expected.tobytes()


def test_an_index_of_convolutions_in_another_order(tmp_path, monkeypatch):
    """An older upweight had channels before the kernel; an index of a network without convolutions is the same."""
    folder, dense = tmp_path / "convolved", tmp_path / "dense"
    images = (nn.Unflatten(1, (1, D)), nn.Conv1d(1, 2, 3), nn.Tanh(), nn.Flatten())
    torch.manual_seed(0)
    influence = indexed(nn.Sequential(*images, nn.Linear(2 * (D - 2), 3)).double())
    other = indexed(nn.Sequential(nn.Linear(D, 20), nn.Tanh(), nn.Linear(20, 3)).double())
    with monkeypatch.context() as before:
        before.setattr(indexing, "ORDER", 1)
        before.setattr(index_module, "ORDER", 1)
        influence.index(folder)
        expected = other.index(dense).coordinates(other, XQ, YQ).values
    assert np.array_equal(uw.Index.open(dense).coordinates(other, XQ, YQ).values, expected)
    with refused(" holds no part of an index (", "Delete the folder, and make the index again"):
        uw.Index.open(folder).coordinates(influence, XQ, YQ)
    shutil.rmtree(folder)
    queries = influence.index(folder).coordinates(influence, XQ, YQ)
    assert np.isfinite(uw.Index.open(folder).on_loss(queries).values).all()


def test_bm25_compares_tokens():
    with refused("k1=", "Pass k1 ≥ 0 and b from 0 to 1"):
        baselines.bm25(classifier(), XQ, YQ, b=2.0)
    with refused("and BM25 compares tokens", "Pass rows of named parts with input_ids, or whole numbers"):
        baselines.bm25(classifier(), XQ, YQ)
    assert baselines.nearest_neighbours(classifier(), XQ, YQ).values.shape == (len(XQ), N)
    influence, texts, y = tagged()
    assert baselines.bm25(influence, texts[:2], y[:2], k1=1.2, b=0.75).values.shape == (2, 8)


def test_an_index_does_not_divide_by_nothing(tmp_path):
    influence = indexed(nn.Sequential(nn.Linear(D, 20), nn.Tanh(), nn.Linear(20, 3)).double())
    index = influence.index(tmp_path / "index", error=0.01, bits=8)
    queries = index.coordinates(influence, XQ, YQ)
    with refused("which is too small to divide by with damping=", "Ask with damping=") as told:
        index.on_loss(queries, damping=0.0)
    damping = float(str(told.value).split("Ask with damping=")[1].split(",")[0])
    assert np.isfinite(index.on_loss(queries, damping=damping).values).all()
    with pytest.raises(NotPositiveDefinite, match="Try damping="):
        indexed(nn.Sequential(nn.Linear(D, 20), nn.Tanh(), nn.Linear(20, 3)).double(), damping=0.0).index(
            tmp_path / "0"
        )


def test_an_index_of_very_few_rows(tmp_path):
    model = nn.Sequential(nn.Linear(D, 20), nn.Tanh(), nn.Linear(20, 3)).double()
    few = uw.explain(model, X[:3], Y[:3], loss=nn.functional.cross_entropy, damping=0.1, curvature=EKFAC())
    with refused("training rows, and the error of an index is measured on pairs", "Use on_loss, which needs no index"):
        few.index(tmp_path / "index")
    assert few.on_loss(XQ, YQ).values.shape == (len(XQ), 3)


def test_a_solver_that_is_larger_than_the_budget():
    x = np.random.default_rng(0).normal(size=(60, 300))
    model, on = Ridge().fit(x, x[:, 0]), (x[:2], x[:2, 0])
    with refused("beside data and model, whatever the batch size", "Use ") as told:
        uw.explain(model, x, x[:, 0], solver=Cholesky(), memory_budget="1.5 MB")
    advice = str(told.value).split("Use ")[1]
    assert "Cholesky of 301 parameters and 60 rows needs 2.54 MB" in str(told.value)
    for solver in (CG(), uw.solvers.Dual()):
        assert f"solver={type(solver).__name__}()" in advice
        small = uw.explain(model, x, x[:, 0], solver=solver, memory_budget="1.5 MB")
        assert small.on_loss(*on).values.shape == (2, 60)
    budget = advice.split("memory_budget='")[1].split("'")[0]
    larger = uw.explain(model, x, x[:, 0], solver=Cholesky(), memory_budget=budget)
    assert larger.on_loss(*on).values.shape == (2, 60)


def test_scores_that_are_larger_than_the_budget():
    influence = ridge(memory_budget=2000)
    with refused("and may take half of memory_budget=", "Ask for some queries at a time: on_loss_in_blocks") as told:
        influence.on_loss(XQ, ZQ)
    size = int(str(told.value).split("size=")[1].split(")")[0])
    blocks = list(influence.on_loss_in_blocks(XQ, ZQ, size=size))
    assert_allclose(np.concatenate([block.values for block in blocks]), ridge().on_loss(XQ, ZQ).values, rtol=1e-12)
    with pytest.raises(uw.errors.InvalidInput, match="on_loss_in_blocks"):
        list(influence.on_loss_in_blocks(XQ, ZQ, size=size + 1))


# ---- shards.py -------------------------------------------------------------------------------------------------------


def test_shards_that_are_missing_or_not_solved_are_run(tmp_path):
    on, system = (work.QUERIES, work.TARGETS), work.ridge().system
    with refused(" holds no part of scores whose systems are solved", "Name the folders that `upweight score STUDY"):
        shards.merge([tmp_path / "D"])
    shards.compute(system, on, tmp_path / "D", (2, 3))
    with refused(" chunks are missing, the first and the last of them in rows ", "Run it again, as `upweight") as told:
        shards.merge([tmp_path / "D"])
    assert "rows 0 to 3,071: shard 0/3, 1/3 has not ended" in str(told.value)
    assert f"--store {tmp_path / 'D'} --shard 0/3" in str(told.value)
    for part in range(2):
        shards.compute(system, on, tmp_path / "D", (part, 3))
    assert np.array_equal(shards.merge([tmp_path / "D"]).values, work.ridge().on_loss(*on).values)


def test_shards_hold_no_standard_errors(tmp_path):
    lissa = ridge(solver=LiSSA(depth=20, repeats=5), damping=5.0)
    with refused(" gives estimates, and a store keeps no standard error of them", "Use solver=CG() or Cholesky()"):
        shards.compute(lissa.system, ON, tmp_path / "D", (0, 1))
    shards.compute(ridge(solver=CG()).system, ON, tmp_path / "E", (0, 1))
    assert_allclose(shards.merge([tmp_path / "E"]).values, ridge().on_loss(*ON).values, rtol=1e-4, atol=1e-8)
    assert lissa.on_loss(*ON).standard_error is not None
