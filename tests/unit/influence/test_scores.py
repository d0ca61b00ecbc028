"""Order, ties, signs, and what a file and a table keep."""

from __future__ import annotations

from dataclasses import fields, replace

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, strategies as st

import upweight as uw
from small import (
    CARD,
    NAMES,
    NAMESQ,
    ROWS,
    VALUES,
    XQ,
    YQ,
    ZQ,
    N,
    X,
    Z,
    classifier,
    fitted,
    logistic,
    made,
    refuses,
    ridge,
)
from upweight.influence.certificate import Certificate
from upweight.influence.scores import top_columns
from upweight.solvers import LiSSA

pytestmark = pytest.mark.filterwarnings("ignore:.*has not settled:upweight.errors.TheoryWarning")  # a short LiSSA


def test_helpful_is_largest_first_and_ties_go_to_the_lower_row():
    top = made().helpful(4)
    assert top.rows.tolist() == [[14, 10, 12, 13], [10, 11, 12, 13]]
    assert top.values.tolist() == [[2.0, 0.5, 0.5, 0.0], [0.0, 0.0, 0.0, 0.0]]


def test_harmful_is_smallest_first():
    top = made().harmful(3)
    assert top.rows.tolist() == [[11, 13, 10], [14, 10, 11]]
    assert top.values.tolist() == [[-1.0, 0.0, 0.5], [-3.0, 0.0, 0.0]]


@pytest.mark.parametrize("k", [5, np.int64(5)])
def test_all_columns_may_be_asked(k):
    assert sorted(made().helpful(k).rows[0].tolist()) == ROWS.tolist()


@given(st.integers(0, 2**16), st.integers(1, 50))
def test_the_top_is_a_stable_sort(seed, k):
    keys = np.random.default_rng(seed).integers(0, 6, size=(3, 50)) * 1.0
    assert np.array_equal(top_columns(keys, k), np.argsort(keys, axis=1, kind="stable")[:, :k])


def test_derivative_is_values_over_scale():
    assert np.array_equal(made().derivative, -40 * VALUES)


def test_finite_changes_have_no_derivative():
    scores = ridge().of_removing([0, 1], on=(XQ, ZQ))
    assert isinstance(refuses(lambda: scores.derivative, ValueError, "finite change"), uw.errors.Undefined)


def test_a_row_of_weight_zero_has_no_derivative_and_is_named():
    weights = np.ones(N)
    weights[7] = 0
    model = type(fitted("ridge"))(alpha=2.0).fit(X, Z, sample_weight=weights)
    influence = uw.explain(model, X, Z, sample_weight=weights)
    for scores in (influence.on_loss(XQ, ZQ), influence.of_self()):
        assert not np.atleast_2d(scores.values)[:, 7].any()
        refuses(lambda scores=scores: scores.derivative, ValueError, "Row 7 has sample weight 0")


MADE = {
    "on_loss": lambda: ridge().on_loss(XQ, ZQ),
    "strings": lambda: logistic().on_loss(XQ, NAMESQ),
    "LiSSA": lambda: ridge(solver=LiSSA(depth=300, repeats=3)).on_loss(XQ, ZQ),
    "of_removing": lambda: ridge().of_removing([3, 9], on=(XQ, ZQ)),
    "of_groups": lambda: ridge().of_groups([[3, 9], [1]], on=(XQ, ZQ)),
    "of_adding": lambda: ridge().of_adding(XQ, ZQ, on=(XQ, ZQ)),
    "module": lambda: classifier().on_loss(XQ, YQ),
    "measure": lambda: classifier().on_measure(_bias, XQ, YQ),
}


def _bias(params, example):
    return params["2.bias"][0] * example[0].sum()


@pytest.mark.parametrize("make", MADE.values(), ids=MADE)
def test_a_file_keeps_every_field(make, tmp_path):
    scores = make()
    scores.save(tmp_path / "scores.safetensors")
    same(uw.Scores.load(tmp_path / "scores.safetensors"), scores)
    uw.Scores.load(str(tmp_path / "scores.safetensors")).save(tmp_path / "again")
    assert (tmp_path / "again").read_bytes() == (tmp_path / "scores.safetensors").read_bytes()


