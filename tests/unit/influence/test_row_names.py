"""A value belongs to the row of its name: whatever is asked, kept and shown, and in whatever order rows come."""

from __future__ import annotations

import pickle
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.kernel_ridge import KernelRidge
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch.nn.functional import cross_entropy

import upweight as uw
from small import NAMES, YQ, N, X, Y, Z, made, net, refuses
from upweight.influence.scores import Scores
from upweight.runs.files import read_tensors, write_tensors

FRAME = pd.DataFrame(X, columns=list("abc"), index=pd.Index([f"patient {row}" for row in range(N)], name="patient"))
LABELS, TARGETS = pd.Series(Y, index=FRAME.index), pd.Series(Z, index=FRAME.index)
XQ, ZQ = FRAME[:4] + 0.1, TARGETS[:4] + 1
FISHER = uw.operators.EmpiricalFisher()
ORDER = np.random.default_rng(3).permutation(N)


def ridge(order=slice(None), frame=FRAME, model=None):
    X, y = frame.iloc[order], TARGETS.iloc[order]
    return uw.explain((model or Ridge(alpha=2.0)).fit(X, y), X, y)


def module(order=slice(None), model=None, **settings):
    X, y = FRAME.iloc[order], LABELS.iloc[order]
    return uw.explain(model or net(), X, y, loss=cross_entropy, penalty=0.1, damping=0.1, **settings)


def head(order=slice(None)):
    return module(order, net(), parameters=["2.weight", "2.bias"])


def own_loss(order=slice(None)):
    objective = uw.Objective(lambda params, example: (params @ example[0] - example[1]) ** 2, np.ones(3), penalty=0.1)
    X, y = FRAME.iloc[order], TARGETS.iloc[order]
    return uw.Influence(objective, (X.to_numpy(), y.to_numpy()), ids=X.index, curvature=FISHER, damping=0.1)


def on_loss(influence):
    classes = influence.objective.name.startswith("Sequential")
    return influence.on_loss(XQ, pd.Series(YQ, index=XQ.index) if classes else ZQ)


MODELS = {
    "ridge": ridge,
    "pipeline": lambda order=slice(None): ridge(order, model=make_pipeline(StandardScaler(), Ridge(alpha=2.0))),
    "kernel": lambda order=slice(None): ridge(order, model=KernelRidge(kernel="rbf")),
    "module": module,
    "head": head,
    "own loss": own_loss,
    "edited": lambda order=slice(None): uw.edited(
        one := ridge(order), [place(one, "patient 5")], FRAME.loc[["patient 5"]] + 1, [0.5]
    ),
    "retrained": lambda order=slice(None): uw.retrained(
        one := ridge(order), without=[place(one, "patient 5"), place(one, "patient 7")]
    ),
    "checkpoint": lambda order=slice(None): uw.checkpoints(
        net(), [net().state_dict()], FRAME.iloc[order], LABELS.iloc[order], loss=cross_entropy, damping=0.1
    )[0],
}


def place(influence, name):
    """Where the row of this name is."""
    return int(np.flatnonzero(influence.examples.ids == name)[0])


@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
def test_a_name_has_the_same_value_in_whatever_order_rows_come(make):
    """The oracle: the same model on the same rows in another order, where positions are others and names are not."""
    straight, shuffled = make(), make(ORDER)
    assert shuffled.examples.ids.tolist() == FRAME.index[ORDER].tolist()
    one, other = on_loss(straight).to_pandas(), on_loss(shuffled).to_pandas()
    assert one.columns.tolist() == FRAME.index.tolist()
    assert one.columns.name == "patient"
    assert one.index.tolist() == XQ.index.tolist()
    pd.testing.assert_frame_equal(one, other[one.columns], rtol=1e-5, atol=1e-9)
    a, b = straight.of_self(), shuffled.of_self()
    np.testing.assert_allclose(pd.Series(a.values, a.ids), pd.Series(b.values, b.ids)[a.ids], rtol=1e-5, atol=1e-9)


QUESTIONS = {
    "on_loss": lambda one, rows: one.on_loss(XQ, ZQ),
    "blocks": lambda one, rows: Scores.joined(list(one.on_loss_in_blocks(XQ, ZQ, size=3))),
    "of_replacing": lambda one, rows: one.of_replacing(rows, FRAME.iloc[:3], TARGETS.iloc[:3], on=(XQ, ZQ)),
    "of_relabeling": lambda one, rows: one.of_relabeling(rows, [1.0, 1.0, 1.0], on=(XQ, ZQ)),
    "of_removing": lambda one, rows: one.of_removing(rows, on=(XQ, ZQ)),
    "ensemble": lambda one, rows: uw.ensemble([one, one]).on_loss(XQ, ZQ),
    "damping path": lambda one, rows: one.damping_path(XQ, ZQ, dampings=[0.1]).every[0],
    "TracIn": lambda one, rows: uw.TracIn([one], [0.1]).on_loss(XQ, ZQ),
    "dot products": lambda one, rows: uw.baselines.gradient_dot(one, XQ, ZQ),
    "relative": lambda one, rows: uw.baselines.relative_influence(one, XQ, ZQ),
}


