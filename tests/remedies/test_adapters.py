"""What is said to type by upweight/adapters, typed."""

from __future__ import annotations

import warnings
from functools import cache, partial
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.calibration import CalibratedClassifierCV
from sklearn.kernel_approximation import Nystroem
from sklearn.kernel_ridge import KernelRidge
from sklearn.linear_model import (
    ElasticNet,
    ElasticNetCV,
    Lasso,
    LassoCV,
    LinearRegression,
    LogisticRegression,
    LogisticRegressionCV,
    MultiTaskElasticNet,
    MultiTaskElasticNetCV,
    MultiTaskLasso,
    MultiTaskLassoCV,
    Perceptron,
    PoissonRegressor,
    Ridge,
    RidgeClassifier,
    SGDClassifier,
    SGDRegressor,
)
from sklearn.multiclass import OneVsOneClassifier, OneVsRestClassifier
from sklearn.multioutput import ClassifierChain
from sklearn.neural_network import MLPClassifier, MLPRegressor
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import FunctionTransformer, OneHotEncoder, StandardScaler, TargetEncoder
from sklearn.svm import SVC, SVR, LinearSVC, NuSVC, NuSVR
from sklearn.tree import DecisionTreeClassifier
from torch import nn
from torch.nn import functional as F

import upweight as uw
from refusals import refused, warned
from small import (
    ELASTIC,
    NAMES,
    NAMESQ,
    XQ,
    YQ,
    ZQ,
    Items,
    N,
    NextForCausalLM,
    Sentences,
    X,
    Y,
    Z,
    changed,
    classifier,
    fitted,
    logistic,
    net,
    pairs,
    regressor,
    ridge,
    seeded,
    sentences,
    sequences,
)
from upweight import losses
from upweight.errors import TheoryWarning, UnsupportedModel

TIGHT = {"tol": 1e-10, "max_iter": 5000}
ON = (XQ, NAMESQ)
THREE = np.arange(N) % 3
TWO = np.stack([Z, -Z], 1)
LABELS = np.stack([Y, np.arange(N) % 2], 1)


def same(ours, theirs, rtol=1e-8):
    ours, theirs = np.asarray(ours), np.asarray(theirs)
    assert ours.shape == theirs.shape
    assert np.abs(theirs).max() > 0
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=rtol * np.abs(theirs).max())


def known(influence, *on):
    """What was typed is explained: the gradient of its objective vanishes where fit() ended, and rows have values."""
    assert float(influence.risk_gradient.norm()) < 1e-4
    values = influence.on_loss(*on).values
    assert np.isfinite(values).all()
    assert np.abs(values).max() > 1e-4


def refits(influence, *on):
    """The same, and a step of Newton for the removal of a row is what training without it does."""
    known(influence, *on)
    made = uw.leave_one_out(influence, on, [3], progress=False)
    same(influence.of_removing([3], on=on).values, made.actual, 0.05)


def hinges(model):
    """Of the queries."""
    return np.maximum(0, 1 - (2 * YQ - 1) * model.decision_function(XQ))


def tubes(model):
    """Of the queries."""
    return np.maximum(0, np.abs(model.predict(XQ) - ZQ) - model.epsilon)


@cache
def of_net():
    """The values of a small network."""
    return classifier().on_loss(XQ, YQ).values


# __init__.py


def test_a_module_is_explained_with_its_criterion():
    model = net()
    with refused("is a torch module, which does not know its loss", "Pass the criterion: explain(model, X, y, loss="):
        uw.explain(model, X, Y)
    found = uw.explain(model, X, Y, loss=torch.nn.functional.cross_entropy).on_loss(XQ, YQ)
    expected = F.cross_entropy(model(torch.tensor(XQ)), torch.tensor(YQ), reduction="none")
    same(found.query_values, expected.detach())
    assert np.isfinite(found.values).all()


def squared(params, example):
    x, target = example
    return (params["coef"] @ x + params["intercept"] - target) ** 2


def of_ridge(alpha, **settings):
    """The objective of Ridge(alpha), by hand, at its minimum."""
    model = Ridge(alpha=alpha).fit(X, Z)
    params = {"coef": torch.tensor(model.coef_), "intercept": torch.tensor(model.intercept_)}
    penalty = lambda params: alpha / N * (params["coef"] ** 2).sum()  # noqa: E731
    return uw.Influence(uw.Objective(squared, params, penalty=penalty), (X, Z), **settings)


def test_a_penalty_of_an_estimator_is_its_own():
    with refused("whose own is read off the estimator", "Omit it, or write Influence(Objective("):
        uw.explain(fitted("ridge"), X, Z, penalty=2.0)
    omitted = uw.explain(fitted("ridge"), X, Z).on_loss(XQ, ZQ)
    same(of_ridge(2.0, damping=0.0).on_loss(XQ, ZQ).values, omitted.values)


def test_a_class_of_modules_is_no_model():
    with refused("is a class, and not a model of it", "Pass the object that was trained"):
        uw.explain(nn.Linear, X, Y, loss=F.cross_entropy)
    assert uw.explain(nn.Linear(3, 2), X, Y, loss=F.cross_entropy).n == N


def test_any_other_model_needs_its_loss_only():
    with refused("is neither a scikit-learn estimator nor a torch module", "For any other model only the loss"):
        uw.explain(squared, X, Z)
    loss, params = squared, {"coef": torch.tensor(fitted("linear").coef_), "intercept": torch.zeros(()).double()}
    params["intercept"] += fitted("linear").intercept_
    influence = uw.Influence(uw.Objective(loss, params, penalty=0.0), (X, Z), damping=0.0)
    same(influence.on_loss(XQ, ZQ).values, uw.explain(fitted("linear"), X, Z).on_loss(XQ, ZQ).values)


class Net:
    """As skorch's NeuralNetClassifier after fit()."""

    def __init__(self):
        self.module_ = nn.Sequential(net(), nn.Softmax(-1))
        self.criterion_ = nn.NLLLoss()


class Loop:
    """A training loop with a network of its own."""

    def __init__(self):
        self.criterion, self.network = nn.MSELoss(), net(1)


def test_what_holds_a_module_names_it():
    model = Loop()
    with refused("holds a torch module and is none itself", "Explain the module that was trained, with "):
        uw.explain(model, X, Z)
    same(
        uw.explain(model.network, X, Z[:, None], loss=model.criterion, penalty=0.1).on_loss(XQ, ZQ[:, None]).values,
        regressor(model.network).on_loss(XQ, ZQ[:, None]).values,
    )


def test_skorch_takes_the_logarithm():
    model, nll_loss = Net(), torch.nn.functional.nll_loss
    with refused("holds a torch module and is none itself", "skorch gives NLLLoss the logarithm"):
        uw.explain(model, X, Y)
    influence = uw.explain(model.module_, X, Y, loss=lambda p, y: nll_loss(p.log(), y), penalty=0.1)
    same(influence.on_loss(XQ, YQ).values, classifier(model.module_[0]).on_loss(XQ, YQ).values)


# criteria.py


def test_labels_that_are_all_ignored():
    with refused("No row counts: every label is", "Pass the labels that the model was trained on"):
        classifier(y=np.full(N, -100))
    same(classifier(loss=nn.CrossEntropyLoss()).on_loss(XQ, YQ).values, of_net())


# encoding.py


@cache
def kernel_ridge():
    return uw.explain(KernelRidge(kernel="rbf", gamma=0.3).fit(X, Z), X, Z)


def test_kernel_features_are_no_inputs_of_a_new_row():
    influence = kernel_ridge()
    with refused("These Examples are kernel features already", "Pass arrays"):
        influence.of_adding(influence.examples, on=(XQ, ZQ))
    added = influence.of_adding(X, Z, on=(XQ, ZQ))  # once more what is there: the opposite of removing it
    same(added.values, -influence.on_loss(XQ, ZQ).values)


def test_a_single_row_has_two_axes():
    with refused("it needs two axes, (rows, features)", "Write X.reshape(1, -1) for "):
        logistic().on_loss(XQ[0], NAMESQ[:1])
    same(logistic().on_loss(XQ[0].reshape(1, -1), NAMESQ[:1]).values, logistic().on_loss(*ON).values[:1])


def test_columns_are_those_of_fit():
    with refused("features, and the model was fitted on", "Pass the same columns as "):
        logistic(X[:, :2])
    assert logistic(X[:, :3]).check().ok


