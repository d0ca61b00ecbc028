"""A budget of memory caps batches, blocks and what is kept, chooses a solver that fits, and moves no value."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.linear_model import Ridge
from torch import nn

import upweight as uw
from small import XQ, YQ, ZQ, D, X, Y, classifier, logistic, ridge
from upweight.model.sweep import MEMORY
from upweight.operators import GaussNewton
from upweight.operators.implicit import Implicit
from upweight.operators.layered import LayeredGaussNewton
from upweight.runs.machine import budget_of, in_bytes
from upweight.solvers import CG, Cholesky


def wide(**settings):
    rows = np.random.default_rng(0).normal(size=(900, 400))
    return uw.explain(Ridge().fit(rows, rows[:, 0]), rows, rows[:, 0], **settings)


def test_batches_take_a_quarter_of_it():
    sizes = []
    sweep = classifier(memory_budget=400_000).sweep

    def noted(batch, weights):
        sizes.append(len(weights))
        return weights.sum()[None]

    sweep.over(sweep.objective, uw.Examples(X, Y)).fold(noted, vectors=9)
    assert max(sizes) == min(len(X), 100_000 // (10 * sweep.example_bytes))
    assert sweep.at_most(MEMORY) == 200_000
    assert classifier().sweep.at_most(MEMORY) == MEMORY


def test_a_solver_that_fits_is_chosen():
    assert isinstance(wide().solver, Cholesky)
    small = wide(memory_budget="4 MB")
    assert isinstance(small.solver, CG)
    rows = np.random.default_rng(1).normal(size=(3, 400))
    expected = wide().on_loss(rows, rows[:, 0]).values
    np.testing.assert_allclose(small.on_loss(rows, rows[:, 0]).values, expected, rtol=1e-4, atol=1e-9)


def test_activations_are_kept_only_if_they_fit():
    settings = {"curvature": GaussNewton(), "damping": 0.1}
    assert isinstance(classifier(**settings).operator, LayeredGaussNewton)
    small = classifier(**settings, memory_budget=10_000)
    assert isinstance(small.operator, Implicit)
    expected = classifier(**settings).on_loss(XQ, YQ).values
    np.testing.assert_allclose(small.on_loss(XQ, YQ).values, expected, rtol=1e-6, atol=1e-12)


def test_values_are_the_same_in_any_budget():
    expected = logistic().on_loss(XQ, np.array(["no", "yes", "no", "yes"])).values
    for budget in ("20 kB", "1 MB", "1 TB"):
        found = logistic(memory_budget=budget).on_loss(XQ, np.array(["no", "yes", "no", "yes"])).values
        np.testing.assert_allclose(found, expected, rtol=1e-12)


def test_a_frozen_body_runs_in_it():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(D, 6), nn.Tanh(), nn.Linear(6, 2)).double()
    asked = {"loss": nn.functional.cross_entropy, "parameters": lambda name: name.startswith("2."), "penalty": 0.1}
    influence = uw.explain(model, X, Y, **asked, memory_budget="10 MB")
    assert influence.encoder.budget == 10**7
    np.testing.assert_allclose(
        influence.on_loss(XQ, YQ).values, uw.explain(model, X, Y, **asked).on_loss(XQ, YQ).values, rtol=1e-10
    )


def test_an_edited_influence_keeps_it():
    influence = ridge(memory_budget="1 GB")
    assert uw.edited(influence, [0], XQ[:1], ZQ[:1]).system.sweep.budget == 10**9


@pytest.mark.parametrize(
    ("size", "text"), [(1, "1 B"), (1500, "1.5 KB"), (2.54e6, "2.54 MB"), (44_800_000_000, "44.8 GB"), (np.nan, "?")]
)
def test_sizes_in_words(size, text):
    assert in_bytes(size) == text
    assert np.isnan(size) or budget_of(text) == size