@pytest.mark.parametrize("ask", QUESTIONS.values(), ids=QUESTIONS)
def test_names_and_numbers_of_every_question_agree(ask):
    influence = ridge(ORDER)
    scores = ask(influence, [9, 2, 30])
    X = FRAME.iloc[ORDER]
    assert X.index[scores.rows].tolist() == scores.ids.tolist()
    assert scores.query_ids.tolist() == XQ.index.tolist()
    assert scores.axes == ("patient", "patient")
    assert scores.to_pandas().index.tolist() == XQ.index.tolist()
    for top in (scores.helpful(3), scores.harmful(3)):
        assert np.array_equal(X.index.to_numpy()[top.rows], top.ids)


def test_self_scores_of_some_rows_have_their_names():
    influence = ridge(ORDER)
    for scores in (influence.of_self([9, 2]), uw.TracIn([influence], [0.1]).of_self([9, 2])):
        assert scores.ids.tolist() == FRAME.index[ORDER][[9, 2]].tolist()
        assert scores.axis == "patient"
    assert uw.ensemble([influence, influence]).of_self().ids.tolist() == FRAME.index[ORDER].tolist()


def test_groups_and_added_examples_have_names_of_their_own():
    influence, on = ridge(), (XQ, ZQ)
    groups = {"north": [1, 2], "south": [4]}
    assert influence.of_groups(groups, on=on).ids.tolist() == ["north", "south"]
    assert influence.of_removing(groups, on=on).ids.tolist() == ["north", "south"]
    assert uw.ensemble([influence]).of_groups(groups, on=on).to_pandas().columns.tolist() == ["north", "south"]
    assert influence.of_groups(groups, on=on).to_pandas().columns.name == "group"
    assert influence.of_groups(list(groups.values()), on=on).ids is None
    assert influence.of_removing([[1, 2], [4]], on=on).ids is None
    added = influence.of_adding(FRAME[:2].set_axis(["new", "newer"]), ZQ[:2].to_numpy(), on=on)
    assert added.ids.tolist() == ["new", "newer"]


def test_members_that_name_their_rows_otherwise_are_refused():
    other = FRAME.set_axis(FRAME.index[::-1])
    member = uw.explain(Ridge(alpha=2.0).fit(other, Z), other, Z)
    refuses(lambda: uw.ensemble([ridge(), member]), ValueError, "the name of row 0 is 'patient 39', not 'patient 0'")
    assert uw.ensemble([ridge(), uw.explain(Ridge(alpha=2.0).fit(X, Z), X, Z)]).on_loss(XQ, ZQ).ids is not None


def test_blocks_of_other_names_are_not_joined():
    one = made(ids=np.array(list("abcde")))
    refuses(lambda: Scores.joined([one, made(ids=np.array(list("abced")))]), ValueError, "do not stand for the same")
    assert Scores.joined([one, one]).ids.tolist() == list("abcde")


# ---- kept and read again -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "index",
    [
        FRAME.index,
        FRAME.index[ORDER].rename(None),
        pd.MultiIndex.from_product([["a", "b"], range(20)], names=["ward", "bed"]),
        pd.date_range("2024-01-01", periods=N, name="day"),
        pd.Index(np.arange(N) * 7 + 1000, name="number"),
    ],
    ids=["text", "unnamed", "levels", "days", "numbers"],
)
def test_a_file_keeps_names_and_they_find_the_rows(index, tmp_path):
    frame = FRAME.set_axis(index)
    scores = uw.explain(Ridge(alpha=2.0).fit(frame, Z), frame, Z).on_loss(frame[:4], Z[:4])
    scores.save(tmp_path / "scores")
    found = Scores.load(tmp_path / "scores")
    found.save(tmp_path / "again")
    assert (tmp_path / "again").read_bytes() == (tmp_path / "scores").read_bytes()
    for kept in (found, pickle.loads(pickle.dumps(scores))):
        assert kept.axes == scores.axes
        assert kept.query_ids.tolist() == scores.query_ids.tolist()
        pd.testing.assert_frame_equal(kept.to_pandas(), scores.to_pandas())
        assert [frame.loc[name].tolist() for name in kept.ids] == X.tolist()
    assert found.to_pandas().columns.equals(index)
    assert found.to_pandas().columns.names == ["id" if name is None else name for name in index.names]