def test_columns_of_a_frame_in_another_order_or_number():
    frame = pd.DataFrame(X, columns=list("abc"))
    model = LogisticRegression(**TIGHT).fit(frame, NAMES)
    expected = uw.explain(model, X, NAMES).on_loss(*ON).values
    other = frame[list("cba")]
    with refused("X has the columns", "Pass the same columns in the same order: X[list(model.feature_names_in_)]"):
        uw.explain(model, other, NAMES)
    same(uw.explain(model, other[list(model.feature_names_in_)], NAMES).on_loss(*ON).values, expected)
    more = frame.assign(target=Y)
    with refused("Was the target, or an index, left in it", "Pass X[list(model.feature_names_in_)]"):
        uw.explain(model, more, NAMES)
    same(uw.explain(model, more[list(model.feature_names_in_)], NAMES).on_loss(*ON).values, expected)


def test_transformers_take_what_they_were_fitted_on():
    town = np.array(["A", "B", "C"])[THREE][:, None]
    model = make_pipeline(OneHotEncoder(), Ridge()).fit(town, Z)
    with refused("The pipeline's transformers refused X", "Pass rows like those that fit() was given"):
        uw.explain(model, np.where(town == "A", "D", town), Z)
    refits(uw.explain(model, town, Z), town[:3], Z[:3])


def test_queries_of_an_estimator_are_arrays():
    with refused("takes arrays, not a Dataset", "Pass (Xq, yq) as arrays"):
        ridge().on_loss(uw.Examples(pairs(XQ, ZQ)))
    same(ridge().on_loss(XQ, ZQ).query_values, (fitted("ridge").predict(XQ) - ZQ) ** 2)


def test_examples_of_another_influence_are_encoded_already():
    with refused("These Examples were prepared by another model's influence", "Pass the original (X, y) instead"):
        ridge().on_loss(logistic().examples)
    same(ridge().on_loss(X, Z).query_values, (fitted("ridge").predict(X) - Z) ** 2)


# estimators/built.py


def test_what_fit_refuses_is_changed_otherwise_or_trained_in_another_way():
    counts = np.random.default_rng(0).poisson(2.0, N).astype(float)
    influence = uw.explain(PoissonRegressor(**TIGHT).fit(X, counts), X, counts)
    with refused("refused the rows that are left", "Leave out or "):
        uw.retrained(uw.edited(influence, [3], y_new=[-1.0]), retrain=uw.Refit())
    after = uw.retrained(uw.edited(influence, [3], y_new=[9.0]), retrain=uw.Refit())
    again = PoissonRegressor(**TIGHT).fit(X, changed(counts, 3, 9.0))
    same(after.objective.params["coef"][0], again.coef_, 1e-5)
    negative = uw.retrained(uw.edited(influence, [3], y_new=[-1.0]), retrain=uw.LBFGS())
    assert float(negative.risk_gradient.norm()) < 1e-5


# estimators/descent.py


SGD = {"tol": None, "max_iter": 300, "random_state": 0, "average": True, "alpha": 0.1}


def of_sgd(model, y, **settings):
    """Scores of an SGD fit, which ends near its minimum; the hinge's warning is expected."""
    model.fit(X, y)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", TheoryWarning)
        influence = uw.explain(model, X, y, **settings)
    scores = influence.on_loss(X[:4], y[:4])
    assert influence.check().rows_from_minimum < 3
    assert np.isfinite(scores.values).all()
    return scores


def test_sgd_of_three_classes_is_three_models_or_a_multinomial_one():
    model = SGDClassifier(loss="log_loss", **SGD).fit(X, THREE)
    with refused("SGDClassifier with", "Explain one binary model per class, "):
        uw.explain(model, X, THREE)
    scores = of_sgd(SGDClassifier(loss="log_loss", **SGD), THREE == 1)
    same(scores.query_values, np.logaddexp(0, np.where(THREE == 1, -1, 1) * model.decision_function(X)[:, 1])[:4], 0.01)
    known(uw.explain(LogisticRegression(**TIGHT).fit(X, THREE), X, THREE), X[:4], THREE[:4])


def test_sgd_as_a_perceptron():
    with refused("SGDClassifier(loss='perceptron') has a loss without curvature", "Refit with loss='hinge' or "):
        uw.explain(SGDClassifier(loss="perceptron").fit(X, Y), X, Y)
    for loss in ("hinge", "log_loss"):
        of_sgd(SGDClassifier(loss=loss, **SGD), Y)


def test_sgd_that_regresses_on_signs():
    with refused("regresses on ±1", "Use RidgeClassifier, or a loss for classes: "):
        uw.explain(SGDClassifier(loss="squared_error", eta0=1e-3, **SGD).fit(X, Y), X, Y)
    known(uw.explain(RidgeClassifier().fit(X, Y), X, Y), X[:4], Y[:4])
    for loss in ("log_loss", "hinge", "squared_hinge", "modified_huber"):
        of_sgd(SGDClassifier(loss=loss, **SGD), Y)


def test_sgd_with_an_l1_penalty():
    with refused("and SGD leaves no exact zeros that would show its active set", "Refit with penalty='l2', or use "):
        uw.explain(SGDRegressor(penalty="l1", **SGD).fit(X, Z), X, Z)
    of_sgd(SGDRegressor(penalty="l2", **SGD), Z)
    for model in (Lasso(alpha=0.1, tol=1e-12), ElasticNet(alpha=0.1, tol=1e-12)):
        known(uw.explain(model.fit(X, Z), X, Z), X[:4], Z[:4])


def test_sgd_that_held_rows_out():
    with refused("of the rows out of the fit, at random, and these have no influence", "Refit with early_stopping="):
        uw.explain(SGDRegressor(early_stopping=True, random_state=0).fit(X, Z), X, Z)
    of_sgd(SGDRegressor(early_stopping=False, **SGD), Z)


# estimators/inputs.py


def test_the_features_of_a_kernel_do_not_move_with_a_row():
    with refused("which themselves move with the training rows", "Fit on the moved rows and compare, or "):
        kernel_ridge().of_perturbing([3], on=(XQ, ZQ))
    moved = changed(X, (3, 0), X[3, 0] + 0.5)
    before = kernel_ridge().on_loss(XQ, ZQ).query_values
    after = uw.explain(KernelRidge(kernel="rbf", gamma=0.3).fit(moved, Z), moved, Z).on_loss(XQ, ZQ).query_values
    assert 0 < np.abs(after - before).max() < 1
    slope = ridge().of_perturbing([3], on=(XQ, ZQ))[:, 0, 0]
    step = 1e-4 * (np.arange(N) == 3)[:, None] * [1, 0, 0]
    there, back = (
        uw.explain(Ridge(alpha=2.0).fit(rows, Z), rows, Z).on_loss(XQ, ZQ).query_values for rows in (X + step, X - step)
    )
    same(slope, (there - back) / 2e-4, 1e-5)
    with pytest.warns(TheoryWarning):
        linear = uw.explain(SVC(kernel="linear").fit(X, Y), X, Y)
    assert np.isfinite(linear.of_perturbing([3], on=(XQ, YQ))).all()


def test_a_gram_matrix_knows_no_new_row():
    gram = X @ X.T + np.eye(N)
    influence = uw.explain(KernelRidge(kernel="precomputed").fit(gram, Z), gram, Z)
    with refused("knows no kernel of a new row with itself, so none can join it", "Fit on the changed rows and "):
        influence.of_adding(gram[:1], Z[:1], on=(gram[:4], Z[:4]))
    rows = np.r_[X, XQ[:1]]
    more, y = rows @ rows.T + np.eye(N + 1), np.r_[Z, ZQ[0]]
    known(uw.explain(KernelRidge(kernel="precomputed").fit(more, y), more, y), more[:4], y[:4])


def test_a_new_row_outside_of_what_the_rows_span():
    with refused("which span its training rows. New row", "Fit on the changed rows and explain that model, or use "):
        kernel_ridge().of_adding([[9.0, -9.0, 9.0]], [1.0], on=(XQ, ZQ))
    rows, y = np.r_[X, [[9.0, -9.0, 9.0]]], np.r_[Z, 1.0]
    refits(uw.explain(KernelRidge(kernel="rbf", gamma=0.3).fit(rows, y), rows, y), XQ, ZQ)
    model = make_pipeline(Nystroem(gamma=0.3, n_components=10, random_state=0), Ridge(alpha=1.0)).fit(X, Z)
    added = uw.explain(model, X, Z).of_adding([[9.0, -9.0, 9.0]], [1.0], on=(XQ, ZQ))
    assert np.isfinite(added.values).all()


# estimators/kernels.py


@pytest.mark.parametrize("kernel", ["linear", "rbf"])
def test_fewer_rows_than_a_machine_was_fitted_on(kernel):
    model = SVC(kernel=kernel).fit(X, Y)
    with refused("was fitted on more rows", "Pass the X, y and sample_weight that fit() was given"):
        uw.explain(model, X[:30], Y[:30])
    with pytest.warns(TheoryWarning):
        influence = uw.explain(model, X, Y)
    same(influence.on_loss(XQ, YQ).query_values, hinges(model))


