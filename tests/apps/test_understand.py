"""What an answer rests on: against distances and sums by hand, and on models whose answer is known."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.sparse
import scipy.stats
import torch
from sklearn.datasets import load_iris, make_moons
from sklearn.linear_model import LinearRegression, LogisticRegression, Ridge
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.svm import SVC
from torch import nn

import upweight as uw
from upweight.apps import pictures

X, Y = load_iris(return_X_y=True)
NAMES = np.array(["setosa", "versicolor", "virginica"])[Y]
ON = (X[[70, 3]], NAMES[[70, 3]])


@pytest.fixture(scope="module")
def influence():
    model = make_pipeline(StandardScaler(), LogisticRegression(tol=1e-10, max_iter=1000)).fit(X, NAMES)
    return uw.explain(model, X, NAMES)


@pytest.fixture(scope="module")
def found(influence):
    return uw.apps.understand(influence, ON, X=X)


def test_rows_and_values_are_those_of_on_loss(influence, found):
    values = influence.on_loss(*ON).values
    for query in range(2):
        order = np.argsort(values[query])
        assert found.helpful(query).rows.tolist() == order[::-1][:5].tolist()
        assert found.harmful(query).rows.tolist() == order[:5].tolist()
        np.testing.assert_allclose(found.helpful(query).values, values[query, order[::-1][:5]], atol=0)
        assert found.helpful(query).labels.tolist() == NAMES[order[::-1][:5]].tolist()
    assert found.predicted.tolist() == ["virginica", "setosa"]
    assert found.targets.tolist() == ["versicolor", "setosa"]


def test_distances_are_euclidean_in_inputs_and_in_features(influence, found):
    expected = np.linalg.norm(ON[0][:, None] - X[None], axis=2)
    np.testing.assert_allclose(found.distances, expected, atol=1e-6)
    assert found.distances[0, 70] == 0
    scaled = StandardScaler().fit(X)
    inside = np.linalg.norm(scaled.transform(ON[0])[:, None] - scaled.transform(X)[None], axis=2)
    np.testing.assert_allclose(found.feature_distances, inside, atol=1e-6)
    np.testing.assert_allclose(uw.apps.understand(influence, ON).distances, inside, atol=1e-6)


def test_locality_is_spearman_and_half_counts_rows(found):
    values = np.abs(found.scores.values)
    for query in range(2):
        expected = scipy.stats.spearmanr(values[query], found.distances[query])[0]
        assert found.locality[query] == pytest.approx(expected)
        sizes = np.sort(values[query])[::-1]
        count = found.half[query]
        assert sizes[:count].sum() >= sizes.sum() / 2 > sizes[: count - 1].sum()


def test_class_shares_and_the_first_row_of_another_class(found):
    values = found.scores.values[0]
    order = np.argsort(-values, kind="stable")
    rank = found.first_of_another_class(0)
    assert rank is not None
    assert NAMES[order[rank - 1]] != "versicolor"
    assert (NAMES[order[: rank - 1]] == "versicolor").all()
    helpful, harmful = found.same_class(0, 10)
    assert helpful == (NAMES[order[:10]] == "versicolor").mean()
    assert harmful == (NAMES[order[::-1][:10]] == "versicolor").mean()


def test_a_kernel_machine_looks_near_and_a_line_does_not():
    inputs, labels = make_moons(300, noise=0.15, random_state=0)
    asked = (inputs[:40], labels[:40])
    with pytest.warns(uw.errors.TheoryWarning):
        kernel = uw.explain(SVC(gamma=8.0, C=1.0).fit(inputs, labels), inputs, labels, loss=uw.losses.smooth_hinge(0.1))
    line = uw.explain(LogisticRegression(tol=1e-10).fit(inputs, labels), inputs, labels)
    pair = uw.apps.side_by_side(
        {
            "kernel": uw.apps.understand(kernel, asked, X=inputs),
            "line": uw.apps.understand(line, asked, X=inputs),
        }
    )
    assert np.nanmean(pair.first.locality) < np.nanmean(pair.second.locality) - 0.2
    assert np.median(pair.first.half) < np.median(pair.second.half)
    assert "kernel" in str(pair)
    assert -1 <= pair.agreement.min() <= pair.agreement.max() <= 1
    same = uw.apps.side_by_side({"a": pair.first, "b": pair.first})
    np.testing.assert_allclose(same.agreement, 1)
    np.testing.assert_allclose(same.shared(), 1)


def test_a_frozen_network_has_distances_of_pictures_and_of_features():
    torch.manual_seed(0)
    pictures_ = torch.rand(30, 1, 6, 6)
    labels = torch.arange(30) % 2
    net = nn.Sequential(nn.Conv2d(1, 3, 3), nn.ReLU(), nn.Flatten(), nn.Linear(48, 2)).eval()
    settings = {"loss": nn.functional.cross_entropy, "penalty": 0.1, "parameters": ["3.weight", "3.bias"]}
    influence = uw.explain(net, pictures_, labels, **settings)
    found = uw.apps.understand(influence, (pictures_[:3], labels[:3]), X=pictures_)
    flat = pictures_.reshape(30, -1).double()
    np.testing.assert_allclose(found.distances, torch.cdist(flat[:3], flat), atol=1e-5)
    inside = net[:3](pictures_).detach().double()
    np.testing.assert_allclose(found.feature_distances, torch.cdist(inside[:3], inside), atol=1e-4)


def test_sparse_inputs_and_regressions():
    sparse = scipy.sparse.csr_matrix(X)
    target = X[:, 0] * 2 + 1
    dense = uw.apps.understand(uw.explain(Ridge().fit(X, target), X, target), (X[:2], target[:2]))
    found = uw.apps.understand(
        uw.explain(Ridge().fit(sparse, target), sparse, target), (sparse[:2], target[:2]), X=sparse
    )
    np.testing.assert_allclose(found.distances, dense.distances, atol=1e-6)
    assert found.labels is None
    assert found.predicted is None
    with pytest.raises(uw.errors.InvalidInput, match="no classes"):
        found.first_of_another_class()
    with pytest.raises(uw.errors.InvalidInput, match="no classes"):
        found.same_class()
    assert "Query 0" in str(found)


def test_what_is_refused(influence, found):
    with pytest.raises(uw.errors.InvalidInput, match="pair"):
        uw.apps.understand(influence, (X[:3], X[:3], X[:3]))
    with pytest.raises(uw.errors.InvalidInput, match="one form"):
        uw.apps.understand(influence, ON, X=X[:20])
    with pytest.raises(uw.errors.InvalidInput, match="numbers"):
        uw.apps.understand(influence, ON, X=X[:, :2])
    with pytest.raises(uw.errors.RowOutOfRange):
        found.helpful(2)
    with pytest.raises(uw.errors.InvalidInput, match="two"):
        uw.apps.side_by_side({"one": found})
    with pytest.raises(uw.errors.InvalidInput, match="same"):
        uw.apps.side_by_side({"one": found, "two": uw.apps.understand(influence, (X[:1], NAMES[:1]))})


def test_the_numbers_and_the_picture(found):
    numbers = found.to_dict()["queries"][0]
    assert numbers["predicted"] == "virginica"
    assert numbers["helpful"][0]["row"] == found.helpful(0).rows[0]
    assert numbers["rows_with_half_of_the_influence"] == found.half[0]
    ax = pictures.influence_against_distance(found, 0)
    assert sum(len(dots.get_offsets()) for dots in ax.collections) >= len(X)
    assert ax.get_xlabel()


@pytest.mark.filterwarnings("ignore::upweight.errors.TheoryWarning")
def test_queries_without_a_value_are_left_out_and_told():
    draw = np.random.default_rng(0)
    x = draw.normal(size=(30, 3))
    y = x @ [1.0, 2.0, 0.0] + draw.normal(size=30)
    x, xq = np.c_[x, x[:, 0]], np.array([[1.0, 2.0, 3.0, 1.0], [1.0, 2.0, 3.0, 0.0], [0.0, 1.0, 0.0, 0.0]])
    asked = (xq, np.array([0.0, 1.0, 2.0]))
    influence = uw.explain(LinearRegression().fit(x, y), x, y)
    found = uw.apps.understand(influence, asked)
    known = uw.apps.understand(influence, (xq[[0, 2]], asked[1][[0, 2]]))
    assert found.left_out.tolist() == [1]
    assert known.left_out.tolist() == []
    text = str(found)
    assert "Query 1" not in text
    assert "nan" not in text
    assert text.splitlines()[-1].startswith("1 of 3 queries has no value and is left out: query 1. The training rows")
    assert "left out" not in str(known)
    assert [each["query"] for each in found.to_dict()["queries"]] == [0, 2]
    assert found.to_dict()["left_out"] == [1]
    pair = uw.apps.side_by_side({"a": found, "b": found})
    assert str(pair).splitlines()[0].startswith("2 queries (of 3: the others have no value")
    assert f"in {np.median(known.half):.0f} rows" in str(pair)
    dropped = uw.explain(LinearRegression().fit(x[:, :3], y), x[:, :3], y)
    assert uw.apps.understand(dropped, (xq[:, :3], asked[1])).left_out.tolist() == []
