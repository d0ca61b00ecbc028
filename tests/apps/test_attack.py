"""Training-set attacks: the ranking against finite differences of real refits, the box, and what refits really say."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import nn

import upweight as uw

TIGHT = {"tol": 1e-12, "max_iter": 10_000}


@pytest.fixture(scope="module")
def digits():
    X, y = load_digits(return_X_y=True)
    two = np.isin(y, (4, 9))
    X, names = X[two] / 16, np.where(y[two] == 4, "four", "nine")
    model = LogisticRegression(C=10.0, **TIGHT).fit(X[:200], names[:200])
    return uw.explain(model, X[:200], names[:200]), X, names


def loss_of(model, X, names):
    place = np.searchsorted(model.classes_, names)
    return -np.log(model.predict_proba(X)[np.arange(len(X)), place])


def test_the_ranking_is_what_a_small_move_really_does(digits):
    influence, X, names = digits
    on = (X[200:203], names[200:203])
    found = uw.apps.vulnerability(influence, on, level=1 / 255)
    assert found.values.shape == (3, 200)
    gradient = influence.of_perturbing([int(found.top(1)[0])], on=on)[:, 0]
    for row in found.top(2):
        for query in range(3):
            g = influence.of_perturbing([row], on=on)[query, 0]
            moved, size = X[:200].copy(), 1e-3
            moved[row] += size * np.sign(g)
            again = LogisticRegression(C=10.0, **TIGHT).fit(moved, names[:200])
            rise = (loss_of(again, *on) - loss_of(influence.encoder.estimator, *on))[query]
            assert found.values[query, row] == pytest.approx(rise / size * 0.5 / 255, rel=0.05)
    assert gradient.shape == (3, 64)
    assert found.by_row[found.top(1)[0]] == found.by_row.max()
    assert found.by_query.tolist() == found.values.max(1).tolist()
    some = uw.apps.vulnerability(influence, on, rows=[7, 3], level=1 / 255)
    np.testing.assert_allclose(some.values, found.values[:, [3, 7]], rtol=1e-12)
    assert found.top(2, query=1).tolist() == np.argsort(-found.values[1])[:2].tolist()


def test_an_attack_raises_the_loss_of_a_model_that_is_really_trained(digits):
    influence, X, names = digits
    on = (X[200:202], names[200:202])
    made = uw.apps.attack(influence, on, rows=3, level=1 / 16, step=0.1, iterations=12, test=(X[200:], names[200:]))
    assert np.abs(made.after - made.before).max() < 0.5 / 16
    assert made.after.min() >= 0
    assert made.after.max() <= 1
    assert made.rounds_back
    assert np.array_equal(np.rint(made.after * 16), np.rint(made.before * 16))
    moved = X[:200].copy()
    moved[made.rows] = made.after
    again = LogisticRegression(C=10.0, **TIGHT).fit(moved, names[:200])
    assert made.loss[1] == pytest.approx(loss_of(again, *on).mean(), rel=1e-5)
    assert made.loss[0] == pytest.approx(loss_of(influence.encoder.estimator, *on).mean(), rel=1e-5)
    assert made.loss[1] > made.loss[0]
    assert made.loss[1] - made.loss[0] > 3 * abs(made.random_loss - made.loss[0])
    np.testing.assert_allclose(np.diff(made.losses)[:3], made.predicted[:3], rtol=0.2)
    assert made.said_after.tolist() == again.predict(on[0]).tolist()
    assert made.accuracy == (influence.encoder.estimator.score(X[200:], names[200:]), again.score(X[200:], names[200:]))
    right = influence.encoder.estimator.predict(X[:200]) == names[:200]
    assert made.newly_wrong.tolist() == np.flatnonzero(right & (again.predict(moved) != names[:200])).tolist()
    np.testing.assert_allclose(made.feature_change, made.lengths, rtol=1e-6)


def test_an_attack_ends_when_the_queries_are_wrong(digits):
    influence, X, names = digits
    margins = uw.predict(influence, X[200:]).outputs[:, 0] * np.where(names[200:] == "nine", 1, -1)
    weakest = 200 + int(np.argmin(np.where(margins > 0, margins, np.inf)))
    on = (X[[weakest]], names[[weakest]])
    made = uw.apps.attack(influence, on, rows=10, level=1 / 4, step=0.2, iterations=40)
    assert made.flipped.all()
    assert len(made.losses) < 40
    assert "Flipped 1 of 1" in str(made)
    assert made.to_dict()["flipped"] == [0]


def test_a_frozen_network_is_attacked_through_its_pixels():
    torch.manual_seed(0)
    body = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Softplus(), nn.Flatten())
    net = nn.Sequential(body, nn.Linear(144, 2)).eval()
    pixels = torch.randint(0, 256, (40, 1, 8, 8), dtype=torch.uint8)
    labels = (pixels[:, 0, :4].float().mean((1, 2)) > pixels[:, 0, 4:].float().mean((1, 2))).long()
    settings = {"loss": nn.functional.cross_entropy, "penalty": 0.01, "parameters": ["1.weight", "1.bias"]}
    influence = uw.retrained(uw.explain(net, pixels[:36], labels[:36], **settings))
    on = (pixels[36:38], labels[36:38])
    made = uw.apps.attack(influence, on, rows=2, level=1.0, step=0.25, iterations=4)
    assert made.before.shape == (2, 1, 8, 8)
    assert np.array_equal(np.rint(made.after), made.before)
    assert made.loss[1] > made.loss[0]
    changed = pixels[:36].float()
    changed[made.rows] = torch.from_numpy(made.after).float()
    fresh = uw.retrained(uw.explain(net, changed, labels[:36], **settings))
    assert made.loss[1] == pytest.approx(fresh.on_loss(on[0].float(), on[1]).query_values.mean(), rel=1e-4)
    inputs = uw.training_inputs(made.model)
    np.testing.assert_allclose(inputs, changed, atol=1e-4)


def test_label_flips_are_the_best_first_and_really_trained(digits):
    influence, X, names = digits
    on = (X[200:201], names[200:201])
    found = uw.apps.flip_labels(influence, on, 3, test=(X[200:], names[200:]))
    other = np.where(names[:200] == "four", "nine", "four")
    values = influence.of_relabeling(np.arange(200), other, on=on).values[0]
    assert found.rows[0] == np.argmax(values)
    assert found.predicted[0] == pytest.approx(values.max())
    labels = names[:200].copy()
    labels[found.rows] = found.new
    again = LogisticRegression(C=10.0, **TIGHT).fit(X[:200], labels)
    assert found.losses[-1] == pytest.approx(loss_of(again, *on).mean(), rel=1e-5)
    assert found.losses[-1] > found.losses[0]
    assert len(set(found.rows.tolist())) == len(found.rows)
    assert found.accuracy[1] == again.score(X[200:], names[200:])
    assert "label changed" in str(found)


def test_replacements_come_from_the_pool_and_are_really_trained(digits):
    influence, X, names = digits
    on, pool = (X[200:201], names[200:201]), (X[220:260], names[220:260])
    found = uw.apps.replace_rows(influence, pool, on, 2)
    rows, labels = X[:200].copy(), names[:200].copy()
    for row, j in zip(found.rows, found.pool_rows, strict=True):
        rows[row], labels[row] = pool[0][j], pool[1][j]
    again = LogisticRegression(C=10.0, **TIGHT).fit(rows, labels)
    assert found.losses[-1] == pytest.approx(loss_of(again, *on).mean(), rel=1e-5)
    every = max(
        float(influence.of_replacing([row], pool[0][j : j + 1], pool[1][j : j + 1], on=on).values[0, 0])
        for row in range(200)
        for j in (int(found.pool_rows[0]),)
    )
    assert found.predicted[0] == pytest.approx(every)
    assert len(set(found.pool_rows.tolist())) == 2


def test_what_is_refused(digits):
    influence, X, names = digits
    on = (X[200:201], names[200:201])
    for settings in ({"level": 0.0}, {"half": -1.0}, {"step": float("nan")}):
        with pytest.raises(uw.errors.InvalidInput, match="positive"):
            uw.apps.attack(influence, on, **settings)
    with pytest.raises(uw.errors.InvalidInput, match="bounds"):
        uw.apps.attack(influence, on, bounds=(0.0, 0.5))
    with pytest.raises(uw.errors.RowOutOfRange):
        uw.apps.attack(influence, on, rows=[999])
    pipe = make_pipeline(StandardScaler(), LogisticRegression(**TIGHT)).fit(X[:200], names[:200])
    with pytest.raises(uw.errors.UnsupportedModel, match="Pipeline"):
        uw.apps.attack(uw.explain(pipe, X[:200], names[:200]), on)
    line = uw.explain(Ridge().fit(X, X[:, 20]), X, X[:, 20])
    with pytest.raises(uw.errors.UnsupportedModel, match="no classes"):
        uw.apps.flip_labels(line, (X[:1], X[:1, 20]))
    with pytest.raises(uw.errors.InvalidInput, match="pool"):
        uw.apps.replace_rows(influence, X, on)
    with pytest.raises(uw.errors.InvalidInput, match="one label for each"):
        uw.apps.replace_rows(influence, (X[:3], names[:2]), on)


def test_a_regression_can_be_attacked_too():
    X = np.random.default_rng(0).normal(size=(40, 3))
    y = X @ [1.0, -2.0, 0.5]
    influence = uw.explain(Ridge(alpha=1.0).fit(X, y), X, y)
    made = uw.apps.attack(influence, (X[:2], y[:2] + 1), rows=2, level=0.1, iterations=5, step=0.1)
    assert made.loss[1] > made.loss[0]
    assert made.targets is None
    assert not len(made.flipped)
    assert "Mean loss" in str(made)