def same(found, kept):
    for field in fields(kept):
        a, b = getattr(found, field.name), getattr(kept, field.name)
        if isinstance(b, Certificate):
            same(a, b)
        elif isinstance(b, np.ndarray):
            assert a.dtype == b.dtype
            assert np.array_equal(a, b, equal_nan=True)
        else:
            assert a == b or (a != a and b != b)
            assert type(a) is type(b)


def test_the_kinds_above_cover_every_field():
    stochastic, removing = MADE["LiSSA"](), MADE["of_removing"]()
    assert stochastic.standard_error is not None
    assert stochastic.error is None
    assert removing.standard_error is None
    assert removing.error is not None
    assert removing.scale is None
    assert MADE["measure"]().measure == "_bias"


def test_a_table_has_queries_as_lines_and_rows_as_columns():
    table = made().to_pandas()
    assert isinstance(table, pd.DataFrame)
    assert (table.index.name, table.columns.name) == ("query", "row")
    assert table.columns.tolist() == ROWS.tolist()
    assert np.array_equal(table.to_numpy(), VALUES)
    assert table.loc[0, 14] == 2.0


def test_notebook_tables_escape_what_users_name():
    page = made(measure="<script>", counterfactual="a & b", certificate=replace(CARD, solver="<b>"))._repr_html_()
    assert "<script>" not in page
    assert "&lt;script&gt;" in page
    assert "a &amp; b" in page
    assert "&lt;b&gt;" in page
    assert "14&nbsp;(+2)" in page


def test_notebook_tables_are_short():
    many = made(values=np.tile(VALUES, (10, 1)), certificate=CARD)._repr_html_()
    assert many.count("<tr>") == 6
    assert "15 more queries" in many
    narrow = made(values=VALUES[:, :1], rows=ROWS[:1], scale=None)._repr_html_()
    assert narrow.count("<tr>") == 3


def test_the_text_tells_sizes_meaning_and_trust():
    text = repr(made())
    assert text.startswith("Scores(2 queries × 5 columns: change of the query's loss, row removed; ")
    assert "residual ≤ 2.0e-09" in text
    assert "NOT converged" not in text
    assert "NOT converged" in repr(made(certificate=replace(CARD, converged=False)))
    assert "truncation bias ≤ 1.0%" in repr(made(certificate=replace(CARD, truncation=0.01)))


def test_joined_certificates_keep_the_worst():
    one, two = CARD, replace(CARD, converged=False, min_curvature=-0.2, sweeps=4)
    joined = Certificate.joined([one, two])
    assert joined.residual.tolist() == [1e-9, 2e-9] * 2
    assert (joined.converged, joined.min_curvature, joined.sweeps) == (False, -0.2, 7)


def test_joined_certificates_keep_the_largest_truncation():
    assert Certificate.joined([CARD, replace(CARD, truncation=0.3)]).truncation == 0.3


def test_self_scores_order_and_derivative():
    scores = ridge().of_self()
    top = scores.top(3)
    assert top.rows.tolist() == np.argsort(-scores.values, kind="stable")[:3].tolist()
    assert np.all(scores.values >= 0)
    np.testing.assert_allclose(scores.derivative, -N * scores.values)
    some = ridge().of_self([5, 2])
    assert some.rows.tolist() == [5, 2]
    np.testing.assert_allclose(some.values, scores.values[[5, 2]])
    assert repr(some).startswith("SelfScores(2 rows")


def test_the_order_of_queries_is_kept():
    forward, backward = logistic().on_loss(XQ, NAMESQ), logistic().on_loss(XQ[::-1], NAMESQ[::-1])
    np.testing.assert_allclose(forward.values[::-1], backward.values, rtol=1e-12)
    np.testing.assert_allclose(forward.query_values[::-1], backward.query_values)
    assert len(NAMES) == forward.values.shape[1]
