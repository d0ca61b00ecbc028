"""A fit that stopped early is judged by what that does to the values: the prediction beside the fit that went on."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from sklearn.datasets import load_breast_cancer, load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler
from torch import nn

import upweight as uw
from upweight.errors import TheoryWarning
from upweight.influence.minimum import distance

DIGITS = load_digits(return_X_y=True)
CANCER = load_breast_cancer(return_X_y=True)
PROBLEMS = {
    "two classes": (StandardScaler().fit_transform(CANCER[0]), CANCER[1], 0.5),
    "ten classes": (DIGITS[0][:400] / 16, DIGITS[1][:400], 1.0),
}


def actual_change(early, late, queries, rows):
    before, after = (influence.on_loss(*queries).values[:, rows] for influence in (early, late))
    return np.linalg.norm(after - before) / np.linalg.norm(before)


@pytest.mark.parametrize("problem", PROBLEMS)
@pytest.mark.parametrize("steps", [12, 25, 60])
def test_the_predicted_change_of_values_is_the_one_of_training_on(problem, steps):
    X, y, C = PROBLEMS[problem]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        early = uw.explain(LogisticRegression(C=C, max_iter=steps).fit(X, y), X, y)
    late = uw.explain(LogisticRegression(C=C, tol=1e-10, max_iter=10_000).fit(X, y), X, y)
    chosen = early.examples.spread(24)  # the rows that are probed: a third of them as queries
    asked, rows = chosen[1::3], np.delete(chosen, np.s_[1::3])
    actual = actual_change(early, late, (X[asked], y[asked]), rows)
    assert distance(early.system).values == pytest.approx(actual, rel=0.25, abs=1e-4)


def test_it_warns_of_what_changes_values_and_not_of_many_rows():
    X, y, C = PROBLEMS["two classes"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        early = LogisticRegression(C=C, max_iter=5).fit(X, y)
    with pytest.warns(TheoryWarning, match=r"as much as .* rows \(going on to the minimum would change values by"):
        influence = uw.explain(early, X, y)
    assert not influence.check().ok
    nearly = uw.explain(LogisticRegression(C=C, tol=5e-4).fit(X, y), X, y).check()  # a warning would be an error
    assert nearly.rows_from_minimum > 1
    assert nearly.value_drift < 0.05
    assert nearly.ok
    assert nearly.verdict.startswith("ok; but θ̂ is not quite at a minimum, as much as ")


def test_of_a_network_too():
    draw = torch.Generator().manual_seed(0)
    X = torch.randn(80, 3, generator=draw, dtype=torch.float64)
    y = (X[:, 0] > 0).long()
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    far = uw.explain(net, X, y, loss=nn.functional.cross_entropy, penalty=0.05, damping=0.01)
    late = uw.retrained(far, retrain=uw.LBFGS(rtol=1e-5))
    early = uw.retrained(far, retrain=lambda *_: late.objective.theta + 0.01 * torch.sign(late.objective.theta))
    chosen = early.examples.spread(24)
    asked, rows = chosen[1::3], np.delete(chosen, np.s_[1::3])
    actual = actual_change(early, late, (X[asked], y[asked]), rows)
    assert distance(early.system).values == pytest.approx(actual, rel=0.3)
    assert distance(late.system).values < 1e-3