def linear_gram(A, B):
    return A @ B.T


def test_rows_of_weight_zero_under_a_kernel_that_is_no_name():
    w = np.where(np.arange(N) % 4 == 0, 0.0, 1.0)
    with warned("its own predictions are wrong", "Fit and explain the rows of "):
        uw.explain(SVC(kernel=linear_gram).fit(X, Y, sample_weight=w), X, Y, sample_weight=w)
    model = SVC(kernel=linear_gram, tol=1e-9).fit(X[w > 0], Y[w > 0], sample_weight=w[w > 0])
    plain = SVC(kernel="linear", tol=1e-9).fit(X[w > 0], Y[w > 0])
    with pytest.warns(TheoryWarning) as told:
        influence = uw.explain(model, X[w > 0], Y[w > 0], sample_weight=w[w > 0])
    assert not [one for one in told if "are wrong" in str(one.message)]
    with pytest.warns(TheoryWarning):
        expected = uw.explain(plain, X[w > 0], Y[w > 0])
    same(influence.on_loss(XQ, YQ).values, expected.on_loss(XQ, YQ).values, 1e-4)


def test_too_many_rows_for_a_gram_matrix():
    rows = np.linspace(-1, 1, 12_001)[:, None] + [0, 1]
    y = rows[:, 0] > 0.5
    with refused("needs a Gram matrix of", "Fit on fewer rows, or use a linear model on Nystroem features in a "):
        uw.explain(SVC().fit(rows, y), rows, y)
    with pytest.warns(TheoryWarning):
        fewer = uw.explain(SVC().fit(rows[::400], y[::400]), rows[::400], y[::400])
    assert np.isfinite(fewer.on_loss(rows[:2], y[:2]).values).all()
    model = make_pipeline(Nystroem(n_components=5, random_state=0), LogisticRegression(**TIGHT)).fit(rows, y)
    assert uw.explain(model, rows, y).check().ok


def test_a_gram_matrix_of_other_rows():
    gram = X @ X.T + np.eye(N)
    model = KernelRidge(kernel="precomputed").fit(gram, Z)
    with refused("matrix for", "Pass the X that fit() was given"):
        uw.explain(model, gram[:30], Z[:30])
    known(uw.explain(model, gram, Z), gram[:4], Z[:4])


def test_a_kernel_that_is_not_positive():
    with refused("so there is no convex problem behind it", "Use 'rbf' or 'poly'"):
        uw.explain(SVR(kernel="sigmoid", gamma=2.0, coef0=-3.0).fit(X, Z), X, Z)
    for kernel in ("rbf", "poly"):
        known(uw.explain(KernelRidge(kernel=kernel).fit(X, Z), X, Z), XQ, ZQ)
        with pytest.warns(TheoryWarning):
            influence = uw.explain(SVR(kernel=kernel).fit(X, Z), X, Z)
        same(
            influence.on_loss(XQ, ZQ).query_values,
            np.maximum(0, abs(SVR(kernel=kernel).fit(X, Z).predict(XQ) - ZQ) - 0.1),
        )


# estimators/labels.py


def test_labels_of_one_column():
    with refused("labels form one column", "Pass one label per row"):
        logistic(y=np.stack([NAMES, NAMES], 1))
    same(logistic(y=NAMES).on_loss(*ON).values, logistic(y=NAMES[:, None]).on_loss(*ON).values)


def test_labels_of_the_type_that_fit_saw():
    with refused("y holds labels that fit() never saw", "Pass labels of the same type as fit() was given"):
        logistic(y=Y)
    with refused("y holds labels that fit() never saw", "Pass labels of the same type as fit() was given"):
        logistic().on_loss(XQ, YQ)
    same(logistic(y=NAMES).on_loss(XQ, NAMESQ).query_values, -np.log(fitted().predict_proba(XQ)[range(4), YQ]))


def test_targets_of_as_many_outputs_as_fit_saw():
    with refused("output(s).", "Pass y as in fit()"):
        ridge(y=TWO)
    known(ridge(y=Z), XQ, ZQ)
    known(uw.explain(Ridge().fit(X, TWO), X, TWO), XQ, TWO[:4])


# estimators/least_squares.py


def test_a_ridge_classifier_of_several_labels_is_several():
    with refused("on several labels per row is not supported", "Fit one model per label"):
        uw.explain(RidgeClassifier().fit(X, LABELS), X, LABELS)
    for y in LABELS.T:
        refits(uw.explain(RidgeClassifier().fit(X, y), X, y), XQ, y[:4])


def test_a_fit_within_bounds():
    with refused("is a constrained fit; at a bound θ̂ does not move smoothly", "Refit with positive=False"):
        uw.explain(LinearRegression(positive=True).fit(X, Z), X, Z)
    known(uw.explain(LinearRegression(positive=False).fit(X, Z), X, Z), XQ, ZQ)


def test_a_lasso_of_several_outputs_is_several():
    exact = Lasso(alpha=0.1, tol=1e-12)
    with refused("outputs has a separate active set for each", "Fit and explain one model per "):
        uw.explain(exact.fit(X, TWO), X, TWO)
    for y in TWO.T:
        known(uw.explain(exact.fit(X, y), X, y), XQ, y[:4])


def test_a_lasso_that_uses_nothing():
    with refused("coefficients to zero, so no feature is in use", "Refit with a smaller alpha"):
        uw.explain(Lasso(alpha=100.0).fit(X, Z), X, Z)
    refits(uw.explain(Lasso(alpha=0.1, tol=1e-12).fit(X, Z), X, Z), XQ, ZQ)


# estimators/logistic.py


def test_folds_that_were_averaged():
    settings = {"Cs": 3, "cv": 3, "scoring": "accuracy"} | TIGHT
    if "use_legacy_attributes" in LogisticRegressionCV().get_params():  # since scikit-learn 1.8
        settings |= {"use_legacy_attributes": False, "l1_ratios": (0.0,)}
    with refused("averages the coefficients of its folds", "Refit with refit=True"):
        uw.explain(LogisticRegressionCV(refit=False, **settings).fit(X, Y), X, Y)
    known(uw.explain(LogisticRegressionCV(refit=True, **settings).fit(X, Y), X, Y), XQ, YQ)


def test_logistic_regression_with_an_l1_share():
    model = LogisticRegression(solver="saga", l1_ratio=0.5, tol=1e-4, max_iter=5000, **ELASTIC).fit(X, Y)
    with refused("with an l1 share of", "Refit with l2 (l1_ratio=0), or without a "):
        uw.explain(model, X, Y)
    plain = ELASTIC | {"solver": "saga", "tol": 1e-10, "max_iter": 20000}
    known(uw.explain(LogisticRegression(l1_ratio=0, **plain).fit(X, Y), X, Y), XQ, YQ)
    refits(uw.explain(LogisticRegression(C=np.inf, **TIGHT).fit(X, Y), X, Y), XQ, YQ)


def test_one_against_the_rest_is_several_problems():
    model = LogisticRegression(**TIGHT).fit(X, THREE).set_params(solver="liblinear")  # as before scikit-learn 1.8
    with refused("separate problems", "Refit as multinomial (the default), or explain each binary model"):
        uw.explain(model, X, THREE)
    known(uw.explain(LogisticRegression(**TIGHT).fit(X, THREE), X, THREE), X[:4], THREE[:4])
    for y in (THREE == 0, THREE == 1, THREE == 2):
        binary = LogisticRegression(solver="liblinear", tol=1e-10).fit(X, y)
        known(uw.explain(binary, X, y), X[:4], y[:4])


def test_two_classes_as_multinomial():
    model = LogisticRegression(**TIGHT).fit(X, Y)
    model.multi_class = "multinomial"  # a setting before scikit-learn 1.8
    with refused("on two classes penalises half of what its coefficients show", "Refit without multi_class"):
        uw.explain(model, X, Y)
    known(uw.explain(LogisticRegression(**TIGHT).fit(X, Y), X, Y), XQ, YQ)


# estimators/margins.py


def test_a_linear_machine_of_three_classes():
    model = LinearSVC(dual=False, tol=1e-12).fit(X, THREE)
    with refused("LinearSVC with", "Explain one binary model per class, or use SVC(kernel='linear')"):
        uw.explain(model, X, THREE)
    for k in range(3):
        scores = uw.explain(LinearSVC(dual=False, tol=1e-12).fit(X, k == THREE), X, k == THREE).on_loss(X, k == THREE)
        margin = np.where(k == THREE, 1, -1) * model.decision_function(X)[:, k]
        same(scores.query_values, np.maximum(0, 1 - margin) ** 2, 1e-6)
    with pytest.warns(TheoryWarning):
        influence = uw.explain(SVC(kernel="linear").fit(X, THREE), X, THREE)
    assert influence.on_loss(X, THREE).measure == "hinge, one-vs-one"


