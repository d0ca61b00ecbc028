"""Label flips and replacements: against brute force over real refits, the control, and what they cost."""

from __future__ import annotations

import json
import tracemalloc

import numpy as np
import pandas as pd
import pytest
import scipy.sparse
import torch
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.svm import SVC
from torch import nn

import upweight as uw
from victims import TIGHT, counted, loss_of, two_digits


@pytest.fixture(scope="module")
def digits():
    return two_digits()


def weighted(n=40):
    """Three classes of unequal size with class weights and sample weights, two of them 0."""
    draw = np.random.default_rng(2)
    X = draw.normal(size=(n, 3))
    y = np.array(["ash", "oak", "yew"])[np.argmax(X + draw.normal(size=(n, 3)) + [0.5, 0, -0.3], 1)]
    weights = draw.uniform(0.2, 2.0, n)
    weights[[4, 8]] = 0
    settings = {"C": 0.3, "class_weight": {"ash": 0.5, "oak": 1.0, "yew": 2.0}, "tol": 1e-9, "max_iter": 10_000}
    influence = uw.explain(LogisticRegression(**settings).fit(X, y, sample_weight=weights), X, y, sample_weight=weights)
    return draw, X, y, weights, settings, influence


def test_the_first_flip_is_the_best_by_equation_3_and_among_the_best_of_all_refits():
    draw, X, y, weights, settings, influence = weighted()
    on = (draw.normal(size=(3, 3)), np.array(["ash", "oak", "oak"]))
    found = uw.apps.flip_labels(influence, on, 1)
    tried = [(row, name) for row in range(40) for name in ("ash", "oak", "yew") if y[row] != name]
    predicted = [influence.of_relabeling([row], [name], on=on).values.mean() for row, name in tried]
    assert (found.rows[0], found.new[0]) == tried[int(np.argmax(predicted))]
    assert found.predicted[0] == pytest.approx(max(predicted), rel=1e-6)
    really = []
    for row, name in tried:
        labels = y.copy()
        labels[row] = name
        again = LogisticRegression(**settings).fit(X, labels, sample_weight=weights)
        really.append(loss_of(again, *on).mean())
    place = tried.index((found.rows[0], found.new[0]))
    assert found.losses[1] == pytest.approx(really[place], rel=1e-6)
    assert np.sort(really)[-3] <= really[place]


def test_flips_are_really_trained(digits):
    influence, X, names = digits
    on = (X[200:201], names[200:201])
    found = uw.apps.flip_labels(influence, on, 3, test=(X[200:], names[200:]))
    labels = names[:200].copy()
    labels[found.rows] = found.new
    again = LogisticRegression(C=10.0, **TIGHT).fit(X[:200], labels)
    assert found.losses[-1] == pytest.approx(loss_of(again, *on).mean(), rel=1e-5)
    assert found.losses[-1] > found.losses[0]
    assert found.loss_given == pytest.approx(found.losses[0], rel=1e-6)
    assert len(set(found.rows.tolist())) == len(found.rows)
    assert found.old.tolist() == names[found.rows].tolist()
    whole = influence.encoder.estimator
    assert found.accuracy == (whole.score(X[200:], names[200:]), again.score(X[200:], names[200:]))
    assert found.accuracy_control == found.accuracy[0]
    right = whole.predict(X[:200]) == names[:200]
    assert found.newly_wrong.tolist() == np.flatnonzero(right & (again.predict(X[:200]) != labels)).tolist()
    assert "label changed" in str(found)
    assert "training again with nothing changed flips 0" in str(found)


def test_rows_without_weight_are_left_alone(digits):
    influence, X, names = digits
    less = uw.retrained(influence, without=np.arange(100))
    on = (X[200:203], names[200:203])
    assert uw.apps.flip_labels(less, on, 5).rows.min() >= 100
    assert uw.apps.replace_rows(less, (X[220:240], names[220:240]), on, 5).rows.min() >= 100


