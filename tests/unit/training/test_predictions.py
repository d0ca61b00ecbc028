"""Outputs and labels in the user's own names, for estimators and modules."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from sklearn.datasets import load_iris
from sklearn.linear_model import LinearRegression, LogisticRegression, RidgeClassifier, SGDClassifier
from sklearn.neural_network import MLPClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.svm import SVC, LinearSVC

import upweight as uw
from upweight.errors import InvalidInput, UnsupportedModel

X, Y = load_iris(return_X_y=True)
X = StandardScaler().fit_transform(X)
NAMES = np.array(["setosa", "versicolor", "virginica"])[Y]
NOISY = np.where(np.random.default_rng(0).random(len(Y)) < 0.1, "virginica", NAMES)
TWO = NOISY != "setosa"

CLASSIFIERS = [
    LogisticRegression(tol=1e-8),
    RidgeClassifier(),
    LinearSVC(loss="squared_hinge", tol=1e-8, max_iter=100_000),
    SVC(kernel="rbf"),
    SGDClassifier(loss="log_loss", alpha=0.1, max_iter=5000, tol=1e-9, learning_rate="optimal", random_state=0),
    MLPClassifier((5,), alpha=0.1, solver="lbfgs", max_iter=3000, tol=1e-12, random_state=0),
    make_pipeline(StandardScaler(), LogisticRegression(class_weight="balanced", tol=1e-8)),
]


@pytest.mark.parametrize("model", CLASSIFIERS, ids=lambda model: str(model).partition("(")[0])
@pytest.mark.parametrize("count", [3, 2])
def test_labels_are_those_of_the_estimator(model, count):
    if isinstance(model, LinearSVC | SGDClassifier) and count == 3:
        pytest.skip("one-vs-rest of several classes is refused")
    rows = TWO if count == 2 else np.arange(len(X))
    inputs, labels = X[rows], NOISY[rows]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.fit(inputs, labels)
        influence = uw.explain(model, inputs, labels)
    said = uw.predict(influence, inputs)
    assert said.labels is not None
    assert said.labels.tolist() == model.predict(inputs).tolist()
    assert said.accuracy(labels) == pytest.approx(model.score(inputs, labels))
    assert uw.classes(influence) == sorted(set(labels))
    assert uw.training_labels(influence).tolist() == labels.tolist()
    assert uw.training_labels(influence, [5, 2]).tolist() == labels[[5, 2]].tolist()
    if isinstance(model, SVC) and count == 3:
        with pytest.raises(UnsupportedModel, match=r"pairs of 3 classes.*LogisticRegression"):
            said.margins(labels)
        return
    assert (said.per_class().argmax(1) == [sorted(set(labels)).index(label) for label in said.labels]).all()
    np.testing.assert_array_equal(said.margins(labels) > 0, said.labels == labels)
    assert (said.margins(said.labels) > 0).all()


@pytest.mark.parametrize("loss", [torch.nn.BCELoss(), torch.nn.MSELoss()], ids=["cross-entropy", "squares"])
def test_margins_of_a_single_output_count_from_where_its_class_changes(loss):
    torch.manual_seed(0)
    module = torch.nn.Sequential(torch.nn.Linear(4, 1), torch.nn.Sigmoid(), torch.nn.Flatten(0)).double()
    y = torch.tensor((NAMES == "setosa").astype(float))
    influence = uw.explain(module, torch.tensor(X), y, loss=loss, damping=1.0)
    said = uw.predict(influence, torch.tensor(X))
    probability = module(torch.tensor(X)).detach().numpy()
    np.testing.assert_allclose(said.margins(np.ones(len(X), int)), probability - 0.5)
    np.testing.assert_allclose(said.margins(np.zeros(len(X), int)), 0.5 - probability)
    with pytest.raises(InvalidInput, match="2 is no class"):
        said.margins(np.full(len(X), 2))
    with pytest.raises(InvalidInput, match="150 predictions"):
        said.margins([1])


def test_outputs_are_decision_values_and_regressions_have_no_labels():
    model = LogisticRegression(tol=1e-8).fit(X, NAMES)
    said = uw.predict(uw.explain(model, X, NAMES), X[:5])
    np.testing.assert_allclose(said.outputs, model.decision_function(X[:5]), atol=1e-12)
    line = LinearRegression().fit(X, Y + 0.5)
    influence = uw.explain(line, X, Y + 0.5)
    np.testing.assert_allclose(uw.predict(influence, X[:5]).outputs[:, 0], line.predict(X[:5]), atol=1e-12)
    assert uw.predict(influence, X[:5]).labels is None
    assert uw.training_labels(influence) is None
    with pytest.raises(uw.errors.InvalidInput, match="no classes"):
        uw.predict(influence, X[:5]).accuracy(Y[:5])


class Rows(torch.utils.data.Dataset):
    def __init__(self, x, y):
        self.x, self.y = x, y

    def __len__(self):
        return len(self.x)

    def __getitem__(self, row):
        return self.x[row], self.y[row]


def test_a_module_s_labels_are_class_numbers():
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(4, 6), torch.nn.Tanh(), torch.nn.Linear(6, 3)).double().eval()
    x, y = torch.from_numpy(X), torch.from_numpy(Y)
    influence = uw.explain(net, x, y, loss=torch.nn.functional.cross_entropy)
    expected = net(x).argmax(1).tolist()
    assert uw.classes(influence) == [0, 1, 2]
    assert uw.predict(influence, x).labels.tolist() == expected
    assert uw.predict(influence, (uw.Examples(x, y))).labels.tolist() == expected
    data = uw.explain(net, Rows(x, y), loss=torch.nn.functional.cross_entropy)
    assert uw.predict(data, x).labels.tolist() == expected
    assert uw.training_labels(data).tolist() == Y.tolist()


@pytest.mark.parametrize("low", [0, -1])
def test_one_output_of_a_module_says_the_sign(low):
    torch.manual_seed(0)
    net = torch.nn.Linear(4, 1).double()
    y = torch.from_numpy(np.where(Y > 0, 1.0, low))

    def loss(output, target):
        signs = target if low else 2 * target - 1
        return torch.nn.functional.softplus(-signs * output[:, 0]).mean()

    influence = uw.explain(net, torch.from_numpy(X), y, loss=loss)
    expected = np.where(net(torch.from_numpy(X))[:, 0].detach().numpy() > 0, 1, low)
    assert uw.classes(influence) == [low, 1]
    assert uw.predict(influence, X).labels.tolist() == expected.tolist()
    assert uw.training_labels(influence).tolist() == y.tolist()


def test_a_loss_without_outputs_predicts_nothing():
    def loss(theta, example):
        return (theta @ example[0] - example[1]) ** 2

    influence = uw.Influence(uw.Objective(loss, torch.zeros(4, dtype=torch.float64)), (X, Y.astype(float)))
    with pytest.raises(uw.errors.InvalidInput, match="outputs"):
        uw.predict(influence, X)


def test_features_are_what_the_coefficients_multiply():
    pipe = make_pipeline(StandardScaler(), LogisticRegression(tol=1e-8)).fit(X + 3, NAMES)
    influence = uw.explain(pipe, X + 3, NAMES)
    np.testing.assert_allclose(uw.features(influence), pipe[0].transform(X + 3), atol=1e-12)
    np.testing.assert_allclose(uw.features(influence, X[:3]), pipe[0].transform(X[:3]), atol=1e-12)
