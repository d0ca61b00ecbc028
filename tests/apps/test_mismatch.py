"""Mismatch: rows, features and sources against finite differences of real refits, sums and real removals."""

from __future__ import annotations

import json

import numpy as np
import pytest
import scipy.sparse
import torch
from sklearn.compose import ColumnTransformer
from sklearn.kernel_ridge import KernelRidge
from sklearn.linear_model import Lasso, LinearRegression, LogisticRegression, Ridge
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import OneHotEncoder

import upweight as uw
from small import XQ, YQ, Items as items_of, classifier, refuses
from upweight.apps import Mismatch, mismatch, one_hot_groups

N = 240
DRAW = np.random.default_rng(3)
KIND = DRAW.integers(0, 3, N)
KIND[:4] = 3  # four rows of a rare kind, three of them labelled the wrong way
NAMES = ["size", "width", "kind_a", "kind_b", "kind_c", "kind_d"]
X = np.column_stack([DRAW.normal(size=(N, 2)), np.eye(4)[KIND]])
X[:4, :2] *= 0.1
Y = (X[:, 0] + 0.5 * X[:, 1] + DRAW.normal(size=N) > 0).astype(np.int64)
Y[:4] = [1, 1, 1, 0]
XR = np.column_stack([0.1 * DRAW.normal(size=(5, 2)), np.tile(np.eye(4)[3], (5, 1))])
YR = np.zeros(5, dtype=np.int64)


def fitted(X=X, y=Y, **settings):
    return LogisticRegression(
        C=0.5, fit_intercept=False, solver="newton-cholesky", tol=1e-12, max_iter=200, **settings
    ).fit(X, y)


def loss(model, Xq=XR, yq=YR):
    return float(-model.predict_log_proba(Xq)[np.arange(len(yq)), yq].mean())


def found(**settings) -> Mismatch:
    return mismatch(uw.explain(fitted(), X, Y), (XR, YR), feature_names=NAMES, **settings)


def test_the_planted_rows_stand_out():
    told = found()
    assert set(told.harmful.responsible) == {0, 1, 2}
    assert told.helpful.rows[0] == 3
    assert told.loss == pytest.approx(loss(fitted()))
    assert set(told.responsible[:3]) == {0, 1, 2}


def test_rows_are_those_of_the_mean_values():
    told = found(k=7)
    values = uw.explain(fitted(), X, Y).on_loss(XR, YR).values.mean(0)
    order = np.argsort(values)
    np.testing.assert_array_equal(told.harmful.rows, order[:7])
    np.testing.assert_array_equal(told.helpful.rows, order[::-1][:7])
    np.testing.assert_allclose(told.harmful.values, values[order[:7]])
    np.testing.assert_allclose(told.harmful.ratios, values[order[:7]] / values[order[1:8]])
    assert told.harmful.ratio == told.harmful.ratios[told.harmful.stand_out - 1] == told.harmful.ratios.max()
    np.testing.assert_array_equal(told.helpful.responsible, told.helpful.rows[: told.helpful.stand_out])
    np.testing.assert_allclose(told.scores.values.mean(0), values)


def test_sides_with_few_rows_or_none():
    few, line = np.array([[0.0], [1.0], [3.0]]), [0.0, 2.0, 1.0]
    model = Ridge(alpha=1.0).fit(few, line)
    influence = uw.explain(model, few, line)
    told = mismatch(influence, (np.array([[4.0]]), [2.0]), k=5)
    sides = [told.harmful, told.helpful]
    assert sorted(len(side.rows) for side in sides) == [1, 2]
    for side in sides:
        assert np.isinf(side.ratios[-1])
        assert side.stand_out == 1
    assert np.isinf(min(sides, key=lambda side: len(side.rows)).ratio)
    empty = mismatch(influence, (np.array([[4.0]]), model.predict([[4.0]])))
    assert len(empty.responsible) == 0
    assert np.isnan(empty.harmful.ratio)
    assert empty.features is None
    assert "stand" not in str(empty)


def test_derivatives_by_feature_are_those_of_real_refits():
    effects = found(feature_groups={}).features
    assert effects is not None
    step = 1e-4
    for at, row in enumerate(effects.rows):
        for j, name in enumerate(NAMES):
            moved = [X.copy(), X.copy()]
            moved[0][row, j] += step
            moved[1][row, j] -= step
            derivative = (loss(fitted(moved[0])) - loss(fitted(moved[1]))) / (2 * step)
            assert effects.by_row[at, effects.names.index(name)] == pytest.approx(derivative, rel=1e-4, abs=1e-8)
    np.testing.assert_allclose(effects.signed, effects.by_row.sum(0))
    np.testing.assert_allclose(effects.absolute, np.abs(effects.by_row).sum(0))
    np.testing.assert_allclose(effects.held_by_row, effects.by_row * X[effects.rows])


