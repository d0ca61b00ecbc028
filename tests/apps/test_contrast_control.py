"""What training again does alone is credited to no change; and margins are measured from where the class changes."""

from __future__ import annotations

import json

import numpy as np
import pytest
import scipy.optimize
import torch
from sklearn.datasets import load_digits, load_iris
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.svm import SVC, LinearSVC
from torch import nn

import upweight as uw
from small import refuses
from upweight.apps import contrast, contrast_by_removal, pictures
from upweight.apps.contrast import _Control

DIGITS, NAMES = load_digits(return_X_y=True)
DIGITS = DIGITS[:, 10:42] / 16
X, Y, XQ, YQ = DIGITS[:300], NAMES[:300], DIGITS[300:1000], NAMES[300:1000]


def fitted(y=Y, keep=slice(None), **settings):
    return LogisticRegression(**{"tol": 1e-9, "max_iter": 5000} | settings).fit(X[keep], y[keep])


def ahead(model, Xq, wanted):
    """The largest output of another class less that of the right one."""
    outputs = model.decision_function(Xq)
    own = np.arange(10) == np.asarray(wanted)[:, None]
    return np.where(own, -np.inf, outputs).max(1) - outputs[own]


def explained(model, X=X, y=Y):
    influence = uw.explain(model, X, y)
    influence.on_loss(X[:1], y[:1])  # warns now that it is at no minimum, and not later
    return influence


@pytest.fixture(scope="module")
def early():
    """A model that stopped early, and the one that it would have become."""
    with pytest.warns(ConvergenceWarning):
        model = fitted(max_iter=6)
    with pytest.warns(uw.errors.TheoryWarning):
        influence = explained(model)
    return model, influence, fitted()


@pytest.mark.parametrize("ask", [contrast, contrast_by_removal])
def test_training_again_alone_is_no_change_that_corrects(early, ask):
    model, influence, whole = early
    now, then = model.predict(XQ), whole.predict(XQ)
    alone = np.flatnonzero((now != YQ) & (then == YQ))[:4]
    still = np.flatnonzero((now != YQ) & (then != YQ))
    still = still[np.argsort(ahead(whole, XQ[still], YQ[still]))][:4]
    assert len(alone) == len(still) == 4
    picked = np.r_[alone, still]
    found = ask(influence, (XQ[picked], YQ[picked]))
    assert [answer.corrected_alone for answer in found.answers] == 4 * [True] + 4 * [False]
    np.testing.assert_allclose([a.margin for a in found.answers], ahead(model, XQ[picked], YQ[picked]), atol=1e-9)
    np.testing.assert_allclose([a.control for a in found.answers], ahead(whole, XQ[picked], YQ[picked]), atol=1e-4)
    np.testing.assert_array_equal([a.alone for a in found.answers], then[picked])
    for answer in found.answers[:4]:
        assert len(answer.rows) == 0
        assert not answer.corrected
        assert answer.after is None
        assert answer.predicted == answer.control < 0
    for answer in found.answers[4:]:
        y, keep = Y.copy(), np.ones(300, dtype=bool)
        if ask is contrast:
            y[answer.rows] = answer.wanted
        else:
            keep[answer.rows] = False
        again, query = fitted(y, keep), XQ[picked][[answer.query]]
        assert answer.actual == pytest.approx(ahead(again, query, [answer.wanted])[0], abs=1e-4)
        assert answer.after == again.predict(query)[0]
        assert answer.predicted == pytest.approx(answer.actual, abs=0.05)
    assert found.corrected == sum(answer.corrected for answer in found.answers[4:]) >= 3
    assert found.corrected_alone == 4
    assert found.corrected_rate == found.corrected / 4
    assert found.calibration == pytest.approx(1, abs=0.1)
    numbers = json.loads(json.dumps(found.to_dict()))
    assert numbers["corrected_alone"] == 4
    assert [answer["corrected_alone"] for answer in numbers["answers"]] == 4 * [True] + 4 * [False]
    text = str(found)
    assert f"{found.corrected} of 4 ({found.corrected_rate:.0%}) are really corrected" in text
    assert "control: training again with nothing changed corrects 4 of 8" in text
    assert text.count("0 rows; training again with nothing changed corrects it") == 4