def test_the_first_replacement_is_the_best_of_all_pairs():
    draw, X, y, weights, settings, influence = weighted()
    on = (draw.normal(size=(3, 3)), np.array(["ash", "oak", "oak"]))
    pool = (2 * draw.normal(size=(6, 3)), np.array(["ash", "oak", "yew", "ash", "oak", "yew"]))
    found = uw.apps.replace_rows(influence, pool, on, 2)
    values = np.array([influence.of_replacing(np.full(6, row), *pool, on=on).values.mean(0) for row in range(40)])
    assert (found.rows[0], found.pool_rows[0]) == np.unravel_index(values.argmax(), values.shape)
    assert found.predicted[0] == pytest.approx(values.max(), rel=1e-6)
    rows, labels = X.copy(), y.copy()
    rows[found.rows], labels[found.rows] = pool[0][found.pool_rows], pool[1][found.pool_rows]
    again = LogisticRegression(**settings).fit(rows, labels, sample_weight=weights)
    assert found.losses[-1] == pytest.approx(loss_of(again, *on).mean(), rel=1e-6)
    assert found.new.tolist() == pool[1][found.pool_rows].tolist()
    assert len(set(found.pool_rows.tolist())) == 2


def test_a_pool_comes_as_the_model_takes_it(digits):
    _, X, names = digits
    columns = [f"p{j}" for j in range(64)]
    frame = pd.DataFrame(X, columns=columns, index=np.random.default_rng(0).permutation(len(X)))
    model = LogisticRegression(C=10.0, **TIGHT).fit(frame[:200], names[:200])
    influence = uw.explain(model, frame[:200], names[:200])
    on = (frame[200:201], names[200:201])
    found = uw.apps.replace_rows(influence, (frame[220:260], pd.Series(names[220:260])), on, 2)
    plain = uw.explain(LogisticRegression(C=10.0, **TIGHT).fit(X[:200], names[:200]), X[:200], names[:200])
    expected = uw.apps.replace_rows(plain, (X[220:260], names[220:260]), (X[200:201], names[200:201]), 2)
    assert found.rows.tolist() == expected.rows.tolist()
    assert found.pool_rows.tolist() == expected.pool_rows.tolist()
    np.testing.assert_allclose(found.losses, expected.losses, rtol=1e-6)
    thin = scipy.sparse.coo_matrix(X)
    sparse = uw.explain(
        LogisticRegression(C=10.0, **TIGHT).fit(thin.tocsr()[:200], names[:200]), thin.tocsr()[:200], names[:200]
    )
    on, pool = (thin.tocsr()[200:201], names[200:201]), (thin.tocsr()[220:260].tocoo(), names[220:260])
    assert uw.apps.replace_rows(sparse, pool, on, 2).pool_rows.tolist() == expected.pool_rows.tolist()


@pytest.mark.parametrize("app", ["flip", "replace"])
def test_what_training_again_alone_flips_is_no_change_s_doing(stopped_early, app):
    influence, whole, X, y, spoilt = stopped_early
    on, test = (X[spoilt[:1]], y[spoilt[:1]]), (X[600:], y[600:])
    if app == "flip":
        found = uw.apps.flip_labels(influence, on, 3, test=test)
    else:
        found = uw.apps.replace_rows(influence, (X[700:720], y[700:720]), on, 3, test=test)
    assert not len(found.rows)
    assert not found.flipped.any()
    assert found.flipped_by_control.all()
    assert found.said_control.tolist() == whole.predict(on[0]).tolist()
    assert found.losses == pytest.approx(loss_of(whole, *on).mean(), rel=1e-6)
    assert found.loss_given == pytest.approx(loss_of(influence.encoder.estimator, *on).mean(), rel=1e-9)
    assert found.accuracy_control == whole.score(*test)
    assert not len(found.newly_wrong)
    told = found.to_dict()
    assert (told["flipped"], told["flipped_by_control"]) == ([], [0])
    assert json.loads(json.dumps(told)) == told
    assert "Flipped 0 of 1 queries, after training again; training again with nothing changed flips 1." in str(found)
    assert "Every query is called wrong before anything is changed." in str(found)


def test_changes_start_where_training_again_ends(stopped_early):
    influence, whole, X, y, spoilt = stopped_early
    chosen = [600, int(spoilt[0])]
    found = uw.apps.flip_labels(influence, (X[chosen], y[chosen]), 1)
    assert found.losses[0] == pytest.approx(loss_of(whole, X[chosen], y[chosen]).mean(), rel=1e-6)
    values = uw.retrained(influence).of_relabeling(found.rows, found.new, on=(X[chosen], y[chosen])).values
    assert found.predicted[0] == pytest.approx(values.mean(), rel=1e-6)
    assert found.flipped_by_control.tolist() == [False, True]
    assert not found.flipped[1]