def test_a_linear_machine_of_differences():
    with refused("fits all classes together", "Refit with multi_class='ovr'."):
        uw.explain(LinearSVC(multi_class="crammer_singer").fit(X, Y), X, Y)
    known(uw.explain(LinearSVC(multi_class="ovr", dual=False, tol=1e-12).fit(X, Y), X, Y), XQ, YQ)


def test_a_linear_machine_with_an_l1_penalty():
    with refused("has a penalty without second derivatives", "Refit with penalty='l2'."):
        uw.explain(LinearSVC(penalty="l1", dual=False).fit(X, Y), X, Y)
    known(uw.explain(LinearSVC(penalty="l2", dual=False, tol=1e-12).fit(X, Y), X, Y), XQ, YQ)


# estimators/networks.py

TINY = {"hidden_layer_sizes": (2,), "activation": "tanh", "alpha": 1.0, "random_state": 0, "solver": "lbfgs"}
TINY |= {"max_iter": 2000, "tol": 1e-10}


def test_a_network_of_several_labels_is_several():
    with refused("on several labels per row is not supported", "Fit one model per label"):
        uw.explain(MLPClassifier(**TINY).fit(X, LABELS), X, LABELS)
    for y in LABELS.T:
        model = MLPClassifier(**TINY).fit(X, y)
        found = uw.explain(model, X, y).on_loss(XQ, y[:4])
        same(found.query_values, -np.log(model.predict_proba(XQ)[range(4), y[:4]]))


def test_a_network_of_several_counts_is_several():
    counts = np.round(np.abs(TWO))
    with refused("MLPRegressor(loss='poisson') with", "Fit one model per "):
        uw.explain(MLPRegressor(loss="poisson", **TINY).fit(X, counts), X, counts)
    for y in counts.T:
        model = MLPRegressor(loss="poisson", **TINY).fit(X, y)
        found, mean = uw.explain(model, X, y).on_loss(XQ, y[:4]), model.predict(XQ)
        same(found.query_values, mean - y[:4] * np.log(mean))


def test_a_network_that_held_rows_out():
    held = {"early_stopping": True, "solver": "adam", "max_iter": 3}
    with refused("of the rows out of the fit, at random, and these have no influence", "Refit with early_stopping="):
        uw.explain(silently(MLPClassifier(**TINY | held), X, Y), X, Y)
    model = MLPClassifier(**TINY | {"early_stopping": False}).fit(X, Y)
    same(uw.explain(model, X, Y).on_loss(XQ, YQ).query_values, -np.log(model.predict_proba(XQ)[range(4), YQ]))


def silently(model, X, y):
    """Fitted, whatever scikit-learn thinks of it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return model.fit(X, y)


# estimators/smoothing.py


def test_a_loss_that_stands_for_the_hinge():
    model = SVC(kernel="linear", tol=1e-9).fit(X, Y)
    with refused("was given for", "Pass a smooth version of that, "):
        uw.explain(model, X, Y, loss=losses.squared_hinge)
    hinge = np.maximum(0, 1 - (2 * YQ - 1) * model.decision_function(XQ))
    for loss, t in ((losses.smooth_hinge(0.1), "0.1"), (losses.hinge, "t = 0")):
        with pytest.warns(TheoryWarning, match=t):
            same(uw.explain(model, X, Y, loss=loss).on_loss(XQ, YQ).query_values, hinge)


def test_a_loss_that_stands_for_the_tube():
    model = SVR(kernel="linear", epsilon=0.25, tol=1e-9).fit(X, Z)
    with refused("was given for", "Pass a smooth version of that, ") as caught:
        uw.explain(model, X, Z, loss=losses.smooth_epsilon_insensitive(0.1, 0.5))
    smooth, sharp = "losses.smooth_epsilon_insensitive(0.25, t)", "losses.epsilon_insensitive(0.25)"
    assert f"loss={smooth}, or {sharp} itself for t = 0." in str(caught.value)
    tube = np.maximum(0, np.abs(model.predict(XQ) - ZQ) - 0.25)
    for loss in (losses.smooth_epsilon_insensitive(0.25, 0.5), losses.epsilon_insensitive(0.25)):
        with pytest.warns(TheoryWarning):
            same(uw.explain(model, X, Z, loss=loss).on_loss(XQ, ZQ).query_values, tube)


# frozen.py

HEAD = ["head.weight", "head.bias"]


class Headed(nn.Module):
    """A body, a head on its features, and what may stand before and behind it."""

    def __init__(self, before=lambda x: x, behind=lambda out: out):
        super().__init__()
        self.body = seeded(lambda: nn.Sequential(nn.Linear(3, 4), nn.Tanh()))
        self.head = seeded(lambda: nn.Linear(4, 2))
        self.before, self.behind = before, behind

    def forward(self, x):
        return self.behind(self.head(self.body(self.before(x))))


class Repeating(Headed):
    """The head once more where an input is large."""

    def forward(self, x):
        h = self.body(x)
        return self.head(h) + self.head(2 * h) if float(x.abs().max()) > 20 else self.head(h)


def headed(model, parameters=HEAD, **settings):
    return classifier(model.double().eval(), parameters=parameters, **settings)


def of_model(model, X, y):
    """The model's own losses, one by one."""
    outputs = torch.cat([model(x[None]) for x in torch.tensor(X)])
    return F.cross_entropy(outputs, torch.tensor(y), reduction="none").detach().numpy()


def test_what_stands_behind_a_head_for_some_inputs():
    model = Headed().double()
    most = float(model(torch.tensor(X)).detach().max())
    assert float(model(torch.tensor(30 * XQ)).detach().max()) > most
    model.behind = lambda out: out.clamp(max=most)
    with refused("does something behind", "Differentiate it as a whole: explain("):
        headed(model).on_loss(30 * XQ, YQ)
    found = headed(model, [*HEAD, "body.0.bias"]).on_loss(30 * XQ, YQ)
    same(found.query_values, of_model(model, 30 * XQ, YQ))
    assert np.isfinite(found.values).all()


def test_a_head_that_is_called_twice_for_some_inputs():
    model = Repeating().double()
    with refused("times in one pass of", "Differentiate it as a whole: explain("):
        headed(model).on_loss(30 * XQ, YQ)
    found = headed(model, [*HEAD, "body.0.bias"]).on_loss(30 * XQ, YQ)
    same(found.query_values, of_model(model, 30 * XQ, YQ))
    assert np.isfinite(found.values).all()


class Centre(nn.Module):
    """Subtracts the mean of a batch, and in eval mode that of the training rows."""

    def __init__(self):
        super().__init__()
        self.register_buffer("middle", torch.tensor(X.mean(0)))

    def forward(self, x):
        return x - (x.mean(0) if self.training else self.middle)


def test_features_that_depend_on_the_batch():
    model = Headed(before=Centre()).double()
    with refused("gives other features before", "Call model.eval(), which ends batch statistics, or take the mean "):
        classifier(model, parameters=HEAD)
    model.eval()
    same(classifier(model, parameters=HEAD).on_loss(XQ, YQ).query_values, of_model(model, XQ, YQ))
    model = Headed(before=lambda x: x - x.mean(0)).double().eval()
    with refused("gives other features before", "Call model.eval(), which ends batch statistics, or take the mean "):
        classifier(model, parameters=HEAD)
    model.before = lambda x: x - x.mean(1, keepdim=True)
    same(classifier(model, parameters=HEAD).on_loss(XQ, YQ).query_values, of_model(model, XQ, YQ))


class Words(nn.Module):
    def __init__(self):
        super().__init__()
        self.table = seeded(lambda: nn.Embedding(9, 3))
        self.rest = Headed()

    def forward(self, x):
        return self.rest(self.table(x).mean(1))


def test_words_are_moved_where_they_are_embedded():
    model, words = Words().double().eval(), np.arange(3 * N).reshape(N, 3) % 9
    head = ["rest.head.weight", "rest.head.bias"]
    with refused("which cannot be moved by a small amount", "Explain a model of the embedded inputs instead"):
        classifier(model, X=words, parameters=head).of_perturbing([3], on=(words[:4], YQ))
    embedded = model.table(torch.tensor(words)).mean(1).detach()
    whole, part = classifier(model, X=words, parameters=head), classifier(model.rest, X=embedded, parameters=HEAD)
    same(part.on_loss(embedded[:4], YQ).values, whole.on_loss(words[:4], YQ).values)
    assert part.of_perturbing([3], on=(embedded[:4], YQ)).shape == (4, 1, 3)


# module.py


