"""Apps that train: the same result on workers, and from a folder; what a folder has is not computed again."""

from __future__ import annotations

import joblib
import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression

import upweight as uw
from upweight import apps
from upweight.errors import StoreMismatch

n, d = 50, 3
DRAW = np.random.default_rng(5)
X = DRAW.normal(size=(n, d))
Y = np.array(["no", "yes"])[(X @ [1.0, -1.0, 0.5] + DRAW.normal(size=n) > 0).astype(int)]
WRONG = X[:4], np.where(Y[:4] == "no", "yes", "no")
TRAININGS = []


class Counting:
    """Newton's method that notes each training."""

    def __repr__(self):
        return "Counting()"

    def bind(self, influence):
        train = uw.Newton().bind(influence)
        return lambda weights, seed: (TRAININGS.append(1), train(weights, seed))[1]


def influence():
    return uw.explain(LogisticRegression(tol=1e-10, max_iter=1000).fit(X, Y), X, Y)


def attack(**settings):
    settings = {"level": 1.0, "step": 0.1, "iterations": 4, "half": 2.0, "count": 2} | settings
    found = apps.attack(influence(), (X[:2], Y[:2]), retrain=Counting(), **settings)
    return [found.rows, found.after, found.losses, found.predicted, found.model.objective.theta, found.random_loss]


def labels(budget=3, **settings):
    found = apps.flip_labels(influence(), (X[:2], Y[:2]), budget, retrain=Counting(), **settings)
    return [found.rows, found.new, found.losses, found.predicted, found.model.objective.theta]


def rows(budget=3, **settings):
    pool = X[30:] + 0.1, Y[30:][::-1].copy()
    found = apps.replace_rows(influence(), pool, (X[:2], Y[:2]), budget, retrain=Counting(), **settings)
    return [found.rows, found.new, found.pool_rows, found.losses, found.predicted, found.model.objective.theta]


def contrast(kind=apps.contrast, **settings):
    found = kind(influence(), WRONG, refits=2, retrain=Counting(), **settings)
    return [str(found), *(part for one in found.answers for part in (one.rows, one.predicted, one.actual, one.after))]


def removal(**settings):
    return contrast(apps.contrast_by_removal, **settings)


def repair(**settings):
    found = apps.repair(influence(), plantings=4, retrain=Counting(), **settings)
    return [found.text(), *found.planted.hits.values()]


def corrected(**settings):
    new = {0: "no" if Y[0] == "yes" else "yes"}
    found = apps.corrected(influence(), new, retrain=Counting(), **settings)
    return [str(found), found.influence.objective.theta]


ALL = [attack, labels, rows, contrast, removal, repair, corrected]


def told(found):
    return [
        part if isinstance(part, str) else (np.asarray(part).dtype.kind, np.asarray(part).tobytes()) for part in found
    ]


@pytest.mark.parametrize("app", ALL, ids=lambda app: app.__name__)
def test_a_folder_is_read_and_not_computed(app, tmp_path):
    TRAININGS.clear()
    alone = told(app())
    needed = len(TRAININGS)
    assert needed > 1
    for more in (needed, 0):
        TRAININGS.clear()
        assert told(app(store=tmp_path / "run")) == alone
        assert len(TRAININGS) == more
    chunks = sorted((tmp_path / "run").glob("chunk-*"))
    for file in chunks[len(chunks) // 2 :]:  # as a kill leaves it
        file.unlink()
    TRAININGS.clear()
    assert told(app(store=tmp_path / "run")) == alone
    assert 0 < len(TRAININGS) < needed


@pytest.mark.parametrize("app", [contrast, removal, repair], ids=lambda app: app.__name__)
def test_workers_find_the_same(app, tmp_path):
    alone = told(app())
    with joblib.parallel_config(backend="threading", n_jobs=2):
        assert told(app()) == alone
        assert told(app(store=tmp_path / "run")) == alone


@pytest.mark.slow
@pytest.mark.parametrize("app", [contrast, removal, repair], ids=lambda app: app.__name__)
def test_processes_find_the_same(app):
    alone = told(app())
    with joblib.parallel_config(backend="loky", n_jobs=2):
        assert told(app()) == alone


@pytest.mark.parametrize(
    ("app", "fewer", "more"),
    [
        (attack, {"iterations": 2}, {"iterations": 4}),
        (labels, {"budget": 1}, {"budget": 3}),
        (rows, {"budget": 1}, {"budget": 3}),
    ],
    ids=["attack", "labels", "rows"],
)
def test_longer_ones_go_on(app, fewer, more, tmp_path):
    TRAININGS.clear()
    alone = told(app(**more))
    needed = len(TRAININGS)
    TRAININGS.clear()
    app(**fewer, store=tmp_path / "run")
    assert told(app(**more, store=tmp_path / "run")) == alone
    assert len(TRAININGS) == needed


@pytest.mark.parametrize(
    ("first", "other"),
    [
        (attack, lambda store: attack(store=store, step=0.2)),
        (attack, labels),
        (labels, lambda store: labels(store=store, seed=1)),
        (contrast, removal),
        (repair, lambda store: repair(store=store, inspect=0.2)),
        (repair, lambda store: repair(store=store, scores=lambda after: {"size": np.abs(X[:, 0])})),
    ],
    ids=["step", "app", "seed", "change", "inspected", "orders"],
)
def test_another_question_is_refused(first, other, tmp_path):
    first(store=tmp_path / "run")
    with pytest.raises(StoreMismatch, match="Different: "):
        other(store=tmp_path / "run")
