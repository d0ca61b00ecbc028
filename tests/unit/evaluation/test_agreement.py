"""Agreement equals NumPy's and SciPy's numbers, and sees what a correlation forgives."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.stats

import upweight as uw
from small import CARD, XQ, YQ, ZQ, X, classifier, made, ridge

DRAW = np.random.default_rng(3)
PREDICTED = DRAW.normal(size=(2, 5))
ACTUAL = 1.3 * PREDICTED + 0.2 * DRAW.normal(size=(2, 5)) + 0.05
ROWS = np.array([10, 11, 12, 13, 14])


def outcomes(actual=ACTUAL, rows=ROWS):
    return uw.Outcomes(actual, np.zeros(len(actual)), rows)


def test_numbers_are_numpys_and_scipys():
    found = uw.agreement(made(values=PREDICTED), outcomes())
    line = scipy.stats.linregress(PREDICTED.ravel(), ACTUAL.ravel())
    assert found.pearson == pytest.approx(np.corrcoef(PREDICTED.ravel(), ACTUAL.ravel())[0, 1])
    assert found.spearman == pytest.approx(scipy.stats.spearmanr(PREDICTED.ravel(), ACTUAL.ravel())[0])
    assert found.slope == pytest.approx(line.slope)
    assert found.intercept == pytest.approx(line.intercept)
    assert found.pairs == 10


@pytest.mark.parametrize("factor", [0.5, 2.0, -1.0])
def test_a_wrong_size_shows_in_the_slope_only(factor):
    found = uw.agreement(made(values=ACTUAL / factor), outcomes())
    assert found.slope == pytest.approx(factor)
    assert abs(found.pearson) == pytest.approx(1)
    assert found.intercept == pytest.approx(0, abs=1e-12)


def test_rows_are_matched_by_number_not_by_place():
    order = np.array([3, 0, 4])
    found = uw.agreement(made(values=PREDICTED), outcomes(ACTUAL[:, order], ROWS[order]))
    assert found.pairs == 6
    assert found.slope == pytest.approx(np.polyfit(PREDICTED[:, order].ravel(), ACTUAL[:, order].ravel(), 1)[0])


def test_constant_outcomes_have_slope_zero_and_no_correlation():
    found = uw.agreement(made(values=PREDICTED), outcomes(np.full((2, 5), 0.3)))
    assert found.slope == pytest.approx(0, abs=1e-12)
    assert np.isnan(found.pearson)
    assert np.isnan(found.spearman)


def test_newton_steps_are_removals_too():
    newton = made(values=PREDICTED, counterfactual="row removed, Newton step", scale=None)
    assert uw.agreement(newton, outcomes()) == uw.agreement(made(values=PREDICTED), outcomes())


def test_ridge_predicted_by_its_newton_step_is_retraining():
    influence = ridge()
    rows = [0, 9, 17, 33]
    found = uw.leave_one_out(influence, (XQ, ZQ), rows, uw.Newton(rtol=1e-12))
    np.testing.assert_allclose(influence.of_removing(rows, on=(XQ, ZQ)).values, found.actual, rtol=1e-8)
    assert np.abs(found.control).max() < 1e-12
    assert found.rows.tolist() == rows


def test_a_measure_is_compared_with_its_own_scores():
    influence = ridge()

    def predictor(params, example):
        return (params["coef"] @ example[0])[0]

    scores = influence.on_measure(predictor, X, ZQ[np.zeros(len(X), int)])
    found = uw.leave_one_out(influence, (X, ZQ[np.zeros(len(X), int)]), [2, 3, 30], measure=predictor)
    assert found.measure == scores.measure == "predictor"
    agreement = uw.agreement(scores, found)
    assert agreement.pearson > 0.95
    assert 0.8 < agreement.slope < 1.5


def test_texts_carry_the_numbers():
    found = uw.agreement(made(values=PREDICTED), outcomes())
    assert str(found) == (
        f"r = {found.pearson:.5f}, rank r = {found.spearman:.5f}, slope = {found.slope:.4f} over 10 pairs"
    )
    assert repr(outcomes()) == "Outcomes(2 queries × 5 retrainings; control drift ≤ 0)"
    assert CARD.converged


def test_progress_is_quiet_unless_asked(capsys):
    influence = classifier()
    theta = influence.objective.theta

    def stay(weights, seed):
        return theta

    uw.leave_one_out(influence, (XQ, YQ), [1, 2], stay)
    assert capsys.readouterr() == ("", "")
    uw.leave_one_out(influence, (XQ, YQ), [1, 2], stay, progress=True)
    out, err = capsys.readouterr()
    assert not out
    assert "retraining" in err