def test_blocks_of_queries_change_nothing(monkeypatch):
    import sys

    whole = found().features
    monkeypatch.setattr(sys.modules["upweight.apps.mismatch"], "_NUMBERS", 50)
    blocks = found().features
    assert whole is not None
    assert blocks is not None
    np.testing.assert_allclose(blocks.by_row, whole.by_row, rtol=1e-10)
    alone = [mismatch(uw.explain(fitted(), X, Y), (XR[[q]], YR[[q]])).scores.values[0] for q in range(5)]
    np.testing.assert_allclose(found().scores.values, alone)


def test_one_hot_columns_are_one_feature():
    alone, together = found(feature_groups={}).features, found().features
    assert alone is not None
    assert together is not None
    assert together.names == ["size", "width", "kind"]
    np.testing.assert_allclose(together.by_row[:, 2], alone.by_row[:, 2:].sum(1))
    np.testing.assert_allclose(together.absolute_by_row[:, 2], np.abs(alone.by_row[:, 2:]).sum(1))
    np.testing.assert_allclose(together.held_by_row[:, 2], alone.by_row[:, 5])  # all four rows are of kind d
    assert together.coefficient[2] == np.abs(fitted().coef_[0, 2:]).max()
    assert together.widest[2] in NAMES[2:]
    named = found(feature_groups={"numbers": ["size", 1]}).features
    assert named is not None
    assert named.names == ["numbers", "kind_a", "kind_b", "kind_c", "kind_d"]
    np.testing.assert_allclose(named.by_row[:, 0], alone.by_row[:, :2].sum(1))


def test_places_count_what_comes_first():
    effects = found(feature_groups={}).features
    assert effects is not None
    coef = np.abs(fitted().coef_[0])
    for j, name in enumerate(NAMES):
        places = effects.places(name)
        assert places.coefficient == 1 + (coef > coef[j]).sum()
        assert places.absolute == 1 + (effects.absolute > effects.absolute[j]).sum()
        assert places.rising == 1 + (effects.signed > effects.signed[j]).sum()
        assert places.falling == 1 + (effects.signed < effects.signed[j]).sum()
    assert effects.places("kind_d").held == 1
    one = effects.of([int(effects.rows[1])])
    np.testing.assert_array_equal(one.by_row, effects.by_row[1:2])
    assert one.names[one.top(1)[0]] == NAMES[int(np.argmax(np.abs(one.held_by_row[0])))]


def test_coefficients_of_several_classes():
    three = np.where(X[:, 1] > 0.8, 2, Y)
    model = fitted(y=three)
    effects = mismatch(uw.explain(model, X, three), (XR, YR), feature_names=NAMES).features
    assert effects is not None
    np.testing.assert_allclose(effects.coefficient[:2], np.abs(model.coef_[:, :2]).max(0), rtol=1e-6)
    assert effects.coefficient[2] == pytest.approx(np.abs(model.coef_[:, 2:]).max())


@pytest.mark.parametrize("k", [2, 3])
def test_groups_add_and_their_newton_step_is_a_real_removal(k):
    source = np.where(KIND == 3, "rare", np.where(np.arange(N) < 120, "first", "second"))
    told = found(groups=source, k=k).groups
    assert told is not None
    values = uw.explain(fitted(), X, Y).on_loss(XR, YR).values.mean(0)
    assert told.names[0] == "rare"
    assert list(told.first_order) == sorted(told.first_order)
    assert told.newton is not None
    assert np.isnan(told.newton).sum() == 3 - k
    for name, size, first, newton in zip(told.names, told.sizes, told.first_order, told.newton, strict=True):
        members = source == name
        assert size == members.sum()
        assert first == pytest.approx(values[members].sum())
        if not np.isnan(newton):
            actual = loss(fitted(X[~members], Y[~members])) - loss(fitted())
            assert newton == pytest.approx(actual, rel=0.1, abs=1e-3)
    by_rows = found(groups={"rare": [0, 1, 2, 3]}).groups
    assert by_rows is not None
    assert by_rows.first_order[0] == pytest.approx(values[:4].sum())


