"""Scores of several kinds as one ranking."""

from __future__ import annotations

import numpy as np
import pytest

import upweight as uw
from upweight.errors import InvalidInput, Undefined
from upweight.influence.certificate import Certificate
from upweight.influence.scores import Scores

Q, N, S = 12, 40, 60
DRAW = np.random.default_rng(0)
TRUE = DRAW.normal(size=(Q, N))
SUBSETS = uw.random_subsets(N, S)
OUTCOMES = uw.SubsetOutcomes((TRUE @ (~SUBSETS).T.astype(float))[:, :, None], SUBSETS)


def scores(values, counterfactual="row removed"):
    return Scores(values, counterfactual, np.arange(N), N, Certificate.unsolved(len(values), 1.0, "made up"))


def noisy(seed, noise, unit):
    """What is true, with noise of its own and in a unit of its own for each query."""
    draw = np.random.default_rng(seed)
    return scores(unit * draw.uniform(0.1, 10, (Q, 1)) * (TRUE + noise * draw.normal(size=(Q, N))))


ONE, OTHER, BAD = noisy(1, 1.0, 1e-3), noisy(2, 1.0, 50.0), noisy(3, 30.0, 1.0)


def sized(values):
    return values / np.sqrt((values**2).mean(1, keepdims=True))


def test_equal_weights_are_the_mean_of_what_is_standardised():
    found = uw.blended({"one": ONE, "other": OTHER})
    np.testing.assert_allclose(found.values, (sized(ONE.values) + sized(OTHER.values)) / 2, rtol=1e-12)
    assert "equal weights: one 0.50, other 0.50" in str(found.certificate)
    assert found.values.shape == found.standard_error.shape


def test_neither_unit_nor_sign_moves_it():
    scaled = scores(-7e5 * OTHER.values)
    np.testing.assert_allclose(
        uw.blended({"one": ONE, "other": scaled}).values, (sized(ONE.values) - sized(OTHER.values)) / 2, rtol=1e-12
    )


def test_kinds_that_err_apart_rank_better_together():
    alone = [uw.lds(one, OUTCOMES).value for one in (ONE, OTHER)]
    together = uw.lds(uw.blended({"one": ONE, "other": OTHER}, OUTCOMES), OUTCOMES).value
    assert together > max(alone) + 0.05


def test_a_kind_that_says_nothing_gets_little_weight():
    found = uw.blended({"one": ONE, "bad": BAD}, OUTCOMES)
    assert "chosen by the other queries" in str(found.certificate)
    lost = uw.lds(ONE, OUTCOMES).value - uw.lds(found, OUTCOMES).value
    assert lost < 0.02
    equal = uw.lds(uw.blended({"one": ONE, "bad": BAD}), OUTCOMES).value
    assert equal < uw.lds(found, OUTCOMES).value - 0.1


def test_a_query_has_no_say_in_its_own_weights():
    before = uw.blended({"one": ONE, "bad": BAD}, OUTCOMES).values
    values = OUTCOMES.values.copy()
    values[4] = DRAW.normal(size=values[4].shape)
    after = uw.blended({"one": ONE, "bad": BAD}, uw.SubsetOutcomes(values, SUBSETS)).values
    np.testing.assert_array_equal(before[4], after[4])


def test_runs_of_a_kind_are_averaged_first_and_the_spread_is_that_of_all_members():
    runs = [noisy(seed, 1.0, 1.0) for seed in (5, 6)]
    found = uw.blended({"runs": runs, "other": OTHER})
    mean = (runs[0].values + runs[1].values) / 2
    np.testing.assert_allclose(found.values, (sized(mean) + sized(OTHER.values)) / 2, rtol=1e-12)
    single = uw.blended({"one": ONE, "other": OTHER})
    members = np.stack([sized(ONE.values), sized(OTHER.values)])
    np.testing.assert_allclose(single.standard_error, members.std(0, ddof=1) / np.sqrt(2), rtol=1e-12)


def test_it_is_no_change_of_the_measure_and_says_so(tmp_path):
    found = uw.blended({"one": ONE, "other": OTHER})
    assert "none: mean of standardised one and other" in repr(found)
    assert found.query_values is None
    with pytest.raises(Undefined):
        _ = found.derivative
    found.save(tmp_path / "scores")
    np.testing.assert_array_equal(Scores.load(tmp_path / "scores").values, found.values)


def test_a_query_without_values_has_none_in_the_blend():
    values = ONE.values.copy()
    values[3] = np.nan
    for outcomes in (None, OUTCOMES):
        found = uw.blended({"one": scores(values), "other": OTHER}, outcomes)
        np.testing.assert_array_equal(np.isnan(found.values).all(1), np.arange(Q) == 3)
        np.testing.assert_array_equal(np.isnan(found.standard_error).all(1), np.arange(Q) == 3)


@pytest.mark.parametrize("others", [OUTCOMES.values[:5], OUTCOMES.values[:, :, [0] * 2][:7]], ids=["5", "7"])
def test_outcomes_of_other_queries_are_refused(others):
    with pytest.raises(InvalidInput, match="pass scores of the same queries"):
        uw.blended({"one": ONE, "other": OTHER}, uw.SubsetOutcomes(others, SUBSETS, tuple(range(others.shape[2]))))


def test_outcomes_of_more_rows_are_refused():
    more = np.concatenate([SUBSETS, SUBSETS], 1)
    with pytest.raises(InvalidInput, match=r"subsets of 80 rows"):
        uw.blended({"one": ONE, "other": OTHER}, uw.SubsetOutcomes(OUTCOMES.values, more))


def test_what_is_no_outcome_is_refused():
    with pytest.raises(InvalidInput, match="SubsetOutcomes of subset_retraining"):
        uw.blended({"one": ONE, "other": OTHER}, OUTCOMES.values)