def test_a_module_is_explained_on_pairs():
    with refused("A module is explained on (x, y) examples", "Pass X and y, or a Dataset of (x, y); for other "):
        classifier(X=X, y=None)
    same(classifier(X=pairs(), y=None).on_loss(XQ, YQ).values, of_net())
    triples = Items((x, y, 0) for x, y in pairs().items)
    with refused("A module is explained on (x, y) examples", "for other shapes write "):
        classifier(X=triples, y=None)
    model = net()

    def loss(params, example):
        x, y, _ = example
        return F.cross_entropy(torch.func.functional_call(model, params, (x[None],)), y[None])

    params = {name: parameter.detach() for name, parameter in model.named_parameters()}
    objective = uw.Objective(loss, params, penalty=0.1, penalty_per_example=True)
    mine = uw.Influence(objective, triples, curvature=uw.operators.Identity(), damping=0.1)
    plain = classifier(curvature=uw.operators.Identity(), damping=0.1)
    same(mine.on_loss(Items(triples.items[:4])).values, plain.on_loss(X[:4], Y[:4]).values)


class Trained(nn.Module):
    """As a LightningModule with a training step only."""

    def __init__(self):
        super().__init__()
        self.loss, self.net = nn.CrossEntropyLoss(), net()

    def training_step(self, batch):
        return self.loss(self.net(batch[0]), batch[1])


class Called(Trained):
    def forward(self, x):
        return self.net(x)


def test_a_module_without_forward():
    model = Trained()
    with refused("has no forward(x) of its own", "Explain the network "):
        uw.explain(model, X, Y, loss=F.cross_entropy)
    expected = of_net()
    same(uw.explain(model.net, X, Y, loss=F.cross_entropy, penalty=0.1).on_loss(XQ, YQ).values, expected)
    same(uw.explain(Called(), X, Y, loss=F.cross_entropy, penalty=0.1).on_loss(XQ, YQ).values, expected)


def test_rows_that_the_criterion_does_not_count():
    labels = changed(Y, [3, 5], -100)
    with warned("does not count row(s)", "Leave them out, and no value of the others changes"):
        whole = classifier(y=labels)
    kept = np.delete(np.arange(N), [3, 5])
    values = whole.on_loss(XQ, YQ).values
    same(classifier(X=X[kept], y=labels[kept]).on_loss(XQ, YQ).values, values[:, kept])
    assert not values[:, [3, 5]].any()


def test_a_query_that_the_criterion_does_not_count():
    labels = changed(YQ, 2, -100)
    with refused("so its loss is not defined: torch gives NaN", "Leave it out"):
        classifier().on_loss(XQ, labels)
    same(classifier().on_loss(XQ[[0, 1, 3]], labels[[0, 1, 3]]).values, of_net()[[0, 1, 3]])


# one_by_one.py


def test_a_label_beyond_the_outputs():
    labels = changed(Y, 10, 2)
    with refused("The loss failed on an example", "Pass labels 0 … K−1 to a model of K outputs"):
        classifier(y=labels)
    same(classifier(net(3), y=labels).on_loss(XQ, YQ).query_values, of_model(net(3), XQ, YQ))
    same(classifier(y=np.minimum(labels, 1)).on_loss(XQ, YQ).query_values, of_model(net(), XQ, YQ))


def own_loss(output, target):
    return F.cross_entropy(output, target)


def test_a_label_that_a_function_ignores():
    labels = changed(Y, 10, -100)
    with refused("The loss of an example alone is", "Pass the criterion itself, such as torch.nn.CrossEntropyLoss()"):
        classifier(y=labels, loss=own_loss)
    with pytest.warns(TheoryWarning, match="does not count"):
        itself = classifier(y=labels, loss=torch.nn.CrossEntropyLoss()).on_loss(XQ, YQ).values
    kept = np.delete(np.arange(N), 10)
    same(classifier(X=X[kept], y=labels[kept], loss=own_loss).on_loss(XQ, YQ).values, itself[:, kept])


class Squeezed(nn.Module):
    """One output without its axis."""

    def __init__(self, *axis):
        super().__init__()
        self.inner, self.axis = net(1), axis

    def forward(self, x):
        return self.inner(x).squeeze(*self.axis)


@pytest.mark.filterwarnings("ignore:Using a target size")
def test_an_output_that_lost_its_batch():
    with refused("returns a single number without a batch axis", "Use .squeeze(-1), which leaves the batch axis"):
        regressor(Squeezed(), y=Z)
    same(regressor(Squeezed(-1), y=Z).on_loss(XQ, ZQ).values, regressor().on_loss(XQ, ZQ[:, None]).values)


class OneOnly(nn.Module):
    """A model of one example at a time."""

    def __init__(self):
        super().__init__()
        self.inner = net()

    def forward(self, x):
        return self.inner(x.reshape(1, 3))


def test_a_model_or_a_loss_of_one_example():
    with refused(
        "accept one example but not a batch of", "Pass a model of batches and loss(output, target) that takes"
    ):
        classifier(OneOnly())
    with refused(
        "accept one example but not a batch of", "Pass a model of batches and loss(output, target) that takes"
    ):
        classifier(loss=lambda output, target: F.cross_entropy(output, target.reshape(1)))
    same(classifier(OneOnly().inner, loss=F.cross_entropy).on_loss(XQ, YQ).query_values, of_model(net(), XQ, YQ))


class Before(nn.Module):
    """A network behind a change of its inputs."""

    def __init__(self, change):
        super().__init__()
        self.change, self.inner = change, net()

    def forward(self, x):
        return self.inner(self.change(x))


def test_outputs_that_depend_on_the_batch():
    model = Before(Centre())
    with refused(
        "gives other outputs for a batch", "Call model.eval(), which ends batch statistics, or take the mean "
    ):
        classifier(model)
    model.eval()
    same(classifier(model).on_loss(XQ, YQ).query_values, of_model(model, XQ, YQ))
    with refused(
        "gives other outputs for a batch", "Call model.eval(), which ends batch statistics, or take the mean "
    ):
        classifier(Before(lambda x: x - x.mean(0)).eval())
    model = Before(lambda x: x - x.mean(1, keepdim=True))
    same(classifier(model).on_loss(XQ, YQ).query_values, of_model(model, XQ, YQ))


def test_a_criterion_that_gives_one_number_for_each_example():
    with refused("for a batch; it must return one number", "Use reduction='mean'"):
        classifier(loss=lambda output, target: F.cross_entropy(output, target, reduction="none").squeeze())
    found = classifier(loss=lambda output, target: F.cross_entropy(output, target, reduction="mean"))
    same(found.on_loss(XQ, YQ).values, of_net())


def mine(output, target, reduction="mean"):
    """A mean, whatever it is told."""
    return F.mse_loss(output, target)


def really(output, target, reduction="mean"):
    return F.mse_loss(output, target, reduction=reduction)


def test_a_criterion_that_says_it_sums_and_does_not():
    with refused("says reduction='sum' and gives the mean over a batch", "Pass it with reduction='mean', or sum"):
        regressor(loss=partial(mine, reduction="sum"))
    on, expected = (XQ, ZQ[:, None]), regressor().on_loss(XQ, ZQ[:, None]).values
    same(regressor(loss=partial(mine, reduction="mean")).on_loss(*on).values, expected)
    summed = regressor(loss=partial(really, reduction="sum"), penalty=0.1 * N, penalty_per_example=True)
    same(summed.on_loss(*on).values, expected)


def test_class_weights_inside_a_function():
    weight = torch.tensor([1.0, 5.0], dtype=torch.float64)
    with refused("It weighs examples unequally in a way that is not known", "pass one of them in place of a function "):
        classifier(loss=lambda output, target: F.cross_entropy(output, target, weight=weight))
    itself = classifier(loss=torch.nn.CrossEntropyLoss(weight=weight)).on_loss(XQ, YQ).values
    same(classifier(loss=partial(F.cross_entropy, weight=weight)).on_loss(XQ, YQ).values, itself)
    times = 1 + 4 * Y
    same(itself, classifier(sample_weight=N * times / times.sum()).on_loss(XQ, YQ).values)


def test_a_label_that_is_rarely_ignored_inside_a_function():
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(600, 4, generator=draw, dtype=torch.float64)
    targets = torch.randint(0, 3, (600, 2), generator=draw)
    targets[301, 1] = -100  # in none of the rows that are spread over the data
    model = torch.nn.Sequential(torch.nn.Linear(4, 6), torch.nn.Unflatten(1, (3, 2))).double()

    def of_words(loss, **weights):
        return uw.explain(model, x, targets, loss=loss, penalty=0.1, **weights).on_loss(x[:2], targets[:2]).values

    with refused("It weighs examples unequally in a way that is not known", "pass one of them in place of a function "):
        of_words(lambda output, target: F.cross_entropy(output, target))

    def mean_of_means(output, target):
        return (F.cross_entropy(output, target, reduction="none").sum(1) / (target >= 0).sum(1)).mean()

    counted = (targets >= 0).double().mean(1).numpy()
    same(of_words(F.cross_entropy), of_words(mean_of_means, sample_weight=counted / counted.mean()))


