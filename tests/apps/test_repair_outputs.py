"""Margins of `repair` for models whose outputs are not one logit per class."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.datasets import load_iris
from sklearn.svm import SVC

import upweight as uw


@pytest.mark.parametrize(
    ("last", "criterion", "cut"),
    [
        (torch.nn.Sigmoid(), torch.nn.functional.binary_cross_entropy, 0.5),
        (torch.nn.Identity(), torch.nn.functional.mse_loss, 0.5),
        (torch.nn.Identity(), torch.nn.functional.binary_cross_entropy_with_logits, 0.0),
    ],
    ids=["probability", "least squares", "logit"],
)
def test_a_single_output_is_measured_from_where_its_class_changes(last, criterion, cut):
    draw = np.random.default_rng(3)
    X = torch.from_numpy(draw.normal(size=(60, 3)))
    y = (X[:, 0] + 0.4 * torch.from_numpy(draw.normal(size=60)) > 0).double()
    y[:6] = 1 - y[:6]

    class Net(torch.nn.Module):
        def __init__(self):
            torch.nn.Module.__init__(self)
            self.line, self.last = torch.nn.Linear(3, 1).double(), last

        def forward(self, x):
            return self.last(self.line(x))[:, 0]

    torch.manual_seed(0)
    net = Net()
    steps = torch.optim.LBFGS(net.parameters(), max_iter=300, tolerance_grad=1e-10, line_search_fn="strong_wolfe")

    def risk():
        steps.zero_grad()
        value = criterion(net(X), y) + 0.005 * sum((p**2).sum() for p in net.parameters())
        value.backward()
        return value

    steps.step(risk)
    found = uw.apps.repair(uw.explain(net.eval(), X, y, loss=criterion, penalty=0.01), inspect=10, by="self-influence")
    with torch.no_grad():
        ahead = np.where(y.numpy() == 1, 1, -1) * (net(X).numpy() - cut)
    np.testing.assert_allclose(found.scores["margin"], -ahead, atol=1e-10)
    assert set(found.labels[found.order("margin")[:10]].tolist()) == {0, 1}


@pytest.mark.filterwarnings("ignore:SVC minimises hinge")
def test_outputs_of_pairs_of_classes_are_refused_for_three_classes_too():
    X, y = load_iris(return_X_y=True)  # 3 pairs for 3 classes
    with pytest.raises(uw.errors.UnsupportedModel, match="one against one"):
        uw.apps.repair(uw.explain(SVC(kernel="linear").fit(X, y), X, y), inspect=5, by="self-influence")
    two = y < 2
    model = SVC(kernel="linear").fit(X[two], y[two])
    found = uw.apps.repair(uw.explain(model, X[two], y[two]), inspect=5, by="self-influence")
    ahead = (2 * y[two] - 1) * model.decision_function(X[two])
    np.testing.assert_allclose(found.scores["margin"], -ahead, atol=1e-6)