def test_a_source_that_cannot_be_removed_leaves_the_others_their_steps():
    line = X[:, :2] @ [1.0, -1.0] + DRAW.normal(size=N)
    columns = np.column_stack([X[:, :2], X[:, 5]])  # without the rare rows the last column is 0
    influence = uw.explain(LinearRegression(fit_intercept=False).fit(columns, line), columns, line)
    source = np.where(KIND == 3, "rare", np.where(np.arange(N) < 120, "first", "second"))
    on = (columns[3:9], line[3:9] + 1)  # the first leans on the rare rows: no refit without them tells its prediction
    told = mismatch(influence, on, groups=source)
    assert told.groups is not None
    assert told.groups.newton is not None
    assert told.groups.refused == ""
    assert list(told.groups.without) == ["rare"]
    assert "1 of 6 queries (first: number 0) lean on it" in told.groups.without["rare"]
    assert f"no Newton step of rare: {told.groups.without['rare']}" in str(told)
    assert told.groups.to_dict()["without"] == dict(told.groups.without)

    def change(of, on):
        model, keep = LinearRegression(fit_intercept=False), source != of
        whole = ((model.fit(columns, line).predict(on[0]) - on[1]) ** 2).mean()
        return ((model.fit(columns[keep], line[keep]).predict(on[0]) - on[1]) ** 2).mean() - whole

    for name, step in zip(told.groups.names, told.groups.newton, strict=True):
        if name == "rare":
            assert np.isnan(step)
        else:
            assert step == pytest.approx(change(name, on), rel=1e-6)
    alone = mismatch(influence, on, groups={"rare": np.flatnonzero(KIND == 3)}).groups
    assert alone is not None
    assert alone.newton is None
    assert "1 of 6 queries" in alone.refused

    common = (columns[4:9], line[4:9] + 1)  # queries that have nothing of what leaves
    others = mismatch(influence, common, groups=source).groups
    assert others is not None
    assert others.newton is not None
    assert others.without == {}
    step = others.newton[others.names.index("rare")]
    assert step == pytest.approx(change("rare", common), rel=1e-6)


def test_what_a_model_does_not_have_is_left_out():
    network = mismatch(classifier(), (XQ, YQ), groups=np.arange(40) % 3)
    assert network.groups is not None
    assert network.groups.newton is None
    assert "linear predictor" in network.groups.refused
    assert network.features is not None
    assert network.features.coefficient is None
    assert network.features.held is not None
    assert network.features.places("column 0").coefficient is None
    kernel = KernelRidge(alpha=1.0, kernel="rbf").fit(X, Y)
    machine = mismatch(uw.explain(kernel, X, Y), (XR, YR))
    assert machine.features is None
    assert machine.harmful.stand_out >= 1
    assert "equation 5 is not defined" in machine.no_features
    assert f"no features: {machine.no_features}" in str(machine)
    assert "(equation 5):" not in str(machine)


@pytest.mark.parametrize("width", [6, 7])
def test_a_frozen_head_holds_what_goes_into_the_network(width):
    """Also where there are as many features as inputs: features times derivatives by inputs would mean nothing."""
    torch.manual_seed(0)
    inputs = torch.randn(60, 6, dtype=torch.float64)
    inputs[:, 5] = 0
    labels = (inputs[:, 0] > 0).long()
    labels[:4] = 1 - labels[:4]
    network = torch.nn.Sequential(torch.nn.Linear(6, width), torch.nn.Tanh(), torch.nn.Linear(width, 2)).double().eval()
    settings = {"penalty": 0.01, "parameters": ["2.weight", "2.bias"], "loss": torch.nn.functional.cross_entropy}
    influence = uw.retrained(uw.explain(network, inputs, labels, **settings))
    on = (torch.randn(5, 6, dtype=torch.float64), torch.arange(5) % 2)
    effects = mismatch(influence, on).features
    assert effects is not None
    assert effects.coefficient is None
    g = influence.of_perturbing(effects.rows, on=on).mean(0)
    np.testing.assert_allclose(effects.held_by_row, inputs.numpy()[effects.rows] * g)
    assert effects.held[5] == 0
    assert effects.absolute[5] > 0
    row = int(effects.rows[0])
    moved = uw.edited(influence, [row], X_new=inputs[[row]] + torch.eye(6, dtype=torch.float64)[[5]])
    after = mismatch(moved, on, k=60).features
    assert after is not None
    g = moved.of_perturbing(after.rows, on=on).mean(0)
    now = inputs.numpy().copy()
    now[row, 5] += 1
    np.testing.assert_allclose(after.held_by_row, now[after.rows] * g)
    items = list(zip(inputs, labels, strict=True))
    unread = mismatch(uw.retrained(uw.explain(network, items_of(items), **settings)), on).features
    assert unread is not None
    np.testing.assert_allclose(unread.by_row, effects.by_row, rtol=1e-6, atol=1e-12)
    assert unread.held is None