def test_a_file_without_names_is_read_as_before(tmp_path):
    made().save(tmp_path / "scores")
    arrays, card = read_tensors(tmp_path / "scores")
    del card["axes"]
    write_tensors(tmp_path / "old", arrays, card)
    found = Scores.load(tmp_path / "old")
    assert (found.ids, found.query_ids, found.axes) == (None, None, ("query", "row"))
    assert np.array_equal(found.values, made().values)


# ---- tables of rows ----------------------------------------------------------------------------------------------


def test_the_table_has_the_strongest_rows_beside_what_they_are():
    influence = ridge(ORDER)
    scores = influence.on_loss(XQ[:2], ZQ[:2])
    table = scores.top(3, data=FRAME.iloc[ORDER])
    assert table.index.name == "patient"
    assert table.columns.tolist() == ["query", "row", "value", "a", "b", "c"]
    for query in XQ.index[:2]:
        values = scores.to_pandas().loc[query]
        own = table[table["query"] == query]
        assert own.index.tolist() == values.abs().sort_values(ascending=False).index[:3].tolist()
        assert own["value"].tolist() == values[own.index].tolist()
        pd.testing.assert_frame_equal(own[["a", "b", "c"]], FRAME.loc[own.index])
        assert FRAME.index[ORDER][own["row"]].tolist() == own.index.tolist()


@pytest.mark.parametrize("make", [lambda: ridge(ORDER).on_loss(XQ[:1], ZQ[:1]), lambda: ridge(ORDER).of_self()])
def test_data_in_another_order_are_looked_up_by_name(make):
    scores, mixed = make(), FRAME.sample(frac=1, random_state=0)
    pd.testing.assert_frame_equal(scores.top(5, data=mixed), scores.top(5, data=FRAME.iloc[ORDER]))
    pd.testing.assert_frame_equal(
        scores.top(5, data=FRAME.iloc[ORDER].reset_index(drop=True)), scores.top(5, data=FRAME.iloc[ORDER])
    )


@pytest.mark.parametrize(
    ("data", "columns"),
    [
        (FRAME.a, ["a"]),
        (FRAME.a.rename(None), ["data"]),
        (X, [0, 1, 2]),
        (Z, ["data"]),
        (NAMES.tolist(), ["data"]),
        (torch.from_numpy(X), [0, 1, 2]),
        (X.reshape(N, 3, 1), ["data"]),
    ],
    ids=["Series", "unnamed", "array", "vector", "list", "tensor", "pictures"],
)
def test_data_may_be_anything_with_a_line_for_each_row(data, columns):
    table = ridge().on_loss(XQ, ZQ).top(2, data=data)
    assert table.columns.tolist()[3:] == columns
    for row, shown in zip(table["row"], table[columns[0]], strict=True):
        expected = data.iloc[row] if hasattr(data, "iloc") else data[row]
        assert np.array_equal(np.ravel(expected)[:1], np.ravel(shown)[:1])


def test_data_of_polars():
    polars = pytest.importorskip("polars")
    frame = polars.DataFrame({"a": X[:, 0], "name": NAMES.tolist()})
    table = ridge().on_loss(XQ, ZQ).top(2, data=frame)
    assert table["a"].tolist() == X[table["row"], 0].tolist()
    assert table["name"].tolist() == NAMES[table["row"]].tolist()
    assert (
        ridge().of_self().top(2, data=frame["name"])["name"].tolist() == NAMES[ridge().of_self().top(2).rows].tolist()
    )


def test_without_names_the_index_are_row_numbers():
    table = made().top(2, data=np.arange(40))
    assert table.index.name == "row"
    assert table.index.tolist() == table["data"].tolist() == [14, 11, 14, 10]
    assert table.columns.tolist() == ["query", "value", "data"]
    assert made().top(2).columns.tolist() == ["query", "value"]


def test_groups_and_added_examples_are_described_by_lines_of_their_own():
    influence, on = ridge(), (XQ[:1], ZQ[:1])
    groups = influence.of_groups([[1, 2], [4], [5]], on=on)
    strongest = np.argsort(-np.abs(groups.values[0]))[:2]
    assert groups.top(2, data=["x", "y", "z"])["data"].tolist() == np.array(["x", "y", "z"])[strongest].tolist()
    refuses(lambda: groups.top(2, data=FRAME), ValueError, "40 lines, and there are 3 rows")
    assert len(influence.of_adding(FRAME[:3], Z[:3], on=on).top(2, data=FRAME[:3])) == 2


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (FRAME[:-1], "39 lines, and there are 40 rows"),
        (Z[:-1], "39 lines"),
        (3, "is a int, and there are 40 rows"),
        ("text", "is a str"),
        (dict.fromkeys(range(N)), "is a dict"),
    ],
)
def test_data_that_do_not_describe_the_rows_are_refused(data, text):
    refuses(lambda: ridge().on_loss(XQ, ZQ).top(2, data=data), ValueError, text)
    refuses(lambda: ridge().of_self().top(2, data=data), ValueError, text)