@pytest.mark.filterwarnings("ignore:Using a target size")
def test_targets_of_another_shape_than_the_outputs():
    with refused("or broadcasts outputs", "make output and target shapes equal for the others"):
        regressor(y=Z)
    same(
        regressor(y=Z[:, None]).on_loss(XQ, ZQ[:, None]).query_values,
        (net(1)(torch.tensor(XQ)).detach().numpy()[:, 0] - ZQ) ** 2,
    )


def test_a_function_that_sums():
    def summing(output, target):
        return F.cross_entropy(output, target, reduction="sum")

    penalty, n = 4.0, N
    with warned("gives the sum over a batch", "pass penalty=penalty/n and penalty_per_example=False, or a torch.nn "):
        classifier(loss=summing, penalty=penalty)
    told = classifier(loss=summing, penalty=penalty / n, penalty_per_example=False)
    criterion = classifier(loss=nn.CrossEntropyLoss(reduction="sum"), penalty=penalty)
    same(told.on_loss(XQ, YQ).values, criterion.on_loss(XQ, YQ).values)


TIME = np.exp(Z / 4)


class Pair(nn.Module):
    """The difference of two scores."""

    def __init__(self):
        super().__init__()
        self.score = net(1)

    def forward(self, both):
        return self.score(both[:, 0]) - self.score(both[:, 1])


def later(score, target):
    """A ranking: softplus of the difference for every pair of which one is later."""
    apart = (target[:, 0][:, None] > target[:, 0][None]).double()
    return (F.softplus(score.T - score) * apart).sum() / apart.sum()


def test_rows_that_are_compared():
    with refused("compares the rows of a batch", "Make an example of what is compared: a Dataset of "):
        regressor(y=TIME[:, None], loss=later)
    dataset = Items(
        (torch.tensor(X[[i, j]]), torch.ones(1).double()) for i in range(9) for j in range(9) if TIME[i] > TIME[j]
    )
    model = Pair()
    pairwise = uw.explain(model, dataset, loss=lambda gap, _: F.softplus(-gap).mean(), penalty=0.1)
    whole = later(model.score(torch.tensor(X[:9])), torch.tensor(TIME[:9, None]))
    same(pairwise.on_loss(dataset).query_values.mean(), whole.detach())

    def survival(output, target):
        time, event, f = target[:, 0], target[:, 1], output[:, 0]
        return (torch.exp(f) * time - event * f).mean()

    target = np.stack([TIME, Y], 1)
    alone = regressor(y=target, loss=survival).on_loss(XQ, target[:4])
    f = net(1)(torch.tensor(XQ)).detach().numpy()[:, 0]
    same(alone.query_values, np.exp(f) * TIME[:4] - Y[:4] * f)


# reading.py


def test_half_a_class():
    influence, encoded = classifier(), np.searchsorted(np.array([0.25, 0.5]), [0.5])
    with refused("which is no class number", "Encode the labels, or use a regression loss"):
        influence.of_relabeling([0], [0.5], on=(XQ, YQ))
    relabelled = influence.of_relabeling([0, 3], np.r_[encoded, encoded], on=(XQ, YQ)).values
    assert not relabelled[:, Y[[0, 3]] == 1].any()
    assert relabelled[:, Y[[0, 3]] == 0].all()
    numbers = regressor(y=Y[:, None] * 1.0)
    half, full = (numbers.of_relabeling([0], [[label]], on=(XQ, ZQ[:, None])).values for label in (0.5, 1.0 - Y[0]))
    same(2 * half, full)


# sklearn.py


def test_an_estimator_is_explained_on_both():
    with refused("was fitted on arrays X and y", "pass both: explain(model, X, y)"):
        uw.explain(fitted(), X)
    assert uw.explain(fitted(), X, NAMES).check().ok


def test_no_rows():
    with refused("There are no examples: X has 0 rows", "Pass the X and y that fit() was given"):
        uw.explain(fitted(), X[:0], NAMES[:0])
    assert uw.explain(fitted(), X, NAMES).check().ok


def test_a_loss_without_kinks_is_its_own():
    with refused("whose own has no kinks and is read off it", "Omit it, or write Influence(Objective("):
        ridge(loss=F.mse_loss)
    same(of_ridge(2.0, damping=0.0).on_loss(XQ, ZQ).values, ridge().on_loss(XQ, ZQ).values)


def test_as_many_labels_as_rows():
    with refused("rows and y has", "Pass one label per row, in the order of the rows"):
        logistic(X, NAMES[:-1])
    assert logistic(X, NAMES).check().ok


def test_a_pipeline_of_nothing():
    with refused("The Pipeline has no steps", "Pass a fitted Pipeline that ends in an estimator"):
        uw.explain(Pipeline([]), X, Z)
    known(uw.explain(make_pipeline(StandardScaler(), Ridge()).fit(X, Z), X, Z), XQ, ZQ)


def test_a_tree_is_trained_without_the_rows():
    tree = DecisionTreeClassifier(max_depth=2, random_state=0)
    with refused("is not fitted by minimising a smooth function of parameters", "Retrain without the rows instead"):
        uw.explain(tree.fit(X, Y), X, Y)
    before = tree.predict_proba(X)
    after = tree.fit(np.delete(X, [3, 7, 9], 0), np.delete(Y, [3, 7, 9])).predict_proba(X)
    assert 0 < np.abs(after - before).max() <= 1


def test_a_class_of_estimators_is_no_estimator():
    with refused("is a class, not a fitted estimator", "Pass the object that fit() returned"):
        uw.explain(Ridge, X, Z)
    known(uw.explain(Ridge().fit(X, Z), X, Z), XQ, ZQ)


def test_a_transformer_predicts_nothing():
    scaler = StandardScaler().fit(X)
    with refused(
        "transforms X and predicts nothing", "Pass the estimator after it, or a fitted Pipeline that ends in "
    ):
        uw.explain(scaler, X, Z)
    after = Ridge().fit(scaler.transform(X), Z)
    part = uw.explain(after, scaler.transform(X), Z).on_loss(scaler.transform(XQ), ZQ).values
    whole = make_pipeline(StandardScaler(), Ridge()).fit(X, Z)
    same(uw.explain(whole, X, Z).on_loss(XQ, ZQ).values, part)


def test_a_pipeline_inside_a_pipeline():
    inner = make_pipeline(StandardScaler(), Ridge())
    with refused("inside a Pipeline is not supported", "Put its steps into the outer Pipeline"):
        uw.explain(make_pipeline(FunctionTransformer(), inner).fit(X, Z), X, Z)
    outer = make_pipeline(FunctionTransformer(), StandardScaler(), Ridge()).fit(X, Z)
    known(uw.explain(outer, X, Z), XQ, ZQ)


class Mine(Ridge):
    """An estimator of one's own."""


def test_an_estimator_that_is_not_known():
    with refused("is not supported. ", "Write its objective yourself: upweight.Influence(upweight.Objective("):
        uw.explain(Mine(alpha=2.0).fit(X, Z), X, Z)
    same(of_ridge(2.0, damping=0.0).on_loss(XQ, ZQ).values, ridge().on_loss(XQ, ZQ).values)


def test_an_estimator_before_fit():
    model = Ridge(alpha=2.0)
    with refused("is not fitted, so it has no parameters to explain", "Call model.fit(X, y) first"):
        uw.explain(model, X, Z)
    model.fit(X, Z)
    known(uw.explain(model, X, Z), XQ, ZQ)


def test_an_estimator_that_was_changed_after_fit():
    model = Ridge(alpha=2.0).fit(X, Z).set_params(fit_intercept=False)
    with refused("from those of its fitted parameters", "Refit it"):
        uw.explain(model, X, Z)
    model.fit(X, Z)
    known(uw.explain(model, X, Z), XQ, ZQ)


def test_a_hinge_is_compared_with_refits():
    model = SVC(C=0.3, tol=1e-9).fit(X, Y)
    with warned("There ‖∇R‖ =", "Compare it with refits: agreement(scores, leave_one_out(influence, (Xq, yq), rows))"):
        influence = uw.explain(model, X, Y)
    Xq, yq, rows = XQ, YQ, range(0, N, 4)
    scores = influence.on_loss(Xq, yq)
    found = uw.agreement(scores, uw.leave_one_out(influence, (Xq, yq), rows, progress=False))
    assert found.pearson > 0.8
    with pytest.warns(TheoryWarning, match=r"Smoother: loss=losses.smooth_hinge\(t\), t=0.001"):
        uw.explain(model, X, Y, loss=losses.hinge)
    with pytest.warns(TheoryWarning):
        smoother = uw.explain(model, X, Y, loss=losses.smooth_hinge(0.001))
    same(smoother.on_loss(Xq, yq).values, scores.values)


