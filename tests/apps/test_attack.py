"""Training-set attacks on inputs: the box, the control, and what refits really say."""

from __future__ import annotations

import importlib
import json

import numpy as np
import pytest
import scipy.optimize
import torch
from sklearn.decomposition import PCA
from sklearn.kernel_ridge import KernelRidge
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import nn

import upweight as uw
from victims import TIGHT, counted, loss_of, two_digits


@pytest.fixture(scope="module")
def digits():
    return two_digits()


def test_an_attack_raises_the_loss_of_a_model_that_is_really_trained(digits):
    influence, X, names = digits
    on = (X[200:202], names[200:202])
    made = uw.apps.attack(influence, on, count=3, level=1 / 16, step=0.1, iterations=12, test=(X[200:], names[200:]))
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
    made = uw.apps.attack(influence, on, count=10, level=1 / 4, step=0.2, iterations=40)
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
    made = uw.apps.attack(influence, on, count=2, level=1.0, step=0.25, iterations=2)
    assert made.before.shape == (2, 1, 8, 8)
    assert np.array_equal(np.rint(made.after), made.before)
    assert made.loss[1] > made.loss[0]
    changed = pixels[:36].float()
    changed[made.rows] = torch.from_numpy(made.after).float()
    fresh = uw.retrained(uw.explain(net, changed, labels[:36], **settings))
    assert made.loss[1] == pytest.approx(fresh.on_loss(on[0].float(), on[1]).query_values.mean(), rel=1e-4)
    inputs = uw.training_inputs(made.model)
    np.testing.assert_allclose(inputs, changed, atol=1e-4)


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
    with pytest.raises(uw.errors.InvalidInput, match="both given"):
        uw.apps.attack(influence, on, rows=[3], count=2)
    with pytest.raises(uw.errors.InvalidInput, match="count=0"):
        uw.apps.attack(influence, on, count=0)
    with pytest.raises(uw.errors.InvalidInput, match="test is"):
        uw.apps.attack(influence, on, test=X)
    kernel = uw.explain(KernelRidge(kernel="rbf").fit(X[:50], X[:50, 20]), X[:50], X[:50, 20])
    with pytest.raises(uw.errors.UnsupportedModel, match="kernel"):
        uw.apps.attack(kernel, (X[:1], X[:1, 20]), rows=[3])
    line = uw.explain(Ridge().fit(X, X[:, 20]), X, X[:, 20])
    with pytest.raises(uw.errors.InvalidInput, match="no classes"):
        uw.apps.attack(line, (X[:1], X[:1, 20]), test=(X[:2], X[:2, 20]))


def test_a_pipeline_that_changes_the_columns_is_refused(digits):
    _, X, names = digits
    pipe = make_pipeline(PCA(5), LogisticRegression(**TIGHT)).fit(X[:200], names[:200])
    with pytest.raises(uw.errors.UnsupportedModel, match="Usual reason: a Pipeline transforms"):
        uw.apps.attack(uw.explain(pipe, X[:200], names[:200]), (X[200:201], names[200:201]), rows=[3])


def test_a_function_of_weights_is_refused_for_it_cannot_see_changed_rows(digits):
    influence, X, names = digits
    on = (X[200:201], names[200:201])
    theta = influence.objective.theta

    def retrain(weights, seed=0):
        return theta

    with pytest.raises(uw.errors.InvalidInput, match=r"rows have changed.*uw.Newton\(\)"):
        uw.apps.attack(influence, on, rows=[3], retrain=retrain)
    with pytest.raises(uw.errors.InvalidInput, match="rows have changed"):
        uw.apps.flip_labels(influence, on, 1, retrain=retrain)
    with pytest.raises(uw.errors.InvalidInput, match="rows have changed"):
        uw.apps.replace_rows(influence, (X[:3], names[:3]), on, 1, retrain=retrain)
    made = uw.apps.attack(influence, on, rows=[3], level=1 / 16, iterations=2, retrain=uw.LBFGS(rtol=1e-7))
    same = uw.apps.attack(influence, on, rows=[3], level=1 / 16, iterations=2)
    np.testing.assert_allclose(made.losses, same.losses, rtol=1e-5)


def test_a_dataset_is_refused_with_a_way_out():
    torch.manual_seed(0)
    X = torch.rand(30, 4, dtype=torch.float64)
    y = (X[:, 0] > 0.5).long()
    data = torch.utils.data.TensorDataset(X, y)
    influence = uw.explain(nn.Linear(4, 2).double().eval(), data, loss=nn.functional.cross_entropy, penalty=0.05)
    with pytest.raises(uw.errors.InvalidInput, match=r"Dataset.*arrays"):
        uw.apps.attack(influence, (X[:1], y[:1]), rows=[3])