def test_rows_of_a_dataset_hold_what_its_items_hold():
    items = items_of([(torch.from_numpy(x), torch.tensor(label)) for x, label in zip(X, Y, strict=True)])
    network = torch.nn.Linear(6, 2).double().eval()
    settings = {"loss": torch.nn.functional.cross_entropy, "penalty": 0.1}
    told = mismatch(uw.explain(network, items, **settings), (torch.from_numpy(XR), torch.from_numpy(YR)))
    plain = mismatch(
        uw.explain(network, torch.from_numpy(X), torch.from_numpy(Y), **settings),
        (torch.from_numpy(XR), torch.from_numpy(YR)),
    )
    assert told.features is not None
    assert plain.features is not None
    np.testing.assert_array_equal(told.features.rows, plain.features.rows)
    np.testing.assert_allclose(told.features.held_by_row, plain.features.held_by_row, rtol=1e-6)


def test_names_come_from_the_frame_and_the_pipeline():
    pandas = pytest.importorskip("pandas")
    frame = pandas.DataFrame(X, columns=NAMES)
    told = mismatch(uw.explain(fitted(frame), frame, Y), (pandas.DataFrame(XR, columns=NAMES), YR))
    assert told.features is not None
    assert told.features.names == ["size", "width", "kind"]
    raw = pandas.DataFrame({"size": X[:, 0], "kind": np.array(list("abcd"))[KIND]})
    queries = pandas.DataFrame({"size": XR[:, 0], "kind": ["d"] * 5})
    columns = ColumnTransformer([("one", OneHotEncoder(), ["kind"])], remainder="passthrough", sparse_threshold=0)
    model = make_pipeline(columns, LogisticRegression(tol=1e-10, max_iter=1000)).fit(raw, Y)
    piped = mismatch(uw.explain(model, raw, Y), (queries, YR)).features
    assert piped is not None
    assert piped.names == ["one__kind", "remainder__size"]
    assert piped.names[piped.top(1)[0]] == "one__kind"


def test_sparse_inputs_pictures_and_lassos():
    table = scipy.sparse.csr_matrix(X)
    told = mismatch(uw.explain(fitted(table), table, Y), (scipy.sparse.csr_matrix(XR), YR), feature_names=NAMES)
    dense = found()
    assert told.features is not None
    assert dense.features is not None
    np.testing.assert_allclose(told.features.held_by_row, dense.features.held_by_row, rtol=1e-6)
    torch.manual_seed(0)
    images, digits = torch.randn(20, 1, 4, 4), torch.arange(20) % 2
    network = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(16, 2)).eval()
    seen = mismatch(
        uw.explain(network, images, digits, loss=torch.nn.functional.cross_entropy, penalty=0.1),
        (images[:2], digits[:2]),
    )
    assert seen.features is not None
    assert len(seen.features.names) == 16
    lasso = Lasso(alpha=0.05).fit(X[:, :2] @ np.ones((2, 6)) * [1, 1, 0, 0, 0, 0] + X, Y)
    sparse = uw.explain(lasso, X[:, :2] @ np.ones((2, 6)) * [1, 1, 0, 0, 0, 0] + X, Y)
    active = mismatch(sparse, (XR, YR))
    assert active.features is not None
    assert len(active.features.names) == 6
    if (lasso.coef_ == 0).any():
        assert active.features.coefficient is None


def test_one_hot_groups_asks_the_data():
    names = ["n_a", "n_b", "drug_x", "drug_y", "both_x", "both_y", "single", "flag_yes"]
    table = np.array([[3, 1, 0, 1, 1, 1, 0, 1], [1, 0, 1, 0, 0, 1, 1, 0], [0, 1, 0, 0, 1, 0, 1, 0]])
    expected = {"n_a": [0], "n_b": [1], "drug": [2, 3], "both_x": [4], "both_y": [5], "single": [6], "flag_yes": [7]}
    assert one_hot_groups(table, names) == expected
    assert one_hot_groups(scipy.sparse.csr_matrix(table), names) == expected
    refuses(lambda: one_hot_groups(table, names[1:]), ValueError, "7 names")