def test_where_the_control_corrects_all_there_is_no_rate(early):
    model, influence, whole = early
    alone = np.flatnonzero((model.predict(XQ) != YQ) & (whole.predict(XQ) == YQ))[:2]
    found = contrast(influence, (XQ[alone], YQ[alone]))
    assert found.corrected == 0
    assert np.isnan(found.corrected_rate)
    assert "0 of 0 are really corrected" in str(found)
    ax = pictures.margins(found)
    drawn = {points.get_label(): np.asarray(points.get_offsets())[:, 1] for points in ax.collections}
    np.testing.assert_allclose(drawn["nothing changed"], [answer.control for answer in found.answers])


def test_a_head_that_adam_left_early():
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(32, 12), nn.Tanh(), nn.Linear(12, 10)).double().eval()
    x, y, xq = torch.from_numpy(X), torch.from_numpy(Y), torch.from_numpy(XQ)
    steps = torch.optim.Adam(network.parameters(), 0.02)
    for _ in range(60):
        steps.zero_grad()
        nn.functional.cross_entropy(network(x), y).backward()
        steps.step()
    influence = uw.explain(
        network, x, y, loss=nn.functional.cross_entropy, penalty=2e-2, parameters=["2.weight", "2.bias"]
    )
    whole = uw.retrained(influence)
    now, then = uw.predict(influence, xq).labels, uw.predict(whole, xq).labels
    wrong = np.flatnonzero(now != YQ)
    alone = wrong[then[wrong] == YQ[wrong]][:2]
    still = wrong[then[wrong] != YQ[wrong]][:3]
    picked = np.r_[alone, still]
    found = contrast(influence, (xq[picked], YQ[picked]))
    assert len(alone) > 0
    assert [answer.corrected_alone for answer in found.answers] == [*len(alone) * [True], *len(still) * [False]]
    told = [answer for answer in found.answers if np.isfinite(answer.actual)]
    assert len(told) >= 2
    assert found.calibration == pytest.approx(1, abs=0.15)


def test_a_minimum_is_its_own_control(early):
    _, influence, whole = early
    best = uw.explain(whole, X, Y)
    control = _Control.of(best, None, uw.Course(best, None, {}))
    assert control.curvature is best
    assert not control.refused
    unlike = _Control.of(influence, None, uw.Course(influence, None, {}))
    assert unlike.curvature is unlike.influence is not influence
    wrong = np.flatnonzero(whole.predict(XQ) != YQ)[:3]
    found = contrast(best, (XQ[wrong], YQ[wrong]))
    for answer in found.answers:
        assert answer.control == pytest.approx(answer.margin, abs=1e-4)
        assert answer.alone == answer.label
    assert found.corrected == 3


def test_without_a_control_nothing_is_confirmed(early):
    _, influence, _ = early
    wrong = np.flatnonzero(uw.predict(influence, XQ).labels != YQ)[:2]

    def fails(weights, seed=0):
        raise uw.errors.NotConverged("no minimum today")

    found = contrast(influence, (XQ[wrong], YQ[wrong]), retrain=fails)
    assert found.corrected == found.corrected_alone == 0
    assert all(answer.refused == "no minimum today" for answer in found.answers)
    assert all(answer.alone is None and np.isnan(answer.control) for answer in found.answers)
    assert any(len(answer.rows) for answer in found.answers)
    assert "there is no control, for training again with nothing changed failed" in str(found)
    assert pictures.margins(found).get_xlabel()
    refuses(lambda: contrast(influence, (XQ[wrong], YQ[wrong]), retrain=3), ValueError, "retrain is 3")