def test_targets_in_a_column_are_attacked_too():
    torch.manual_seed(0)
    X = torch.randn(40, 3, dtype=torch.float64)
    y = (X[:, :1] + 0.5 * torch.randn(40, 1) > 0).double()
    net = nn.Linear(3, 1).double().eval()
    influence = uw.retrained(uw.explain(net, X, y, loss=nn.BCEWithLogitsLoss(), penalty=0.05))
    assert uw.classes(influence) == [0, 1]
    on = (X[:2] * 0.9, y[:2])
    made = uw.apps.attack(influence, on, count=2, level=0.5, step=0.2, iterations=4)
    moved = X.clone()
    moved[made.rows] = torch.from_numpy(made.after)
    coef = np.concatenate([influence.objective.theta.numpy()])

    def risk(theta, inputs, targets):
        f = inputs.numpy() @ theta[:3] + theta[3]
        return np.logaddexp(0, -(2 * targets.numpy()[:, 0] - 1) * f).mean() + 0.025 * theta @ theta

    def loss_after(inputs, targets):
        theta = scipy.optimize.minimize(risk, coef, (inputs, targets), tol=1e-12).x
        return np.logaddexp(0, -(2 * on[1].numpy()[:, 0] - 1) * (on[0].numpy() @ theta[:3] + theta[3])).mean()

    assert made.loss[1] > made.loss[0]
    assert made.loss[1] == pytest.approx(loss_after(moved, y), rel=1e-4)
    found = uw.apps.flip_labels(influence, on, 2)
    labels = y.clone()
    labels[found.rows, 0] = torch.from_numpy(found.new.astype(float))
    assert found.losses[-1] == pytest.approx(loss_after(X, labels), rel=1e-4)
    pool = (torch.tensor([[2.0, 0, 0], [-3.0, 1, 0]], dtype=torch.float64), torch.tensor([[0.0], [1.0]]).double())
    found = uw.apps.replace_rows(influence, pool, on, 1)
    moved, labels = X.clone(), y.clone()
    moved[found.rows], labels[found.rows] = pool[0][found.pool_rows], pool[1][found.pool_rows]
    assert found.new.tolist() == pool[1][found.pool_rows, 0].tolist()
    assert found.losses[-1] == pytest.approx(loss_after(moved, labels), rel=1e-4)


def test_a_regression_can_be_attacked_too():
    X = np.random.default_rng(0).normal(size=(40, 3))
    y = X @ [1.0, -2.0, 0.5]
    influence = uw.explain(Ridge(alpha=1.0).fit(X, y), X, y)
    made = uw.apps.attack(influence, (X[:2], y[:2] + 1), count=2, level=0.1, iterations=5, step=0.1)
    assert made.loss[1] > made.loss[0]
    assert made.targets is None
    assert not len(made.flipped)
    assert "Mean loss" in str(made)


def three_classes(seed, count, C):
    draw = np.random.default_rng(seed)
    X = draw.normal(size=(count, 3))
    y = np.argmax(X + draw.normal(size=(count, 3)), 1)
    return draw, X, y, LogisticRegression(C=C, tol=1e-8, max_iter=3000).fit(X, y)


def test_the_point_at_which_all_queries_are_wrong_is_given_back():
    """Its mean loss may be smaller than one that was met before, where one of the queries was still right."""
    draw, X, y, model = three_classes(21, 25, 3.0)
    influence = uw.explain(model, X, y)
    Q = draw.normal(size=(80, 3))
    sure = np.sort(model.predict_proba(Q), 1)
    chosen = np.r_[np.argsort(sure[:, -1] - sure[:, -2])[draw.integers(0, 6, 1)], draw.integers(0, 80, 1)]
    settings = {"level": 3.0, "step": 0.25, "iterations": 12, "patience": 12, "bounds": (-30, 30)}
    made = uw.apps.attack(influence, (Q[chosen], model.predict(Q[chosen])), rows=list(range(12)), **settings)
    assert np.argmax(made.losses) != len(made.losses) - 1  # else this says nothing
    assert made.flipped.all()
    assert made.step == len(made.losses) - 1
    assert made.loss[1] == made.losses[-1]
    moved = X.copy()
    moved[made.rows] = made.after
    again = LogisticRegression(C=3.0, tol=1e-8, max_iter=3000).fit(moved, y)
    assert (again.predict(Q[chosen]) != model.predict(Q[chosen])).all()


@pytest.mark.parametrize("bounds", [None, (0.0, 1.0), (-0.03, 1.03), (-0.1, 1.1)])
def test_levels_are_those_of_the_data_whatever_the_bounds(digits, bounds):
    influence, X, names = digits
    on = (X[200:203], names[200:203])
    made = uw.apps.attack(influence, on, rows=[3, 5], level=1 / 16, step=0.2, iterations=4, bounds=bounds)
    assert made.rounds_back
    assert np.array_equal(np.rint(made.after * 16), np.rint(made.before * 16))
    wide = uw.apps.attack(influence, on, rows=[3, 5], level=1 / 16, half=1.5, step=0.5, iterations=4, bounds=bounds)
    assert not np.array_equal(np.rint(wide.after * 16), np.rint(wide.before * 16))
    assert not wide.rounds_back


