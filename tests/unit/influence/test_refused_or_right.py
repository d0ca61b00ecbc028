"""Queries, criteria, stores and solvers that could pass for others are refused, or answered rightly."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch.utils.data import TensorDataset

import upweight as uw
from upweight.data.examples import PROBE_ROWS

DRAW = np.random.default_rng(0)
X = 3 * DRAW.normal(size=(60, 3)) + 1
Y = (X[:, 0] + DRAW.normal(size=60) > 1).astype(int) + 1
MODEL = make_pipeline(StandardScaler(), LogisticRegression(tol=1e-10, max_iter=1000)).fit(X, Y)


def test_training_examples_asked_as_queries_are_not_encoded_twice():
    influence = uw.explain(MODEL, X, Y)
    assert np.array_equal(influence.on_loss(influence.examples).values, influence.on_loss(X, Y).values)


def test_examples_of_another_influence_are_refused():
    first, second = uw.explain(MODEL, X, Y), uw.explain(MODEL, X, Y)
    with pytest.raises(uw.errors.InvalidInput, match="another model's influence"):
        second.on_loss(first.examples)
    with pytest.raises(uw.errors.InvalidInput, match="another model's influence"):
        uw.explain(MODEL, first.examples)


def test_agreement_refuses_outcomes_of_other_queries():
    influence = uw.explain(MODEL, X, Y)
    outcomes = uw.leave_one_out(influence, (X[:1], Y[:1]), range(3))
    with pytest.raises(uw.errors.InvalidInput, match="same queries"):
        uw.agreement(influence.on_loss(X[1:2], Y[1:2]), outcomes)


def test_lissa_that_stopped_early_warns_and_check_is_not_ok():
    influence = uw.explain(MODEL, X, Y, solver=uw.solvers.LiSSA(depth=5, repeats=3))
    with pytest.warns(uw.errors.TheoryWarning, match="has not settled"):
        influence.on_loss(X[:1], Y[:1])
    assert not influence.check().ok


def test_a_changed_row_of_a_dataset_is_another_work(tmp_path):
    def score(rows):
        objective = uw.Objective(lambda w, example: (w @ example[0] - example[1]) ** 2, torch.zeros(3).double())
        data = TensorDataset(torch.as_tensor(rows), torch.as_tensor(Y, dtype=torch.float64))
        influence = uw.Influence(objective, data, curvature=uw.operators.Identity())
        return influence.on_loss(uw.Examples(X[:1], Y[:1].astype(float)), store=tmp_path / "store")

    score(X)
    changed = X.copy()
    unprobed = np.setdiff1d(np.arange(len(X)), uw.Examples(X).spread(PROBE_ROWS))[0]
    changed[unprobed] += 5
    with pytest.raises(uw.errors.StoreMismatch, match="risk gradient"):
        score(changed)


def test_masked_arrays_are_refused():
    with pytest.raises(uw.errors.InvalidInput, match="masked"):
        uw.Examples(np.ma.masked_array(X, X > 2), Y)


def test_the_sum_of_influences_is_computed_and_equals_the_drift_away_from_a_minimum():
    early = LogisticRegression(C=1.0, tol=0.3).fit(X, Y)
    with pytest.warns(uw.errors.TheoryWarning):
        report = uw.explain(early, X, Y).check((X[:5], Y[:5]))
    assert report.sum_of_influences == pytest.approx(report.drift, rel=1e-6)
    assert report.drift > 1e-4