@pytest.mark.filterwarnings("ignore::upweight.errors.TheoryWarning")
def test_fits_that_end_beside_the_minimum_of_what_is_explained():
    """A hinge is explained by a smooth one, whose own minimum is elsewhere: the difference is no change's doing."""
    pair = np.flatnonzero(np.isin(NAMES, (3, 9)))
    train, rest = pair[:200], pair[200:]
    model = LinearSVC(loss="hinge", C=0.5, tol=1e-9, max_iter=10**6, random_state=0)
    model.fit(DIGITS[train], NAMES[train])
    influence = uw.explain(model, DIGITS[train], NAMES[train], loss=uw.losses.smooth_hinge(0.3))
    near = rest[np.argsort(np.abs(model.decision_function(DIGITS[rest])))[:4]]
    wanted = np.where(model.predict(DIGITS[near]) == 3, 9, 3)
    found = contrast_by_removal(influence, (DIGITS[near], wanted))
    for answer in found.answers:
        assert answer.control == pytest.approx(answer.margin, abs=1e-3)
        if np.isfinite(answer.actual):
            keep = np.setdiff1d(np.arange(200), answer.rows)
            again = LinearSVC(loss="hinge", C=0.5, tol=1e-9, max_iter=10**6, random_state=0)
            told = again.fit(DIGITS[train][keep], NAMES[train][keep]).decision_function(DIGITS[near][[answer.query]])[0]
            assert answer.actual == pytest.approx(told if answer.wanted == 3 else -told, abs=5e-3)


@pytest.mark.filterwarnings("ignore::upweight.errors.TheoryWarning")
def test_pairs_of_three_classes_are_refused():
    """Three classes have three pairs: as many outputs as classes."""
    inputs, labels = load_iris(return_X_y=True)
    inputs = inputs + np.random.default_rng(0).normal(0, 0.4, inputs.shape)
    model = SVC(kernel="linear", C=1).fit(inputs, labels)
    influence = uw.explain(model, inputs, labels, loss=uw.losses.smooth_hinge(0.5))
    wrong = np.flatnonzero(model.predict(inputs) != labels)
    for ask in (contrast, contrast_by_removal):
        refuses(lambda ask=ask: ask(influence, (inputs[wrong], labels[wrong])), TypeError, "pairs of 3 classes")


LINE = np.random.default_rng(1).normal(size=(60, 2))
BIT = (LINE[:, 0] + 0.8 * np.random.default_rng(2).normal(size=60) > 0).astype(float)
ASKED = np.random.default_rng(3).normal(size=(50, 2))
DECAY = 0.05


def least_squares(y, keep=slice(None)):
    """The closed form of (1/n) Σ (θᵀ(x, 1) − y)² + (λ/2)‖θ‖², n of all rows."""
    wide = np.column_stack([LINE, np.ones(60)])
    kept = wide[keep]
    return np.linalg.solve(2 / 60 * kept.T @ kept + DECAY * np.eye(3), 2 / 60 * kept.T @ y[keep])


@pytest.mark.parametrize("ask", [contrast, contrast_by_removal])
def test_least_squares_on_zero_and_one_change_their_class_at_a_half(ask):
    network = nn.Sequential(nn.Linear(2, 1), nn.Flatten(0)).double().eval()
    settings = {"loss": nn.functional.mse_loss, "penalty": DECAY, "penalty_per_example": False}
    start = uw.explain(network, torch.from_numpy(LINE), torch.from_numpy(BIT), **settings)
    influence = uw.retrained(start)
    wide = np.column_stack([ASKED, np.ones(50)])
    outputs = wide @ least_squares(BIT)
    near = np.argsort(np.abs(outputs - 0.5))[:6]
    wanted = (outputs[near] < 0.5).astype(int)
    found = ask(influence, (torch.from_numpy(ASKED[near]), wanted))
    assert len(found.answers) == found.corrected == 6
    candidates = {name: np.flatnonzero(name != BIT) if ask is contrast else np.arange(60) for name in (0, 1)}
    for answer in found.answers:
        at = near[answer.query]
        sign = 1 if answer.wanted == 0 else -1
        assert answer.margin == pytest.approx(sign * (outputs[at] - 0.5), abs=1e-5)

        def output(rows, wanted=answer.wanted, at=at):
            y, keep = BIT.copy(), np.ones(60, dtype=bool)
            if ask is contrast:
                y[rows] = wanted
            else:
                keep[rows] = False
            return wide[at] @ least_squares(y, keep)

        told = output(answer.rows)
        assert answer.actual == pytest.approx(sign * (told - 0.5), abs=1e-5)
        assert answer.after == answer.wanted == int(told > 0.5)
        singles = [output([row]) for row in candidates[answer.wanted]]
        one_does = any(int(single > 0.5) == answer.wanted for single in singles)
        assert (len(answer.rows) == 1) == one_does


