"""A stochastic solver's standard errors describe the scatter that is there, for every score that carries one."""

from __future__ import annotations

import numpy as np
import pytest

import cases
import upweight as uw
from tolerances import STANDARD_ERRORS

SPEC = uw.solvers.LiSSA(depth=400, repeats=16, batch_size=4, seed=3)


@pytest.fixture(scope="module")
def pair():
    case = cases.make("sklearn_logistic", weighted=True)
    return case, case.influence(), case.influence(solver=SPEC)


ASKED = {
    "on_loss": lambda influence, case, on: influence.on_loss(*on),
    "of_groups": lambda influence, case, on: influence.of_groups([[0, 1, 2], [5, 9], [30, 31, 32, 33]], on=on),
    "of_self": lambda influence, case, on: influence.of_self(),
    "of_adding": lambda influence, case, on: influence.of_adding(case.X[:6].numpy(), case.y[:6].numpy(), on=on),
    "of_relabeling": lambda influence, case, on: influence.of_relabeling([3, 4], 1 - case.y[[3, 4]].numpy(), on=on),
}


@pytest.mark.parametrize(
    "question", [name if name == "on_loss" else pytest.param(name, marks=pytest.mark.slow) for name in ASKED]
)
def test_scores_scatter_as_their_standard_errors_say(pair, question):
    case, exact, stochastic = pair
    on = tuple(array.numpy() for array in case.queries)
    truth, found = (ASKED[question](influence, case, on) for influence in (exact, stochastic))
    z = (found.values - truth.values) / found.standard_error
    assert np.abs(z).max() < STANDARD_ERRORS
    assert 0.3 < np.sqrt(np.mean(z**2)) < 2.0
    assert truth.standard_error is None
