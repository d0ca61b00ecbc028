"""Which columns are one feature: every column in exactly one, under a name of its own."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.sparse
from sklearn.linear_model import LogisticRegression

import upweight as uw
from small import refuses
from upweight.apps import mismatch, one_hot_groups
from upweight.apps.columns import grouped_columns

DRAW = np.random.default_rng(0)
N = 50
KIND = np.eye(3)[DRAW.integers(0, 3, N)]
CODE = np.eye(5)[DRAW.integers(0, 5, N)]
NUMBER = DRAW.normal(size=(N, 1))


def whole(groups, names):
    """Every column once, and what grouped_columns makes of it has the same columns."""
    columns = grouped_columns(groups, list(names))
    assert sorted(j for own in groups.values() for j in own) == list(range(len(names)))
    assert sorted(int(j) for own in columns.values() for j in own) == list(range(len(names)))
    assert {name: own.tolist() for name, own in columns.items()} == groups
    return groups


def test_a_number_beside_the_categories_of_its_name_is_kept():
    names = ["income", "income_low", "income_mid", "income_high"]
    table = np.hstack([NUMBER, KIND])
    assert whole(one_hot_groups(table, names), names) == {"income": [0], "income_*": [1, 2, 3]}
    names = ["income_low", "income_mid", "income_high", "income", "income_*"]
    table = np.hstack([KIND, NUMBER, NUMBER])
    assert whole(one_hot_groups(table, names), names) == {"income_*2": [0, 1, 2], "income": [3], "income_*": [4]}


def test_several_blocks_of_one_prefix_are_features_of_their_own():
    names = ["c_a", "c_b", "x", "c_d", "c_e", "y", "c_f", "c_g"]
    table = np.hstack([CODE[:, :2], NUMBER, CODE[:, 2:4], NUMBER, KIND[:, :2]])
    expected = {"c": [0, 1], "x": [2], "c_*": [3, 4], "y": [5], "c_*2": [6, 7]}
    assert whole(one_hot_groups(table, names), names) == expected


def test_columns_of_one_name_stay_apart():
    names = ["a", "b_x", "a", "b_x", "b_y"]
    table = np.hstack([NUMBER, NUMBER, NUMBER, KIND[:, :2]])
    found = whole(one_hot_groups(table, names), names)
    assert list(found.values()) == [[0], [1], [2], [3, 4]]
    assert list(found)[:2] == ["a", "b_x"]
    assert found["a (column 2)"] == [2]
    columns = grouped_columns({"b": [3, 4]}, names)
    assert sorted(int(j) for own in columns.values() for j in own) == [0, 1, 2, 3, 4]
    refuses(lambda: grouped_columns({"first": ["a"]}, names), ValueError, "'a' is the name of 2 columns")


def test_names_of_features_do_not_clash():
    names = ["income", "income_low", "income_high"]
    refuses(lambda: grouped_columns({"income": [1, 2]}, names), ValueError, "'income' is also the name of column 0")
    assert list(grouped_columns({"income": [0, 1, 2]}, names)) == ["income"]
    refuses(lambda: grouped_columns({1: [0], "1": [1]}, names), ValueError, "two groups are called '1'")


def test_nothing_of_equation_5_is_lost():
    table = np.hstack([NUMBER, KIND])
    y = (KIND[:, 0] + 0.5 * NUMBER[:, 0] > 0.4).astype(int)
    influence = uw.explain(LogisticRegression(tol=1e-9).fit(table, y), table, y)
    names, on = ["income", "income_low", "income_mid", "income_high"], (table[:3], 1 - y[:3])
    alone = mismatch(influence, on, feature_names=names, feature_groups={}).features
    together = mismatch(influence, on, feature_names=names).features
    assert alone is not None
    assert together is not None
    assert together.names == ["income", "income_*"]
    assert together.absolute.sum() == pytest.approx(alone.absolute.sum())
    twice = mismatch(influence, on, feature_names=["a", "a", "b", "c"]).features
    assert twice is not None
    assert twice.absolute.sum() == pytest.approx(alone.absolute.sum())


@pytest.mark.parametrize("form", [scipy.sparse.csr_matrix, scipy.sparse.csc_matrix, scipy.sparse.coo_matrix])
def test_sparse_tables_give_the_same_and_stay_as_they_are(form):
    names = ["k_a", "k_b", "k_c", "n", "b_x", "b_y", "e_x", "e_y"]
    both = np.array([[1.0, 1.0]] + [[0.0, 1.0]] * (N - 1))
    table = np.hstack([KIND, NUMBER, both, 2 * KIND[:, :2]])
    sparse = form(table)
    if hasattr(sparse, "data"):
        sparse.data[0] = 0.0  # a zero that is stored
        table = sparse.toarray()
    stored = sparse.nnz
    assert one_hot_groups(sparse, names) == one_hot_groups(table, names)
    assert list(one_hot_groups(table, names)) == ["k", "n", "b_x", "b_y", "e_x", "e_y"]
    assert sparse.nnz == stored


def test_wide_sparse_text_takes_no_time_per_column():
    import time

    words = scipy.sparse.random(2000, 6000, 0.01, format="csr", random_state=0)
    words.data[:] = 1
    names = [f"w{j}" if j % 50 else f"w_{j}" for j in range(6000)]
    start = time.process_time()
    assert len(one_hot_groups(words, names)) == 6000
    assert time.process_time() - start < 0.5
