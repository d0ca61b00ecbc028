"""Contrast: effects against closed forms, sets against brute force, outcomes against scikit-learn from scratch."""

from __future__ import annotations

import itertools
import json

import numpy as np
import pytest
import scipy.sparse
import torch
from scipy.special import expit
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression, Ridge, RidgeClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.svm import SVC
from torch import nn

import upweight as uw
from small import refuses
from upweight.apps import contrast, contrast_by_removal
from upweight.errors import NotConverged

DRAW = np.random.default_rng(5)
N = 90
CENTRES = np.array([[1.5, 0.0], [-1.5, 0.5], [0.0, -1.5]])
CODES = DRAW.integers(0, 3, N)
X = CENTRES[CODES] + DRAW.normal(size=(N, 2))
NAMES = np.array(["ant", "bee", "cat"])[CODES]
XQ = CENTRES[DRAW.integers(0, 3, 60)] + 1.3 * DRAW.normal(size=(60, 2))


def fitted(X=X, y=NAMES, **settings):
    return LogisticRegression(**{"C": 0.3, "tol": 1e-10, "max_iter": 5000} | settings).fit(X, y)


def wrong(model, k=8):
    """Queries that shall have the class of the second largest probability."""
    order = np.argsort(model.predict_proba(XQ), axis=1)
    near = np.argsort(np.ptp(np.sort(model.predict_proba(XQ), axis=1)[:, -2:], axis=1))[:k]
    return XQ[near], model.classes_[order[near, -2]]


def check(found, model, X, y, on, **settings):
    """What is told is what scikit-learn finds from scratch."""
    for answer in found.answers:
        q, changed, keep = answer.query, np.array(y), np.ones(len(y), dtype=bool)
        if found.change == "labels changed":
            assert (changed[answer.rows] != answer.wanted).all()
            changed[answer.rows] = answer.wanted
        else:
            keep[answer.rows] = False
        assert answer.labels == np.array(y)[answer.rows].tolist()
        again = fitted(X[keep], changed[keep], **settings)
        assert again.predict(on[0][[q]])[0] == answer.after
        assert answer.corrected == (answer.after == on[1][q])
        assert answer.label == model.predict(on[0][[q]])[0]
        told = again.decision_function(on[0][[q]])[0]
        outputs = np.array([0.0, told]) if np.ndim(told) == 0 else told
        place = model.classes_.tolist().index(on[1][q])
        assert answer.actual == pytest.approx(np.delete(outputs, place).max() - outputs[place], abs=2e-4)


@pytest.mark.parametrize("ask", [contrast, contrast_by_removal])
def test_three_classes_are_really_corrected(ask):
    model = fitted()
    on = wrong(model)
    found = ask(uw.explain(model, X, NAMES), on)
    assert len(found.answers) == 8
    assert found.corrected >= 7
    assert found.calibration == pytest.approx(1, abs=0.02)
    check(found, model, X, NAMES, on)


def test_no_shorter_start_of_the_order_corrects():
    on, influence = wrong(fitted(C=3.0)), uw.explain(fitted(C=3.0), X, NAMES)
    shorter = []
    for answer in contrast_by_removal(influence, on).answers:
        keep = np.setdiff1d(np.arange(N), answer.rows[:-1])
        shorter.append(fitted(X[keep], NAMES[keep], C=3.0).predict(on[0][[answer.query]])[0] == answer.wanted)
        assert answer.corrected
        assert answer.predicted < 0
    assert sum(shorter) <= 1


def test_training_that_stopped_early_goes_on_in_prediction_and_refit():
    with pytest.warns(ConvergenceWarning):
        early = fitted(max_iter=4)
    influence = uw.explain(early, X, NAMES)
    assert influence.check().rows_from_minimum > 1
    found = contrast(influence, wrong(early))
    for answer in found.answers:
        assert answer.predicted == pytest.approx(answer.actual, abs=0.02)


@pytest.mark.parametrize("ask", [contrast, contrast_by_removal])
def test_two_classes_are_really_corrected(ask):
    y = np.where(CODES == 2, "cat", "other")
    model = fitted(y=y, fit_intercept=False)
    on = wrong(model)
    found = ask(uw.explain(model, X, y, penalty_per_example=False), on)
    assert found.corrected == 8
    check(found, model, X, y, on, fit_intercept=False)