def test_what_it_says_and_json():
    told = found(groups=KIND)
    text = str(told)
    assert f"row {told.harmful.rows[0]:>7}  {told.harmful.values[0]:+.4g}" in text
    assert "3 rows stand out" in text
    assert "kind: of what they hold" in text
    assert "3 (4 rows): first order" in text
    numbers = json.loads(json.dumps(told.to_dict(), default=str))
    assert numbers["harmful"]["rows"] == told.harmful.rows.tolist()
    assert numbers["features"]["features"][0]["name"] == "kind"
    assert len(numbers["groups"]["groups"]) == 4


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"k": 0}, "k=0"),
        ({"feature_names": ["a"]}, "1 feature names, and an input has 6"),
        ({"feature_groups": {"a": ["nothing"]}}, "columns that do not exist"),
        ({"feature_groups": {"a": [9]}}, "columns that do not exist"),
        ({"feature_groups": {"a": [1], "b": [1, 2]}}, "'width' twice"),
        ({"groups": ["a"]}, "groups has shape"),
    ],
)
def test_what_cannot_be_used_is_refused(settings, message):
    influence = uw.explain(fitted(), X, Y)
    refuses(lambda: mismatch(influence, (XR, YR), **{"feature_names": NAMES} | settings), ValueError, message)


def test_unknown_names_and_rows_are_refused():
    effects = found().features
    assert effects is not None
    refuses(lambda: effects.places("nothing"), ValueError, "no feature 'nothing'")
    refuses(lambda: effects.of([0, 239]), ValueError, "features were computed for rows")


def repeating(width=4, **settings):
    """30 rows whose column 3 repeats column 0, and three queries; in query 1 it does not."""
    draw = np.random.default_rng(0)
    x = draw.normal(size=(30, 3))
    y = x @ [1.0, 2.0, 0.0] + draw.normal(size=30)
    x, xq = np.c_[x, x[:, 0]], np.array([[1.0, 2.0, 3.0, 1.0], [1.0, 2.0, 3.0, 0.0], [0.0, 1.0, 0.0, 0.0]])
    model = Ridge(**settings) if settings else LinearRegression()
    return uw.explain(model.fit(x[:, :width], y), x[:, :width], y), (xq[:, :width], np.array([0.0, 1.0, 2.0]))


@pytest.mark.filterwarnings("ignore::upweight.errors.TheoryWarning")
def test_queries_without_a_value_are_left_out_and_told():
    influence, (xq, yq) = repeating()
    told, known = (mismatch(influence, on, groups=np.arange(30) % 3) for on in ((xq, yq), (xq[[0, 2]], yq[[0, 2]])))
    assert told.left_out.tolist() == [1]
    assert known.left_out.tolist() == []
    for side in ("harmful", "helpful"):
        np.testing.assert_array_equal(getattr(told, side).rows, getattr(known, side).rows)
        np.testing.assert_allclose(getattr(told, side).values, getattr(known, side).values)
    np.testing.assert_allclose(told.loss, known.loss)
    np.testing.assert_allclose(told.features.by_row, known.features.by_row)
    np.testing.assert_allclose(told.groups.newton, known.groups.newton)
    said = str(told).splitlines()[1]
    assert said.startswith("1 of 3 queries has no value and is left out: query 1. The training rows do not determine")
    assert "left out: query" not in str(known)
    numbers = told.to_dict()
    assert (numbers["queries"], numbers["left_out"]) == (2, [1])
    first = mismatch(influence, (xq[[1, 0, 2]], yq[[1, 0, 2]]))  # the first query has no value
    np.testing.assert_allclose(first.features.by_row, known.features.by_row)
    dropped, on = repeating(width=3)
    assert mismatch(dropped, on).left_out.tolist() == []
    penalised, on = repeating(alpha=0.1)
    assert mismatch(penalised, on).left_out.tolist() == []


@pytest.mark.filterwarnings("ignore::upweight.errors.TheoryWarning")
def test_features_without_a_derivative_are_left_out_and_told():
    influence, on = repeating()
    effects = mismatch(influence, on).features
    assert effects is not None
    assert effects.undetermined == [0, 3]
    assert effects.top(4) == effects.top(2) == [1, 2]
    assert (effects.places("column 0").absolute, effects.places("column 1").absolute) == (None, 1)
    assert "nan" not in str(mismatch(influence, on))
    assert "left out: column 0, column 3. The columns repeat" in str(mismatch(influence, on))
    assert [each["name"] for each in effects.to_dict()["features"]] == [f"column {j}" for j in (1, 2, 0, 3)]
    dropped, on = repeating(width=3)
    assert mismatch(dropped, on).features.undetermined == []