def test_levels_of_inputs_that_do_not_start_at_0(digits):
    _, X, names = digits
    Z = 2 * X - 1 + 1 / 16  # no level is 0
    influence = uw.explain(LogisticRegression(**TIGHT).fit(Z[:200], names[:200]), Z[:200], names[:200])
    made = uw.apps.attack(influence, (Z[200:202], names[200:202]), rows=[3], level=1 / 8, step=0.2, iterations=4)
    assert made.largest > 0.4
    assert made.rounds_back


def test_rows_are_named_as_everywhere(digits):
    influence, X, names = digits
    on, few = (X[200:201], names[200:201]), {"level": 1 / 16, "iterations": 1}
    mask = np.zeros(200, dtype=bool)
    mask[[4, 9]] = True
    assert uw.apps.attack(influence, on, rows=5, **few).rows.tolist() == [5]
    assert uw.apps.attack(influence, on, rows=np.int64(5), **few).rows.tolist() == [5]
    assert uw.apps.attack(influence, on, rows=mask, **few).rows.tolist() == [4, 9]
    ranked = uw.apps.vulnerability(influence, on, level=1 / 16)
    assert uw.apps.attack(influence, on, **few).rows.tolist() == ranked.top(1).tolist()
    assert uw.apps.attack(influence, on, count=3, **few).rows.tolist() == ranked.top(3).tolist()


def test_what_training_again_alone_flips_is_not_the_attacks_doing(stopped_early):
    influence, whole, X, y, spoilt = stopped_early
    on = (X[spoilt[:1]], y[spoilt[:1]])
    made = uw.apps.attack(influence, on, rows=[3], level=1 / 16, iterations=3, test=(X[600:], y[600:]))
    assert made.said_before.tolist() == on[1].tolist()
    assert made.said_control.tolist() == whole.predict(on[0]).tolist() != on[1].tolist()
    assert not made.flipped.any()
    assert made.flipped_by_control.all()
    assert made.losses == [pytest.approx(loss_of(whole, *on).mean(), rel=1e-6)]
    assert made.loss_given == pytest.approx(loss_of(influence.encoder.estimator, *on).mean(), rel=1e-9)
    assert np.array_equal(made.after, made.before)
    assert made.accuracy_control == whole.score(X[600:], y[600:])
    assert made.accuracy[1] == made.accuracy_control
    assert not len(made.newly_wrong)
    told, said = made.to_dict(), str(made)
    assert told["flipped"] == []
    assert told["flipped_by_control"] == [0]
    assert told["accuracy_control"] == made.accuracy_control
    assert "Flipped 0 of 1 queries, after training again; training again with nothing changed flips 1." in said
    assert "wrong before any is changed" in said
    assert json.loads(json.dumps(told)) == told


def test_an_attack_starts_where_training_again_ends(stopped_early):
    """A model that stopped early has a larger loss than any retrained one, so no step would ever beat it."""
    influence, whole, X, y, _ = stopped_early
    on = (X[600:603], y[600:603])
    made = uw.apps.attack(influence, on, rows=[3, 40], level=1 / 4, step=0.25, iterations=3)
    assert made.loss_given > made.losses[0]
    assert made.losses[0] == pytest.approx(loss_of(whole, *on).mean(), rel=1e-6)
    assert made.step > 0
    assert made.loss[1] > made.loss[0]
    moved = X[:600].copy()
    moved[made.rows] = made.after
    again = LogisticRegression(solver="newton-cholesky", **TIGHT).fit(moved, y[:600])
    assert made.loss[1] == pytest.approx(loss_of(again, *on).mean(), rel=1e-6)


def test_a_network_sees_the_queries_once_and_only_changed_rows_again():
    net, X, y, influence = counted()
    net.passes = 0
    settings = {"level": 1 / 16, "step": 0.1, "iterations": 10, "test": (X[:7] * 0.8, y[:7].numpy())}
    made = uw.apps.attack(influence, (X[:10] * 0.9, y[:10]), rows=[3], **settings)
    steps = len(made.losses) - 1
    assert steps == 10
    directions, by_chance = 2, 1  # equation 5 and equation 3 of the row, to compare; the random corner
    assert net.passes == 10 + 7 + directions + 2 * steps + by_chance


def test_features_of_all_rows_are_read_in_blocks(digits, monkeypatch):
    influence, X, names = digits
    monkeypatch.setattr(importlib.import_module("upweight.apps.attack"), "_NUMBERS", 64 * 30)
    sizes, plain = [], uw.features
    monkeypatch.setattr(uw, "features", lambda *asked: sizes.append(len(found := plain(*asked))) or found)
    made = uw.apps.attack(influence, (X[200:202], names[200:202]), rows=[7, 3, 12], level=1 / 16, iterations=1)
    assert max(sizes) == 30
    for place, row in enumerate([7, 3, 12]):
        mean = X[:200][names[:200] == names[row]].mean(0)
        assert made.feature_scale[place] == pytest.approx(np.linalg.norm(X[row] - mean), rel=1e-12)