def test_effects_of_new_labels_are_the_closed_form():
    from upweight.apps.changes import Relabelled, Removed
    from upweight.apps.contrast import _jacobian
    from upweight.apps.solving import solved

    y = (CODES == 2).astype(int)
    model = fitted(y=y, C=2.0)
    influence = uw.explain(model, X, y)
    wide = np.column_stack([X, np.ones(N)])
    p = expit(wide @ np.append(model.coef_[0], model.intercept_))
    hessian = (wide * (p * (1 - p))[:, None]).T @ wide / N + np.diag([1, 1, 0]) / (2.0 * N)
    query = np.append(XQ[0], 1.0)
    s = np.linalg.solve(hessian, query)
    S = solved(influence, _jacobian(influence, influence.encoder.examples(XQ[:1])), "the outputs")
    np.testing.assert_allclose(S.numpy()[0], s, rtol=1e-6)
    change = Relabelled(influence, 1)
    zeros = np.flatnonzero(y == 0)
    np.testing.assert_array_equal(change.candidates, zeros)
    np.testing.assert_allclose(change.effects(S)[:, 0], wide[zeros] @ s / N, rtol=1e-6)  # −(1/n) s·((p − 1) − p) x
    np.testing.assert_allclose(Removed(influence, 1).effects(S)[:, 0], (wide * (p - y)[:, None]) @ s / N, rtol=1e-6)
    folded = uw.explain(model, X, y, penalty_per_example=True)
    share = np.append(model.coef_[0] / (2.0 * N), 0.0) @ s
    np.testing.assert_allclose(
        Removed(folded, 1).effects(S)[:, 0], ((wide * (p - y)[:, None]) @ s + share) / N, rtol=1e-6
    )
    moved = influence.objective.at(influence.objective.theta + torch.tensor([0.3, -0.2, 0.1], dtype=torch.float64))
    eta = wide @ moved.theta.numpy()
    rows = zeros[:3]
    np.testing.assert_allclose(change.gradient(moved, rows).numpy(), -wide[rows].sum(0) / N, rtol=1e-9)
    expected = -((expit(eta) - y)[rows, None] * wide[rows]).sum(0) / N
    np.testing.assert_allclose(Removed(influence, 1).gradient(moved, rows).numpy(), expected, rtol=1e-9)


@pytest.mark.parametrize("folded", [True, False])
def test_the_gradient_of_changed_data_is_that_of_the_changed_objective(folded):
    from upweight.apps.changes import Relabelled, Removed

    influence = uw.explain(fitted(class_weight="balanced"), X, NAMES, sample_weight=None, penalty_per_example=folded)
    rows = np.flatnonzero(NAMES != "bee")[[0, 4, 9]]
    for change in (Relabelled(influence, "bee"), Removed(influence, "bee")):
        after = change.made(rows, None)
        there = uw.Influence(after.objective.at(after.objective.theta), influence.examples, encoder=influence.encoder)
        back = (
            there.objective
            if not folded
            else uw.explain(fitted(class_weight="balanced"), X, NAMES, penalty_per_example=True).objective.at(
                after.objective.theta
            )
        )
        whole = uw.Influence(back, influence.examples, encoder=influence.encoder)
        total = whole.risk_gradient + change.gradient(back, rows)
        assert float(total.norm()) < 1e-6 * float(whole.risk_gradient.norm() + 1)
        assert float(whole.risk_gradient.norm()) > 1e-4


@pytest.mark.parametrize("query", [0, 1, 2, 3])
@pytest.mark.parametrize("ask", [contrast, contrast_by_removal])
def test_no_smaller_set_corrects(ask, query):
    """Against every set of fewer rows, each really made and refitted."""
    few, y = X[:14, :], (CODES[:14] == 0).astype(int)
    model = fitted(few, y, C=0.5)
    p = model.predict_proba(XQ)[:, 1]
    chosen = np.argsort(np.abs(p - 0.5), kind="stable")[[0, 2, 4, 6]][query]
    on = (XQ[[chosen]], 1 - model.predict(XQ[[chosen]]))
    answer = ask(uw.explain(model, few, y), on, most=6).answers[0]
    candidates = np.flatnonzero(y != on[1][0]) if ask is contrast else np.arange(14)

    def corrects(rows):
        changed, keep = y.copy(), np.ones(14, dtype=bool)
        if ask is contrast:
            changed[list(rows)] = on[1][0]
        else:
            keep[list(rows)] = False
        if len(np.unique(changed[keep])) < 2:
            return False
        return fitted(few[keep], changed[keep], C=0.5).predict(on[0])[0] == on[1][0]

    size = len(answer.rows)
    assert size > 0
    assert answer.corrected
    assert corrects(answer.rows)
    assert size < 5
    for smaller in range(1, size):
        assert not any(corrects(rows) for rows in itertools.combinations(candidates, smaller))