def test_a_fit_that_stopped_early():
    early = silently(LogisticRegression(C=1e3, max_iter=2), X, Y)
    with warned("is not at a minimum of its objective on these data", "refit with a smaller tol and a larger max_iter"):
        uw.explain(early, X, Y)
    known(uw.explain(LogisticRegression(C=1e3, tol=1e-10, max_iter=5000).fit(X, Y), X, Y), XQ, YQ)


def test_data_of_another_fit():
    with warned("is not at a minimum of its objective on these data", "pass those"):
        uw.explain(fitted("ridge"), X, Z + X[:, 0])
    known(uw.explain(fitted("ridge"), X, Z), XQ, ZQ)


def test_a_target_encoder_that_encodes_each_row_by_others():
    town, y = np.array(["A", "B", "C"])[THREE][:, None], Z + THREE
    with pytest.warns(TheoryWarning, match="Encode first, Z = encoder.fit"):
        uw.explain(make_pipeline(TargetEncoder(), Ridge()).fit(town, y), town, y)
    encoder = TargetEncoder()
    encoded = encoder.fit(town, y).transform(town)
    known(uw.explain(Ridge().fit(encoded, y), encoded, y), encoded[:4], y[:4])


# What one line of REFUSED says of one estimator; those that name a line to type are in test_estimator_inputs.py.


def told(model, advice, y):
    """The refusal of a fitted model, with its advice."""
    with pytest.raises(UnsupportedModel, match=advice):
        uw.explain(silently(model, X, y), X, y)


def test_a_calibrated_model_is_explained_before_calibration():
    told(CalibratedClassifierCV(LogisticRegression(**TIGHT), cv=3), "model itself, fitted on all rows, before calib", Y)
    known(uw.explain(LogisticRegression(**TIGHT).fit(X, Y), X, Y), XQ, YQ)


def test_a_chain_is_explained_one_output_at_a_time():
    told(ClassifierChain(LogisticRegression(**TIGHT)), "Explain a model of one output at a time", LABELS)
    for y in LABELS.T:
        known(uw.explain(LogisticRegression(**TIGHT).fit(X, y), X, y), XQ, y[:4])


@pytest.mark.parametrize(
    ("several", "one"),
    [
        (MultiTaskLasso(alpha=0.1), Lasso(alpha=0.1, tol=1e-12)),
        (MultiTaskElasticNet(alpha=0.1), ElasticNet(alpha=0.1, tol=1e-12)),
        (MultiTaskLassoCV(cv=3), LassoCV(cv=3, tol=1e-12)),
        (MultiTaskElasticNetCV(cv=3), ElasticNetCV(cv=3, tol=1e-12)),
    ],
)
def test_several_tasks_are_one_model_each(several, one):
    told(several, f"Fit one {type(one).__name__} per output", TWO)
    known(uw.explain(one.fit(X, Z), X, Z), XQ, ZQ)


def test_machines_of_nu():
    told(NuSVC(nu=0.2), "Refit as SVC with the C that suits", Y)
    told(NuSVR(), "Refit as SVR with the epsilon that suits", Z)
    with pytest.warns(TheoryWarning):
        of_classes, of_numbers = uw.explain(SVC(C=0.5).fit(X, Y), X, Y), uw.explain(SVR(epsilon=0.5).fit(X, Z), X, Z)
    same(of_classes.on_loss(XQ, YQ).query_values, hinges(SVC(C=0.5).fit(X, Y)))
    same(of_numbers.on_loss(XQ, ZQ).query_values, tubes(SVR(epsilon=0.5).fit(X, Z)))


def test_one_model_per_pair_of_classes():
    model = OneVsOneClassifier(LogisticRegression(**TIGHT))
    told(model, "Explain each of its estimators_ on its own rows and labels, or use SVC", THREE)
    for (i, j), part in zip([(0, 1), (0, 2), (1, 2)], model.estimators_, strict=True):
        own = (i == THREE) | (j == THREE)
        labels = (THREE[own] == j).astype(int)
        known(uw.explain(part, X[own], labels), X[own][:4], labels[:4])
    with pytest.warns(TheoryWarning):
        assert uw.explain(SVC().fit(X, THREE), X, THREE).on_loss(X, THREE).measure == "hinge, one-vs-one"


def test_one_model_per_class():
    told(
        OneVsRestClassifier(LogisticRegression(**TIGHT)), "or use LogisticRegression, whose multinomial loss is", THREE
    )
    known(uw.explain(LogisticRegression(**TIGHT).fit(X, THREE), X, THREE), X[:4], THREE[:4])


def test_a_perceptron():
    told(Perceptron(), "Refit as SGDClassifier with loss='hinge' or 'log_loss'", Y)
    for loss in ("hinge", "log_loss"):
        of_sgd(SGDClassifier(loss=loss, **SGD), Y)


def test_a_model_without_labels_is_not_asked_for_its_loss():
    model = seeded(Sentences)
    with refused("has no loss to be asked for", "Pass rows with the column 'labels'"):
        uw.explain(model, sentences(labelled=False))
    influence = uw.explain(model, sentences(), damping=1.0)
    assert np.isfinite(influence.on_loss(sentences()[:2]).values).all()


def test_a_model_that_knows_no_loss_gets_one():
    class Plain(Sentences):
        def forward(self, input_ids, attention_mask):
            return super().forward(input_ids, attention_mask)["logits"]

    with refused("returns no loss and logits", "Pass the criterion of its output and the labels, loss="):
        uw.explain(seeded(Plain), sentences())
    influence = uw.explain(seeded(Plain), sentences(), loss=lambda output, y: F.cross_entropy(output, y), damping=1.0)
    asked = uw.explain(seeded(Sentences), sentences(), damping=1.0).on_loss(sentences()[:2]).values
    np.testing.assert_allclose(influence.on_loss(sentences()[:2]).values, asked, rtol=1e-9)


def test_a_loss_that_is_none_of_the_known_ones_is_passed():
    model = seeded(lambda: Sentences(2.0))
    with refused("which is none that is known", "or a criterion of its output and the labels, loss="):
        uw.explain(model, sentences())
    influence = uw.explain(model, sentences(), loss=lambda o, y: 2 * F.cross_entropy(o["logits"], y), damping=1.0)
    half = uw.explain(seeded(Sentences), sentences(), damping=0.5).on_loss(sentences()[:2]).values
    np.testing.assert_allclose(influence.on_loss(sentences()[:2]).values, 2 * half, rtol=1e-6)


def test_a_smoothed_loss_of_tokens_is_passed():
    class Tagged(Sentences):
        """A label for every word, smoothed where the model computes its own loss."""

        def forward(self, input_ids, attention_mask, labels=None):
            logits = self.head(self.words(input_ids))
            own = None if labels is None else smoothed(logits.transpose(1, 2), labels)
            return {"logits": logits, "loss": own}

    smoothed = nn.CrossEntropyLoss(label_smoothing=0.2)
    model = seeded(Tagged)
    rows = [{**row, "labels": [word % 2 for word in row["input_ids"]]} for row in sentences()]
    with refused("which is none that is known", "Pass torch's criterion of classes, loss=torch.nn.CrossEntropyLoss("):
        uw.explain(model, rows)
    influence = uw.explain(model, rows, loss=smoothed, damping=1.0)
    logits = [model.head(model.words(torch.tensor(row["input_ids"]))) for row in rows[:3]]
    losses = [float(smoothed(f, torch.tensor(row["labels"])).detach()) for f, row in zip(logits, rows[:3], strict=True)]
    np.testing.assert_allclose(influence.on_loss(rows[:3]).query_values, losses, rtol=1e-6)


def test_a_criterion_that_reads_another_part_of_the_output():
    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(3, 2)

        def forward(self, x):
            return {"score": self.linear(x), "inputs": x}

    with refused("and the criterion does not take it", "Pass a criterion of the whole output"):
        uw.explain(seeded(Named), X, Y, loss=F.cross_entropy)
    influence = uw.explain(seeded(Named), X, Y, loss=lambda output, y: F.cross_entropy(output["score"], y), damping=0.1)
    plain = uw.explain(seeded(lambda: nn.Linear(3, 2)), X, Y, loss=F.cross_entropy, damping=0.1)
    np.testing.assert_allclose(influence.on_loss(XQ, YQ).values, plain.on_loss(XQ, YQ).values, rtol=1e-9)