def test_what_is_refused(digits):
    influence, X, names = digits
    on = (X[200:201], names[200:201])
    line = uw.explain(Ridge().fit(X, X[:, 20]), X, X[:, 20])
    with pytest.raises(uw.errors.UnsupportedModel, match="no classes"):
        uw.apps.flip_labels(line, (X[:1], X[:1, 20]))
    with pytest.raises(uw.errors.InvalidInput, match="pool"):
        uw.apps.replace_rows(influence, X, on)
    with pytest.raises(uw.errors.InvalidInput, match="one label for each"):
        uw.apps.replace_rows(influence, (X[:3], names[:2]), on)
    with pytest.raises(uw.errors.InvalidInput, match="budget=0"):
        uw.apps.flip_labels(influence, on, 0)
    with pytest.raises(uw.errors.InvalidInput, match="test is"):
        uw.apps.flip_labels(influence, on, 1, test=X)


def test_a_kernel_machine_that_does_not_hold_the_pool_says_so():
    draw = np.random.default_rng(0)
    X = draw.normal(size=(40, 2))
    y = (X[:, 0] > 0).astype(int)
    with pytest.warns(uw.errors.TheoryWarning, match="smooth_hinge"):
        influence = uw.explain(SVC(gamma=1.0, C=10).fit(X, y), X, y, loss=uw.losses.smooth_hinge(0.3))
    with pytest.raises(uw.errors.UnsupportedModel, match="kernel"):
        uw.apps.replace_rows(influence, (np.array([[3.2, 2.0]]), [0]), (np.array([[3.2, 2.0]]), [1]), 1)


def test_a_network_sees_the_queries_once():
    net, X, y, influence = counted()
    on, test = (X[:10] * 0.9, y[:10]), (X[:7] * 0.8, y[:7].numpy())
    net.passes = 0
    assert len(uw.apps.flip_labels(influence, on, 4, test=test).rows) == 4
    assert net.passes == 10 + 7
    net.passes = 0
    found = uw.apps.replace_rows(influence, (X[:20].flip(-1), y[:20]), on, 4, test=test)
    assert len(found.rows) == 4
    assert net.passes == 10 + 7 + 20 + 4


def test_a_flip_reads_a_dataset_to_train_to_score_once_and_to_predict():
    class Reading(torch.utils.data.Dataset):
        reads = 0

        def __len__(self):
            return 80

        def __getitem__(self, row):
            Reading.reads += 1
            return X[row], y[row]

    torch.manual_seed(0)
    X = torch.randn(80, 4, dtype=torch.float64)
    y = (X[:, 0] + 0.5 * torch.randn(80) > 0).long()
    net, settings = nn.Linear(4, 2).double().eval(), {"loss": nn.functional.cross_entropy, "penalty": 0.05}
    influence = uw.retrained(uw.explain(net, Reading(), **settings))
    on = (torch.randn(3, 4, dtype=torch.float64), torch.tensor([0, 1, 0]))
    plain = uw.retrained(uw.explain(net, X, y, **settings))
    expected = uw.apps.flip_labels(plain, on, 1)
    Reading.reads = 0
    control = uw.retrained(influence)
    changed = uw.retrained(uw.edited(control, expected.rows, y_new=expected.new))
    trained, Reading.reads = Reading.reads, 0
    changed.on_loss(*on)
    scored, Reading.reads = Reading.reads, 0
    found = uw.apps.flip_labels(influence, on, 1)
    labels_once, three_models_say = 80, 3 * 80
    assert Reading.reads <= trained + scored + labels_once + three_models_say + 40  # and a few single rows
    assert found.rows.tolist() == expected.rows.tolist()


def test_flips_form_no_gradients_of_all_rows():
    draw = np.random.default_rng(0)
    X, y = draw.normal(size=(6000, 60)), draw.integers(0, 8, 6000)
    influence = uw.explain(LogisticRegression(C=1e-3, tol=1e-10, max_iter=1000).fit(X, y), X, y)
    gradients = 6000 * influence.objective.size * 8  # 23 MB
    on = (X[:2], influence.encoder.estimator.predict(X[:2]))
    influence.on_loss(*on)
    tracemalloc.start()
    assert len(uw.apps.flip_labels(influence, on, 1).rows) == 1
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < gradients / 2