def test_weights_pipelines_and_sparse_inputs():
    model = make_pipeline(
        StandardScaler(), LogisticRegression(C=0.3, class_weight="balanced", tol=1e-10, max_iter=5000)
    )
    weight = DRAW.uniform(0.5, 2, N)
    model.fit(X, NAMES, logisticregression__sample_weight=weight)
    influence = uw.explain(model, X, NAMES, sample_weight=weight)
    order = np.argsort(model.predict_proba(XQ), axis=1)
    on = (XQ[:3], model.classes_[order[:3, -2]])
    assert contrast(influence, on).corrected == 3
    assert contrast_by_removal(influence, on).corrected == 3
    table, (few, wanted) = scipy.sparse.csr_matrix(X), wrong(fitted(), 3)
    dense = contrast(uw.explain(fitted(), X, NAMES), (few, wanted))
    sparse_on = (scipy.sparse.csr_matrix(few), wanted)
    sparse = contrast(uw.explain(fitted(table), table, NAMES), sparse_on)
    for one, other in zip(dense.answers, sparse.answers, strict=True):
        np.testing.assert_array_equal(one.rows, other.rows)
        assert one.actual == pytest.approx(other.actual, abs=1e-4)


def test_queries_of_a_frame_go_by_position():
    pandas = pytest.importorskip("pandas")
    frame, index = pandas.DataFrame(X, columns=["a", "b"]), np.linspace(5, 6, 3)[::-1]
    Xq, wanted = wrong(fitted(), 3)
    on = (pandas.DataFrame(Xq, columns=["a", "b"], index=index), pandas.Series(wanted, index=index))
    framed = contrast(uw.explain(fitted(frame), frame, NAMES), on)
    plain = contrast(uw.explain(fitted(), X, NAMES), (Xq, wanted))
    assert [answer.rows.tolist() for answer in framed.answers] == [answer.rows.tolist() for answer in plain.answers]
    coo = contrast(uw.explain(fitted(), X, NAMES), (scipy.sparse.coo_matrix(Xq), wanted))
    assert [answer.rows.tolist() for answer in coo.answers] == [answer.rows.tolist() for answer in plain.answers]


def test_regressing_classifiers():
    model = RidgeClassifier(alpha=2.0).fit(X, NAMES)
    order = np.argsort(model.decision_function(XQ), axis=1)
    on = (XQ[:6], model.classes_[order[:6, -2]])
    found = contrast(uw.explain(model, X, NAMES), on)
    assert found.corrected == 6
    assert found.calibration == pytest.approx(1, abs=1e-6)  # squared loss: the first step is exact
    for answer in found.answers:
        assert answer.predicted == pytest.approx(answer.actual, abs=1e-8)
        changed = NAMES.copy()
        changed[answer.rows] = answer.wanted
        assert RidgeClassifier(alpha=2.0).fit(X, changed).predict(on[0][[answer.query]])[0] == answer.wanted


def trained(network, loss, y):
    """A network at its minimum, as its influence says."""
    start = uw.explain(network, torch.from_numpy(X), y, loss=loss, penalty=0.02, curvature=uw.operators.GaussNewton())
    return uw.retrained(start)


def test_networks_with_several_outputs_and_with_one():
    torch.manual_seed(0)
    several = nn.Sequential(nn.Linear(2, 6), nn.Tanh(), nn.Linear(6, 3)).double().eval()
    influence = trained(several, nn.functional.cross_entropy, torch.from_numpy(CODES))
    outputs = uw.predict(influence, torch.from_numpy(XQ)).outputs
    near = np.argsort(np.ptp(np.sort(outputs, 1)[:, -2:], axis=1))[:2]
    on = (torch.from_numpy(XQ[near]), np.argsort(outputs[near], 1)[:, -2])
    found = contrast(influence, on)
    assert found.corrected == 2
    for answer in found.answers:
        assert answer.wanted == on[1][answer.query]
        if answer.corrected:
            assert answer.actual < 0
    torch.manual_seed(0)
    one = nn.Sequential(nn.Linear(2, 5), nn.Tanh(), nn.Linear(5, 1), nn.Flatten(0)).double().eval()
    single = trained(one, nn.functional.binary_cross_entropy_with_logits, torch.from_numpy((CODES == 2).astype(float)))
    logits = uw.predict(single, torch.from_numpy(XQ)).outputs[:, 0]
    near = np.argsort(np.abs(logits))[:2]
    told = contrast_by_removal(single, (torch.from_numpy(XQ[near]), (logits[near] < 0).astype(int)))
    assert told.corrected == 2


def test_a_head_on_frozen_features():
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(2, 20), nn.ReLU(), nn.Linear(20, 3)).eval()
    y = torch.from_numpy(CODES)
    start = uw.explain(
        network,
        torch.from_numpy(X).float(),
        y,
        loss=nn.functional.cross_entropy,
        penalty=0.02,
        parameters=["2.weight", "2.bias"],
        damping=0.0,
    )
    influence = uw.retrained(start)
    outputs = uw.predict(influence, torch.from_numpy(XQ).float()).outputs
    on = (torch.from_numpy(XQ[:3]).float(), np.argsort(outputs[:3], 1)[:, -2])
    found = contrast(influence, on)
    assert found.corrected == 3
    assert found.calibration == pytest.approx(1, abs=0.05)


