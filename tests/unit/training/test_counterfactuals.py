"""Edited data and really retrained models, against scikit-learn's own fit on the edited data."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.sparse
import torch
from sklearn.datasets import load_iris
from sklearn.linear_model import Lasso, LogisticRegression, PoissonRegressor, Ridge
from sklearn.preprocessing import StandardScaler
from sklearn.svm import SVC

import upweight as uw

X, Y = load_iris(return_X_y=True)
X = StandardScaler().fit_transform(X)
NAMES = np.array(["setosa", "versicolor", "virginica"])[Y]
TIGHT = {"tol": 1e-12, "max_iter": 10_000}
ROWS = [3, 77, 120]


def coef(influence):
    return influence.objective.params["coef"].numpy()


@pytest.mark.parametrize("sparse", [False, True])
def test_new_labels_then_training_is_fit_on_them(sparse):
    inputs = scipy.sparse.csr_matrix(X) if sparse else X
    influence = uw.explain(LogisticRegression(**TIGHT).fit(inputs, NAMES), inputs, NAMES)
    changed = uw.edited(influence, ROWS, y_new=["virginica", "setosa", "versicolor"])
    labels = NAMES.copy()
    labels[ROWS] = ["virginica", "setosa", "versicolor"]
    assert uw.training_labels(changed).tolist() == labels.tolist()
    assert uw.training_labels(influence).tolist() == NAMES.tolist()
    after = uw.retrained(changed)
    np.testing.assert_allclose(coef(after), LogisticRegression(**TIGHT).fit(inputs, labels).coef_, atol=1e-6)
    assert float(after.risk_gradient.norm()) < 1e-8
    again = uw.retrained(changed, retrain=uw.Refit())
    np.testing.assert_allclose(coef(again), coef(after), atol=1e-6)


def test_new_inputs_then_training_is_fit_on_them():
    influence = uw.explain(Ridge(alpha=2.0).fit(X, Y), X, Y)
    moved = X.copy()
    moved[ROWS] += 2.0
    after = uw.retrained(uw.edited(influence, ROWS, moved[ROWS]))
    np.testing.assert_allclose(coef(after)[0], Ridge(alpha=2.0).fit(moved, Y).coef_, atol=1e-10)
    both = Y.astype(float)
    both[ROWS] = -1.0
    after = uw.retrained(uw.edited(influence, ROWS, moved[ROWS], both[ROWS]))
    np.testing.assert_allclose(coef(after)[0], Ridge(alpha=2.0).fit(moved, both).coef_, atol=1e-10)


def test_the_prediction_of_an_edit_is_the_derivative_of_the_edit():
    influence = uw.explain(LogisticRegression(**TIGHT).fit(X, NAMES), X, NAMES)
    predicted = influence.of_relabeling([77], ["virginica"], on=(X[:20], NAMES[:20])).values[:, 0]
    after = uw.retrained(uw.edited(influence, [77], y_new=["virginica"]))
    actual = after.on_loss(X[:20], NAMES[:20]).query_values - influence.on_loss(X[:20], NAMES[:20]).query_values
    assert np.corrcoef(predicted, actual)[0, 1] > 0.99
    assert 0.7 < (actual @ predicted) / (predicted @ predicted) < 1.4


def test_balanced_class_weights_follow_the_new_label():
    model = LogisticRegression(class_weight={"setosa": 1.0, "versicolor": 3.0, "virginica": 5.0}, **TIGHT)
    influence = uw.explain(model.fit(X, NAMES), X, NAMES)
    labels = NAMES.copy()
    labels[3] = "virginica"
    after = uw.retrained(uw.edited(influence, [3], y_new=["virginica"]))
    np.testing.assert_allclose(coef(after), model.fit(X, labels).coef_, atol=1e-6)


@pytest.mark.parametrize(
    "model", [LogisticRegression(C=0.5, **TIGHT), Ridge(alpha=2.0)], ids=lambda model: type(model).__name__
)
def test_rows_left_out_are_those_of_fit_without_them(model):
    y = NAMES if isinstance(model, LogisticRegression) else Y.astype(float)
    influence = uw.explain(model.fit(X, y), X, y)
    after = uw.retrained(influence, without=ROWS)
    keep = np.setdiff1d(np.arange(len(X)), ROWS)
    np.testing.assert_allclose(coef(after).squeeze(), model.fit(X[keep], y[keep]).coef_.squeeze(), atol=1e-6)
    assert float(after.risk_gradient.norm()) < 1e-8


def test_a_mean_loss_takes_its_share_of_the_penalty_along():
    model = PoissonRegressor(alpha=0.3, tol=1e-10, max_iter=1000)
    influence = uw.explain(model.fit(X, Y), X, Y)
    after = uw.retrained(influence, without=ROWS)
    keep = np.setdiff1d(np.arange(len(X)), ROWS)
    share = len(keep) / len(X)
    assert influence.objective.folded
    assert float(after.risk_gradient.norm()) < 1e-8
    np.testing.assert_allclose(coef(after)[0], model.fit(X[keep], Y[keep]).coef_, atol=1e-6)
    assert share < 1


def test_an_svc_is_fitted_again_on_the_edited_rows():
    two = Y > 0
    inputs, labels = X[two], Y[two]
    model = SVC(C=1.0, tol=1e-8)
    model.fit(inputs, labels)
    with pytest.warns(uw.errors.TheoryWarning):
        influence = uw.explain(model, inputs, labels)
    after = uw.retrained(uw.edited(influence, [3, 60], y_new=[2, 1]))
    changed = labels.copy()
    changed[[3, 60]] = [2, 1]
    assert uw.predict(after, inputs).labels.tolist() == model.fit(inputs, changed).predict(inputs).tolist()


def test_a_module_on_arrays_and_on_a_dataset():
    torch.manual_seed(0)
    net = torch.nn.Linear(4, 3).double()
    x, y = torch.from_numpy(X), torch.from_numpy(Y)

    class Rows(torch.utils.data.Dataset):
        def __len__(self):
            return len(x)

        def __getitem__(self, row):
            return x[row], y[row]

    found = []
    for data in ((x, y), (Rows(),)):
        influence = uw.explain(net, *data, loss=torch.nn.functional.cross_entropy, penalty=0.1)
        changed = uw.edited(influence, ROWS, y_new=[2, 0, 1])
        whole = uw.edited(influence, ROWS, x[ROWS], [2, 0, 1])
        assert uw.training_labels(changed)[ROWS].tolist() == [2, 0, 1]
        found += [uw.retrained(changed).objective.theta, uw.retrained(whole).objective.theta]
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], atol=1e-6, rtol=0)
    labels = Y.copy()
    labels[ROWS] = [2, 0, 1]
    reference = uw.retrained(
        uw.explain(net, x, torch.from_numpy(labels), loss=torch.nn.functional.cross_entropy, penalty=0.1)
    )
    torch.testing.assert_close(found[0], reference.objective.theta, atol=1e-6, rtol=0)


def test_what_is_refused():
    influence = uw.explain(LogisticRegression(**TIGHT).fit(X, NAMES), X, NAMES)
    with pytest.raises(uw.errors.InvalidInput, match="nothing would change"):
        uw.edited(influence, [1])
    with pytest.raises(uw.errors.InvalidInput, match="twice"):
        uw.edited(influence, [1, 1], y_new=["setosa", "setosa"])
    with pytest.raises(uw.errors.InvalidInput, match="never saw"):
        uw.edited(influence, [1], y_new=["rose"])
    with pytest.raises(uw.errors.InvalidInput):
        uw.edited(influence, [1, 2], y_new=["setosa"])
    with pytest.raises(uw.errors.InvalidInput, match="one new example"):
        uw.edited(influence, [1, 2], X[:1])
    with pytest.raises(uw.errors.InvalidInput, match="No row"):
        uw.retrained(influence, without=np.arange(len(X)))
    with pytest.raises(uw.errors.InvalidInput, match="factor"):
        uw.retrained(influence, weights=np.ones(3))
    lasso = uw.explain(Lasso(alpha=0.1).fit(X, Y), X, Y)
    with pytest.raises(uw.errors.UnsupportedModel, match="other columns"):
        uw.retrained(lasso, without=[0])
