"""Edits that bring a row which no training row resembles, and rows without weight that do."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.linear_model import LinearRegression, LogisticRegression
from torch import nn

import upweight as uw
from upweight.errors import NotPositiveDefinite, TheoryWarning

DRAW = np.random.default_rng(0)
N = 60
FREE = DRAW.normal(size=(N, 2))
Y = FREE[:, 0] + DRAW.normal(size=N)
LEVELS = np.c_[FREE[:, :1], np.eye(4)[DRAW.integers(0, 3, N)]]  # the fourth level never occurs
TWICE = np.c_[FREE, FREE[:, 0]]


def influence(X, **weights):
    return uw.explain(LinearRegression().fit(X, Y, **weights), X, Y, **weights)


def test_a_new_combination_has_no_small_effect_and_the_others_keep_theirs():
    explained, plain = influence(LEVELS), influence(LEVELS[:, [0, 2, 3]])
    new, targets, on = np.array([[0.3, 0, 0, 0, 1], [0.3, 1, 0, 0, 0]]), [3.0, 3.0], (LEVELS[:2], Y[:2])
    with pytest.warns(TheoryWarning, match=r"1 of 2 changes \(first: number 0\)"):
        added = explained.of_adding(new, targets, on=on).values
    with pytest.warns(TheoryWarning, match=r"1 of 2 changes \(first: number 0\)"):
        replaced = explained.of_replacing([5, 6], new, targets, on=on).values
    assert np.isnan(added[:, 0]).all()
    assert np.isnan(replaced[:, 0]).all()
    reduced, on = new[1:, [0, 2, 3]], (LEVELS[:2][:, [0, 2, 3]], Y[:2])
    np.testing.assert_allclose(added[:, 1:], plain.of_adding(reduced, targets[1:], on=on).values, rtol=1e-7)
    expected = plain.of_replacing([6], reduced, targets[1:], on=on).values
    np.testing.assert_allclose(replaced[:, 1:], expected, rtol=1e-7)


def test_columns_that_repeat_cannot_be_moved_apart():
    with pytest.warns(TheoryWarning, match="Moving x0, x2 apart from each other"):
        moved = influence(TWICE).of_perturbing([3], on=(TWICE[:2], Y[:2]))
    plain = influence(FREE).of_perturbing([3], on=(FREE[:2], Y[:2]))
    assert np.isnan(moved[..., [0, 2]]).all()
    np.testing.assert_allclose(moved[..., 1], plain[..., 1], rtol=1e-7)


@pytest.mark.filterwarnings("ignore:Moving x0, x2 apart")
def test_a_query_that_leans_is_nan_for_every_move_and_the_others_keep_theirs():
    apart = TWICE[:2].copy()
    apart[0, 2] += 1
    with pytest.warns(TheoryWarning, match=r"1 of 2 systems \(first: number 0\)"):
        moved = influence(TWICE).of_perturbing([3, 4], on=(apart, Y[:2]))
    assert np.isnan(moved[0]).all()
    plain = influence(FREE).of_perturbing([3, 4], on=(FREE[1:2], Y[1:2]))
    np.testing.assert_allclose(moved[1, :, 1], plain[0, :, 1], rtol=1e-7)


def test_a_row_without_weight_may_lean():
    weights = np.ones(N)
    weights[:2] = 0
    apart = TWICE.copy()
    apart[:2, 2] += 1
    explained, plain = influence(apart, sample_weight=weights), influence(FREE, sample_weight=weights)
    np.testing.assert_allclose(explained.of_self().values, plain.of_self().values, rtol=1e-7, atol=1e-12)
    removed = explained.of_removing([[0], [7]], on=(apart[5:7], Y[5:7])).values
    np.testing.assert_allclose(removed, plain.of_removing([[0], [7]], on=(FREE[5:7], Y[5:7])).values, atol=1e-9)
    with pytest.warns(TheoryWarning, match="DFBETAS"):
        leverage = explained.summary_frame().leverage
    np.testing.assert_allclose(leverage, plain.summary_frame().leverage, rtol=1e-7, atol=1e-12)


def test_check_of_a_query_that_leans_still_says_that_the_rest_is_positive():
    apart = TWICE[:1].copy()
    apart[0, 2] += 1
    report = influence(TWICE).check((apart, Y[:1]))
    assert report.min_curvature > 0
    assert "1 of 1 queries ask for what the rows do not determine" in report.verdict


def test_networks_with_more_parameters_than_rows_stay_refused():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Linear(6, 1)).double()
    X = torch.randn(10, 3, dtype=torch.float64)
    explained = uw.explain(net, X, X[:, :1], loss=nn.MSELoss(), damping=0.0)
    with pytest.raises(NotPositiveDefinite):
        explained.on_loss(X[:2], X[:2, :1])


@pytest.mark.parametrize("scale", [1e4, 1e6])
def test_units_do_not_hide_a_fit_that_stopped_early(scale):
    X = np.c_[FREE, scale * DRAW.normal(size=N)]
    early = LogisticRegression(max_iter=3)
    with pytest.warns(Warning, match="."):
        early.fit(X, Y > 0)
    with pytest.warns(TheoryWarning, match="not at a minimum"):
        explained = uw.explain(early, X, Y > 0)
    assert not explained.check().ok


def test_rows_without_weight_do_not_hide_labels_that_changed():
    n = 2000
    X = DRAW.normal(size=(n, 3))
    y = (X[:, 0] + DRAW.normal(size=n) > 0).astype(int)
    weights = np.zeros(n)
    weights[1::100] = 1
    model = LogisticRegression().fit(X, y, sample_weight=weights)
    with pytest.warns(TheoryWarning, match="not at a minimum"):
        explained = uw.explain(model, X, 1 - y, sample_weight=weights)
    assert not explained.check().ok