def test_data_of_other_names_are_refused_and_the_remedy_works():
    scores, other = ridge().on_loss(XQ[:1], ZQ[:1]), FRAME.set_axis([f"other {row}" for row in range(N)])
    refuses(
        lambda: scores.top(2, data=other), ValueError, r"no row named 'patient \d+': its index starts with 'other 0'"
    )
    expected = scores.top(2, data=FRAME)
    pd.testing.assert_frame_equal(scores.top(2, data=other.reset_index(drop=True)), expected)


def test_a_column_that_the_table_has_itself_is_refused_and_the_remedy_works():
    scores, data = ridge().on_loss(XQ[:1], ZQ[:1]), FRAME.rename(columns={"a": "value"})
    refuses(lambda: scores.top(2, data=data), ValueError, "a column 'value'")
    assert "data_value" in scores.top(2, data=data.add_prefix("data_"))


def test_a_top_unpacks_as_rows_and_values():
    top = ridge().on_loss(XQ, ZQ).helpful(3)
    rows, values = top
    assert rows is top.rows
    assert values is top.values
    again = pickle.loads(pickle.dumps(top))
    assert np.array_equal(again.ids, top.ids)


def test_the_statistician_s_table_is_by_name():
    frame = ridge(ORDER).summary_frame()
    assert frame.index.equals(FRAME.index[ORDER])
    assert frame.index.name == "patient"
    pd.testing.assert_frame_equal(frame.loc[FRAME.index], ridge().summary_frame(), rtol=1e-6)


# ---- printing ----------------------------------------------------------------------------------------------------

MANY = 5000  # and 900 queries, whose numbers NumPy would print


def many():
    draw = np.random.default_rng(0)
    frame = pd.DataFrame(draw.normal(size=(MANY, 3)), index=[f"<row {row}>" for row in draw.permutation(MANY)])
    y = (frame[0] + draw.normal(size=MANY) > 0).astype(int)
    return uw.explain(LogisticRegression(tol=1e-8).fit(frame, y), frame, y), frame, y


def test_what_is_printed_of_many_rows_is_short_and_names_them():
    influence, frame, y = many()
    on = (frame[:900], y[:900])
    scores = influence.on_loss(*on)
    groups = {name: [row] for row, name in enumerate(frame.index)}
    outcomes = uw.leave_one_out(influence, on, [1, 2])
    results = [
        scores,
        scores.helpful(200),
        influence.of_self(),
        influence.of_self().top(4000),
        uw.extremes([scores], 200),
        influence.of_groups(groups, on=on),
        influence.damping_path(*on, dampings=[0.1]),
        influence,
        influence.examples,
        influence.check(on),
        outcomes,
        uw.agreement(scores, outcomes),
        scores.certificate,
        uw.predict(influence, frame),
        uw.apps.understand(influence, on),
        (found := uw.apps.mismatch(influence, on, groups=np.arange(MANY) // 10, k=4000)),
        found.harmful,
        found.groups,
        found.features,
        (repair := uw.apps.repair(influence, inspect=1.0)),
        uw.apps.corrected(influence, dict(list(repair.suggestions().items())[:500])),
        (leading := influence.leading(*on, k=200)),
    ]
    for result in results:
        for text in (str(result), repr(result), getattr(result, "_repr_html_", str)()):
            assert len(text.split("</style>")[-1]) < 6000, type(result)
            assert len(text.splitlines()) <= 50, type(result)
    assert all(len(repr(result).splitlines()) <= 3 for result in results[:9])
    first = frame.index[int(scores.values[0].argmax())]
    for shown in (scores, results[4], leading):
        assert f"{first} ({scores.values[0].max():+.3g})" in str(shown)
        assert first.replace("<", "&lt;").replace(">", "&gt;").replace(" ", "&nbsp;") in shown._repr_html_()
        assert "<row" not in shown._repr_html_()
    assert "… and 895 more queries" in str(scores)


def test_long_names_are_cut():
    scores = made(ids=np.array(["word " * 1000 + str(row) for row in range(5)], dtype=object))
    assert "word word word word word word w…" in str(scores)
    assert len(str(scores)) < 2000
    assert len(str(replace(scores, query_ids=np.array(["a\nb" * 1000, "c"], dtype=object))).splitlines()) == 5