def test_a_limit_that_is_not_enough_is_said():
    model = fitted()
    sure = int(np.argmax(model.predict_proba(XQ).max(1)))
    on = (XQ[[sure]], model.classes_[[np.argmin(model.predict_proba(XQ[[sure]])[0])]])
    answer = contrast(uw.explain(model, X, NAMES), on, most=2).answers[0]
    assert len(answer.rows) == 0
    assert not answer.corrected
    assert answer.after is None
    assert 0 < answer.predicted < answer.margin
    assert np.isnan(answer.actual)
    assert "no set within the limit" in str(contrast(uw.explain(model, X, NAMES), on, most=2))


def test_a_set_that_does_not_correct_is_said_and_grows_if_asked():
    model = fitted()
    on = tuple(part[4:5] for part in wrong(model))
    influence = uw.explain(model, X, NAMES)
    theta = influence.objective.theta.numpy()
    exact = uw.Newton().bind(influence)

    def half_way(weights, seed=0):
        return theta + 0.7 * (exact(weights).numpy() - theta)

    short = contrast_by_removal(influence, on, retrain=half_way)
    assert short.corrected == 0
    assert short.answers[0].grown is None
    assert "NOT confirmed" in str(short)
    longer = contrast_by_removal(influence, on, retrain=half_way, refits=8).answers[0]
    assert not longer.corrected
    assert longer.grown is not None
    assert len(longer.grown) > len(longer.rows)
    np.testing.assert_array_equal(longer.grown[: len(longer.rows)], longer.rows)

    def fails(weights, seed=0):
        raise NotConverged("no minimum today")

    refused = contrast_by_removal(influence, on, retrain=fails).answers[0]
    assert refused.refused == "no minimum today"
    assert not refused.corrected


def test_only_wrong_queries_are_answered_and_told():
    model = fitted()
    Xq, wanted = wrong(model)
    y = model.predict(Xq)
    y[2], y[5] = wanted[2], wanted[5]
    found = contrast(uw.explain(model, X, NAMES), (Xq, y))
    assert [answer.query for answer in found.answers] == [2, 5]
    assert found.sizes.tolist() == [len(answer.rows) for answer in found.answers]
    assert found.median_set_size == np.median(found.sizes)
    numbers = json.loads(json.dumps(found.to_dict()))
    assert numbers["queries"] == 2
    assert numbers["corrected_rate"] == found.corrected_rate == found.corrected / 2
    assert numbers["answers"][0]["wanted"] == wanted[2]
    text = str(found)
    assert "2 wrong predictions, labels changed" in text
    assert f"{found.answers[0].label} instead of {wanted[2]}" in text


def test_what_cannot_be_answered_is_refused():
    model = fitted()
    influence = uw.explain(model, X, NAMES)
    refuses(lambda: contrast(influence, (XQ, model.predict(XQ))), ValueError, "All 60 predictions")
    refuses(lambda: contrast(influence, (XQ[:2], ["ant", "dog"])), ValueError, "dog is no class")
    refuses(lambda: contrast(influence, (XQ[:2], ["ant"])), ValueError, r"yq has shape \(1,\)")
    refuses(lambda: contrast(influence, XQ), ValueError, "Pass the pair")
    refuses(lambda: contrast(influence, wrong(model), most=0), ValueError, "most=0")
    refuses(lambda: contrast(influence, wrong(model), refits=0), ValueError, "refits=0")
    line = uw.explain(Ridge().fit(X, CODES), X, CODES)
    refuses(lambda: contrast(line, (XQ, np.zeros(60))), TypeError, "no classes")
    with pytest.warns(uw.errors.TheoryWarning):
        pairs = uw.explain(
            SVC(kernel="linear").fit(np.vstack([X, X + 9]), np.r_[CODES, CODES + 3]),
            np.vstack([X, X + 9]),
            np.r_[CODES, CODES + 3],
        )
    refuses(lambda: contrast(pairs, (XQ[:1], [5])), TypeError, "15 outputs are those of pairs of 6 classes")


@pytest.mark.parametrize("ask", [contrast, contrast_by_removal])
def test_answers_have_a_bar(ask, capsys):
    influence, on = uw.explain(fitted(), X, NAMES), wrong(fitted(), 2)
    found = ask(influence, on, progress=True)
    shown = capsys.readouterr().err
    assert f"contrast, {found.change}" in shown
    assert "0/2" in shown
    ask(influence, on, progress=False)
    ask(influence, on)  # no terminal
    assert capsys.readouterr().err == ""
