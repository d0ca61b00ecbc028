"""Edited and retrained models, each against a real fit."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from sklearn.kernel_ridge import KernelRidge
from sklearn.linear_model import LogisticRegression, PoissonRegressor, SGDClassifier
from sklearn.svm import SVC, LinearSVC

import upweight as uw
from upweight.errors import InvalidInput, Undefined, UnsupportedModel
from upweight.model.losses import smooth_hinge

DRAW = np.random.default_rng(0)
X = DRAW.normal(size=(60, 3))
Y = (X[:, 0] + DRAW.normal(size=60) > 0).astype(int)
COUNTS = DRAW.poisson(np.exp(0.3 * X[:, 0])).astype(float)
ON = (X[:4] + 0.1, Y[:4])


def logistic(**settings):
    return LogisticRegression(tol=1e-12, max_iter=9000, **settings)


def coef(influence):
    return influence.objective.params["coef"].numpy()


# ---- kernels hold training rows only ---------------------------------------------------------------------------------


def rbf(kind):
    model = KernelRidge(kernel="rbf", gamma=1.0, alpha=0.1) if kind == "ridge" else SVC(gamma=1.0, C=10)
    return model.fit(X, Y)


def explained(model):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", uw.errors.TheoryWarning)  # hinges are smoothed
        return uw.explain(model, X, Y)


@pytest.mark.parametrize("kind", ["ridge", "machine"])
def test_a_row_that_the_kernel_features_do_not_hold_is_refused(kind):
    influence, far = explained(rbf(kind)), X[:1] + 4
    for ask in (
        lambda: uw.edited(influence, [0], far, [1]),
        lambda: influence.of_replacing([0], far, [1], on=ON),
        lambda: influence.of_adding(far, [1], on=ON),
        lambda: influence.on_params_of_replacing([0], far, [1]),
    ):
        with pytest.raises(UnsupportedModel, match=r"New row 0 lies outside of them with 1 of.*Nystroem"):
            ask()


def test_a_row_that_they_hold_is_a_real_refit():
    influence = explained(rbf("ridge"))
    changed = uw.retrained(uw.edited(influence, [0, 7], X[[3, 4]], [1, 0]))
    inputs, labels = X.copy(), Y.copy()
    inputs[[0, 7]], labels[[0, 7]] = X[[3, 4]], [1, 0]
    real = KernelRidge(kernel="rbf", gamma=1.0, alpha=0.1).fit(inputs, labels)
    np.testing.assert_allclose(uw.predict(changed, ON[0]).outputs[:, 0], real.predict(ON[0]), atol=1e-8)


def test_a_function_as_kernel_is_fitted_again_on_the_edited_rows():
    influence = explained(SVC(kernel=lambda A, B: A @ B.T, C=1, tol=1e-8).fit(X, Y))
    moved = X[[10, 11, 12]] + 3
    changed = uw.retrained(uw.edited(influence, [0, 1, 2], moved))
    inputs = X.copy()
    inputs[:3] = moved
    real = SVC(kernel="linear", C=1, tol=1e-8).fit(inputs, Y)
    np.testing.assert_allclose(uw.predict(changed, ON[0]).outputs[:, 0], real.decision_function(ON[0]), atol=1e-5)


def test_a_precomputed_kernel_knows_no_new_rows():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", uw.errors.TheoryWarning)
        influence = uw.explain(SVC(kernel="precomputed", C=1).fit(X @ X.T, Y), X @ X.T, Y)
    with pytest.raises(UnsupportedModel, match="precomputed"):
        influence.of_adding((X @ X.T)[:1], [1], on=((X @ X.T)[:2], Y[:2]))


# ---- rows that were taken out stay out -------------------------------------------------------------------------------


def test_rows_that_were_left_out_stay_out():
    gone = [0, 5, 9]
    less = uw.retrained(uw.explain(logistic().fit(X, Y), X, Y), without=gone)
    assert not less.of_relabeling(gone, 1 - Y[gone], on=ON).values.any()
    assert not less.of_replacing(gone, X[gone] + 1, Y[gone], on=ON).values.any()
    kept = np.setdiff1d(np.arange(len(X)), gone)
    again = uw.retrained(uw.edited(less, [0], y_new=[1 - Y[0]]))
    np.testing.assert_allclose(coef(again), logistic().fit(X[kept], Y[kept]).coef_, atol=1e-6)


def test_half_a_row_stays_half():
    half = np.ones(len(X))
    half[3] = 0.5
    less = uw.retrained(uw.explain(logistic().fit(X, Y), X, Y), weights=half)
    changed, labels = uw.retrained(uw.edited(less, [3], y_new=[1 - Y[3]])), Y.copy()
    labels[3] = 1 - Y[3]
    np.testing.assert_allclose(coef(changed), logistic().fit(X, labels, sample_weight=half).coef_, atol=1e-6)


def test_a_function_of_weights_is_not_asked_about_edited_rows():
    influence = uw.explain(logistic().fit(X, Y), X, Y)

    def train(weights, seed=0):
        kept = logistic().fit(X, Y, sample_weight=weights)
        return {"coef": torch.from_numpy(kept.coef_), "intercept": torch.from_numpy(kept.intercept_)}

    uw.retrained(influence, without=[1], retrain=train)
    with pytest.raises(InvalidInput, match=r"retrain='train' is given weights only"):
        uw.retrained(uw.edited(influence, [1], y_new=[1 - Y[1]]), retrain=train)


# ---- a class that is gone --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("retrain", [None, uw.Refit()])
def test_a_class_whose_rows_all_got_other_labels_is_missed(retrain):
    labels = np.zeros(len(X), int)
    labels[:2] = 1
    influence = uw.explain(logistic().fit(X, labels), X, labels)
    with pytest.raises(Undefined, match="With the labels as they are now, no row of class 1 is left"):
        uw.retrained(uw.edited(influence, [0, 1], y_new=[0, 0]), retrain=retrain)


# ---- the penalty's share ---------------------------------------------------------------------------------------------

TWICE = {
    "Newton": (lambda: logistic(C=0.1), None, True, Y),
    "logistic": (lambda: logistic(C=0.1), uw.Refit(), True, Y),
    "machine": (
        lambda: LinearSVC(loss="hinge", C=0.05, tol=1e-9, max_iter=10**6, random_state=0),
        uw.Refit(),
        True,
        Y,
    ),
    "poisson": (lambda: PoissonRegressor(alpha=1.0, tol=1e-10, max_iter=1000), uw.Refit(), False, COUNTS),
    "descent": (
        lambda: SGDClassifier(loss="log_loss", alpha=0.1, max_iter=300, tol=None, random_state=0, average=True),
        uw.Refit(),
        None,
        Y,
    ),
}


@pytest.mark.filterwarnings("ignore::upweight.errors.TheoryWarning")
@pytest.mark.parametrize("case", TWICE)
def test_leaving_out_in_two_steps_is_leaving_out_at_once(case):
    build, retrain, folded, targets = TWICE[case]
    influence = uw.explain(build().fit(X, targets), X, targets, penalty_per_example=folded)
    once = uw.retrained(influence, without=np.arange(30), retrain=retrain)
    first = uw.retrained(influence, without=np.arange(15), retrain=retrain)
    twice = uw.retrained(first, without=np.arange(15, 30), retrain=retrain)
    np.testing.assert_allclose(coef(twice), coef(once), rtol=1e-6)


@pytest.mark.parametrize("folded", [False, True])
def test_a_new_label_with_another_class_weight_moves_the_penalty_as_predicted(folded):
    draw = np.random.default_rng(1)
    inputs = draw.normal(size=(2000, 3))
    labels = (inputs[:, 0] + draw.normal(size=2000) > 0).astype(int)
    model = logistic(C=0.002, class_weight={0: 1, 1: 8.0}).fit(inputs, labels)
    influence = uw.retrained(uw.explain(model, inputs, labels, penalty_per_example=folded))
    on = (inputs[:4] + 0.3, labels[:4])
    now = influence.on_loss(*on).query_values
    for row in np.flatnonzero(labels == 0)[:3]:
        said = influence.of_relabeling([row], [1], on=on).values[:, 0]
        real = uw.retrained(uw.edited(influence, [row], y_new=[1])).on_loss(*on).query_values - now
        assert float(real @ said / (said @ said)) == pytest.approx(1, abs=0.01)
        assert np.corrcoef(real, said)[0, 1] > 0.999


# ---- an intercept that nothing holds ---------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore::upweight.errors.TheoryWarning")
@pytest.mark.parametrize("folded", [False, True])
def test_a_held_intercept_is_held_where_the_new_fit_has_it(folded):
    draw = np.random.default_rng(0)
    inputs = draw.normal(size=(40, 2))
    labels = (inputs[:, 0] + 0.5 * draw.normal(size=40) > 0).astype(int)
    other = labels.copy()
    other[5] = 1 - labels[5]
    settings = {"penalty_per_example": folded, "loss": smooth_hinge(0.001)}

    def machine(y):
        return uw.explain(SVC(kernel="linear", C=0.02, tol=1e-10).fit(inputs, y), inputs, y, **settings)

    assert "intercept" in machine(labels).objective.penalty.tilt  # else the case shows nothing
    changed, fresh = uw.retrained(uw.edited(machine(labels), [5], y_new=[other[5]])), machine(other)
    on = (inputs[:4], other[:4])
    ours, theirs = changed.on_loss(*on), fresh.on_loss(*on)
    np.testing.assert_allclose(ours.values, theirs.values, atol=1e-6 * np.abs(theirs.values).max())
    np.testing.assert_allclose(
        changed.of_removing([1, 2], on=on).values, fresh.of_removing([1, 2], on=on).values, atol=1e-6
    )


# ---- modules ---------------------------------------------------------------------------------------------------------


def test_kept_features_stay_those_of_new_queries_when_the_body_is_trained_further():
    torch.manual_seed(0)
    body = torch.nn.Sequential(torch.nn.Linear(3, 5), torch.nn.Tanh(), torch.nn.Linear(5, 2)).double().eval()
    data, labels = torch.tensor(X), torch.tensor(Y)
    loss = torch.nn.functional.cross_entropy
    influence = uw.explain(body, data, labels, loss=loss, penalty=0.01, damping=0.1, parameters=["2.weight", "2.bias"])
    values, said = influence.on_loss(data[:4], labels[:4]).values, uw.predict(influence, data).outputs
    with torch.no_grad():
        for parameter in body.parameters():
            parameter.add_(torch.randn_like(parameter))
    np.testing.assert_array_equal(influence.on_loss(data[:4], labels[:4]).values, values)
    np.testing.assert_array_equal(uw.predict(influence, data).outputs, said)


def test_targets_in_a_column_are_classes():
    torch.manual_seed(0)
    module = torch.nn.Linear(3, 1).double()
    data, labels = torch.tensor(X), torch.tensor(Y, dtype=torch.float64)[:, None]
    influence = uw.explain(module, data, labels, loss=torch.nn.BCEWithLogitsLoss(), damping=0.1)
    assert uw.classes(influence) == [0, 1]
    assert uw.training_labels(influence).tolist() == Y.tolist()
    said = uw.predict(influence, data)
    assert said.labels.tolist() == (module(data)[:, 0] > 0).int().tolist()
    changed = uw.edited(influence, [2], y_new=[1.0 - Y[2]])
    assert uw.training_labels(changed, [2]).tolist() == [1 - Y[2]]


class Counted(torch.utils.data.Dataset):
    def __init__(self):
        self.read = 0

    def __len__(self):
        return len(X)

    def __getitem__(self, row):
        self.read += 1
        return torch.tensor(X[row]), torch.tensor(Y[row])


def test_labels_of_a_dataset_are_read_once_however_often_it_is_edited():
    data = Counted()
    influence = uw.explain(torch.nn.Linear(3, 2).double(), data, loss=torch.nn.CrossEntropyLoss(), damping=0.1)
    uw.training_labels(influence)
    before = data.read
    for row in range(5):
        influence = uw.edited(influence, [row], y_new=[1 - Y[row]])
        uw.training_labels(influence)
    assert data.read - before < len(X)
    assert uw.training_labels(influence).tolist() == [*(1 - Y[:5]), *Y[5:]]


# ---- labels ----------------------------------------------------------------------------------------------------------


def test_ties_of_votes_are_broken_as_the_machine_breaks_them():
    draw = np.random.default_rng(0)
    inputs, labels = draw.normal(size=(150, 2)), draw.integers(0, 4, 150)
    model = SVC(break_ties=True, decision_function_shape="ovr").fit(inputs, labels)
    queries = draw.uniform(-3, 3, (3000, 2))
    plain = SVC().fit(inputs, labels)
    assert (model.predict(queries) != plain.predict(queries)).any()  # else the case shows nothing
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", uw.errors.TheoryWarning)
        influence = uw.explain(model, inputs, labels)
    assert uw.predict(influence, queries).labels.tolist() == model.predict(queries).tolist()


def test_an_accuracy_against_labels_of_another_type_is_refused():
    said = uw.predict(uw.explain(logistic().fit(X, Y), X, Y), X)
    with pytest.raises(InvalidInput, match=r"None of the 60 labels in y, such as .*'0'|'1'"):
        said.accuracy([str(label) for label in Y])