def test_a_sigmoid_with_its_cross_entropy_changes_its_class_at_a_half():
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(2, 1), nn.Sigmoid(), nn.Flatten(0)).double().eval()
    start = uw.explain(
        network, torch.from_numpy(LINE), torch.from_numpy(BIT), loss=nn.functional.binary_cross_entropy, penalty=DECAY
    )
    influence = uw.retrained(start)
    said = uw.predict(influence, torch.from_numpy(ASKED))
    near = np.argsort(np.abs(said.outputs[:, 0] - 0.5))[:4]
    found = contrast(influence, (torch.from_numpy(ASKED[near]), 1 - said.labels[near]))
    assert found.corrected >= 3
    for answer in found.answers:
        assert answer.margin == pytest.approx(abs(said.outputs[near[answer.query], 0] - 0.5))
        y = BIT.copy()
        y[answer.rows] = answer.wanted
        # scikit-learn's penalty leaves the intercept out; a column of ones beside no intercept holds it
        again = LogisticRegression(C=1 / (60 * DECAY), fit_intercept=False, tol=1e-10, max_iter=5000)
        again.fit(np.column_stack([LINE, np.ones(60)]), y)
        told = again.predict_proba(np.append(ASKED[near[answer.query]], 1)[None])[0, 1]
        assert answer.actual == pytest.approx(abs(told - 0.5) * (-1 if answer.corrected else 1), abs=1e-4)


def test_what_training_leaves_of_the_gradient_is_no_changes_doing():
    """A training that never moves leaves ∇R as it is; predictions hold it fixed, an oracle minimises what is left."""
    y = BIT.astype(int)
    with pytest.warns(ConvergenceWarning):
        model = LogisticRegression(C=0.1, max_iter=1).fit(LINE, y)
    with pytest.warns(uw.errors.TheoryWarning):
        influence = explained(model, LINE, y)
    wide, start = np.column_stack([LINE, np.ones(60)]), np.append(model.coef_[0], model.intercept_)
    tilt = influence.risk_gradient.numpy()
    assert np.linalg.norm(tilt) > 1e-2
    near = np.argsort(np.abs(model.decision_function(ASKED)))[:4]
    wanted = 1 - model.predict(ASKED[near])
    found = contrast_by_removal(
        influence, (ASKED[near], wanted), retrain=lambda weights, seed=0: influence.objective.theta
    )
    assert sum(len(answer.rows) > 0 for answer in found.answers) >= 3
    for answer in found.answers:
        assert answer.control == pytest.approx(answer.margin)
        if not len(answer.rows):
            continue
        keep = np.setdiff1d(np.arange(60), answer.rows)

        def tilted(theta, keep=keep):
            eta = wide[keep] @ theta
            values = np.logaddexp(0, np.where(y[keep] == 1, -eta, eta))
            slopes = 1 / (1 + np.exp(-eta)) - y[keep]
            value = values.sum() / 60 + (theta[:2] ** 2).sum() / (2 * 60 * 0.1) - tilt @ theta
            return value, wide[keep].T @ slopes / 60 + np.append(theta[:2] / (60 * 0.1), 0) - tilt

        least = scipy.optimize.minimize(tilted, start, jac=True, method="BFGS", options={"gtol": 1e-9}).x
        sign = 1 if answer.wanted == 0 else -1
        told = sign * (np.append(ASKED[near][answer.query], 1) @ least)
        assert answer.predicted == pytest.approx(told, abs=0.02)