class LastWord(Sentences):
    """Its answer is read off the last word that is no padding, if it knows which word that is."""

    def __init__(self, pad=None):
        super().__init__()
        self.config = SimpleNamespace(pad_token_id=pad)

    def forward(self, input_ids, attention_mask, labels=None):
        pad, count = self.config.pad_token_id, input_ids.shape[1]
        if pad == "unknown" and len(input_ids) > 1:
            raise ValueError("no padding token is defined")
        known = isinstance(pad, int)
        ends = (input_ids != pad).long().sum(1) if known else torch.full((len(input_ids),), count)
        logits = self.head(self.words(input_ids.gather(1, ends[:, None] - 1)[:, 0]))
        return {"logits": logits, "loss": None if labels is None else F.cross_entropy(logits, labels)}


@pytest.mark.parametrize("pad", [None, "unknown"])
def test_an_answer_read_off_the_last_word(pad):
    rows = [{**row, "input_ids": [1 + word % 19 for word in row["input_ids"]]} for row in sentences()]
    model = seeded(lambda: LastWord(pad))
    if pad is None:
        with refused("they differ by up to ", "Set model.config.pad_token_id to the tokenizer's pad_token_id, or pass"):
            uw.explain(model, rows)
        model.config.pad_token_id = 0
    else:
        with refused("and not beside the longer row", "Set model.config.pad_token_id to the tokenizer's pad_token_id"):
            uw.explain(model, rows)
        model.config.pad_token_id = 0
    values = uw.explain(model, rows, damping=1.0).on_loss(rows[:2]).values
    same = [{"input_ids": row["input_ids"][-1:], "labels": row["labels"]} for row in rows]
    np.testing.assert_allclose(values, uw.explain(model, same, damping=1.0).on_loss(same[:2]).values, rtol=1e-9)


class Pointing(nn.Module):
    """Where an answer begins and ends in a row of words: two softmaxes over its places."""

    def __init__(self):
        super().__init__()
        self.words, self.head = nn.Embedding(20, 4), nn.Linear(4, 2)

    def forward(self, input_ids, attention_mask):
        start, end = self.head(self.words(input_ids)).unbind(-1)
        return {"start": start, "end": end}


def test_a_loss_of_all_places_of_a_row():
    def span(output, y):
        return F.cross_entropy(output["start"], y[:, 0]) + F.cross_entropy(output["end"], y[:, 1])

    model, rows = seeded(Pointing), [{**row, "labels": [0, k % 2]} for k, row in enumerate(sentences())]
    with refused("what stands behind its end counts", "Pass rows of one length, padded as they were in training"):
        uw.explain(model, rows, loss=span)
    longest = max(len(row["input_ids"]) for row in rows)
    for row in rows:
        missing = [0] * (longest - len(row["input_ids"]))
        row["attention_mask"] = [1] * len(row["input_ids"]) + missing
        row["input_ids"] = row["input_ids"] + missing
    influence = uw.explain(model, rows, loss=span, damping=1.0)
    outputs = model(torch.tensor([row["input_ids"] for row in rows[:3]]), None)
    alone = [{name: part[k : k + 1] for name, part in outputs.items()} for k in range(3)]
    losses = [float(span(f, torch.tensor([row["labels"]])).detach()) for f, row in zip(alone, rows[:3], strict=True)]
    np.testing.assert_allclose(influence.on_loss(rows[:3]).query_values, losses, rtol=1e-6)


def of_tokens():
    """A network that names one of 3 at each of 4 places, and rows of which some places are not counted."""
    draw = torch.Generator().manual_seed(0)
    model = seeded(lambda: nn.Sequential(nn.Linear(5, 12), nn.Unflatten(1, (3, 4))))
    y = torch.randint(0, 3, (8, 4), generator=draw)
    y[::2, 2:] = -100
    return model, torch.randn(8, 5, generator=draw), y


def test_a_mean_that_is_unknown():
    model, X, y = of_tokens()
    with refused("is no mean that is known", "Pass reduction='tokens'"):
        uw.explain(model, X, y, loss=F.cross_entropy, reduction="mean")
    tokens, rows = (
        uw.explain(model, X, y, loss=F.cross_entropy, reduction=reduction).examples.weights
        for reduction in ("tokens", "rows")
    )
    np.testing.assert_allclose(tokens, np.tile([2 / 3, 4 / 3], 4))
    np.testing.assert_allclose(rows, 1.0)


def test_a_mean_of_a_criterion_whose_labels_are_not_counted():
    model, X, y = of_tokens()

    def own(f, y):
        return F.cross_entropy(f, y)

    with refused("does not say how labels count in it", "Pass loss=torch.nn.CrossEntropyLoss()"):
        uw.explain(model, X, y.clamp(0), loss=own, reduction="rows")
    assert uw.explain(model, X, y, loss=nn.CrossEntropyLoss(), reduction="rows").n == 8
    assert uw.explain(model, X, y.clamp(0), loss=own).n == 8


def adapted(**settings):
    peft = pytest.importorskip("peft")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = seeded(
            lambda: peft.get_peft_model(
                nn.Sequential(nn.Linear(X.shape[1], 4), nn.Tanh(), nn.Linear(4, 3)),
                peft.LoraConfig(r=1, target_modules=["0"], **settings),
            )
        )
    return model.eval()


def test_adapters_that_are_merged_or_not_trained():
    model, y = adapted(), torch.from_numpy(THREE)
    with warned("are not trained yet", "Train them first"):
        uw.explain(model, X, y, loss=F.cross_entropy)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.fill_(0.5)
    model.merge_adapter()
    with refused("so nothing that the model computes depends on it", "Call model."):
        uw.explain(model, X, y, loss=F.cross_entropy)
    model.unmerge_adapter()
    assert "LoRA: 1 flat direction " in repr(uw.explain(model, X, y, loss=F.cross_entropy))


def test_adapters_whose_norm_is_held():
    model, y = adapted(use_dora=True), torch.from_numpy(THREE)
    with refused("whose norm of W + BA is detached", "Explain the magnitudes alone, whose gradient is whole"):
        uw.explain(model, X, y, loss=F.cross_entropy)
    influence = uw.explain(model, X, y, loss=F.cross_entropy, parameters=lambda name: "lora_magnitude" in name)
    assert influence.objective.size == 4


def next_of_twelve(rows):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return uw.explain(NextForCausalLM(), rows, curvature=uw.operators.Identity())


def test_rows_of_which_no_label_is_counted_are_left_out():
    rows = [{**row, "labels": [-100] * len(row["input_ids"])} for row in sequences()]
    with refused("has a label that is counted: all are ", "Leave such rows out, for they taught nothing"):
        next_of_twelve(rows)
    rows = [*rows, *({**row, "labels": row["input_ids"]} for row in sequences())]  # four of them come first
    with pytest.warns(TheoryWarning, match=r"does not count row\(s\) 0, 1, 2, 3, 4 and 3 more"):
        next_of_twelve(rows)
    rows = [row for row in rows if any(label != -100 for label in row["labels"][1:])]
    expected = next_of_twelve(sequences()).on_loss(sequences()[:1]).values
    np.testing.assert_allclose(next_of_twelve(rows).on_loss(sequences()[:1]).values, expected)


class Pooled(nn.Module):
    """A mean over positions, padded ones too."""

    def __init__(self):
        super().__init__()
        layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dropout=0.0)
        self.encoder, self.head = nn.TransformerEncoder(layer, 1), nn.Linear(8, 2)

    def forward(self, x, padded):
        return self.head(self.encoder(x, src_key_padding_mask=padded).mean(1))


def test_a_model_that_predicts_otherwise_without_gradients():
    torch.manual_seed(0)
    model, x = Pooled().eval(), torch.randn(8, 5, 8)
    padded = torch.arange(5)[None] >= torch.tensor([5, 3, 3, 4, 5, 3, 4, 3])[:, None]
    y = torch.arange(8) % 2
    with warned("gives other outputs under torch.no_grad() in eval mode", "Predict after "):
        influence = uw.explain(model, {"x": x, "padded": padded}, y, loss=F.cross_entropy, damping=0.1)
    given = influence.on_loss({"x": x, "padded": padded}, y).query_values
    trained = F.cross_entropy(model(x, padded), y, reduction="none").detach().numpy()
    same(given, trained, 1e-6)
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with torch.no_grad():
            same(F.cross_entropy(model(x, padded), y, reduction="none").numpy(), given, 1e-6)
    finally:
        torch.backends.mha.set_fastpath_enabled(before)
    pooled = {"x": x, "padded": torch.zeros(8, 5, dtype=torch.bool)}
    uw.explain(model, pooled, y, loss=F.cross_entropy, damping=0.1)  # says nothing
